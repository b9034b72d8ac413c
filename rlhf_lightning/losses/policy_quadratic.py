"""DRO: a pull back to the policy that sampled instead of a bound."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput
from rlhf_lightning.core.ratio import log_ratios


@dataclass(frozen=True)
class Dro(PolicyLoss):
    """Direct reward optimisation with the advantage in place of a learnt value, per token.

        loss_t = -A_t logprobs_t + beta / 2 (logprobs_t - old_logprobs_t)^2

    Its gradient vanishes where the log-ratio is A_t / beta: nothing is cut off, so answers of an older policy still
    teach. On-policy it is REINFORCE's. As verl's `dro` has it: the paper's squares are over whole answers.

    Args:
        beta: strength of the pull.
    References:
        Richemond et al., Offline Regularised Reinforcement Learning for Large Language Models Alignment, 2024.
        arXiv:2405.19107
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(
                f"beta={self.beta} would not hold the policy near the one that sampled: give 0.1, or Reinforce"
            )

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        log_ratio = log_ratios(logprobs, old_logprobs, mask)
        per_token = -advantages * logprobs + 0.5 * self.beta * log_ratio.square()
        return PolicyLossOutput(per_token, log_ratio.detach().exp(), torch.zeros_like(mask))
