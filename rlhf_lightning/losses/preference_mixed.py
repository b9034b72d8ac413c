"""Preference losses made of others: weighted sums (MPO, RPO, TPO), and pairs weighted by their probability (WPO)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, Need, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.preference import DPO, LossAroundAnother, check_beta
from rlhf_lightning.losses.preference_free import CPO, ChosenNLL, NLLAverage, answer_nll


@dataclass(frozen=True)
class WeightedLoss:
    """One of several losses.

    Args:
        loss: any preference loss.
        weight: its factor.
    """

    loss: PreferenceLoss
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.weight, f"weight of {type(self.loss).__name__}")


@dataclass(frozen=True)
class WeightedLosses(PreferenceLoss):
    """A weighted sum of preference losses on the same pairs; the rewards that are logged are those of the first.

    MPO is 0.8 DPO + 0.2 BCOPair + 1 ChosenNLL.

    Args:
        losses: the losses, each with its weight.

    References:
        Wang et al., Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference
        Optimization (MPO), 2024. arXiv:2411.10442
    """

    losses: list[WeightedLoss]

    def __post_init__(self) -> None:
        if not self.losses:
            raise UserError("losses is empty: name at least one preference loss, such as DPO")
        kept = [name for each in self.losses for name in each.loss.running_means]
        if len(kept) != len(set(kept)):
            raise UserError(
                f"losses: {', '.join(type(each.loss).__name__ for each in self.losses)} keep the same running mean "
                f"({', '.join(sorted(set(kept)))}): use one of them"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(each.loss.needs for each in self.losses))

    @property
    def running_means(self) -> Mapping[str, float]:
        return {name: decay for each in self.losses for name, decay in each.loss.running_means.items()}

    @property
    def step_means(self) -> frozenset[str]:
        return frozenset().union(*(each.loss.step_means for each in self.losses))

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        outputs = [each.loss(pairs) for each in self.losses]
        weights = [each.weight for each in self.losses]
        per_pair = _weighted_sum(weights, [out.per_pair for out in outputs])
        assert per_pair is not None
        return PreferenceLossOutput(
            per_pair,
            outputs[0].chosen_rewards,
            outputs[0].rejected_rewards,
            per_chosen_token=_weighted_sum(weights, [out.per_chosen_token for out in outputs]),
            per_gold_token=_weighted_sum(weights, [out.per_gold_token for out in outputs]),
            statistics={name: value for out in outputs for name, value in out.statistics.items()},
        )


def _weighted_sum(weights: Sequence[float], terms: Sequence[Tensor | None]) -> Tensor | None:
    """Over the terms that are there; None: none is."""
    there = [weight * term for weight, term in zip(weights, terms, strict=True) if term is not None]
    return torch.stack(there).sum(0) if there else None


@dataclass(frozen=True)
class RPO(LossAroundAnother):
    """A preference loss, and the likelihood of the chosen answers beside it so that it does not fall.

        loss = preference loss + nll_coef (-log pi(y_w|x) averaged as said)

    Args:
        loss: the preference loss; DPO in the paper.
        nll_coef: the paper's alpha (1).
        average: each answer's mean over its own tokens first (`sequence_mean`, the paper), or over all chosen tokens of
            the step (`token_mean`: TRL's loss_type [sigmoid, sft]).

    References:
        Pang et al., Iterative Reasoning Preference Optimization, 2024. arXiv:2404.19733
    """

    loss: PreferenceLoss = DPO()
    nll_coef: float = 1.0
    average: NLLAverage = "sequence_mean"

    def __post_init__(self) -> None:
        check_beta(self.nll_coef, "nll_coef")

    @property
    def _sum(self) -> WeightedLosses:
        return WeightedLosses([WeightedLoss(self.loss), WeightedLoss(ChosenNLL(self.average), self.nll_coef)])

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        return self._sum(pairs)


@dataclass(frozen=True)
class TPO(LossAroundAnother):
    """Triple preference optimisation: a preference loss, and the likelihood of a third answer, the gold one.

        loss = preference loss + nll_coef mean over the gold tokens of the step of -log pi

    The gold answer (the column `gold`) is better than both: what is imitated need not be what was preferred. Around a
    loss without a reference one stage does what SFT and DPO do. TPO-L is the same around SimPO.

    Args:
        loss: the preference loss; CPO without its own likelihood, or SimPO for TPO-L.
        nll_coef: the paper's alpha (TRL: 1).

    References:
        Saeidi et al., Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization,
        2024. arXiv:2405.16681
    """

    loss: PreferenceLoss = CPO(beta=0.01, nll_coef=0.0)
    nll_coef: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.nll_coef, "nll_coef")
        if "gold" in self.loss.needs:
            raise UserError(f"TPO around {type(self.loss).__name__} would train on the gold answers twice: use one")

    @property
    def needs(self) -> frozenset[Need]:
        gold: frozenset[Need] = frozenset({"gold"})
        return super().needs | gold

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        if pairs.gold is None:
            raise UserError("TPO reads a gold answer to each prompt, and these pairs have none: use DPOModule")
        return replace(self.loss(pairs), per_gold_token=answer_nll(pairs.gold, self.nll_coef))


@dataclass(frozen=True)
class WPO(LossAroundAnother):
    """Pairs weighted by how probable the policy finds them now: off-policy data counts as if the policy had drawn it.

        w(y) = exp(mean over t of (log pi_t(y_t) - c_t)),   loss = w(y_w) w(y_l) times the loss of the pair

    with c_t = log sum_v pi_t(v)^2, the log-probability expected of a token that the policy itself draws (`sampled`), or
    0 (`none`). The weights carry no gradient. The likelihood of gold answers is not of the pair, and not weighed.

    Args:
        loss: the loss that is weighted.
        alignment: see above; `sampled` makes answers weigh alike whatever the policy's entropy.

    References:
        Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, 2024, eq. 2. arXiv:2406.11827
    """

    loss: PreferenceLoss = DPO()
    alignment: Literal["none", "sampled"] = "sampled"

    def __post_init__(self) -> None:
        if "whole_batch" in self.loss.needs:
            raise UserError(
                f"WPO weighs pairs, and {type(self.loss).__name__} sorts them apart: no term belongs to one pair any "
                "more. Use a loss that keeps pairs together, such as DPO"
            )

    @property
    def needs(self) -> frozenset[Need]:
        collision: frozenset[Need] = frozenset({"log_collision"} if self.alignment == "sampled" else ())
        return super().needs | collision

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        output = self.loss(pairs)
        weights = self._weights(pairs.chosen) * self._weights(pairs.rejected)
        per_token = output.per_chosen_token
        return replace(
            output,
            per_pair=weights * output.per_pair,
            per_chosen_token=None if per_token is None else weights.unsqueeze(-1) * per_token,
        )

    def _weights(self, scores: CompletionScores) -> Float[Tensor, " rows"]:
        logprobs = scores.logprobs.detach()
        if self.alignment == "sampled":
            assert scores.log_collision is not None, "the stage measures it for losses that need it"
            logprobs = logprobs - scores.log_collision
        return (torch.where(scores.mask, logprobs, 0.0).sum(-1) / scores.lengths).exp()
