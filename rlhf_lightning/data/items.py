"""Checked records to items: one frozen dataclass per batch format, each with the function that collates it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from rlhf_lightning.core.batches import (
    Batch,
    PairBatch,
    PromptBatch,
    RankedBatch,
    RatedBatch,
    StepBatch,
    TokenBatch,
    UnpairedBatch,
)
from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.data.collate import PaddingSide, collate_packed, collate_prompts, collate_tokens
from rlhf_lightning.data.encode import Encoded


@dataclass(frozen=True)
class TokenItem:
    """A text, a conversation or a completion."""

    encoded: Encoded

    def rows(self) -> list[Encoded]:
        return [self.encoded]


@dataclass(frozen=True)
class PairItem:
    """Two completions of one prompt."""

    chosen: Encoded
    rejected: Encoded
    margin: float | None
    gold: Encoded | None = None
    """A third one, if it was asked for."""

    def rows(self) -> list[Encoded]:
        return [self.chosen, self.rejected] if self.gold is None else [self.chosen, self.rejected, self.gold]


@dataclass(frozen=True)
class RankedItem:
    """K completions of one prompt."""

    completions: Sequence[Encoded]
    ranks: Sequence[float]

    def rows(self) -> list[Encoded]:
        return list(self.completions)


@dataclass(frozen=True)
class UnpairedItem:
    """A completion that somebody called good or bad."""

    encoded: Encoded
    desirable: bool
    mismatched: Encoded | None = None
    """The same prompt with a completion that belongs to another one: see `data.mismatch`."""

    def rows(self) -> list[Encoded]:
        return [self.encoded] if self.mismatched is None else [self.encoded, self.mismatched]


@dataclass(frozen=True)
class ScoredItem:
    """A completion with a rating."""

    encoded: Encoded
    value: float

    def rows(self) -> list[Encoded]:
        return [self.encoded]


@dataclass(frozen=True)
class StepItem:
    """A solution in steps; the mask is True on the last token of each labelled step."""

    encoded: Encoded
    labels: Sequence[float]

    def rows(self) -> list[Encoded]:
        return [self.encoded]


@dataclass(frozen=True)
class PromptItem:
    """A prompt to be answered."""

    ids: np.ndarray
    text: str
    record: Mapping[str, Any]
    index: int

    def rows(self) -> list[Encoded]:
        return [Encoded(self.ids, np.zeros(len(self.ids), np.bool_))]


Item = TokenItem | PairItem | RankedItem | ScoredItem | UnpairedItem | StepItem | PromptItem


def with_reference(item: Item, ref_logprobs: Sequence[np.ndarray]) -> Item:
    """The item, each of its rows with what the reference said of it.

    Args:
        ref_logprobs: one array per row, in the order of `item.rows()`.
    """
    values = iter(ref_logprobs)

    def measured(value: Any) -> Any:
        if isinstance(value, Encoded):
            return replace(value, ref_logprobs=next(values))
        if isinstance(value, list) and all(isinstance(row, Encoded) for row in value):
            return [measured(row) for row in value]
        return value

    return replace(item, **{f.name: measured(getattr(item, f.name)) for f in fields(item)})


def compact(encoded: Encoded) -> Encoded:
    """The same record in arrays: an eighth of the memory of lists."""
    return Encoded(np.asarray(encoded.ids, np.int32), np.asarray(encoded.mask, np.bool_))


@dataclass(frozen=True)
class Collator:
    """Items of one batch format to a batch; picklable, so that workers may run it."""

    batch_format: BatchFormat
    pad_id: int
    padding_side: PaddingSide = "right"
    packed: bool = False
    """Whether the items come as rows of several."""
    multiple_of: int = 1
    """Row lengths are rounded up to a multiple of this."""

    def __call__(self, items: Sequence[Any]) -> Batch:
        return getattr(self, f"_{self.batch_format}")(items)

    def _rows(self, encoded: Sequence[Encoded]) -> TokenBatch:
        return collate_tokens(encoded, self.pad_id, padding_side=self.padding_side, multiple_of=self.multiple_of)

    def _tokens(self, items: Sequence[Any]) -> TokenBatch:
        if self.packed:
            rows = [[item.encoded for item in row] for row in items]
            return collate_packed(rows, self.pad_id, multiple_of=self.multiple_of)
        return self._rows([item.encoded for item in items])

    def _pairs(self, items: Sequence[PairItem]) -> PairBatch:
        margins = [item.margin for item in items]
        known = any(margin is not None for margin in margins)
        gold = [item.gold for item in items if item.gold is not None]
        return PairBatch(
            self._rows([item.chosen for item in items]),
            self._rows([item.rejected for item in items]),
            torch.tensor([margin or 0.0 for margin in margins]) if known else None,
            self._rows(gold) if gold else None,
        )

    _triples = _pairs

    def _ranked(self, items: Sequence[RankedItem]) -> RankedBatch:
        return RankedBatch(
            self._rows([row for item in items for row in item.completions]),
            torch.tensor([group for group, item in enumerate(items) for _ in item.completions]),
            torch.tensor([float(rank) for item in items for rank in item.ranks]),
        )

    def _rated(self, items: Sequence[ScoredItem]) -> RatedBatch:
        return RatedBatch(self._rows([item.encoded for item in items]), torch.tensor([item.value for item in items]))

    def _unpaired(self, items: Sequence[UnpairedItem]) -> UnpairedBatch:
        labels = torch.tensor([item.desirable for item in items])
        mismatched = [item.mismatched for item in items if item.mismatched is not None]
        return UnpairedBatch(
            self._rows([item.encoded for item in items]), labels, self._rows(mismatched) if mismatched else None
        )

    _mismatched = _unpaired

    def _steps(self, items: Sequence[StepItem]) -> StepBatch:
        rows = self._rows([item.encoded for item in items])
        labels = torch.zeros(rows.tokens.shape)
        # row-major, as the items' labels stand; a step never ends on a record's first token: the prompt is there
        labels[rows.mask] = torch.tensor([label for item in items for label in item.labels], dtype=torch.float32)
        return StepBatch(rows, labels)

    def _prompts(self, items: Sequence[PromptItem]) -> PromptBatch:
        return collate_prompts(
            [item.ids for item in items],
            [item.text for item in items],
            [item.record for item in items],
            [item.index for item in items],
            self.pad_id,
        )
