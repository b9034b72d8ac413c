"""Several reward functions as one: weighted, added, and checked for everything that a function may get wrong."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.rewards.asking import OnError, ask


@dataclass(frozen=True)
class WeightedReward:
    """A reward function and what it counts for.

    Args:
        reward: the function.
        weight: factor on its scores; negative turns it into a penalty, 0 only logs it.
        name: what the metrics call it; null = the function's own name.
        on_error: what becomes of a sample on which the function raises, hangs or returns no finite number. error: the
            run stops and names it. drop: the sample carries no loss. zero: it scores 0. The last two warn.
        timeout_s: seconds that a call may take (wall clock); null = no limit.
    """

    reward: RewardFn
    weight: float = 1.0
    name: str | None = None
    on_error: OnError = "error"
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"weight={self.weight} of reward {self.label}: give a finite number")
        if self.on_error not in ("error", "drop", "zero"):
            raise UserError(f"on_error={self.on_error!r} of reward {self.label}: use error, drop or zero")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UserError(f"timeout_s={self.timeout_s} of reward {self.label}: give seconds above 0, or null")

    @property
    def label(self) -> str:
        return self.name or self.reward.name or type(self.reward).__name__


@dataclass(frozen=True)
class ScoredSamples:
    """What the reward functions said about a batch of samples."""

    total: Tensor
    """Weighted sum of all functions [batch]; one that scores tokens counts with the sum over its tokens."""
    at_end: Tensor
    """The part of `total` that functions with one number per sample gave [batch]: `total` without `per_token`."""
    per_token: list[Tensor] | None
    """Weighted sum of the functions that score tokens, [tokens] for each sample, nothing for one that was dropped;
    None if no function does."""
    breakdown: dict[str, Tensor]
    """Scores of each function before weighting, by name [batch]."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Numbers behind the scores, by `function/part` [batch]: the members of an ensemble, the halves of a verdict."""
    valid: Tensor | None = None
    """False for a sample that was dropped and must carry no loss [batch]; its scores are 0. None: all count."""
    samples: Sequence[Sample] = ()
    """What was scored."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each function, by name; 1 where none is given."""

    @property
    def counts(self) -> Tensor:
        """`valid`, spelt out [batch]."""
        return torch.ones_like(self.total, dtype=torch.bool) if self.valid is None else self.valid

    @property
    def weighted(self) -> dict[str, Tensor]:
        """Scores of each function after weighting, by name [batch]; functions of weight 0 are only logged."""
        weights = {name: self.weights.get(name, 1.0) for name in self.breakdown}
        return {name: weights[name] * scores for name, scores in self.breakdown.items() if weights[name]}

    def keeping(self, kept: Tensor) -> "ScoredSamples":
        """With every sample dropped for which `kept` is False [batch]."""
        valid = self.counts & kept.to(self.total.device)
        per_token = self.per_token
        if per_token is not None:
            per_token = [row if keep else row[:0] for row, keep in zip(per_token, valid.tolist(), strict=True)]
        return replace(
            self,
            total=torch.where(valid, self.total, 0.0),
            at_end=torch.where(valid, self.at_end, 0.0),
            per_token=per_token,
            breakdown={name: torch.where(valid, scores, 0.0) for name, scores in self.breakdown.items()},
            parts={name: torch.where(valid, numbers, 0.0) for name, numbers in self.parts.items()},
            valid=valid,
        )

    def select(self, rows: Sequence[int]) -> "ScoredSamples":
        """What was said about the samples at `rows`."""
        at = list(rows)
        return replace(
            self,
            total=self.total[at],
            at_end=self.at_end[at],
            per_token=None if self.per_token is None else [self.per_token[row] for row in at],
            breakdown={name: scores[at] for name, scores in self.breakdown.items()},
            parts={name: numbers[at] for name, numbers in self.parts.items()},
            valid=None if self.valid is None else self.valid[at],
            samples=[self.samples[row] for row in at] if self.samples else (),
        )

    @staticmethod
    def joined(batches: Sequence["ScoredSamples"]) -> "ScoredSamples":
        """What the same functions said about several batches of samples."""
        first = batches[0]
        # a function that failed on the whole of a batch has scored no tokens there
        by_token = any(batch.per_token is not None for batch in batches)
        return replace(
            first,
            total=torch.cat([batch.total for batch in batches]),
            at_end=torch.cat([batch.at_end for batch in batches]),
            per_token=[row for batch in batches for row in batch._token_rows()] if by_token else None,
            breakdown={name: torch.cat([batch.breakdown[name] for batch in batches]) for name in first.breakdown},
            parts={name: torch.cat([batch.parts[name] for batch in batches]) for name in first.parts},
            valid=torch.cat([batch.counts for batch in batches]) if any(b.valid is not None for b in batches) else None,
            samples=[sample for batch in batches for sample in batch.samples],
        )

    def _token_rows(self) -> list[Tensor]:
        """`per_token`, spelt out: 0 for every token if no function scored them."""
        if self.per_token is not None:
            return self.per_token
        kept = zip(self.samples, self.counts.tolist(), strict=True)
        return [torch.zeros(len(sample.tokens) if counts else 0) for sample, counts in kept]

    def plus(self, scores: Tensor) -> "ScoredSamples":
        """With one more number per sample [batch], given at the end; dropped samples stay at 0."""
        scores = torch.where(self.counts, scores.to(self.total), 0.0)
        return replace(self, total=self.total + scores, at_end=self.at_end + scores)


