"""A baseline for every token: the one of least variance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.advantages.answers import answers_of
from rlhf_lightning.advantages.per_token import rewards_to_come
from rlhf_lightning.core.interfaces import NO_BREAKDOWN, Credit, CreditBaseline, on_one_rank


@dataclass(frozen=True)
class OptimalTokenBaseline(Credit):
    """OTB: rewards to come, minus their mean over the group, weighted by how much each answer's gradient has varied.

        A_it = G_it - sum_j W_jt G_jt / sum_j W_jt,     W_it = sum_{s <= t} (1 - 2 pi(y_is) + sum_v pi_is(v)^2)

    over the answers of the group that have a t-th token; G are the rewards to come. The bracket is the squared length
    of the gradient of log pi with respect to the logits. An answer that is alone in its group gets 0 (verl: its score).
    Needs the policy's own probabilities: one more forward pass of it. Under the stage's `correction` the bracket is
    multiplied by the square of the token's weight, as its gradient is by the weight. Returns are the rewards to come.

    Args:
        uncompared: of tokens that no other answer of the group is long enough for: zero, or score, what is to come
            (verl's handle_zero_tail).
    References:
        Li et al., The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL, 2026. arXiv:2602.07078
    """

    needs_groups: ClassVar[bool] = True
    baseline: ClassVar[CreditBaseline] = "variance"

    uncompared: Literal["zero", "score"] = "zero"

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
        group_sum = answers_of(rewards, mask, groups).group_sum
        to_come = rewards_to_come(rewards, mask)
        counted = mask.double()
        weights = (values.double() * counted).cumsum(-1) * counted
        total = group_sum(weights)
        # certain of every token so far: then none of them has a gradient, whatever the advantage is
        mean = group_sum(weights * to_come) / torch.where(total > 0, total, 1.0)
        others = group_sum(counted) > 1
        alone = group_sum(mask.any(-1, keepdim=True).double()) <= 1
        compared = torch.where(total > 0, to_come - mean, 0.0)
        rest = to_come if self.uncompared == "score" else torch.zeros_like(to_come)
        advantages = torch.where(others, compared, torch.where(alone, 0.0, rest.double()))
        return torch.where(mask, advantages, 0.0).to(rewards), to_come
