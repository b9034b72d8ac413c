"""Losses on how much more the policy prefers the chosen answer than its reference does: DPO and its nearest kin.

All are functions of d = beta (f'(u_w) - f'(u_l)), one number per pair, with u = pi/pi_ref of an answer and f' of the
divergence (log u for DPO).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, Need, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.divergence import MAX_EXPONENT, Divergence, ReverseKL

MarginUse = Literal["ignore", "offset", "log_offset", "log_odds"]
Pairs = Float[Tensor, " pairs"]


def logistic(
    difference: Float[Tensor, "*pairs"], *, label_smoothing: float | Float[Tensor, "*pairs"] = 0.0
) -> Float[Tensor, "*pairs"]:
    """Negative log-likelihood that chosen beats rejected when labels are wrong with probability e, per pair.

        loss = -(1 - e) log sigma(d) - e log sigma(-d)

    Args:
        difference: d, the reward of chosen less that of rejected.
        label_smoothing: e; of all pairs or of each.
    References:
        Rafailov et al., Direct Preference Optimization, 2023, eq. 7. arXiv:2305.18290
        Mitchell, A note on DPO with noisy preferences (conservative DPO), 2023. https://ericmitchell.ai/cdpo.pdf
    """
    if isinstance(label_smoothing, float | int) and label_smoothing == 0:
        return -F.logsigmoid(difference)
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def robust_logistic(difference: Float[Tensor, "*pairs"], *, label_smoothing: float) -> Float[Tensor, "*pairs"]:
    """`logistic` freed of the bias that wrong labels bring, per pair; may be negative.

        loss = (-(1 - e) log sigma(d) + e log sigma(-d)) / (1 - 2 e)

    Its expectation under labels flipped with probability e is the plain loss of the true labels.

    References:
        Chowdhury et al., Provably Robust DPO: Aligning Language Models with Noisy Feedback, 2024. arXiv:2403.00409
    """
    kept = -(1 - label_smoothing) * F.logsigmoid(difference)
    return (kept + label_smoothing * F.logsigmoid(-difference)) / (1 - 2 * label_smoothing)


def hinge(difference: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """max(0, 1 - d), per pair.

    References:
        Zhao et al., SLiC-HF, 2023. arXiv:2305.10425. Liu et al., Statistical Rejection Sampling Improves Preference
        Optimization (RSO), 2023. arXiv:2309.06657
    """
    return (1 - difference).clamp(min=0)


def identity_preference(log_ratio_difference: Float[Tensor, "*pairs"], *, beta: float) -> Float[Tensor, "*pairs"]:
    """IPO's squared distance of h to 1 / (2 beta), per pair.

        loss = (h - 1 / (2 beta))^2

    References:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, eq. 17.
        arXiv:2310.12036
    """
    return (log_ratio_difference - 1 / (2 * beta)).square()


def exact_preference(difference: Float[Tensor, "*pairs"], *, label_smoothing: float) -> Float[Tensor, "*pairs"]:
    """EXO's reverse KL between the two-way softmax of the rewards and the labels, per pair.

        q = sigma(d);   loss = q log(q / (1 - e)) + (1 - q) log((1 - q) / e)

    References:
        Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024, eq. 16. arXiv:2402.00856
    """
    wins, loses = F.logsigmoid(difference), F.logsigmoid(-difference)
    return wins.exp() * (wins - math.log1p(-label_smoothing)) + loses.exp() * (loses - math.log(label_smoothing))


def discovered(difference: Float[Tensor, "*pairs"], *, temperature: float) -> Float[Tensor, "*pairs"]:
    """DiscoPOP's log-ratio modulated blend of logistic and exponential loss, per pair.

        m = sigma(d / temperature);   loss = -(1 - m) log sigma(d) + m exp(-d)

    Not monotone: at the paper's temperature of 0.05 it rises from d = -0.12 to 0.07 and falls elsewhere, so a policy
    that equals its reference is first pushed the wrong way. The exponent is held at 80, where m has long been 0: as
    published exp(-d) overflows, and 0 times infinity is NaN.

    References:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024, eq. 5.
        arXiv:2406.08414
    """
    modulation = torch.sigmoid(difference / temperature)
    exponential = torch.exp((-difference).clamp(max=MAX_EXPONENT))
    return -(1 - modulation) * F.logsigmoid(difference) + modulation * exponential


def implicit_rewards(scores: CompletionScores, beta: float, divergence: Divergence) -> Float[Tensor, " rows"]:
    """beta f'(pi(y|x) / pi_ref(y|x)): up to a constant of the prompt, the reward that the policy is optimal for."""
    return beta * divergence(scores.log_ratio)


