"""What flows between rooms: frozen batches. `mask` True means *counts*; index t is about tokens[t]."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Same = TypeVar("Same", bound="Batch")  # not typing.Self: the checker of shapes under the tests cannot read it


def _move(value: Any, device: Any, non_blocking: bool) -> Any:
    if isinstance(value, Tensor | Batch):
        return value.to(device, non_blocking=non_blocking)
    return value


def _pin(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor | Batch) else value


@dataclass(frozen=True)
class Batch:
    """Common ground of all batches: moving, pinning, and the totals of the optimiser step they belong to."""

    totals: Mapping[str, float] | None = field(default=None, kw_only=True)
    """How many tokens, sequences, pairs ... the whole optimiser step holds, over its micro-batches and all ranks; the
    denominators of its losses. None: this batch is the whole step."""
    unit: ClassVar[str] = "sequence"
    """What it consists of, in a word: no smaller part of it has a loss of its own."""

    def to(self: Same, device: torch.device | str, non_blocking: bool = False) -> Same:
        """The same batch with every tensor on `device`."""
        return replace(self, **{f.name: _move(getattr(self, f.name), device, non_blocking) for f in fields(self)})

    def pin_memory(self: Same) -> Same:
        """The same batch in page-locked memory (called by the data loader)."""
        return replace(self, **{f.name: _pin(getattr(self, f.name)) for f in fields(self)})

    def counts(self) -> dict[str, float]:
        """This batch's own share of `totals`."""
        raise NotImplementedError(f"{type(self).__name__} has no counts")

    def total(self, name: str, *, at_least: float = 1.0) -> float:
        """The denominator called `name`: that of the step if known, else this batch's own; at least 1."""
        counts = self.counts() if self.totals is None else self.totals
        return max(counts[name], at_least)

    def with_totals(self: Same, totals: Mapping[str, float]) -> Same:
        return replace(self, totals=dict(totals))

    @property
    def num_units(self) -> int:
        """Sequences, pairs or prompts in the batch."""
        own = next(iter(self._rows.values()), None)
        return next(x.num_units for x in vars(self).values() if isinstance(x, Batch)) if own is None else len(own)

    def part(self: Same, start: int, stop: int) -> Same:
        """The units from `start` to before `stop`; the totals stay those of the step."""
        changed: dict[str, Any] = {name: x[start:stop] for name, x in self._rows.items()}
        changed |= {name: x.part(start, stop) for name, x in vars(self).items() if isinstance(x, Batch)}
        return replace(self, **changed)

    def without_loss(self: Same) -> Same:
        """The same units, none of which counts."""
        raise NotImplementedError(f"{type(self).__name__} always counts")

    def halves(self: Same) -> tuple[Same, Same]:
        """Two batches whose losses and gradients add up to those of this one, where the loss takes units one by one."""
        middle = (self.num_units + 1) // 2
        return self.part(0, middle), self.part(middle, self.num_units)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of every row, those of the batches inside it too."""
        inner = [n for x in vars(self).values() if isinstance(x, Batch) for n in x.lengths]
        mask = getattr(self, "attention_mask", None)
        return inner if mask is None else [*mask.flatten(0, -2).sum(-1).tolist(), *inner]

    @property
    def num_cells(self) -> int:
        """Tokens with their padding: what a forward pass computes."""
        mask = getattr(self, "attention_mask", None)
        inner = sum(x.num_cells for x in vars(self).values() if isinstance(x, Batch))
        return inner + (0 if mask is None else int(mask.numel()))

    @property
    def _rows(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


def step_totals(
    batches: Sequence[Batch],
    add_over_ranks: Callable[[Tensor], Tensor],
    measure: Callable[[Sequence[Batch]], Mapping[str, float]] = lambda batches: {},
) -> dict[str, float]:
    """What an optimiser step holds, over its micro-batches and all ranks: the denominators of its losses.

    Args:
        batches: this rank's micro-batches of the step.
        add_over_ranks: adds a vector over all ranks.
        measure: sums over these micro-batches that they do not know themselves, such as of what a model says of them.
    """
    counts = [batch.counts() for batch in batches]
    sums = {name: sum(count[name] for count in counts) for name in counts[0]} | dict(measure(batches))
    names = sorted(sums)
    summed = torch.tensor([sums[name] for name in names], dtype=torch.float64)
    return dict(zip(names, add_over_ranks(summed).tolist(), strict=True))


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Token sequences, padded or packed."""

    tokens: Int[Tensor, "batch time"]
    """Token ids; padding where `attention_mask` is False."""
    attention_mask: Bool[Tensor, "batch time"]
    """True on real tokens."""
    mask: Bool[Tensor, "batch time"]
    """True on tokens that are trained or scored (a completion, an assistant's turn)."""
    positions: Int[Tensor, "batch time"]
    """Position ids: count from 0 at each record's first real token, whatever the padding side."""
    segments: Int[Tensor, "batch time"] | None = None
    """Packed rows: 1, 2, ... per record, 0 on padding; no attention across. None: one record per row."""
    ref_logprobs: Float[Tensor, "batch time"] | None = None
    """What the frozen reference said of each token, measured beforehand; 0 where `mask` is False. None: it was not."""

    def counts(self) -> dict[str, float]:
        return {"tokens": float(self.mask[:, 1:].sum()), "sequences": float(self.num_sequences)}

    def without_loss(self) -> "TokenBatch":
        return replace(self, mask=torch.zeros_like(self.mask))

    @property
    def num_sequences(self) -> int:
        """Records in the batch: rows, or packed records."""
        if self.segments is None:
            return self.tokens.shape[0]
        return int(self.segments.amax(1).sum())


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs of completions of the same prompt, the first preferred. Row i of both belongs to pair i."""

    chosen: TokenBatch
    rejected: TokenBatch
    margins: Float[Tensor, " pairs"] | None = None
    """By how much chosen should win (Llama 2's margin), or None."""
    gold: TokenBatch | None = None
    """A third answer to each prompt, better than both; None: not asked for."""
    unit = "pair"

    def counts(self) -> dict[str, float]:
        counts = {"pairs": float(self.chosen.tokens.shape[0]), "chosen_tokens": self.chosen.counts()["tokens"]}
        if self.gold is not None:
            counts["gold_tokens"] = self.gold.counts()["tokens"]
        return counts


@dataclass(frozen=True)
class RankedBatch(Batch):
    """K >= 2 ranked completions of each prompt, flattened; K may differ between prompts."""

    completions: TokenBatch
    groups: Int[Tensor, " completions"]
    """Index of the prompt in this batch that each completion answers: 0, 0, 0, 1, 1, ..."""
    ranks: Float[Tensor, " completions"]
    """Rank within the prompt, 1 = best; equal ranks are ties."""

    unit = "ranking"

    def counts(self) -> dict[str, float]:
        return {"prompts": float(self.num_units)}

    @property
    def num_units(self) -> int:
        return int(self.groups.max() + 1)

    def part(self, start: int, stop: int) -> "RankedBatch":
        here = (self.groups >= start) & (self.groups < stop)
        return replace(
            self,
            completions=_select(self.completions, here.nonzero()[:, 0]),
            groups=self.groups[here] - start,
            ranks=self.ranks[here],
        )


@dataclass(frozen=True)
class RatedBatch(Batch):
    """Completions with an absolute rating."""

    completions: TokenBatch
    ratings: Float[Tensor, " completions"]

    def counts(self) -> dict[str, float]:
        return {"sequences": float(self.ratings.numel())}


@dataclass(frozen=True)
class UnpairedBatch(Batch):
    """Completions that somebody called good or bad, each on its own."""

    completions: TokenBatch
    labels: Bool[Tensor, " completions"]
    """True = desirable."""
    mismatched: TokenBatch | None = None
    """Each prompt once more, with a completion that belongs to another one: what KTO's KL is estimated from."""

    def counts(self) -> dict[str, float]:
        return {"sequences": float(self.labels.numel()), "desirable": float(self.labels.sum())}


@dataclass(frozen=True)
class StepBatch(Batch):
    """Completions cut into steps, each labelled at its last token."""

    completions: TokenBatch
    """`mask` is True on the last token of each labelled step."""
    step_labels: Float[Tensor, "batch time"]
    """The step's label at its last token, 0 elsewhere."""

    def counts(self) -> dict[str, float]:
        return {"steps": float(self.completions.mask.sum())}


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Prompts to be answered, left-padded so that all end at the same index."""

    tokens: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    texts: Sequence[str]
    """Each prompt as the model reads it (after the chat template)."""
    records: Sequence[Mapping[str, Any]]
    """Each prompt's whole record: extra columns reach the reward functions from here."""
    indices: Int[Tensor, " batch"]
    """Row of each prompt in its data set: names it in seeds and logs."""

    def counts(self) -> dict[str, float]:
        return {"sequences": float(self.tokens.shape[0])}

    def part(self, start: int, stop: int) -> "PromptBatch":
        return replace(super().part(start, stop), texts=self.texts[start:stop], records=self.records[start:stop])


@dataclass(frozen=True)
class Generated(Batch):
    """Sampled answers as they come from an engine: prompt (left-padded) + response (right-padded)."""

    tokens: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    """True on real tokens of prompt and response."""
    mask: Bool[Tensor, "batch time"]
    """True on response tokens, the end token included."""
    positions: Int[Tensor, "batch time"]
    finished: Bool[Tensor, " batch"]
    """True where the answer ended by itself: with an end token or a stop string."""
    kept: UInt8[Tensor, "batch time bytes"] | None = None
    """Which of the vocabulary each token was drawn from, one bit each (see `core.kept`); None = from all of it."""
    sampler_logprobs: Float[Tensor, "batch time"] | None = None
    """What the engine itself gave each token (nats), where it says so; 0 where `mask` is False."""
    sampler_entropy: Float[Tensor, "batch time"] | None = None
    """Entropy of what the engine drew each token from (nats), where it says so; 0 where `mask` is False."""

    def counts(self) -> dict[str, float]:
        return {"tokens": float(self.mask.sum()), "sequences": float(self.tokens.shape[0])}

    def select(self, rows: Int[Tensor, " rows"]) -> "Generated":
        """The answers at `rows`."""
        return _select(self, rows)


AnswersT = TypeVar("AnswersT", bound="_Answers")


class _Answers(Batch):
    """Sampled answers, one a row, and beside them a batch of another source: what is counted, and how they are cut."""

    tokens: Tensor
    mask: Tensor
    extra: TokenBatch | None

    def counts(self) -> dict[str, float]:
        # one wait for the device, not two
        tokens, sequences = torch.stack((self.mask.sum(), self.mask.any(-1).sum())).tolist()
        counts = {"tokens": float(tokens), "sequences": float(sequences)}
        if self.extra is not None:
            counts["extra_tokens"] = self.extra.counts()["tokens"]
        return counts

    def select(self: Same, rows: Int[Tensor, " rows"]) -> Same:
        """The sequences at `rows`, as a minibatch."""
        return _select(self, rows)

    @property
    def num_units(self) -> int:
        return max(len(self.tokens), 0 if self.extra is None else self.extra.num_units)

    def part(self: AnswersT, start: int, stop: int) -> AnswersT:
        whole, alone = self.num_units, _with(self, extra=None)
        extra = None if self.extra is None else _share(self.extra, len(self.extra.tokens), start, stop, whole)
        return _with(_share(alone, len(self.tokens), start, stop, whole), extra=extra)

    def without_loss(self: AnswersT) -> AnswersT:
        return _with(self, mask=torch.zeros_like(self.mask))


@dataclass(frozen=True)
class Rollouts(_Answers):
    """Sampled answers and everything known about them: prompt (left-padded) + response (right-padded)."""

    tokens: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    """True on real tokens of prompt and response."""
    mask: Bool[Tensor, "batch time"]
    """True on response tokens, the end token included."""
    positions: Int[Tensor, "batch time"]
    finished: Bool[Tensor, " batch"]
    """True where the answer ended by itself: with an end token or a stop string."""
    scores: Float[Tensor, " batch"]
    """One number per sequence from the reward functions, after weighting; before clipping, scaling and KL."""
    old_logprobs: Float[Tensor, "batch time"]
    """Log-probability of each token under the policy that sampled it; 0 where `mask` is False."""
    ref_logprobs: Float[Tensor, "batch time"]
    """The same under the frozen reference."""
    rewards: Float[Tensor, "batch time"]
    """Reward of each token after shaping (score at the end, KL on the way)."""
    advantages: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    """The critic's estimate before tokens[t] was drawn; 0 without a critic."""
    returns: Float[Tensor, "batch time"]
    """What the critic should have said."""
    groups: Int[Tensor, " batch"]
    """Which prompt of the rollout each sequence answers: 0, 0, 1, 1, ..."""
    weights: Float[Tensor, "batch time"] | None = None
    """Factor on the policy's loss of each token; None = 1."""
    kept: UInt8[Tensor, "batch time bytes"] | None = None
    """Which of the vocabulary each token was drawn from, one bit each (see `core.kept`); None = from all of it."""
    extra: TokenBatch | None = None
    """A batch of another source to be trained on in the same step (PPO-ptx)."""


@dataclass(frozen=True)
class AnswerRollouts(_Answers):
    """Sampled answers of which nothing else is known: prompt (left-padded) + response (right-padded)."""

    tokens: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    """True on real tokens of prompt and response."""
    mask: Bool[Tensor, "batch time"]
    """True on response tokens, the end token included."""
    positions: Int[Tensor, "batch time"]
    extra: TokenBatch | None = None
    """A batch of another source to be trained on in the same step."""


@dataclass(frozen=True)
class PairRollouts(Batch):
    """Pairs of sampled answers to one prompt, [pair, 0] preferred to [pair, 1]: prompt (left-padded) + response."""

    tokens: Int[Tensor, "pairs 2 time"]
    attention_mask: Bool[Tensor, "pairs 2 time"]
    """True on real tokens of prompt and response."""
    mask: Bool[Tensor, "pairs 2 time"]
    """True on response tokens, the end token included."""
    positions: Int[Tensor, "pairs 2 time"]
    margins: Float[Tensor, " pairs"]
    """By how much the first one scored more."""
    own: Bool[Tensor, "pairs 2"]
    """True where the policy itself drew the answer, not another model."""
    counts_in_loss: Bool[Tensor, " pairs"]
    """False for a pair that only fills a place and carries no loss."""
    unit = "pair"

    def counts(self) -> dict[str, float]:
        chosen_tokens = self.mask[:, 0, 1:].sum(-1)
        # one wait for the device, not two
        pairs, tokens = torch.stack((self.counts_in_loss.sum(), chosen_tokens[self.counts_in_loss].sum())).tolist()
        return {"pairs": float(pairs), "chosen_tokens": float(tokens)}

    def select(self, rows: Int[Tensor, " rows"]) -> "PairRollouts":
        """The pairs at `rows`, as a minibatch."""
        return _select(self, rows)

    def without_loss(self) -> "PairRollouts":
        return replace(self, counts_in_loss=torch.zeros_like(self.counts_in_loss))

    def side(self, index: int) -> TokenBatch:
        """The preferred answers (0), or the others (1)."""
        return TokenBatch(
            self.tokens[:, index], self.attention_mask[:, index], self.mask[:, index], self.positions[:, index]
        )

    def as_pairs(self) -> PairBatch:
        """The same as a preference data set would have it."""
        return PairBatch(self.side(0), self.side(1), self.margins, totals=self.totals)


RowsT = TypeVar("RowsT", TokenBatch, Generated, Rollouts)


def _share(batch: Same, rows: int, start: int, stop: int, whole: int) -> Same:
    """The rows that belong to units `start` to `stop` of `whole`; where there are none, one in which nothing counts."""
    first, last = start * rows // whole, stop * rows // whole
    some = _select(batch, torch.arange(first, max(last, first + 1)).clamp(max=rows - 1))
    return some if last > first else some.without_loss()


def _select(batch: Same, rows: Int[Tensor, " rows"]) -> Same:
    picked: dict[str, Any] = {
        f.name: getattr(batch, f.name)[rows] for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)
    }
    return replace(batch, **picked)


