"""Policy losses that spare the few tokens that cost entropy most: Clip-Cov, KL-Cov.

Both look at each token's covariance term, (A_t - mean A)(logprobs_t - mean logprobs). The means, and the number of
tokens that are picked, are those of the sequences of one forward pass, as in the authors' code: the only losses here
that depend on the micro-batch size.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput
from rlhf_lightning.core.masked import masked_mean
from rlhf_lightning.losses.policy import clipped_surrogate


@dataclass(frozen=True)
class ClipCov(PolicyLoss):
    """Clip-Cov: the clipped surrogate, without the gradient of a few tokens of high covariance, drawn at random.

        loss_t = 0 for frac of all tokens, drawn from those within the bounds and with cov_low < cov_t < cov_high

    The draw is a hash of the token's `old_logprobs`: the same at every epoch on a rollout, on every rank and after a
    resume. At least one token is drawn where there are candidates.

    Args:
        clip_low: how far the ratio may fall below 1 before its gradient stops.
        clip_high: how far it may rise above 1.
        frac: share of the tokens that is spared (the paper: 2e-4 for 32B, 2e-3 for 7B).
        cov_low: smallest covariance of a candidate.
        cov_high: largest.
    References:
        Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, 2025.
        arXiv:2505.22617
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    frac: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0

    @property
    def whole_batch(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _check_frac(self.frac)
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not value > 0:
                raise UserError(f"{name}={value} leaves no room for the ratio: give a positive number, such as 0.2")
        if not self.cov_low < self.cov_high:
            raise UserError(f"cov_low={self.cov_low} is not below cov_high={self.cov_high}: no token is in between")

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        out = clipped_surrogate(logprobs, old_logprobs, advantages, **bounds)
        covariance = _covariance(logprobs, advantages, mask)
        candidates = mask & ~out.clipped & (covariance > self.cov_low) & (covariance < self.cov_high)
        lots = torch.where(candidates, _lots(old_logprobs), -1.0)
        spared = candidates & (_rank_from_top(lots) < _count(mask, self.frac))
        per_token = torch.where(spared, 0.0, out.per_token)
        return PolicyLossOutput(per_token=per_token, ratio=out.ratio, clipped=out.clipped | spared)


@dataclass(frozen=True)
class KlCov(PolicyLoss):
    """KL-Cov: the importance-weighted objective, with a KL penalty on the tokens of highest covariance.

        loss_t = -r_t A_t  [+ kl_coef |logprobs_t - old_logprobs_t|  for the frac of tokens with the largest cov_t]

    No bound on the ratio. The penalty is to the policy that sampled, so the first step on a rollout is REINFORCE.

    Args:
        kl_coef: weight of the penalty.
        frac: share of the tokens that pays it (the paper: 2e-4 for 32B, 2e-3 for 7B); at least one does.
    References:
        Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, 2025.
        arXiv:2505.22617
    """

    kl_coef: float = 1.0
    frac: float = 2e-4

    @property
    def whole_batch(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _check_frac(self.frac)
        if not self.kl_coef > 0:
            raise UserError(f"kl_coef={self.kl_coef} leaves nothing of KL-Cov: give a positive number, such as 1")

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        out = clipped_surrogate(logprobs, old_logprobs, advantages, clip_low=math.inf, clip_high=math.inf)
        covariance = torch.where(mask, _covariance(logprobs, advantages, mask), -math.inf)
        heavy = mask & (_rank_from_top(covariance) < _count(mask, self.frac))
        penalty = self.kl_coef * (logprobs - old_logprobs).abs()
        per_token = out.per_token + torch.where(heavy, penalty, 0.0)
        return PolicyLossOutput(per_token=per_token, ratio=out.ratio, clipped=out.clipped)


def _covariance(
    logprobs: Float[Tensor, "batch time"], advantages: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Each token's part in the covariance of log-probability and advantage; used to compare tokens, never as a loss."""
    return (advantages - masked_mean(advantages, mask)) * (logprobs - masked_mean(logprobs, mask))


def _count(mask: Bool[Tensor, "batch time"], frac: float) -> Int[Tensor, ""]:
    """How many tokens that share is, at least one; stays on the device."""
    return (mask.sum() * frac).long().clamp(min=1)


def _rank_from_top(x: Float[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """0 at the largest entry, 1 at the next, ...; of equal ones the earlier comes first."""
    order = x.flatten().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device)).view(x.shape)


def _lots(logprobs: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """A number from 0 to 1 out of the last digits of each entry: a draw without a generator."""
    return ((logprobs.double() * 1e6).frac().abs() * 999983).frac().to(logprobs.dtype)


def _check_frac(frac: float) -> None:
    if not 0 < frac <= 1:
        raise UserError(f"frac={frac} is no share of the tokens: give more than 0 and at most 1, such as 0.0002")