def score_samples(rewards: Sequence[WeightedReward], samples: Sequence[Sample]) -> ScoredSamples:
    """Ask every function about every sample, check the answers, weigh and add them.

        total = sum_f weight_f score_f

    Raises:
        UserError: a function raised or hung, or returned nothing, the wrong number of scores, or one that is no finite
            number, and its `on_error` is "error". Names the function and the sample.
    """
    check_names(rewards)
    valid = torch.ones(len(samples), dtype=torch.bool)
    answers = {}
    for weighted in rewards:
        said = ask(weighted.label, weighted.reward, samples, on_error=weighted.on_error, timeout_s=weighted.timeout_s)
        answers[weighted.label] = said
        valid[said.invalid] = False
        if weighted.on_error == "drop":
            valid[list(said.failed)] = False
    at_end = torch.zeros(len(samples))
    per_token: list[Tensor] | None = None
    breakdown: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for weighted in rewards:
        name, said = weighted.label, answers[weighted.label]
        scores = said.scores
        if scores and isinstance(scores[0], Tensor):
            rows = [row if keep else row[:0] for row, keep in zip(scores, valid.tolist(), strict=True)]
            per_token = per_token or [torch.zeros(len(row)) for row in rows]
            per_token = [so_far + weighted.weight * row for so_far, row in zip(per_token, rows, strict=True)]
            breakdown[name] = _sums(rows)
        else:
            breakdown[name] = torch.where(valid, torch.tensor(scores, dtype=torch.float32), 0.0)
            at_end = at_end + weighted.weight * breakdown[name]
        for part, numbers in said.parts.items():
            parts[f"{name}/{part}"] = torch.where(valid, torch.tensor(numbers), 0.0)
    total = at_end if per_token is None else at_end + _sums(per_token)
    return ScoredSamples(
        total=total,
        at_end=at_end,
        per_token=per_token,
        breakdown=breakdown,
        parts=parts,
        valid=None if valid.all() else valid,
        samples=samples,
        weights={weighted.label: weighted.weight for weighted in rewards},
    )


def unscored(samples: Sequence[Sample]) -> ScoredSamples:
    """What is said of samples where there is no reward function: nothing, and all count."""
    nothing = torch.zeros(len(samples))
    return ScoredSamples(total=nothing, at_end=nothing, per_token=None, breakdown={}, samples=samples)


def check_names(rewards: Sequence[WeightedReward]) -> None:
    """There is a function, and no two share a name."""
    if not rewards:
        raise UserError("rewards is empty: name at least one reward function, such as a trained reward model")
    repeated = [name for name, times in Counter(weighted.label for weighted in rewards).items() if times > 1]
    if repeated:
        raise UserError(f"two reward functions are called {repeated[0]!r}: give each a `name` of its own")


def _sums(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([row.sum().item() for row in rows])
