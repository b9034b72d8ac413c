"""Preference losses that judge each answer on its own against the reference, rather than the difference of the two."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.preference import check_beta, output_of

Pairs = Float[Tensor, " pairs"]


def noise_contrastive(chosen_rewards: Pairs, rejected_rewards: Pairs) -> Pairs:
    """NCA with two answers, per pair: chosen is raised against both, so that its likelihood does not fall.

        loss = -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l)

    References:
        Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, 2024. arXiv:2402.05369
    """
    raised = -F.logsigmoid(chosen_rewards)
    return raised - 0.5 * F.logsigmoid(-chosen_rewards) - 0.5 * F.logsigmoid(-rejected_rewards)


def binary_classifier(chosen_rewards: Pairs, rejected_rewards: Pairs, *, shift: float | Tensor = 0.0) -> Pairs:
    """BCO's two classifications, per pair: chosen as good, rejected as bad.

        loss = -log sigma(r_w - shift) - log sigma(-(r_l - shift))

    References:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024. arXiv:2404.04656
    """
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(-(rejected_rewards - shift))


def self_play_preference(chosen_log_ratios: Pairs, rejected_log_ratios: Pairs, *, beta: float) -> Pairs:
    """SPPO's squared error with win probabilities of 1 and 0, per pair.

        loss = (log u_w - 1 / (2 beta))^2 + (log u_l + 1 / (2 beta))^2

    References:
        Wu et al., Self-Play Preference Optimization for Language Model Alignment, 2024, eq. 4.7. arXiv:2405.00675
    """
    return (chosen_log_ratios - 0.5 / beta).square() + (rejected_log_ratios + 0.5 / beta).square()


def anchored_zero(chosen_rewards: Pairs, rejected_rewards: Pairs) -> Pairs:
    """APO-zero, per pair: chosen up, rejected down. For answers better than the policy's own.

        loss = 1 - sigma(r_w) + sigma(r_l)

    References:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024, eq. 7. arXiv:2408.06266
    """
    return torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)


def anchored_down(chosen_rewards: Pairs, rejected_rewards: Pairs) -> Pairs:
    """APO-down, per pair: both down, rejected further. For chosen answers worse than the policy's own.

        loss = sigma(r_w) + 1 - sigma(r_w - r_l)

    References:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024, eq. 8. arXiv:2408.06266
    """
    return torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)


@dataclass(frozen=True)
class NCAPair(PreferenceLoss):
    """Noise contrastive alignment with two answers: see `noise_contrastive`.

    Args:
        beta: strength of the pull to the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio
        return output_of(noise_contrastive(chosen, rejected), chosen, rejected)


@dataclass(frozen=True)
class BCOPair(PreferenceLoss):
    """Binary classifier optimisation on pairs: see `binary_classifier`.

    The paper shifts both rewards by their mean. Here it is the running mean over the optimiser steps before this one,
    all pairs of a step with equal weight whatever its micro-batches and ranks, so that the loss does not depend on how
    a step was cut; 0 at first, where all rewards are 0.

    Args:
        beta: strength of the pull to the reference.
        shift_decay: d of the running mean, mean <- d mean + (1 - d) mean of the step's chosen and rejected rewards;
            null: no shift (TRL's bco_pair).
    """

    beta: float = 0.1
    shift_decay: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.shift_decay is not None:
            check_decay(self.shift_decay, "shift_decay")

    @property
    def running_means(self) -> Mapping[str, float]:
        return {} if self.shift_decay is None else {"reward": self.shift_decay}

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio
        shift = 0.0 if self.shift_decay is None else pairs.running.get("reward", 0.0)
        return PreferenceLossOutput(
            binary_classifier(chosen, rejected, shift=shift),
            chosen.detach(),
            rejected.detach(),
            statistics={} if self.shift_decay is None else {"reward": 0.5 * (chosen + rejected).detach()},
        )


@dataclass(frozen=True)
class SPPOHard(PreferenceLoss):
    """Self-play preference optimisation with hard labels: see `self_play_preference`.

    Args:
        beta: the paper's 1 / eta (1e-3 there); the log-ratio aimed at is 1 / (2 beta).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = pairs.chosen.log_ratio, pairs.rejected.log_ratio
        loss = self_play_preference(chosen, rejected, beta=self.beta)
        return output_of(loss, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class APOZero(PreferenceLoss):
    """Anchored preference optimisation where chosen answers are better than the policy's own: see `anchored_zero`.

    Args:
        beta: strength of the pull to the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio
        return output_of(anchored_zero(chosen, rejected), chosen, rejected)


@dataclass(frozen=True)
class APODown(PreferenceLoss):
    """Anchored preference optimisation where chosen answers are worse than the policy's own: see `anchored_down`.

    Args:
        beta: strength of the pull to the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio
        return output_of(anchored_down(chosen, rejected), chosen, rejected)


def check_decay(decay: float, name: str) -> None:
    """Raise unless a running mean forgets something and remembers something."""
    if not 0 <= decay < 1:
        raise UserError(f"{name}={decay} is the share of a running mean that a step keeps: give 0 to below 1")
