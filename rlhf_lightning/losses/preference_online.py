"""Losses on pairs of which one answer was drawn by the policy and one by another model: XPO, Nash-MD."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Need, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.preference import DPO, LossAroundAnother, check_beta, margins_of, output_of


@dataclass(frozen=True)
class XPO(LossAroundAnother):
    """Exploratory preference optimisation: a preference loss, and what the reference would say made less likely.

        loss = preference loss + alpha log pi(y_ref|x),   y_ref drawn from the reference

    At fixed preferences this raises the value that DPO's implicit reward promises the policy away from the reference:
    optimism, and with it exploration. Without it the policy learns only about what it already says.

    Args:
        alpha: how much optimism, in units of the loss per nat (the paper's coefficient; 0 is online DPO).
        loss: the preference loss; DPO in the paper.

    References:
        Xie et al., Exploratory Preference Optimization, 2024, algorithm 1. arXiv:2405.21046
    """

    alpha: float = 1e-5
    loss: PreferenceLoss = DPO()

    def __post_init__(self) -> None:
        check_beta(self.alpha, "alpha")

    @property
    def needs(self) -> frozenset[Need]:
        opponent: frozenset[Need] = frozenset({"opponent"})
        return super().needs | opponent

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        output = self.loss(pairs)
        totals = torch.stack((pairs.chosen.total, pairs.rejected.total), dim=-1)
        optimism = torch.where(own_answers(pairs, "XPO"), 0.0, totals).sum(-1)
        return replace(output, per_pair=output.per_pair + self.alpha * optimism)


@dataclass(frozen=True)
class NashMD(PreferenceLoss):
    """Nash mirror descent: a policy gradient on being preferred to a mixture of oneself and the reference.

        loss = -sg(P(y > y') - 1/2 - kl_coef log pi(y|x)/pi_ref(y|x)) log pi(y|x),   y ~ pi,   y' ~ pi^(1-m) pi_ref^m

    with m the opponent's `reference_share`. Only the policy's own answer is trained. Its fixed point is the Nash
    equilibrium of the preference game with a KL penalty of kl_coef to the reference. Pairs that score the same are
    dropped, and with them the pull of their KL.

    Args:
        kl_coef: the paper's tau.
        preference: P of the preferred answer. `hard`: 1; `bradley_terry`: sigma(difference of the two scores).

    References:
        Munos et al., Nash Learning from Human Feedback, 2023, sections 6 and 7. arXiv:2312.00886
    """

    kl_coef: float = 0.1
    preference: Literal["hard", "bradley_terry"] = "hard"

    def __post_init__(self) -> None:
        check_beta(self.kl_coef, "kl_coef")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "opponent"})

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        own = own_answers(pairs, "NashMD")
        totals = torch.stack((pairs.chosen.total, pairs.rejected.total), dim=-1)
        log_ratios = torch.stack((pairs.chosen.log_ratio, pairs.rejected.log_ratio), dim=-1).detach()
        ones = torch.ones_like(log_ratios[:, 0])
        wins = ones if self.preference == "hard" else torch.sigmoid(margins_of(pairs))
        preferred = torch.stack((wins, 1 - wins), dim=-1)
        advantages = preferred - 0.5 - self.kl_coef * log_ratios
        loss = torch.where(own, -advantages * totals, 0.0).sum(-1)
        return output_of(loss, self.kl_coef * log_ratios[:, 0], self.kl_coef * log_ratios[:, 1])


def own_answers(pairs: PairScores, name: str) -> Bool[Tensor, "pairs 2"]:
    """Which answers the policy drew itself.

    Raises:
        UserError: nobody knows.
    """
    if pairs.own is None:
        raise UserError(
            f"{name} asks which answer of a pair the policy drew itself, and records do not say: use OnlineDPOModule "
            "with an opponent"
        )
    return pairs.own
