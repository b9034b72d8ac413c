"""Losses on single completions that somebody called good or bad: KTO and its relatives."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Baseline, UnpairedLoss


def kto(
    log_ratios: Float[Tensor, " completions"],
    labels: Bool[Tensor, " completions"],
    kl: Float[Tensor, ""],
    *,
    beta: float,
) -> Float[Tensor, " completions"]:
    """Kahneman-Tversky optimisation: one minus the value of a gain or a loss, seen from where the policy stands now.

        desirable    1 - sigma(beta (log_ratio - KL))
        undesirable  1 - sigma(beta (KL - log_ratio))

    Args:
        log_ratios: log pi(y|x) - log pi_ref(y|x), summed over the completion's tokens (nats).
        labels: True = desirable.
        kl: how far the policy has moved from the reference, estimated on other completions; at least 0, no gradient.
        beta: how sharply value saturates; a higher one holds the policy nearer to the reference.
    References:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024, eq. 7 and 8. arXiv:2402.01306
    """
    signs = torch.where(labels, 1.0, -1.0)
    return torch.sigmoid(-beta * signs * (log_ratios - kl))  # 1 - sigma(z) = sigma(-z), exact where sigma(z) is near 1


def apo_zero_unpaired(
    log_ratios: Float[Tensor, " completions"], labels: Bool[Tensor, " completions"], *, beta: float
) -> Float[Tensor, " completions"]:
    """APO-zero for single completions: desirable ones become likelier than under the reference, the others less likely.

        desirable    1 - sigma(beta log_ratio)
        undesirable  sigma(beta log_ratio)

    KTO with a KL of 0: no mismatched completions are measured.

    References:
        D'Oosterlinck et al., Anchored Preference Optimization, 2024, eq. 7. arXiv:2408.06266
    """
    return kto(log_ratios, labels, log_ratios.new_zeros(()), beta=beta)


def bco(
    log_ratios: Float[Tensor, " completions"],
    labels: Bool[Tensor, " completions"],
    shift: Float[Tensor, ""],
    *,
    beta: float,
) -> Float[Tensor, " completions"]:
    """Binary classifier optimisation: logistic regression of the labels on the rewards that the policy implies.

        desirable    -log sigma(beta log_ratio - shift)
        undesirable  -log sigma(-(beta log_ratio - shift))

    Args:
        shift: delta, the reward between good and bad: a running mean of rewards, no gradient.
    References:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024. arXiv:2404.04656
    """
    signs = torch.where(labels, 1.0, -1.0)
    return -F.logsigmoid(signs * (beta * log_ratios - shift))


@dataclass(frozen=True)
class KTO(UnpairedLoss):
    """KTO: gains and losses measured from the policy's present distance to the reference, each saturating.

    Args:
        beta: how sharply value saturates; a higher one holds the policy nearer to the reference.
        desirable_weight: factor on the loss of desirable completions. With n desirable and m undesirable records, the
            paper asks for desirable_weight n / (undesirable_weight m) between 1 and 4/3.
        undesirable_weight: factor on the loss of undesirable completions.
    """

    baseline: ClassVar[Baseline] = "mismatched_kl"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.beta, self.desirable_weight, self.undesirable_weight)

    def __call__(
        self,
        log_ratios: Float[Tensor, " completions"],
        labels: Bool[Tensor, " completions"],
        baseline: Float[Tensor, ""],
    ) -> Float[Tensor, " completions"]:
        weights = _weights(labels, self.desirable_weight, self.undesirable_weight)
        return weights * kto(log_ratios, labels, baseline, beta=self.beta)


@dataclass(frozen=True)
class APOZeroUnpaired(UnpairedLoss):
    """APO-zero for single completions: KTO without the KL, so desirable completions end above the reference.

    Args:
        beta: how sharply value saturates.
        desirable_weight: factor on the loss of desirable completions.
        undesirable_weight: factor on the loss of undesirable completions.
    """

    baseline: ClassVar[Baseline] = "none"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.beta, self.desirable_weight, self.undesirable_weight)

    def __call__(
        self,
        log_ratios: Float[Tensor, " completions"],
        labels: Bool[Tensor, " completions"],
        baseline: Float[Tensor, ""],
    ) -> Float[Tensor, " completions"]:
        weights = _weights(labels, self.desirable_weight, self.undesirable_weight)
        return weights * apo_zero_unpaired(log_ratios, labels, beta=self.beta)


@dataclass(frozen=True)
class BCO(UnpairedLoss):
    """BCO: the policy's implied reward is trained as a classifier of good and bad.

    The shift between the classes is a running mean of the rewards over all optimiser steps before the present one (at
    first 0, which is what the rewards are then). Implementations differ: TRL's former BCOTrainer counted the present
    batch too. Underlying distribution matching (density-ratio weights of undesirable records) is not offered.

    Args:
        beta: factor from log-ratio to reward.
        desirable_weight: factor on the loss of desirable completions.
        undesirable_weight: factor on the loss of undesirable completions.
        balanced_shift: shift = half-way between the mean reward of desirable and that of undesirable completions (the
            paper's delta); False: the mean over all completions (TRL's), the same where both are equally many.
    """

    baseline: ClassVar[Baseline] = "mean_reward"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    balanced_shift: bool = True

    def __post_init__(self) -> None:
        _check(self.beta, self.desirable_weight, self.undesirable_weight)

    @property
    def balanced_baseline(self) -> bool:
        return self.balanced_shift

    def __call__(
        self,
        log_ratios: Float[Tensor, " completions"],
        labels: Bool[Tensor, " completions"],
        baseline: Float[Tensor, ""],
    ) -> Float[Tensor, " completions"]:
        weights = _weights(labels, self.desirable_weight, self.undesirable_weight)
        return weights * bco(log_ratios, labels, baseline, beta=self.beta)


def _weights(
    labels: Bool[Tensor, " completions"], desirable_weight: float, undesirable_weight: float
) -> Float[Tensor, " completions"]:
    return torch.where(labels, desirable_weight, undesirable_weight)


def _check(beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    if not beta > 0:
        raise UserError(f"beta={beta} leaves nothing to learn: give a positive number, such as 0.1")
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not value >= 0:
            raise UserError(f"{name}={value} would train towards the opposite: give 0 or more")
    if desirable_weight == undesirable_weight == 0:
        raise UserError("desirable_weight and undesirable_weight are both 0: nothing would be trained")
