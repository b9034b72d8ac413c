"""Generalised advantage estimation: credit from a critic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from rlhf_kernels import gae
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import NO_BREAKDOWN, Credit, CreditBaseline, on_one_rank


@dataclass(frozen=True)
class Gae(Credit):
    """Generalised advantage estimation: rewards to come, discounted, against what the critic expected.

        delta_t     = rewards_t + gamma values_{t+1} - values_t
        advantage_t = delta_t + gamma lam advantage_{t+1}
        return_t    = advantage_t + values_t          with critic_lam in place of lam, if given

    The value and the advantage after a sequence's last counted token are 0; tokens that do not count are stepped over.

    Args:
        gamma: discount per token; 1 for answers that end.
        lam: 0 trusts the critic's next value, 1 only the rewards that came.
        critic_lam: the lam of the critic's returns; null = lam. VAPO trains the critic on 1 and the policy on less.
    References:
        Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2015.
        arXiv:1506.02438
        Yuan et al., What's Behind PPO's Collapse in Long-CoT? (decoupled lam), 2025. arXiv:2503.01491
        Yue et al., VAPO, 2025. arXiv:2504.05118
    """

    baseline: ClassVar[CreditBaseline] = "critic"

    gamma: float = 1.0
    lam: float = 0.95
    critic_lam: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("lam", self.lam), ("critic_lam", self.critic_lam)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}={value} is outside of 0 to 1: Gae needs a fraction, such as 1 or 0.95")

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
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        if self.critic_lam is not None and self.critic_lam != self.lam:
            _, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.critic_lam)
        return advantages, returns
