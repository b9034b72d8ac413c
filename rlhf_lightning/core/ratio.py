"""Importance ratios of policies, from log-probabilities, kept where float32 can hold them."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: no policy that far from its sampler learns anything, and exp cannot overflow into 0 * inf = NaN."""

RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_sum"]


def bounded_exp(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp of a log-ratio held within +-20; no gradient beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def log_ratios(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    level: RatioLevel = "token",
) -> Float[Tensor, "batch time"]:
    """Log of the ratio of two policies at each token, or of each whole answer at each of its tokens.

        token           d_t = logprobs_t - old_logprobs_t
        sequence        mean_t d_t               geometric mean of the token ratios (GSPO; TRL's level "sequence")
        sequence_token  mean_t d_t as a value, with the gradient of each token's own log-probability (GSPO-token)
        sequence_sum    sum_t d_t                the ratio of the answers' probabilities (TRL's RLOO)

    Returns:
        Not bounded; 0 at tokens that do not count, except the answer's value there.
    References:
        Zheng et al., Group Sequence Policy Optimization, 2025, eqs. 7 and 14. arXiv:2507.18071
    """
    difference = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    if level == "token":
        return difference
    total = difference.sum(-1, keepdim=True)
    if level == "sequence_sum":
        return total.expand_as(difference)
    mean = total / mask.sum(-1, keepdim=True).clamp(min=1)
    if level == "sequence":
        return mean.expand_as(difference)
    if level == "sequence_token":
        return mean.detach() + (difference - difference.detach())
    raise ValueError(f"unknown ratio {level!r}: use token, sequence, sequence_token or sequence_sum")
