"""From scores per sequence to rewards per token: end-token rule, scaling, clipping, KL."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kl import KLEstimator, kl_estimate


def kl_shaped_rewards(
    scores: Float[Tensor, " batch"],
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kl_coef: float,
    estimator: KLEstimator = "k1",
    bound: float | None = None,
    token_rewards: Float[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Reward of each token: the KL penalty on the way, the sequence's score at its end.

        rewards_t = -kl_coef kl_t [+ token_rewards_t] + (scores if t is the last token that counts)

    Args:
        scores: one number per sequence. Put on the last True of `mask`, which is the end token if the answer has one;
            never on padding. A sequence without any counted token gets no reward.
        logprobs: of the sampled tokens, under the policy that sampled them; no gradient.
        ref_logprobs: of the same tokens, under the reference.
        kl_coef: price of a nat of KL.
        estimator: of the KL: k1 is unbiased, and what the KL-regularised objective asks for.
        bound: hold the KL of a token within +-bound; None: it is not held.
        token_rewards: rewards that belong to single tokens, in addition to `scores`.
    Returns:
        Rewards and KL per token, both 0 where `mask` is False.
    References:
        Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, eq. 2. arXiv:1909.08593
    """
    zero = torch.zeros_like(logprobs)
    kl = torch.where(mask, kl_estimate(logprobs, ref_logprobs, estimator, bound=bound), zero)
    rewards = -kl_coef * kl
    if token_rewards is not None:
        rewards = rewards + torch.where(mask, token_rewards, zero)
    return rewards + torch.where(_is_last(mask), scores.unsqueeze(-1), zero), kl


def missing_eos_penalty(
    scores: Float[Tensor, " batch"],
    finished: Bool[Tensor, " batch"],
    *,
    subtract: float = 0.0,
    factor: float = 1.0,
    replace_by: float | None = None,
) -> Float[Tensor, " batch"]:
    """Lower scores for answers that ran into the length limit, so that the policy learns to end.

    Args:
        finished: True where the answer ended by itself, with an end token or a stop string.
        subtract: what an unfinished answer loses.
        factor: what its score is multiplied by first (1: nothing; 0: no score); below 1 it also softens a bad score.
        replace_by: if given, the score of every unfinished answer, whatever the reward function said (-1 is usual).
    References:
        Ziegler et al., 2019 (fixed score). arXiv:1909.08593
        Huang et al., The N+ Implementation Details of RLHF with PPO, 2024. arXiv:2403.17031
        Liu et al., ProRL (multiplied: OpenRLHF's stop_properly_penalty_coef), 2025. arXiv:2505.24864
    """
    unfinished = scores * factor - subtract if replace_by is None else torch.full_like(scores, replace_by)
    return torch.where(finished, scores, unfinished)


def soft_overlong_punishment(lengths: Int[Tensor, " batch"], *, max_length: int, cache: int) -> Float[Tensor, " batch"]:
    """What an answer near the length limit loses: nothing at first, then linearly more, 1 at the limit.

        0 if length <= max_length - cache, else (max_length - cache - length) / cache, but not below -1

    To be added to the score. verl's version is not bounded below, and has a factor.

    Args:
        lengths: of the answers, in tokens.
        max_length: the length at which the whole point is lost (DAPO: 20480).
        cache: how many tokens before that the punishment begins (DAPO: 4096).
    References:
        Yu et al., DAPO, 2025, eq. 13. arXiv:2503.14476
    """
    if not 0 < cache <= max_length:
        raise UserError(f"cache={cache} is no stretch before max_length={max_length}: give 1 to {max_length}")
    return ((max_length - cache - lengths.float()) / cache).clamp(-1, 0)


def overlong_mask(mask: Bool[Tensor, "batch time"], finished: Bool[Tensor, " batch"]) -> Bool[Tensor, "batch time"]:
    """The tokens that carry a loss when answers that were cut off do not: their advantage says nothing about them.

    They stay in their group for the credit, as in DAPO and in TRL's `mask_truncated_completions`.

    Args:
        mask: True on the tokens of the answers.
        finished: True where the answer ended by itself.
    References:
        Yu et al., DAPO (overlong filtering), 2025. arXiv:2503.14476
    """
    return mask & finished.unsqueeze(-1)


Limit = float | tuple[float, float]
"""How far numbers may go: c for -c to c, or both ends."""


def ends_of(limit: Limit, name: str = "limit") -> tuple[float, float]:
    """Both ends of a limit.

    Raises:
        UserError: nothing lies between them.
    """
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    if not low < high:
        raise UserError(f"{name}={limit} leaves room for no number: give a positive one, or [low, high]")
    return low, high


def clip_scores(scores: Float[Tensor, "*shape"], limit: Limit) -> Float[Tensor, "*shape"]:
    """Scores held within the limit."""
    return scores.clamp(*ends_of(limit))


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and spread of all numbers seen so far. Each update gives a new object."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    @property
    def var(self) -> float:
        """Population variance (divided by n, not n - 1); 0 before anything was seen."""
        return self.squares / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.var)

    @classmethod
    def of(cls, x: Float[Tensor, "*shape"]) -> "RunningMoments":
        """The moments of `x` alone."""
        if x.numel() == 0:
            return cls()
        exact = x.detach().double()
        mean = exact.mean()
        return cls(count=float(x.numel()), mean=mean.item(), squares=(exact - mean).square().sum().item())

    def update(self, x: Float[Tensor, "*shape"]) -> "RunningMoments":
        """With every entry of `x` added: those of all ranks, if there are several."""
        return self.merge(RunningMoments.of(x))

    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """As if both had been seen by one; the order makes no difference.

        References:
            Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
        """
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + difference * other.count / count,
            squares=self.squares + other.squares + difference**2 * self.count * other.count / count,
        )

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, float]) -> "RunningMoments":
        return cls(**state)


def scale_scores(
    scores: Float[Tensor, "*shape"], moments: RunningMoments, *, shift_mean: bool = False
) -> Float[Tensor, "*shape"]:
    """Scores divided by the standard deviation of all scores so far.

        y = scores / std, or (scores - mean) / std if shift_mean

    Args:
        moments: with these scores already in them. A standard deviation of 0 leaves the scale as it is.
        shift_mean: whether to take the mean off too.
    References:
        Engstrom et al., Implementation Matters in Deep Policy Gradients, 2020. arXiv:2005.12729
    """
    centred = scores - moments.mean if shift_mean else scores
    return centred / (moments.std or 1.0)


def _is_last(mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """True at the last True of each row; nowhere in a row without one."""
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, -1).amax(-1, keepdim=True)
    return index == last
