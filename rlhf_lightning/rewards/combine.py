"""Several reward functions as one: weighted, added, and checked for everything that a function may get wrong."""

import math
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample

EXCERPT = 60
"""Characters of a prompt or completion that an error message quotes."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward function and what it counts for.

    Args:
        reward: the function.
        weight: factor on its scores; negative turns it into a penalty, 0 only logs it.
        name: what the metrics call it; null = the function's own name.
    """

    reward: RewardFn
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"weight={self.weight} of reward {self.label}: give a finite number")

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
    """Weighted sum of the functions that score tokens, [tokens] for each sample; None if no function does."""
    breakdown: dict[str, Tensor]
    """Scores of each function before weighting, by name [batch]."""

    def plus(self, scores: Tensor) -> "ScoredSamples":
        """With one more number per sample [batch], given at the end."""
        scores = scores.to(self.total)
        return replace(self, total=self.total + scores, at_end=self.at_end + scores)


def score_samples(rewards: Sequence[WeightedReward], samples: Sequence[Sample]) -> ScoredSamples:
    """Ask every function about every sample, check the answers, weigh and add them.

        total = sum_f weight_f score_f

    Raises:
        UserError: a function raised, or returned nothing, the wrong number of scores, or one that is no finite number.
            Names the function and the sample.
    """
    _check_names(rewards)
    at_end = torch.zeros(len(samples))
    per_token: list[Tensor] | None = None
    breakdown: dict[str, Tensor] = {}
    for weighted in rewards:
        scores = _ask(weighted, samples)
        if isinstance(scores, Tensor):
            at_end = at_end + weighted.weight * scores
            breakdown[weighted.label] = scores
        else:
            if per_token is None:
                per_token = [torch.zeros(len(sample.tokens)) for sample in samples]
            per_token = [so_far + weighted.weight * row for so_far, row in zip(per_token, scores, strict=True)]
            breakdown[weighted.label] = _sums(scores)
    total = at_end if per_token is None else at_end + _sums(per_token)
    return ScoredSamples(total=total, at_end=at_end, per_token=per_token, breakdown=breakdown)


def _check_names(rewards: Sequence[WeightedReward]) -> None:
    if not rewards:
        raise UserError("rewards is empty: name at least one reward function, such as a trained reward model")
    repeated = [name for name, times in Counter(weighted.label for weighted in rewards).items() if times > 1]
    if repeated:
        raise UserError(f"two reward functions are called {repeated[0]!r}: give each a `name` of its own")


def _ask(weighted: WeightedReward, samples: Sequence[Sample]) -> Tensor | list[Tensor]:
    """The scores of one function, checked: [batch], or [tokens] for each sample."""
    name = weighted.label
    try:
        returned = weighted.reward(samples)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        guilty = _first_that_raises(weighted.reward, samples)
        where = (
            "on the whole batch, though on no sample alone" if guilty is None else f"on {_describe(guilty, samples)}"
        )
        raise UserError(f"reward function {name} raised {_describe_error(error)} {where}") from error
    values = _as_list(name, returned, samples)
    if any(isinstance(value, list) for value in values):
        return [_token_scores(name, value, i, samples) for i, value in enumerate(values)]
    return torch.tensor([_number(name, value, i, samples) for i, value in enumerate(values)])


def _as_list(name: str, returned: Any, samples: Sequence[Sample]) -> list[Any]:
    """One entry per sample: a number or a list, not yet checked."""
    if isinstance(returned, Tensor | np.ndarray):
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise UserError(
            f"reward function {name} returned {_shorten(returned)}: "
            f"a list of {len(samples)} numbers is needed, one per sample"
        )
    if len(returned) != len(samples):
        first = f"; nothing for {_describe(len(returned), samples)}" if len(returned) < len(samples) else ""
        raise UserError(f"reward function {name} returned {len(returned)} scores for {len(samples)} samples{first}")
    return [_plain(value) for value in returned]


def _plain(value: Any) -> Any:
    """Tensors, arrays and tuples as Python numbers and lists."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _number(name: str, value: Any, index: int, samples: Sequence[Sample]) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"reward function {name} returned {_shorten(value)} for {_describe(index, samples)}: "
            "a finite number is needed"
        )
    return float(value)


def _token_scores(name: str, value: Any, index: int, samples: Sequence[Sample]) -> Tensor:
    wanted = len(samples[index].tokens)
    if not isinstance(value, list):
        raise UserError(
            f"reward function {name} returned {_shorten(value)} for {_describe(index, samples)}, but lists for others: "
            "give one number per sample, or one list per sample"
        )
    if len(value) != wanted:
        raise UserError(
            f"reward function {name} returned {len(value)} token scores for {_describe(index, samples)}, "
            f"which has {wanted} tokens"
        )
    return torch.tensor([_number(name, _plain(entry), index, samples) for entry in value], dtype=torch.float32)


def _sums(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([row.sum().item() for row in rows])


def _first_that_raises(reward: RewardFn, samples: Sequence[Sample]) -> int | None:
    """Index of the first sample that the function cannot score by itself."""
    for index, sample in enumerate(samples):
        try:
            reward([sample])
        except Exception:
            return index
    return None


def _describe(index: int, samples: Sequence[Sample]) -> str:
    sample = samples[index]
    return f"sample {index} (prompt {_shorten(sample.prompt)}, completion {_shorten(sample.completion)})"


def _describe_error(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