def _with(batch: Same, **changed: Any) -> Same:
    """`replace`, of fields that not every batch has."""
    return replace(batch, **changed)


def concatenate_rows(parts: Sequence[RowsT], *, pad_id: int) -> RowsT:
    """The rows of all parts as one batch, part after part, padded on the right to the widest.

    Raises:
        ValueError: one part has an optional tensor that another lacks.
    """
    width = max(part.tokens.shape[1] for part in parts)
    whole: dict[str, Any] = {}
    for f in fields(parts[0]):
        tensors = [getattr(part, f.name) for part in parts]
        given = {isinstance(tensor, Tensor) for tensor in tensors}
        if len(given) == 2:
            raise ValueError(f"{f.name} is given in some of the parts and missing in others")
        if given == {False}:
            continue
        if tensors[0].dim() > 1:
            value = pad_id if f.name == "tokens" else 0
            tensors = [_pad_time(tensor, width, value) for tensor in tensors]
        whole[f.name] = torch.cat(tensors)
    return replace(parts[0], **whole)


def _pad_time(x: Tensor, width: int, value: int) -> Tensor:
    """[batch, time, ...] with `value` on the right up to `width`."""
    missing = x.new_full((x.shape[0], width - x.shape[1], *x.shape[2:]), value)
    return torch.cat((x, missing), dim=1)
