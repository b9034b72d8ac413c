"""Credit without a critic that differs from token to token, or is normalised over the tokens of the whole batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from rlhf_kernels import gae
from torch import Tensor

from rlhf_lightning.advantages.answers import answers_of, check_ddof, spread
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import NO_BREAKDOWN, Credit, CreditBaseline, on_one_rank
from rlhf_lightning.core.masked import masked_centre, masked_moments, masked_whiten


@dataclass(frozen=True)
class RewardsToCome(Credit):
    """REINFORCE: the discounted reward to come, as it is. Needs no groups.

        A_t = sum_{s >= t} gamma^(s - t) r_s

    With gamma 0 a token is credited with its own reward alone: with KL to a teacher in the reward, that is on-policy
    distillation by policy gradient. Returns are the advantages.

    Args:
        gamma: discount per token that counts.
    References:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, 1992.
        Lu and Thinking Machines Lab, On-Policy Distillation, 2025.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

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
        to_come = rewards_to_come(rewards, mask, gamma=self.gamma)
        return to_come, to_come


@dataclass(frozen=True)
class BatchNormalised(Credit):
    """REINFORCE++: discounted reward to come, normalised over all answer tokens of all ranks. Needs no groups.

        R_t = sum_{s >= t} gamma^(s - t) r_s
        A_t = (R_t - mean_batch(R)) / sqrt(var_batch(R) + 1e-8)

    Returns are R.

    Args:
        gamma: discount per token that counts.
        divide_by_std: false takes the mean off alone.
        ddof: 0 divides the variance by n, 1 by n - 1 (verl).
    References:
        Hu et al., REINFORCE++, 2025. arXiv:2501.03262
    """

    gamma: float = 1.0
    divide_by_std: bool = True
    ddof: int = 0

    def __post_init__(self) -> None:
        check_ddof(self.ddof)
        _check_gamma(self.gamma)

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
        to_come = rewards_to_come(rewards, mask, gamma=self.gamma)
        return _whitened(to_come, mask, add_over_ranks, self.divide_by_std, self.ddof), to_come


@dataclass(frozen=True)
class CentredBatchNormalised(Credit):
    """REINFORCE++-baseline: the score minus its group's mean, normalised over all answer tokens of all ranks.

        a_i = r_i - mean_group(r),     A_i = (a_i - mean_batch(a)) / sqrt(var_batch(a) + 1e-8)

    Mean and variance are over tokens: an answer counts as often as it is long, so the mean is not 0 in general and a
    group of equal scores gets a small advantage. Returns are scores.

    Args:
        divide_by_std: false takes the mean off alone.
        ddof: 0 divides the variance by n, 1 by n - 1 (verl).
    References:
        Hu et al., REINFORCE++, 2025. arXiv:2501.03262
    """

    needs_groups: ClassVar[bool] = True

    divide_by_std: bool = True
    ddof: int = 0

    def __post_init__(self) -> None:
        check_ddof(self.ddof)

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
        answers = answers_of(rewards, mask, groups)
        centred = spread(answers.scores - answers.group_mean(answers.scores), mask, rewards)
        whitened = _whitened(centred, mask, add_over_ranks, self.divide_by_std, self.ddof)
        return whitened, spread(answers.scores, mask, rewards)


@dataclass(frozen=True)
class ReMax(Credit):
    """ReMax: reward to come, minus what the greedy answer to the same prompt scores.

        A_t = sum_{s >= t} r_s - r(greedy answer)

    Needs one more answer per prompt, without sampling, and no groups. Returns are the rewards to come.

    References:
        Li et al., ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method, 2023, alg. 2.
        arXiv:2310.10505
    """

    baseline: ClassVar[CreditBaseline] = "greedy"

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
        to_come = rewards_to_come(rewards, mask)
        greedy = torch.where(mask, values, 0.0).sum(-1, keepdim=True)
        return torch.where(mask, to_come - greedy, 0.0), to_come


def rewards_to_come(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, gamma: float = 1.0
) -> Float[Tensor, "batch time"]:
    """Discounted sum of the rewards from each counted token on; 0 elsewhere.

    This is generalised advantage estimation with lam 1 and a critic that says 0: the same scan.
    """
    to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return torch.where(mask, to_come, 0.0)


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma={gamma} is outside of 0 to 1: give a fraction, such as 1")


def _whitened(
    x: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    add_over_ranks: Callable[[Tensor], Tensor],
    divide_by_std: bool,
    ddof: int,
) -> Float[Tensor, "batch time"]:
    moments = add_over_ranks(masked_moments(x, mask))
    if not divide_by_std:
        return masked_centre(x, mask, moments=moments)
    return masked_whiten(x, mask, moments=moments, ddof=ddof)
