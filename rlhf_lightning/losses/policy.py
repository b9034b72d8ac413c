"""The clipped policy loss of PPO and its relatives."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: no policy that far from its sampler learns anything, and exp cannot overflow into 0 * inf = NaN."""


def clipped_surrogate(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLossOutput:
    """PPO's clipped surrogate objective, negated, per token.

        r_t    = exp(logprobs_t - old_logprobs_t)
        loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        loss_t = min(loss_t, -dual_clip A_t)  where A_t < 0, if dual_clip is given

    Args:
        logprobs: of the sampled tokens, under the policy being trained (nats).
        old_logprobs: of the same tokens, under the policy that sampled them; no gradient.
        advantages: credit of each token; no gradient.
        clip_low: how far the ratio may fall below 1 before its gradient stops.
        clip_high: how far it may rise above 1 before its gradient stops; larger than `clip_low` lets rare tokens grow.
        dual_clip: the ratio above which a token of negative advantage gives no more gradient; None = no such bound.
    Returns:
        Loss per token, the ratio, and where a bound stopped the gradient. Masking and averaging are the caller's: see
        `core.masked.reduce_tokens`.
    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017, eq. 7. arXiv:1707.06347
        Ye et al., Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (dual clip), 2019.
        arXiv:1912.09729
        Yu et al., DAPO (clip_high > clip_low), 2025. arXiv:2503.14476
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = torch.exp(log_ratio)
    gained = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(gained, bounded)
    clipped = bounded < gained
    if dual_clip is not None:
        floor = dual_clip * advantages
        over = (advantages < 0) & (objective < floor)
        objective = torch.where(over, floor, objective)
        clipped = clipped | over
    return PolicyLossOutput(per_token=-objective, ratio=ratio.detach(), clipped=clipped)


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """PPO's policy loss: no gradient once the ratio to the sampling policy has left the trust region.

    Args:
        clip_low: how far the ratio may fall below 1 before its gradient stops (PPO: 0.2).
        clip_high: how far it may rise above 1 before its gradient stops (PPO: 0.2; DAPO: 0.28).
        dual_clip: largest ratio that a token of negative advantage is pushed down from (3 is usual); null = no bound.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if not self.clip_low > 0:
            raise UserError(
                f"clip_low={self.clip_low} leaves no room for the ratio: give a positive number, such as 0.2"
            )
        if not self.clip_high > 0:
            raise UserError(
                f"clip_high={self.clip_high} leaves no room for the ratio: give a positive number, such as 0.2"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(
                f"dual_clip={self.dual_clip} would stop the gradient at the start: give more than 1, such as 3, or null"
            )

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        return clipped_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
