"""Policy losses on the ratio of the whole answer that are no clipped surrogate: GMPO, VESPO."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput
from rlhf_lightning.core.ratio import MAX_LOG_RATIO, log_ratios
from rlhf_lightning.losses.policy import loss_of_form

MIN_LOG_WEIGHT = math.log(1e-8)
"""VESPO's weights below 1e-8 count as 1e-8."""


def geometric_mean_surrogate(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLossOutput:
    """GMPO: the geometric mean of clipped token ratios, at each token of the answer.

        c_t    = min(d_t, clip(d_t, -clip_low, clip_high)) if A_t > 0 else max(...),   d_t = logprobs_t - old_logprobs_t
        loss_t = -A_t exp(mean_s c_s)

    Returns:
        `ratio` is the geometric mean; `clipped` says which tokens' log-ratios were held.
    """
    difference = log_ratios(logprobs, old_logprobs, mask)
    held = difference.clamp(-clip_low, clip_high)
    kept = torch.where(advantages > 0, torch.minimum(difference, held), torch.maximum(difference, held))
    mean = kept.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(difference)
    return PolicyLossOutput(per_token=-advantages * ratio, ratio=ratio.detach(), clipped=mask & (kept != difference))


@dataclass(frozen=True)
class Gmpo(PolicyLoss):
    """GMPO: the geometric mean of the answer's clipped token ratios in place of their arithmetic mean.

        loss = -A exp(mean_t c_t),     c_t = d_t, clipped as PPO clips, but in log space

    An outlier among the ratios moves the geometric mean little, so the bounds may be wide. Goes with the reduction
    `sequence_mean`. Advantages are taken to be the same all over the answer, as `advantages.group` gives them.

    Args:
        clip_low: how far a token's log-ratio may fall below 0; a bound of exp(-clip_low) on the ratio.
        clip_high: how far it may rise above 0.
    References:
        Zhao et al., Geometric-Mean Policy Optimization, 2025. arXiv:2507.20673
    """

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not value > 0:
                raise UserError(f"{name}={value} leaves no room for the log-ratio: give a positive number, such as 0.4")

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return geometric_mean_surrogate(logprobs, old_logprobs, advantages, mask, **bounds)


@dataclass(frozen=True)
class Vespo(PolicyLoss):
    """VESPO: REINFORCE, weighted by a smooth bump in the ratio of the whole answer.

        w      = exp(sum_t (logprobs_t - old_logprobs_t)), within 1e-8 and exp(20)
        phi    = w^k exp(lambda (1 - w)),     k, lambda by the sign of A_t; phi = 1 at w = 1
        loss_t = -sg(phi) A_t logprobs_t

    The weight peaks at w = k / lambda and falls to 0 on both sides. Goes with the reduction `token_mean`. TRL
    multiplies w by its train-inference ratio too; here that correction is a weight on the loss, as for all losses.

    Args:
        k_pos: how fast the weight falls towards w = 0, where the advantage is 0 or more.
        lambda_pos: how fast it falls towards large w.
        k_neg: the same where the advantage is negative.
        lambda_neg: the same where the advantage is negative.
    References:
        VESPO: Variational Sequence-Level Soft Policy Optimization, 2026. arXiv:2602.10693
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(f"{name}={value} lets the weight grow without bound: give a positive number")

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        difference = log_ratios(logprobs, old_logprobs, mask).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        log_weight = difference.sum(-1, keepdim=True).clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO).expand_as(difference)
        good = advantages >= 0
        k = torch.where(good, self.k_pos, self.k_neg)
        rate = torch.where(good, self.lambda_pos, self.lambda_neg)
        phi = (k * log_weight + rate * (1 - log_weight.exp())).exp()
        return loss_of_form("reinforce", logprobs, log_weight, advantages * phi)
