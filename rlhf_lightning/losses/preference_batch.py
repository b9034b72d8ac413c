"""Preference losses in which pairs look at the others of their batch: optimal transport, and dynamic beta."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Need, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.preference import check_beta, check_label_smoothing, logistic, output_of
from rlhf_lightning.losses.preference_pointwise import check_decay

Pairs = Float[Tensor, " pairs"]
LEAST_BETA = 1e-3
"""beta-DPO's beta goes no lower: at 0 a batch would not be learnt from, below it in the wrong direction."""


@dataclass(frozen=True)
class AOT(PreferenceLoss):
    """Alignment by optimal transport on pairs: the policy's preferences are to dominate the reference's as a whole.

        a = sort(log pi(y_w) - log pi(y_l)),  b = sort(log pi_ref(y_w) - log pi_ref(y_l))
        d = beta (a - b);   loss = -(1 - e) log sigma(d) - e log sigma(-d)

    The i-th smallest of the one is compared with the i-th smallest of the other, over the pairs of *one micro-batch of
    one rank*: unlike other losses here, this one depends on how a step is cut. Use large micro-batches.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: e, the share of labels believed to be wrong.

    References:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024. arXiv:2406.05882
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "whole_batch"})

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        policy = pairs.chosen.total - pairs.rejected.total
        reference = pairs.chosen.ref_total - pairs.rejected.ref_total
        difference = self.beta * (policy.sort().values - reference.sort().values)
        loss = logistic(difference, label_smoothing=self.label_smoothing)
        return output_of(loss, self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio)


@dataclass(frozen=True)
class AOTUnpaired(PreferenceLoss):
    """Alignment by optimal transport without pairs: the rewards of chosen answers dominate those of rejected ones.

        d = beta (sort(log u_w) - sort(log u_l));   loss = -(1 - e) log sigma(d) - e log sigma(-d)

    Over the pairs of *one micro-batch of one rank*, like `AOT`.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: e, the share of labels believed to be wrong.

    References:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024. arXiv:2406.05882
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "whole_batch"})

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        chosen, rejected = self.beta * pairs.chosen.log_ratio, self.beta * pairs.rejected.log_ratio
        loss = logistic(chosen.sort().values - rejected.sort().values, label_smoothing=self.label_smoothing)
        return output_of(loss, chosen, rejected)


@dataclass(frozen=True)
class BetaDPO(PreferenceLoss):
    """DPO whose beta follows the batch: pairs that are told apart easily hold the policy closer to its reference.

        M_i  = beta h_i                                 (no gradient)
        beta' = beta (1 + alpha (mean of M over the step - M_0)),  at least 1e-3
        M_0 <- decay M_0 + (1 - decay) mean of M over the step,  0 at first
        loss = -log sigma(beta' h)

    The mean is that of the whole optimiser step, over micro-batches and ranks: the stage measures it before the step,
    at the price of one more forward pass. M is in units of reward; code that leaves beta out of it means by alpha what
    is alpha / beta here.

    With `keep_frac` below 1 that share of the step's pairs is drawn without replacement, the others have no loss, and
    the mean in beta' and the loss are over those drawn:

        weight_i = exp(-(M_i - m)^2 / (2 s^2)),  m = decay M_0 + (1 - decay) mean of M,  s likewise of the deviation

    M_0 and s are over all pairs. As in the authors' code m and s have taken up the step itself. Their beta' compares
    with m too; ours, as without the filter, with M_0.

    Args:
        beta: the middle value.
        alpha: how far it follows (the paper: 0.6).
        decay: of M_0, the running mean over steps (the paper: 0.9).
        keep_frac: the paper's rho (0.8); 1 keeps all pairs.

    References:
        Wu et al., beta-DPO: Direct Preference Optimization with Dynamic beta, 2024. arXiv:2407.08639
    """

    beta: float = 0.1
    alpha: float = 0.6
    decay: float = 0.9
    keep_frac: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_beta(self.alpha, "alpha")
        check_decay(self.decay, "decay")
        if not 0 < self.keep_frac <= 1:
            raise UserError(
                f"keep_frac={self.keep_frac} is the share of each step's pairs that is trained on: give a number above "
                "0, such as 0.8, to 1"
            )

    @property
    def draws(self) -> bool:
        """Whether pairs are left out."""
        return self.keep_frac < 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "drawn_pairs"} if self.draws else {"reference"})

    @property
    def step_means(self) -> frozenset[str]:
        return frozenset({"margin", "margin_std"} if self.draws else {"margin"})

    @property
    def running_means(self) -> Mapping[str, float]:
        return dict.fromkeys(("margin", "margin_std") if self.draws else ("margin",), self.decay)

    def log_weights(self, margins: Pairs, running: Mapping[str, float | Tensor]) -> Pairs:
        mean, std = (
            self.decay * float(running[name]) + (1 - self.decay) * float(now)
            for name, now in (("margin", margins.mean()), ("margin_std", margins.std(correction=0)))
        )
        # a policy that is its reference tells no pairs apart
        return torch.zeros_like(margins) if std == 0 else -0.5 * ((margins - mean) / std).square()

    def __call__(self, pairs: PairScores) -> PreferenceLossOutput:
        margin = (self.beta * pairs.log_ratio).detach()
        gap = pairs.step.get("margin", 0.0) - pairs.running.get("margin", 0.0)
        beta = torch.as_tensor(self.beta * (1 + self.alpha * gap), device=margin.device).clamp(min=LEAST_BETA)
        chosen, rejected = beta * pairs.chosen.log_ratio, beta * pairs.rejected.log_ratio
        statistics = {"margin": margin}
        if self.draws:
            spread = pairs.step.get("margin_std", margin.std(correction=0))
            statistics["margin_std"] = torch.as_tensor(spread, dtype=margin.dtype).to(margin.device).expand_as(margin)
        return PreferenceLossOutput(
            logistic(chosen - rejected), chosen.detach(), rejected.detach(), statistics=statistics
        )
