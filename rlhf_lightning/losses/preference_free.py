"""Preference losses without a reference: SimPO, AlphaPO, CPO, ORPO, and the likelihood of the chosen answers."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, Need, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.divergence import MAX_EXPONENT
from rlhf_lightning.losses.preference import check_beta, check_label_smoothing, hinge, identity_preference, logistic
from rlhf_lightning.losses.supervised import token_nll

NLLAverage = Literal["token_mean", "sequence_mean"]
LEAST_NLL = 1e-6
"""Nats per token: an answer that is surer has no finite odds in float32."""


def power_reward(logprobs: Float[Tensor, "*shape"], *, alpha: float) -> Float[Tensor, "*shape"]:
    """AlphaPO's reward of an answer from its log-probability l, in the paper the mean per token.

        r = (1 - exp(-alpha l)) / alpha,   l at alpha = 0

    Its slope exp(-alpha l) is above 1 for alpha > 0: unlikely answers move faster. Computed by expm1, whose limit at
    alpha = 0 is exact; the exponent is held at 80.

    References:
        Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, 2025. arXiv:2501.03884
    """
    if alpha == 0:
        return logprobs
    return -torch.expm1((-alpha * logprobs).clamp(max=MAX_EXPONENT)) / alpha


def log_odds(mean_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(p / (1 - p)) of p = exp(mean log-probability per token), which is held at 1e-6 nats below 0.

    References:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024, eq. 4. arXiv:2403.07691
    """
    held = mean_logprobs.clamp(max=-LEAST_NLL)
    return held - torch.log(-torch.expm1(held))


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """DPO without a reference, on log-probabilities per token, with a target margin.

        d = beta (l_w - l_l) - gamma,  l = log pi(y|x) / |y|;   loss = -(1 - e) log sigma(d) - e log sigma(-d)

    Give the target margin in one of its two units, which the literature calls by the same name:

        gamma            of the rewards beta l (the paper's gamma; TRL's simpo_gamma)
        gamma_over_beta  of the log-probabilities l (the authors' code: gamma_beta_ratio)

    Args:
        beta: scale of the rewards (2 to 10).
        gamma: target margin of rewards; or
        gamma_over_beta: the same divided by beta (0.1 to 0.8).
        label_smoothing: e, the share of labels believed to be wrong.

    References:
        Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024. arXiv:2405.14734
    """

    beta: float = 2.0
    gamma: float | None = None
    gamma_over_beta: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)
        check_gammas(self.gamma, self.gamma_over_beta)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.mean, self.beta * pairs.rejected.mean
        margin = target_margin(self.beta, self.gamma, self.gamma_over_beta)
        loss = logistic(chosen - rejected - margin, label_smoothing=self.label_smoothing)
        return PreferenceLossOutput(loss, chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class AlphaPO(PreferenceLoss):
    """SimPO with a reward that bends: see `power_reward`; at alpha = 0 it is SimPO.

        d = beta (r_w - r_l) - gamma,  r = (1 - exp(-alpha l)) / alpha,  l = log pi(y|x) / |y|

    Args:
        beta: scale of the rewards.
        alpha: above 0: unlikely answers move faster; below 0: slower; the paper uses 0.1 to 0.3.
        gamma: target margin of rewards; or
        gamma_over_beta: the same divided by beta. See `SimPO`.
        label_smoothing: share of labels believed to be wrong.

    References:
        Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, 2025. arXiv:2501.03884
    """

    beta: float = 2.5
    alpha: float = 0.25
    gamma: float | None = None
    gamma_over_beta: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)
        check_gammas(self.gamma, self.gamma_over_beta)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = self.beta * power_reward(pairs.chosen.mean, alpha=self.alpha)
        rejected = self.beta * power_reward(pairs.rejected.mean, alpha=self.alpha)
        margin = target_margin(self.beta, self.gamma, self.gamma_over_beta)
        loss = logistic(chosen - rejected - margin, label_smoothing=self.label_smoothing)
        return PreferenceLossOutput(loss, chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class CPO(PreferenceLoss):
    """Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen answers.

        sigmoid  -(1 - e) log sigma(d) - e log sigma(-d),  d = beta (log pi(y_w|x) - log pi(y_l|x))
        hinge    max(0, 1 - d)                              (SLiC-HF without its reference)
        ipo      (l_w - l_l - 1 / (2 beta))^2,              l = log pi(y|x) / |y|
        + nll_coef mean over the chosen tokens of the step of -log pi

    Args:
        beta: scale of the rewards.
        form: sigmoid, hinge or ipo.
        label_smoothing: e, the share of labels believed to be wrong; for sigmoid.
        nll_coef: weight of the likelihood term (1 in the paper); 0 leaves it out.
        alpha: bends the rewards as AlphaPO does, x -> (1 - exp(-alpha x)) / alpha for each log pi or l above; 0 (the
            paper) leaves them straight. TRL's CPOTrainer has it.

    References:
        Xu et al., Contrastive Preference Optimization, 2024, eq. 3. arXiv:2401.08417
    """

    beta: float = 0.1
    form: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    nll_coef: float = 1.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)
        check_nll_coef(self.nll_coef)
        if self.form not in ("sigmoid", "hinge", "ipo"):
            raise UserError(f"form={self.form!r} is unknown: use sigmoid, hinge or ipo")
        if self.form != "sigmoid" and self.label_smoothing:
            raise UserError(
                f"label_smoothing={self.label_smoothing} does nothing with form={self.form}: set it to 0, or use "
                "sigmoid"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = (
            power_reward(answers.mean if self.form == "ipo" else answers.total, alpha=self.alpha)
            for answers in (pairs.chosen, pairs.rejected)
        )
        d = self.beta * (chosen - rejected)
        match self.form:
            case "sigmoid":
                loss = logistic(d, label_smoothing=self.label_smoothing)
            case "hinge":
                loss = hinge(d)
            case "ipo":
                loss = identity_preference(chosen - rejected, beta=self.beta)
        chosen, rejected = self.beta * chosen, self.beta * rejected
        per_token = answer_nll(pairs.chosen, self.nll_coef) if self.nll_coef else None
        return PreferenceLossOutput(loss, chosen.detach(), rejected.detach(), per_token)


@dataclass(frozen=True)
class ORPO(PreferenceLoss):
    """Odds ratio preference optimisation: supervised fine-tuning that also turns away from the rejected answer.

        loss = mean over the chosen tokens of -log pi  -  odds_coef log sigma(log odds(y_w) - log odds(y_l))

    with odds = p / (1 - p), p = exp(log pi(y|x) / |y|). The likelihood is that of the answer given the prompt, as in
    the paper's equation; its code and TRL's ORPOTrainer also train the prompt's tokens.

    Args:
        odds_coef: the paper's lambda (0.1 to 0.25).

    References:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024, eq. 6. arXiv:2403.07691
    """

    odds_coef: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.odds_coef, "odds_coef")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = pairs.chosen.mean, pairs.rejected.mean
        loss = -self.odds_coef * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
        rewards = self.odds_coef * chosen.detach(), self.odds_coef * rejected.detach()
        return PreferenceLossOutput(loss, *rewards, answer_nll(pairs.chosen, 1.0))


