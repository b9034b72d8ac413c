"""A few records with every token coloured by what it counts for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.data.building import Encoding, build_items
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.items import Item, PairItem, PromptItem, RankedItem, ScoredItem, StepItem, UnpairedItem
from rlhf_lightning.data.report import DataReport
from rlhf_lightning.data.splits import SourceRows
from rlhf_lightning.data.text import text_encoder

Role = Literal["prompt", "trained", "end", "padding", "truncated"]
STYLES: dict[Role, str] = {
    "prompt": "cyan",
    "trained": "bold green",
    "end": "bold black on green",
    "padding": "dim",
    "truncated": "red strike",
}
"""How a token is shown, by what it counts for."""

_UNLIMITED = 1 << 40


@dataclass(frozen=True)
class ShownToken:
    """A token and what it counts for."""

    text: str
    role: Role


def preview_records(
    datamodule: RLHFDataModule,
    batch_format: BatchFormat,
    n: int = 3,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    split: str = "train",
) -> RenderableType:
    """The first `n` records of a data set, for a rich console.

    Args:
        datamodule: whose options and sources are used; it need not be set up.
        batch_format: what the stage reads.
        n: how many records.
        tokenizer: a tokenizer or where it is; None: the datamodule's.
        split: train, val, test or pretraining.
    """
    encoding = datamodule.encoding_for("tokens" if split == "pretraining" else batch_format, tokenizer)
    legend = Text("tokens: ").append_text(Text(" ").join(Text(role, style=style) for role, style in STYLES.items()))
    panels: list[RenderableType] = [legend]
    for place, rows in islice(_records(datamodule.read_rows(split), encoding), n):
        panels.append(Panel(Group(*rows), title=place, title_align="left"))
    return Group(*panels)


def record_tokens(encoding: Encoding, full: Encoded, kept: Encoded | None, width: int = 0) -> list[ShownToken]:
    """Every token of a record as it would be without a limit, with what becomes of it.

    Args:
        encoding: how records become tokens.
        full: the record without any limit.
        kept: what is left of it; None: it is left out as a whole.
        width: tokens of the batch's rows; the rest is padding.
    """
    survives = _survivors(list(full.ids), [] if kept is None else list(kept.ids))
    pieces = _token_texts(encoding.tokenizer, full.ids)
    controls = text_encoder(encoding.tokenizer).controls
    shown = []
    for i, piece in enumerate(pieces):
        trained = bool(full.mask[i]) and i > 0  # nothing predicts a record's first token
        role: Role = "prompt"
        if not survives[i]:
            role = "truncated"
        elif trained:
            role = "end" if controls.fullmatch(piece.strip()) else "trained"
        shown.append(ShownToken(piece, role))
    padding = width - sum(survives)
    pad = encoding.tokenizer.pad_token or encoding.tokenizer.eos_token or "<pad>"
    return shown + [ShownToken(pad, "padding")] * max(padding, 0)


def _records(sources: Iterator[SourceRows], encoding: Encoding) -> Iterator[tuple[str, list[RenderableType]]]:
    unlimited = replace(encoding, rule=replace(encoding.rule, max_length=_UNLIMITED, max_prompt_length=None))
    if encoding.rule.overlong == "split":
        unlimited = encoding
    for part in sources:
        for place, record in part.rows:
            args = ([(place, record)], part.columns, part.source.path)
            full = build_items(*args, unlimited, DataReport("preview"))
            cut = replace(encoding, rule=replace(encoding.rule, overlong="drop"))
            report = DataReport("preview")
            kept = build_items(*args, encoding if encoding.rule.overlong != "error" else cut, report)
            why = [Text(f"left out: {reason}", style="red") for reason in report.left_out]
            shown: list[RenderableType] = [*why]
            for index, item in enumerate(full):
                shown += _show_item(encoding, item, kept[index] if index < len(kept) else None)
            yield place, shown


def _show_item(encoding: Encoding, full: Item, kept: Item | None) -> Iterator[RenderableType]:
    full_rows, kept_rows = full.rows(), kept.rows() if kept is not None else []
    width = max((len(row.ids) for row in kept_rows), default=0)
    for name, i in zip(_row_names(full), range(len(full_rows)), strict=True):
        row = kept_rows[i] if i < len(kept_rows) else None
        tokens = record_tokens(encoding, full_rows[i], row, width)
        counts = (
            f"{len(row.ids) if row is not None else 0} tokens, {int(sum(row.mask)) if row is not None else 0} trained"
        )
        if isinstance(full, PromptItem):
            counts = f"{len(row.ids) if row is not None else 0} tokens"
        yield Text(f"{name} ({counts})", style="bold")
        yield _coloured(tokens)


def _row_names(item: Item) -> list[str]:
    if isinstance(item, PairItem):
        margin = "" if item.margin is None else f", margin {item.margin:g}"
        return [f"chosen{margin}", "rejected", "gold"][: len(item.rows())]
    if isinstance(item, RankedItem):
        return [f"rank {rank:g}" for rank in item.ranks]
    if isinstance(item, UnpairedItem):
        return ["desirable" if item.desirable else "undesirable"]
    if isinstance(item, ScoredItem):
        return [f"value {item.value:g}"]
    if isinstance(item, StepItem):
        return [f"step labels {', '.join(f'{label:g}' for label in item.labels)}"]
    return ["prompt" if isinstance(item, PromptItem) else "record"]


def _coloured(tokens: Sequence[ShownToken]) -> Text:
    text = Text()
    padding = [token.text for token in tokens if token.role == "padding"]
    for token in tokens:
        if token.role != "padding":
            # a line break stays one, and is seen to be a token
            text.append(token.text.replace("\n", "⏎\n"), style=STYLES[token.role])
    if padding:
        text.append(f" {padding[0]} × {len(padding)}", style=STYLES["padding"])
    return text


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as it adds to the text; bytes of one character are shown with its last one."""
    plain: list[Any] = [int(i) for i in ids]
    texts = [tokenizer.decode(plain[:end]) for end in range(len(plain) + 1)]
    pieces = []
    shown = ""
    for _, after in pairwise(texts):
        complete = after.rstrip("\ufffd")
        pieces.append(complete[len(shown) :] if complete.startswith(shown) else "")
        shown = complete if complete.startswith(shown) else shown
    return pieces


def _survivors(full: list[int], kept: list[int]) -> list[bool]:
    """Which tokens of a record are left, given that a stretch behind its beginning and its end may be gone."""
    if not kept:
        return [False] * len(full)
    for removed in range(len(full) - len(kept) + 1):
        for head in (1, 0) if removed else (0,):
            rest = len(kept) - head
            if full[:head] == kept[:head] and full[head + removed : head + removed + rest] == kept[head:]:
                return [i < head or head + removed <= i < head + removed + rest for i in range(len(full))]
    return [True] * len(full)
