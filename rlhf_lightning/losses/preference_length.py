"""Preference losses against length bias: a penalty on length; tokens beyond the shorter answer's length set back."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.preference import DPO, LossAroundAnother, check_beta, logistic, output_of


@dataclass(frozen=True)
class RDPO(PreferenceLoss):
    """DPO for a reward less a penalty on length: what is longer must be better by more.

        r(x, y) = beta log pi(y|x)/pi_ref(y|x) + alpha |y|;   loss = -log sigma(r_w - r_l)

    It is DPO on E[r - alpha |y|] - beta KL: the part of a preference that length explains is not learnt.

    Args:
        beta: strength of the pull to the reference.
        alpha: reward per token that labels are believed to give (0.005 to 0.05).

    References:
        Park et al., Disentangling Length from Quality in Direct Preference Optimization, 2024. arXiv:2403.19159
    """

    beta: float = 0.1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_beta(self.alpha, "alpha")

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = self.beta * pairs.chosen.log_ratio + self.alpha * pairs.chosen.lengths
        rejected = self.beta * pairs.rejected.log_ratio + self.alpha * pairs.rejected.lengths
        return output_of(logistic(chosen - rejected), chosen, rejected)


@dataclass(frozen=True)
class LDDPO(LossAroundAnother):
    """Length-desensitised DPO: tokens beyond the length of the pair's shorter answer count `alpha` times.

        log pi(y|x) := sum_{t <= m} log pi_t + alpha sum_{t > m} log pi_t,   m = min(|y_w|, |y_l|)

    for policy and reference, in any loss. At alpha = 1 it is that loss, at 0 only the shared length counts.

    Args:
        alpha: weight of the longer answer's rest, from 0 to 1.
        loss: the loss that is made of them.

    References:
        Liu et al., Length Desensitization in Direct Preference Optimization, 2024. arXiv:2409.06411
    """

    alpha: float = 0.5
    loss: PreferenceLoss = DPO()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha} is the weight of tokens beyond the shorter answer: give 0 to 1")

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        shared = torch.minimum(pairs.chosen.mask.sum(-1), pairs.rejected.mask.sum(-1))
        return self.loss(
            pairs.with_completions(self._desensitised(pairs.chosen, shared), self._desensitised(pairs.rejected, shared))
        )

    def _desensitised(self, scores: CompletionScores, shared: Tensor) -> CompletionScores:
        within = scores.mask.cumsum(-1) <= shared.unsqueeze(-1)
        weights: Float[Tensor, "rows time"] = torch.where(within, 1.0, self.alpha)
        return scores.weighted(weights)