@dataclass(frozen=True)
class ChosenNLL(PreferenceLoss):
    """The negative log-likelihood of the chosen answers alone: supervised fine-tuning, as one of several losses.

    Its rewards are the log-probabilities.

    Args:
        average: over the chosen `token_mean` of the step (SFT, TRL's sft), or each answer's mean over its own tokens
            first, `sequence_mean` (iterative RPO).
    """

    average: NLLAverage = "token_mean"

    def __post_init__(self) -> None:
        if self.average not in ("token_mean", "sequence_mean"):
            raise UserError(f"average={self.average!r} is unknown: use token_mean or sequence_mean")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        rewards = pairs.chosen.total.detach(), pairs.rejected.total.detach()
        # nothing of the rejected answers is trained; 0 times them keeps every weight in the graph
        if self.average == "sequence_mean":
            return PreferenceLossOutput(-pairs.chosen.mean, *rewards)
        return PreferenceLossOutput(0.0 * pairs.chosen.total, *rewards, answer_nll(pairs.chosen, 1.0))


def answer_nll(answers: CompletionScores, weight: float) -> Float[Tensor, "pairs time"]:
    """weight times the negative log-likelihood of answers, per token; 0 off their mask."""
    return weight * token_nll(answers.logprobs)


def target_margin(beta: float, gamma: float | None, gamma_over_beta: float | None) -> float:
    """The margin of rewards, from whichever unit it was given in."""
    if gamma is not None:
        return gamma
    assert gamma_over_beta is not None
    return beta * gamma_over_beta


def check_gammas(gamma: float | None, gamma_over_beta: float | None) -> None:
    """Raise unless the target margin was given once."""
    if (gamma is None) == (gamma_over_beta is None):
        given = "neither is given" if gamma is None else f"gamma={gamma} and gamma_over_beta={gamma_over_beta} are both"
        raise UserError(
            f"{given}: the target margin is either gamma, a difference of rewards, or gamma_over_beta, a difference of "
            "log-probabilities per token; give one of them"
        )
    for name, value in (("gamma", gamma), ("gamma_over_beta", gamma_over_beta)):
        if value is not None and not value >= 0:
            raise UserError(f"{name}={value} would ask the rejected answer to win: give 0 or more")


def check_nll_coef(nll_coef: float) -> None:
    """Raise unless the likelihood is to be raised, or left alone."""
    if not nll_coef >= 0:
        raise UserError(f"nll_coef={nll_coef} would lower the chosen answers' likelihood: give 0 or more")
