"""Rows of the sources to items: checked, encoded, cut to length, counted."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.data.encode import (
    Encoded,
    encode_conversation,
    encode_pair,
    encode_prompt,
    encode_steps,
    encode_text,
)
from rlhf_lightning.data.items import (
    Item,
    PairItem,
    PromptItem,
    RankedItem,
    ScoredItem,
    StepItem,
    TokenItem,
    UnpairedItem,
    compact,
)
from rlhf_lightning.data.records import check_record, content_strings, record_kind, split_prompt
from rlhf_lightning.data.report import DataReport
from rlhf_lightning.data.templates import check_messages, render
from rlhf_lightning.data.text import text_encoder
from rlhf_lightning.data.truncation import LengthRule, cut_prompt, prompt_length_of

TrainOn = Literal["answers", "last_answer", "all"]
Row = tuple[str, Mapping[str, Any]]
"""Where a record stands, and the record."""


@dataclass(frozen=True)
class Encoding:
    """How records become tokens; the same for all sources of a datamodule."""

    tokenizer: PreTrainedTokenizerBase
    batch_format: BatchFormat
    rule: LengthRule
    train_on: TrainOn = "answers"
    add_eos: bool = True
    parse_special_tokens: bool = False
    step_separator: str = "\n"
    skip_bad: bool = False


def build_items(
    rows: Iterable[Row], columns: Sequence[str], label: str, encoding: Encoding, report: DataReport
) -> list[Item]:
    """Items of all rows that can be used; what happens to the others is in the report.

    Args:
        rows: of one source.
        columns: that the source has.
        label: the source's name in messages.
        encoding: how to read them.
        report: counts here.
    """
    kind = record_kind(columns, encoding.batch_format, label)
    builder = _Builder(encoding, kind, report)
    items: list[Item] = []
    for place, record in rows:
        report.read += 1
        try:
            check_record(record, kind, place)
            made = list(builder.items(place, record))
        except UserError as error:
            if not encoding.skip_bad:
                raise UserError(str(error) if place in str(error) else f"{place}: {error}") from error
            report.leave_out("bad record", str(error) if place in str(error) else f"{place}: {error}")
            continue
        for item in made:
            report.kept += 1
            report.lengths += [len(row.ids) for row in item.rows()]
            report.trained += sum(int(np.sum(row.mask[1:])) for row in item.rows())  # the first is never predicted
        items += made
    return items


class _Builder:
    """One record at a time, for one source."""

    def __init__(self, encoding: Encoding, kind: Sequence[str], report: DataReport) -> None:
        self.encoding = encoding
        self.kind = kind
        self.report = report
        self.encoder = text_encoder(encoding.tokenizer)

    def items(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        """The items of a record: one, or none if it is left out, or several if a text is split."""
        if not self.encoding.parse_special_tokens and any(
            map(self.encoder.has_control, content_strings(record, self.kind))
        ):
            self.report.note("with control tokens spelt out in the text (they stay text)", place)
        return getattr(self, f"_{self.encoding.batch_format}")(place, record)

    def _tokens(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        encoding = self.encoding
        if "text" in self.kind:
            encoded = encode_text(
                encoding.tokenizer,
                record["text"],
                add_eos=encoding.add_eos,
                parse_controls=encoding.parse_special_tokens,
            )
            if encoding.rule.overlong == "split":
                pieces = encoding.rule.split(encoded)
                if len(pieces) > 1:
                    self.report.note("longer than max_length and split into pieces", place)
                yield from (TokenItem(compact(piece)) for piece in pieces if len(piece) > 1)
                return
        elif "messages" in self.kind:
            encoded = encode_conversation(
                encoding.tokenizer,
                record["messages"],
                add_eos=encoding.add_eos,
                only_last=encoding.train_on == "last_answer",
                tools=_tools(record),
            )
        else:
            encoded = self._pair(record, record["prompt"], record["completion"])
        prompt_length = prompt_length_of(encoded)
        if encoding.train_on == "all":
            encoded = Encoded(encoded.ids, [True] * len(encoded.ids))
        for (row,) in self._fit([encoded], prompt_length, place):
            yield TokenItem(row)

    def _pairs(self, place: str, record: Mapping[str, Any], gold: Any = None) -> Iterator[Item]:
        prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        if chosen == rejected:
            self.report.leave_out("chosen equals rejected", place)
            return
        if not prompt or (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
            prompt, chosen, rejected = split_prompt(chosen, rejected)
            if not (chosen and rejected):
                raise UserError(f"{place}: one of chosen and rejected is empty behind the prompt they share")
            gold = None if gold is None else _behind(prompt, gold, place)
        answers = [self._pair(record, prompt, it) for it in (chosen, rejected, gold) if it is not None]
        for rows in self._fit(answers, min(map(prompt_length_of, answers)), place):
            if list(rows[0].ids) == list(rows[1].ids):
                self.report.leave_out("chosen equals rejected once both are cut to max_length", place)
                return
            margin = record.get("margin")
            yield PairItem(rows[0], rows[1], None if margin is None else float(margin), *rows[2:])

    def _triples(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        yield from self._pairs(place, record, record["gold"])

    def _ranked(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        if len(set(record["ranks"])) == 1:
            self.report.leave_out("all ranks are equal", place)
            return
        answers = [self._pair(record, record["prompt"], answer) for answer in record["completions"]]
        for rows in self._fit(answers, min(map(prompt_length_of, answers)), place):
            yield RankedItem(rows, [float(rank) for rank in record["ranks"]])

    def _rated(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        for row in self._completion(place, record):
            yield ScoredItem(row, float(record["rating"]))

    def _unpaired(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        for row in self._completion(place, record):
            yield UnpairedItem(row, bool(record["label"]))

    _mismatched = _unpaired  # who is paired with whom is known once all records are read

    def _completion(self, place: str, record: Mapping[str, Any]) -> Iterator[Encoded]:
        encoded = self._pair(record, record["prompt"], record["completion"])
        for (row,) in self._fit([encoded], prompt_length_of(encoded), place):
            yield row

    def _steps(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        encoding = self.encoding
        if all(label is None for label in record["labels"]):
            self.report.leave_out("no step is labelled", place)
            return
        ids, ends = encode_steps(
            encoding.tokenizer,
            record["prompt"],
            record["completions"],
            separator=encoding.step_separator,
            parse_controls=encoding.parse_special_tokens,
        )
        labels = {end: float(y) for end, y in zip(ends, record["labels"], strict=True) if y is not None}
        encoded = Encoded(ids, [i in labels for i in range(len(ids))])
        prompt_length = len(self._prompt_ids(record["prompt"]))
        for (row,) in self._fit([encoded], prompt_length, place):
            yield StepItem(row, list(labels.values())[: int(row.mask.sum())])

    def _prompts(self, place: str, record: Mapping[str, Any]) -> Iterator[Item]:
        prompt = record["prompt"] if "prompt" in self.kind else record["messages"]
        if "messages" in self.kind:
            while prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        ids, rule = self._prompt_ids(prompt, _tools(record)), self.encoding.rule
        limit = rule.max_prompt_length or rule.max_length
        if len(ids) > limit:
            if not self._may_cut(place, len(ids), limit, "prompt"):
                return
            ids = cut_prompt(ids, limit, self._bos_length(ids))
            text = self.encoding.tokenizer.decode(ids)
        elif isinstance(prompt, str):
            text = prompt
        else:
            text = render(self.encoder, check_messages(prompt), tools=_tools(record), add_generation_prompt=True)
        yield PromptItem(np.asarray(ids, np.int32), text, dict(record), self.report.read - 1)

    def _pair(self, record: Mapping[str, Any], prompt: Any, completion: Any) -> Encoded:
        encoding = self.encoding
        return encode_pair(
            encoding.tokenizer,
            prompt or "",
            completion,
            add_eos=encoding.add_eos,
            tools=_tools(record),
            parse_controls=encoding.parse_special_tokens,
        )

    def _prompt_ids(self, prompt: Any, tools: Any = None) -> list[int]:
        return encode_prompt(
            self.encoding.tokenizer, prompt, tools=tools, parse_controls=self.encoding.parse_special_tokens
        )

    def _fit(self, rows: list[Encoded], prompt_length: int, place: str) -> Iterator[list[Any]]:
        """The rows cut to length, once; nothing if the record is left out."""
        rule = self.encoding.rule
        if not all(any(row.mask) for row in rows):
            what = "labelled step" if self.encoding.batch_format == "steps" else "assistant's message"
            raise UserError(f"{place}: there is no {what} to train on")
        if not rule.fits(rows, prompt_length):
            longest = max(len(row.ids) for row in rows)
            if longest > rule.max_length:
                allowed = self._may_cut(place, longest, rule.max_length, "record")
            else:
                allowed = self._may_cut(place, prompt_length, rule.max_prompt_length or 0, "prompt")
            if not allowed:
                return
            rows = rule.cut(rows, prompt_length, self._bos_length(rows[0].ids))
        # the first token is never predicted: a record of which it alone is left trains nothing
        if not all(any(row.mask[1:]) for row in rows):
            self.report.leave_out("no trained token left", place)
            return
        yield [compact(row) for row in rows]

    def _may_cut(self, place: str, length: int, limit: int, what: str) -> bool:
        overlong = self.encoding.rule.overlong
        option = "max_prompt_length" if what == "prompt" and self.encoding.rule.max_prompt_length else "max_length"
        if overlong == "error":
            raise UserError(
                f"{place}: the {what} has {length} tokens, {option} is {limit}; raise it, or set overlong to truncate "
                "or drop"
            )
        if overlong == "drop":
            self.report.leave_out(f"{what} longer than {option}={limit}", place)
            return False
        self.report.cut(place)
        return True

    def _bos_length(self, ids: Sequence[int]) -> int:
        prefix = self.encoder.prefix
        if prefix and list(ids[: len(prefix)]) == prefix:
            return len(prefix)
        return int(len(ids) > 0 and ids[0] == self.encoding.tokenizer.bos_token_id)


def _behind(prompt: Any, gold: Any, place: str) -> Any:
    """The gold answer without the prompt that chosen and rejected share."""
    rest = gold[len(prompt) :]
    if gold[: len(prompt)] != prompt or not (rest.strip() if isinstance(rest, str) else rest):
        raise UserError(
            f"{place}: gold does not go on from the prompt that chosen and rejected share, {prompt!r:.60}: let it "
            "begin with that too, or give prompt as a column of its own and the three answers without it"
        )
    return rest


def _tools(record: Mapping[str, Any]) -> Any:
    """The tools of a record; data sets keep them as JSON text where their schemas differ."""
    tools = record.get("tools")
    return json.loads(tools) if isinstance(tools, str) and tools else tools or None