def output_of(loss: Pairs, chosen: Pairs, rejected: Pairs) -> PreferenceLossOutput:
    """A loss per pair with the rewards that it implies."""
    return PreferenceLossOutput(loss, chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct preference optimisation; conservative DPO with `label_smoothing`, f-DPO with another divergence.

        d = beta (f'(u_w) - f'(u_l)) - offset;   loss = -(1 - e) log sigma(d) - e log sigma(-d)

    Args:
        beta: strength of the pull to the reference (0.1 is usual; larger holds it closer).
        label_smoothing: e, the share of labels believed to be wrong, from 0 to 0.5 (cDPO).
        divergence: what is measured between policy and reference; reverse KL is DPO.
        margin: what the records' `margin` column m is: nothing (`ignore`), an `offset` margin_coef m (Llama 2's margin;
            ODPO with the identity), a `log_offset` margin_coef log m (ODPO as published), or the `log_odds` that chosen
            is better: then e = sigma(-margin_coef m) for each pair (soft labels).
        margin_coef: factor on the margin.

    References:
        Rafailov et al., Direct Preference Optimization, 2023, eq. 7. arXiv:2305.18290
        Amini et al., Direct Preference Optimization with an Offset, 2024. arXiv:2402.10571
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: Divergence = ReverseKL()
    margin: MarginUse = "ignore"
    margin_coef: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing, largest=0.5)
        if self.margin not in ("ignore", "offset", "log_offset", "log_odds"):
            raise UserError(f"margin={self.margin!r} is unknown: use ignore, offset, log_offset or log_odds")
        if self.margin == "ignore" and self.margin_coef != 1.0:
            raise UserError(
                f"margin_coef={self.margin_coef} does nothing with margin=ignore: leave it out, or say what the margin "
                "is: offset, log_offset or log_odds"
            )
        if self.margin == "log_odds" and self.label_smoothing:
            raise UserError(
                f"label_smoothing={self.label_smoothing} does nothing with margin=log_odds, where each pair's margin "
                "says how sure its label is: set it to 0"
            )
        if not self.margin_coef >= 0:
            raise UserError(f"margin_coef={self.margin_coef} would ask the rejected answer to win: give 0 or more")

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, self.divergence)
        rejected = implicit_rewards(pairs.rejected, self.beta, self.divergence)
        difference = chosen - rejected
        smoothing: float | Tensor = self.label_smoothing
        if self.margin == "log_odds":
            smoothing = torch.sigmoid(-self.margin_coef * margins_of(pairs))
        elif self.margin != "ignore":
            difference = difference - self.margin_coef * _offsets(margins_of(pairs), self.margin)
        return output_of(logistic(difference, label_smoothing=smoothing), chosen, rejected)


