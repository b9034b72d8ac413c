"""DPPO: a trust region in probabilities instead of ratios."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput
from rlhf_lightning.core.ratio import log_ratios
from rlhf_lightning.losses.policy import loss_of_form


@dataclass(frozen=True)
class Dppo(PolicyLoss):
    """DPPO: no gradient for a token whose probability has moved too far in the direction that its advantage pushes.

        loss_t = -sg(min(r_t, max_ratio)) A_t logprobs_t,  or 0 where A_t > 0, p_t > q_t and D_t > limit_high,
                                                           or A_t <= 0, p_t < q_t and D_t > limit_low
        tv: D = |p - q|     kl: D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))     (token against all others)

    with p the token's probability under the policy, q under the one that sampled. A ratio clip stops rare tokens at
    once and lets frequent ones lose most of their mass; a divergence does neither.

    Args:
        divergence: tv (total variation) or kl, between the two coins "this token or another".
        limit_low: largest divergence of a token that is pushed down; 0.15 for tv and 0.05 for kl are usual.
        limit_high: the same for a token that is pushed up.
        max_ratio: largest importance weight.
    References:
        Qi et al., Rethinking the Trust Region in LLM Reinforcement Learning, 2026. arXiv:2602.04879
    """

    divergence: Literal["tv", "kl"] = "tv"
    limit_low: float = 0.15
    limit_high: float = 0.15
    max_ratio: float = 20.0

    def __post_init__(self) -> None:
        for name, value in (("limit_low", self.limit_low), ("limit_high", self.limit_high)):
            if not value > 0:
                raise UserError(f"{name}={value} leaves no room for the policy: give a positive number, such as 0.15")
        if not self.max_ratio >= 1:
            raise UserError(f"max_ratio={self.max_ratio} would shrink on-policy gradients: give 1 or more, such as 20")

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        log_ratio = log_ratios(logprobs, old_logprobs, mask)
        moved = binary_divergence(logprobs.detach(), old_logprobs, self.divergence)
        up = (advantages > 0) & (log_ratio > 0) & (moved > self.limit_high)
        down = (advantages <= 0) & (log_ratio < 0) & (moved > self.limit_low)
        stopped = up | down
        kept = torch.where(stopped, 0.0, advantages)
        # CISPO's weight without a lower bound
        out = loss_of_form("cispo", logprobs, log_ratio, kept, clip_low=1.0, clip_high=self.max_ratio - 1)
        return PolicyLossOutput(per_token=out.per_token, ratio=out.ratio, clipped=stopped)


def binary_divergence(
    logprobs: Float[Tensor, "batch time"], old_logprobs: Float[Tensor, "batch time"], kind: Literal["tv", "kl"]
) -> Float[Tensor, "batch time"]:
    """Divergence of (q, 1 - q) from (p, 1 - p), p = exp(logprobs), q = exp(old_logprobs); kl is KL(q || p)."""
    p, q = logprobs.exp(), old_logprobs.exp()
    if kind == "tv":
        return (p - q).abs()
    tiny = 1e-8  # what is left of a probability of 1
    other, old_other = ((1 - x).clamp(min=0) for x in (p, q))  # rounding leaves certain tokens a little above 1
    return q * (old_logprobs - logprobs) + old_other * ((old_other + tiny) / (other + tiny)).log()
