"""Batches with a shape and nothing in them: the largest that a run will meet."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_lightning.core.batches import (
    AnswerRollouts,
    Batch,
    Generated,
    PairBatch,
    PairRollouts,
    RankedBatch,
    RatedBatch,
    Rollouts,
    StepBatch,
    TokenBatch,
    UnpairedBatch,
)
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule

RANKED = 4
"""Completions of a prompt where no data says how many."""


@dataclass(frozen=True)
class Lengths:
    """How large records are."""

    row: int
    """Tokens of the longest row: of prompt and answer together."""
    prompt: int
    """Of them those of the prompt, where a stage samples its answers; else 0."""
    rows: int
    """Most completions that one record has."""
    origin: str
    """Where that is known from, in words."""


class AnyTotals(dict[str, float]):
    """Denominators of a step whose numbers do not matter."""

    def __missing__(self, name: str) -> float:
        return 1.0


def lengths_of(module: Any, data: RLHFDataModule | None, length: int | None) -> Lengths:
    """The longest record, as the options cut it: of the data, or of `length` tokens.

    Raises:
        UserError: neither is given; a length that leaves no room for the prompt.
    """
    answer = getattr(getattr(module, "generation", None), "max_new_tokens", 0)
    if length is not None:
        if length < 2 or length <= answer:
            raise UserError(
                f"--length {length} is the length of a whole row: give at least 2 tokens, and more than the "
                f"{answer} of generation.max_new_tokens"
            )
        ranked = module.batch_format == "ranked"
        return Lengths(length, length - answer if answer else 0, RANKED if ranked else 1, f"--length {length}")
    if data is None or data.options["train"] is None:
        raise UserError(
            "how long records are decides about memory, and there are none: set data.train, or give --length N, tokens "
            "of prompt and answer together"
        )
    tokenizer = None if data.options["tokenizer"] else module.tokenizer
    items = data.setup_for(module.batch_format, tokenizer, stage="fit").items("train")
    if module.batch_format == "prompts":
        prompt = max(len(item.ids) for item in items)  # type: ignore[union-attr]
        return Lengths(prompt + answer, prompt, 1, f"{len(items)} prompts of up to {prompt} tokens in data.train")
    rows = max(len(item.rows()) for item in items)
    longest = max(len(row.ids) for item in items for row in item.rows())
    if data.options["packing"] and module.batch_format == "tokens":
        longest = data.encoding_for("tokens").rule.max_length or longest
    longest = -(-longest // data.options["pad_to_multiple_of"]) * data.options["pad_to_multiple_of"]
    return Lengths(longest, 0, rows, f"{len(items)} records of up to {longest} tokens in data.train")


def tokens(rows: int, time: int) -> TokenBatch:
    shape = rows, time
    real = torch.ones(shape, dtype=torch.bool)
    return TokenBatch(torch.zeros(shape, dtype=torch.long), real, real.clone(), torch.zeros(shape, dtype=torch.long))


def generated(rows: int, lengths: Lengths) -> Generated:
    batch = tokens(rows, lengths.row)
    return Generated(
        batch.tokens, batch.attention_mask, batch.mask, batch.positions, torch.ones(rows, dtype=torch.bool)
    )


def training_batch(module: Any, units: int, lengths: Lengths) -> Batch:
    """A micro-batch of so many sequences, pairs or prompts, as `training_step` gets it."""
    made = _rollouts(module, units, lengths) if module.batch_format == "prompts" else _records(module, units, lengths)
    return replace(made, totals=AnyTotals())


def _rollouts(module: Any, units: int, lengths: Lengths) -> Batch:
    answers, numbers = generated(units, lengths), torch.zeros(units)
    if module.rollout_kind is PairRollouts:
        pairs = {name: torch.stack((x, x), 1) for name, x in vars(tokens(units, lengths.row)).items() if x is not None}
        known = torch.ones(units, 2, dtype=torch.bool)
        return PairRollouts(**pairs, margins=numbers, own=known, counts_in_loss=known[:, 0].clone())
    per_token = {
        name: torch.zeros(units, lengths.row)
        for name in ("old_logprobs", "ref_logprobs", "rewards", "advantages", "values", "returns")
    }
    extra = tokens(units, lengths.row) if module.reads_pretraining else None
    rows = {name: getattr(answers, name) for name in ("tokens", "attention_mask", "mask", "positions")}
    if module.rollout_kind is AnswerRollouts:
        return AnswerRollouts(**rows, extra=extra)
    rows["finished"] = answers.finished
    groups = torch.zeros(units, dtype=torch.long)
    return Rollouts(**rows, **per_token, scores=numbers, groups=groups, extra=extra)


def _records(module: Any, units: int, lengths: Lengths) -> Batch:
    kind = module.batch_format
    batch, numbers = tokens(units, lengths.row), torch.zeros(units)
    if getattr(module, "reference_cache", None) is not None:
        batch = replace(batch, ref_logprobs=torch.zeros(units, lengths.row))
    labels = torch.ones(units, dtype=torch.bool)
    makers: dict[str, Callable[[], Batch]] = {
        "tokens": lambda: batch,
        "pairs": lambda: PairBatch(batch, _like(batch), numbers),
        "triples": lambda: PairBatch(batch, _like(batch), numbers, _like(batch)),
        "rated": lambda: RatedBatch(batch, numbers),
        "steps": lambda: StepBatch(batch, torch.zeros(units, lengths.row)),
        "unpaired": lambda: UnpairedBatch(batch, labels),
        "mismatched": lambda: UnpairedBatch(batch, labels, _like(batch)),
    }
    if kind in makers:
        return makers[kind]()
    if kind != "ranked":
        raise UserError(f"{type(module).__name__} reads {kind}, of which plan knows no shape")
    completions = tokens(units * lengths.rows, lengths.row)
    groups = torch.arange(units).repeat_interleave(lengths.rows)
    return RankedBatch(completions, groups, torch.zeros(units * lengths.rows))


def _like(batch: TokenBatch) -> TokenBatch:
    return replace(batch, **{name: x.clone() for name, x in vars(batch).items() if isinstance(x, torch.Tensor)})
