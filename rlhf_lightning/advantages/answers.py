"""The answers of a rollout as a credit without a critic sees them, and the credit that gives each answer one number.

An answer's score is the sum of its rewards. Groups may differ in size; an answer that is alone in its group has nothing
to be compared with. Sums are taken in float64, so that a group of equal scores gives exactly 0.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import NO_BREAKDOWN, Credit, on_one_rank


@dataclass(frozen=True)
class Answers:
    """The answers of a rollout as a credit per answer sees them: this rank's, every group whole."""

    scores: Float[Tensor, " batch"]
    """Sum of the rewards over the tokens that count, float64."""
    lengths: Int[Tensor, " batch"]
    """How many tokens count."""
    group: Int[Tensor, " batch"]
    """Which group each belongs to, below the number of answers."""
    breakdown: Mapping[str, Float[Tensor, " batch"]]
    """Weighted score from each reward function."""
    add_over_ranks: Callable[[Tensor], Tensor]

    def group_sum(self, x: Float[Tensor, " batch *rest"]) -> Float[Tensor, " batch *rest"]:
        """The sum of `x` over each answer's group, at each answer."""
        return torch.zeros_like(x).index_add(0, self.group, x)[self.group]

    def group_mean(self, x: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.group_sum(x) / self.sizes

    def group_std(self, x: Float[Tensor, " batch"], ddof: int) -> Float[Tensor, " batch"]:
        """Standard deviation of `x` in each answer's group; 0 in a group of no more than `ddof`."""
        squares = self.group_sum((x - self.group_mean(x)).square())
        return (squares / (self.sizes - ddof).clamp(min=1)).sqrt()

    def batch_mean_std(
        self, x: Float[Tensor, " batch"], ddof: int, *, weights: Float[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean and standard deviation of `x` over the answers of all ranks, each counted `weights` times (None: 1)."""
        times = torch.ones_like(x) if weights is None else weights
        count, total = self.add_over_ranks(torch.stack((times.sum(), (times * x).sum()))).unbind()
        mean = total / count.clamp(min=1)
        squares = self.add_over_ranks((times * (x - mean).square()).sum())
        return mean, (squares / (count - ddof).clamp(min=1)).sqrt()

    @property
    def sizes(self) -> Float[Tensor, " batch"]:
        """How many answers each one's group has."""
        return self.group_sum(torch.ones_like(self.scores))

    @property
    def informative(self) -> Bool[Tensor, " batch"]:
        """True in groups whose scores are not all equal."""
        return _varies(self.scores, self.group)


class OutcomeCredit(Credit):
    """One advantage per answer, at each of its tokens; returns are the answer's score at each of its tokens."""

    @abstractmethod
    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        """The advantage of each answer."""

    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        values: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        groups: Int[Tensor, " batch"],
        *,
        breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        counted = mask.any(-1)  # of an answer that was dropped nothing counts: it must not enter a mean or a deviation
        # reward functions give their scores on the CPU
        kept = {name: scores.to(counted.device)[counted] for name, scores in breakdown.items()}
        answers = answers_of(rewards[counted], mask[counted], groups[counted], kept, add_over_ranks)
        both = torch.zeros(2, len(counted), dtype=torch.float64, device=rewards.device)
        both[:, counted] = torch.stack((self.of_answers(answers).double(), answers.scores))
        return spread(both[0], mask, rewards), spread(both[1], mask, rewards)


def answers_of(
    rewards: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    groups: Int[Tensor, " batch"],
    breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
    add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
) -> Answers:
    """The answers whose rewards these are; `groups` may hold any numbers, in any order."""
    return Answers(
        scores=torch.where(mask, rewards, 0.0).sum(-1, dtype=torch.float64),
        lengths=mask.sum(-1),
        group=_numbered(groups),
        breakdown={name: scores.detach().double() for name, scores in breakdown.items()},
        add_over_ranks=add_over_ranks,
    )


def informative_answers(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], *, at_least: float = 0.0
) -> Bool[Tensor, " batch"]:
    """True for the answers that a group credit can learn from: the scores of their group differ.

    With scores of 0 and 1 this is DAPO's condition for keeping a prompt, 0 < number correct < group size. A group of
    one is never informative.

    Args:
        scores: of each answer: what is to differ. DAPO looks at correctness alone, without length penalties.
        groups: names the prompt that each answers.
        at_least: by how much the best and the worst of a group must differ, at least; 0 = at all.
    References:
        Yu et al., DAPO, 2025, eq. 11. arXiv:2503.14476
    """
    return _varies(scores, _numbered(groups), at_least)


def mean_is_within(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], low: float, high: float
) -> Bool[Tensor, " batch"]:
    """True for the answers of groups whose mean score lies between `low` and `high`, ends excluded.

    With scores of 0 and 1 and these ends it is `informative_answers`.
    """
    numbered, scores = _numbered(groups), scores.double()
    sizes = torch.zeros_like(scores).index_add(0, numbered, torch.ones_like(scores))
    mean = (torch.zeros_like(scores).index_add(0, numbered, scores) / sizes.clamp(min=1))[numbered]
    return (low < mean) & (mean < high)


# ---- one advantage per answer --------------------------------------------------------------------------------------


def spread(
    per_answer: Float[Tensor, " batch"], mask: Bool[Tensor, "batch time"], like: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """One number per answer, at each of its tokens; 0 elsewhere."""
    return torch.where(mask, per_answer.to(like.dtype).unsqueeze(-1), 0.0)


# ---- helpers -------------------------------------------------------------------------------------------------------


def check_ddof(ddof: int) -> None:
    if ddof not in (0, 1):
        raise UserError(f"ddof={ddof}: 0 divides squares by n, 1 by n - 1; give one of these")


def _numbered(groups: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The same groups, numbered from 0 without gaps."""
    numbered: Tensor = torch.unique(groups, return_inverse=True)[1]
    return numbered


def _varies(
    scores: Float[Tensor, " batch"], group: Int[Tensor, " batch"], at_least: float = 0.0
) -> Bool[Tensor, " batch"]:
    """True where the scores of the answer's group differ."""
    best = torch.zeros_like(scores).scatter_reduce(0, group, scores, "amax", include_self=False)
    worst = torch.zeros_like(scores).scatter_reduce(0, group, scores, "amin", include_self=False)
    spread = (best - worst)[group]
    return (spread > 0) & (spread >= at_least)
