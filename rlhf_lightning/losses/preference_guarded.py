"""DPO with a guard against what it does to probabilities: falling chosen answers, over-optimisation, drifting KL."""

from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, Need, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.divergence import ChiSquaredKL
from rlhf_lightning.losses.preference import Pairs, check_beta, implicit_rewards, logistic, output_of


@dataclass(frozen=True)
class DPOP(PreferenceLoss):
    """DPO-positive (Smaug): a penalty where the chosen answer became less likely than under the reference.

        loss = -log sigma(beta (h - penalty max(0, log pi_ref(y_w|x) - log pi(y_w|x))))

    Args:
        beta: strength of the pull to the reference (the paper: 0.3).
        penalty: the paper's lambda (5 to 50).

    References:
        Pal et al., Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, 2024.
        arXiv:2402.13228
    """

    beta: float = 0.3
    penalty: float = 50.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_beta(self.penalty, "penalty")

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        log_ratio = pairs.chosen.log_ratio
        chosen = self.beta * (log_ratio - self.penalty * (-log_ratio).clamp(min=0))
        rejected = self.beta * pairs.rejected.log_ratio
        return output_of(logistic(chosen - rejected), chosen, rejected)


@dataclass(frozen=True)
class ChiPO(PreferenceLoss):
    """DPO under chi-squared and KL together, which pays ever less for answers far from the reference.

        d = beta (u_w + log u_w - u_l - log u_l),  u = pi/pi_ref;   loss = -log sigma(clip(d, -2 R, 2 R))

    Args:
        beta: strength of the pull to the reference.
        reward_bound: R, the largest reward believed possible: no gradient beyond a difference of 2 R; null: no bound.

    References:
        Huang et al., Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via
        Chi-Squared Preference Optimization, 2024. arXiv:2407.13399
    """

    beta: float = 0.1
    reward_bound: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.reward_bound is not None:
            check_beta(self.reward_bound, "reward_bound")

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, ChiSquaredKL())
        rejected = implicit_rewards(pairs.rejected, self.beta, ChiSquaredKL())
        difference = chosen - rejected
        if self.reward_bound is not None:
            difference = difference.clamp(-2 * self.reward_bound, 2 * self.reward_bound)
        return output_of(logistic(difference), chosen, rejected)


@dataclass(frozen=True)
class TDPO(PreferenceLoss):
    """Token-level DPO: the forward KL along each answer is part of the comparison, and stays balanced.

        D(y) = sum_t KL(pi_ref(.|x, y_<t) || pi(.|x, y_<t))          exact, over the whole vocabulary
        version 1   loss = -log sigma(beta h - beta (D(y_l) - D(y_w)))
        version 2   loss = -log sigma(beta h - alpha beta (D(y_l) - D(y_w))),  no gradient through D(y_w)

    Args:
        beta: strength of the pull to the reference.
        alpha: weight of the KL in version 2 (the paper: 0.5).
        version: of the paper's two losses.

    References:
        Zeng et al., Token-level Direct Preference Optimization, 2024. arXiv:2404.11999
    """

    beta: float = 0.1
    alpha: float = 0.5
    version: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_beta(self.alpha, "alpha")
        if self.version == 1 and self.alpha != 0.5:
            raise UserError(f"alpha={self.alpha} does nothing with version=1: leave it out, or use version=2")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "ref_kl"})

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio
        chosen_kl, rejected_kl = _sequence_kl(pairs.chosen), _sequence_kl(pairs.rejected)
        if self.version == 1:
            offset = self.beta * (rejected_kl - chosen_kl)
        else:
            offset = self.alpha * self.beta * (rejected_kl - chosen_kl.detach())
        return output_of(logistic(chosen - rejected - offset), chosen, rejected)


def _sequence_kl(scores: CompletionScores) -> Pairs:
    assert scores.ref_kl is not None, "the stage measures it for losses that need it"
    return torch.where(scores.mask, scores.ref_kl, 0.0).sum(-1)