@dataclass(frozen=True)
class RobustDPO(PreferenceLoss):
    """DPO freed of the bias of wrong labels: see `robust_logistic`.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: e, the known share of wrong labels, above 0 and below 0.5.
        divergence: what is measured between policy and reference.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1
    divergence: Divergence = ReverseKL()

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not 0 < self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing={self.label_smoothing}: the robust loss divides by 1 - 2 label_smoothing and is "
                "plain DPO at 0: give a number above 0 and below 0.5, or use DPO"
            )

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, self.divergence)
        rejected = implicit_rewards(pairs.rejected, self.beta, self.divergence)
        return output_of(robust_logistic(chosen - rejected, label_smoothing=self.label_smoothing), chosen, rejected)


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """SLiC's and RSO's hinge on the difference of implicit rewards: see `hinge`.

    Args:
        beta: strength of the pull to the reference; 1/beta is the margin in log-ratios.
        divergence: what is measured between policy and reference.
    """

    beta: float = 0.1
    divergence: Divergence = ReverseKL()

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, self.divergence)
        rejected = implicit_rewards(pairs.rejected, self.beta, self.divergence)
        return output_of(hinge(chosen - rejected), chosen, rejected)


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation: a squared loss that does not run away on labels that never disagree.

        loss = (h - 1 / (2 beta))^2,   h = f'(u_w) - f'(u_l)  (sum)  or  f'(u_w)/|y_w| - f'(u_l)/|y_l|  (token_mean)

    Args:
        beta: the paper's tau.
        log_ratio: `sum` over the answer's tokens (the paper's equation, the DPO authors' code, OpenRLHF), or
            `token_mean`, divided by the answer's length (TRL, which says that the paper's results were made so). Beta
            does not mean the same in the two.
        divergence: what is measured between policy and reference.

    References:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, eq. 17.
        arXiv:2310.12036
    """

    beta: float = 0.1
    log_ratio: Literal["sum", "token_mean"] = "token_mean"
    divergence: Divergence = ReverseKL()

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.log_ratio not in ("sum", "token_mean"):
            raise UserError(f"log_ratio={self.log_ratio!r} is unknown: use sum or token_mean")

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = self.divergence(pairs.chosen.log_ratio)
        rejected = self.divergence(pairs.rejected.log_ratio)
        if self.log_ratio == "token_mean":
            chosen, rejected = chosen / pairs.chosen.lengths, rejected / pairs.rejected.lengths
        loss = identity_preference(chosen - rejected, beta=self.beta)
        return output_of(loss, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class EXOPair(PreferenceLoss):
    """EXO with two answers: reverse KL to smoothed labels, see `exact_preference`.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: e; the KL to labels without doubt is infinite, so above 0 (1e-3 is usual), to 0.5.
        divergence: what is measured between policy and reference.
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3
    divergence: Divergence = ReverseKL()

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not 0 < self.label_smoothing <= 0.5:
            raise UserError(
                f"label_smoothing={self.label_smoothing}: EXO divides by it: give a number above 0, such as "
                "0.001, to 0.5"
            )

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, self.divergence)
        rejected = implicit_rewards(pairs.rejected, self.beta, self.divergence)
        loss = exact_preference(chosen - rejected, label_smoothing=self.label_smoothing)
        return output_of(loss, chosen, rejected)


@dataclass(frozen=True)
class DiscoPOP(PreferenceLoss):
    """The log-ratio modulated loss that a language model found: see `discovered`.

    Args:
        beta: strength of the pull to the reference.
        temperature: of the blend (the paper: 0.05).
        divergence: what is measured between policy and reference.
    """

    beta: float = 0.1
    temperature: float = 0.05
    divergence: Divergence = ReverseKL()

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not self.temperature > 0:
            raise UserError(
                f"temperature={self.temperature} divides the log-ratios: give a positive number, such as 0.05"
            )

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, self.divergence)
        rejected = implicit_rewards(pairs.rejected, self.beta, self.divergence)
        return output_of(discovered(chosen - rejected, temperature=self.temperature), chosen, rejected)


@dataclass(frozen=True)
class LengthNormalisedDPO(PreferenceLoss):
    """DPO on log-ratios per token instead of per answer, so that long answers do not weigh more.

        loss = -log sigma(beta (f'(u_w)/|y_w| - f'(u_l)/|y_l|))

    Args:
        beta: strength of the pull to the reference; larger than DPO's by about an answer's length (5 is usual).
        divergence: what is measured between policy and reference.

    References:
        Lambert et al., Tulu 3 (length-normalised DPO), 2024. arXiv:2411.15124
    """

    beta: float = 5.0
    divergence: Divergence = ReverseKL()

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen = implicit_rewards(pairs.chosen, self.beta, self.divergence) / pairs.chosen.lengths
        rejected = implicit_rewards(pairs.rejected, self.beta, self.divergence) / pairs.rejected.lengths
        return output_of(logistic(chosen - rejected), chosen, rejected)


class LossAroundAnother(PreferenceLoss):
    """A loss that changes what another one reads or gives, and asks for what that one needs."""

    loss: PreferenceLoss

    @property
    def needs(self) -> frozenset[Need]:
        return self.loss.needs

    @property
    def running_means(self) -> Mapping[str, float]:
        return self.loss.running_means

    @property
    def step_means(self) -> frozenset[str]:
        return self.loss.step_means


def margins_of(pairs: PairScores) -> Pairs:
    """The records' margins.

    Raises:
        UserError: they have none.
    """
    if pairs.margins is None:
        raise UserError("the loss reads the column `margin`, which no record here has: add it, or margin: ignore")
    return pairs.margins


def _offsets(margins: Pairs, use: MarginUse) -> Pairs:
    if use == "offset":
        return margins
    # waits for the device, for this option alone: a margin of 0 would train on infinity unnoticed
    if (margins <= 0).any():
        raise UserError(
            f"margin=log_offset takes the logarithm of the column `margin`, which holds {float(margins.min())}: give "
            "positive margins, or margin: offset"
        )
    return margins.log()


def check_beta(beta: float, name: str = "beta") -> None:
    """Raise unless a factor on rewards is positive."""
    if not beta > 0:
        raise UserError(f"{name}={beta} would not prefer the chosen answer: give a positive number")


def check_label_smoothing(label_smoothing: float, *, largest: float = 0.5) -> None:
    """Raise unless a share of wrong labels is possible."""
    if not 0 <= label_smoothing <= largest:
        raise UserError(
            f"label_smoothing={label_smoothing} is the share of labels believed to be wrong: give 0 to {largest}"
        )
