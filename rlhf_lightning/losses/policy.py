"""Policy losses whose form the kernels know: clipped, REINFORCE, CISPO, SAPO; on token or sequence ratios.

The arithmetic is that of `rlhf_kernels.arithmetic`, which the fused kernels inline as well.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float
from rlhf_kernels.arithmetic import torch_policy_term
from rlhf_kernels.spec import FORMS
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput
from rlhf_lightning.core.ratio import RatioLevel, log_ratios


def clipped_surrogate(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLossOutput:
    """PPO's clipped surrogate objective, negated, per token.

        r_t    = exp(logprobs_t - old_logprobs_t)
        loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        loss_t = min(loss_t, -dual_clip A_t)  where A_t < 0, if dual_clip is given

    With clip_low and clip_high infinite it is the plain importance-weighted objective, whose gradient at r = 1 is
    REINFORCE's. TRL's two-sided `delta` is `dual_clip`, for any delta of at least 1 + clip_high; a smaller delta also
    lowers TRL's upper bound for positive advantages to delta, and has no effect on negative ones below 1 + clip_high.

    Args:
        logprobs: of the sampled tokens, under the policy being trained (nats).
        old_logprobs: of the same tokens, under the policy that sampled them; no gradient.
        advantages: credit of each token; no gradient.
        clip_low: how far the ratio may fall below 1 before its gradient stops.
        clip_high: how far it may rise above 1 before its gradient stops; larger than `clip_low` lets rare tokens grow.
        dual_clip: the ratio above which a token of negative advantage gives no more gradient; None = no such bound.
    Returns:
        Loss per token, the ratio, and where a bound stopped the gradient. Masking and averaging are the caller's: see
        `core.masked.reduce_tokens`.
    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017, eq. 7. arXiv:1707.06347
        Ye et al., Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (dual clip), 2019.
        arXiv:1912.09729
        Yu et al., DAPO (clip_high > clip_low), 2025. arXiv:2503.14476
        Prime Intellect, INTELLECT-2 (two-sided clipping, delta), 2025. arXiv:2505.07291
    """
    log_ratio = logprobs - old_logprobs
    return loss_of_form(
        "clipped", logprobs, log_ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def loss_of_form(
    form: Literal["clipped", "reinforce", "cispo", "sapo"],
    logprobs: Float[Tensor, "batch time"],
    log_ratio: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    clip_low: float = 0.0,
    clip_high: float = 0.0,
    dual_clip: float | None = None,
    tau_up: float = 1.0,
    tau_down: float = 1.0,
) -> PolicyLossOutput:
    """The kernels' arithmetic on log-probabilities: `rlhf_kernels.arithmetic.policy_term`, which has the formulas.

    Args:
        log_ratio: to the policy that sampled, of tokens or sequences: see `core.ratio.log_ratios`.
    """
    if form == "cispo":
        log_ratio = log_ratio.detach()  # its weight is a constant
    dual = 0.0 if dual_clip is None else dual_clip
    bounds = (clip_low, clip_high, dual, tau_up, tau_down)
    outcome: tuple[Tensor, ...] = torch_policy_term(
        logprobs, log_ratio, advantages, *bounds, FORMS[form], dual_clip is not None
    )
    loss, _, ratio, stopped = outcome
    return PolicyLossOutput(per_token=loss, ratio=ratio.detach(), clipped=stopped)


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """PPO's and GRPO's policy loss: no gradient once the ratio to the sampling policy has left the trust region.

    Args:
        clip_low: how far the ratio may fall below 1 before its gradient stops (PPO: 0.2).
        clip_high: how far it may rise above 1 before its gradient stops (PPO: 0.2; DAPO: 0.28).
        dual_clip: largest ratio that a token of negative advantage is pushed down from (3 is usual); null = no bound.
            TRL calls it delta.
        ratio: of each token, or of the whole answer: `core.ratio.log_ratios`. `sequence_sum` with the reduction
            `sequence_mean` is TRL's RLOO. For GSPO use `Gspo`, which has its bounds.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: RatioLevel = "token"

    def __post_init__(self) -> None:
        _check_clips(self.clip_low, self.clip_high)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(
                f"dual_clip={self.dual_clip} would stop the gradient at the start: give more than 1, such as 3, or null"
            )

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        bounds: dict[str, Any] = {"clip_low": self.clip_low, "clip_high": self.clip_high, "dual_clip": self.dual_clip}
        if self.ratio == "token":
            return clipped_surrogate(logprobs, old_logprobs, advantages, **bounds)
        log_ratio = log_ratios(logprobs, old_logprobs, mask, self.ratio)
        return loss_of_form("clipped", logprobs, log_ratio, advantages, **bounds)


@dataclass(frozen=True)
class Gspo(PolicyLoss):
    """GSPO: the clipped surrogate on the ratio of the whole answer, per token length.

        s    = exp(mean_t (logprobs_t - old_logprobs_t))
        loss = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), at each token of the answer

    The mean of many log-ratios varies little, hence bounds of a few ten-thousandths. Goes with the reduction
    `sequence_mean`, or with `length_weighted`, which makes it LUSPO. For answers of one token it is GRPO.

    Args:
        clip_low: how far s may fall below 1 before its gradient stops.
        clip_high: how far s may rise above 1.
        per_token: GSPO-token: the same value, each token with its own advantage and the gradient of its own
            log-probability, clipped together (the form that verl has; TRL has the other). The same gradients where the
            advantage is the same all over the answer.
    References:
        Zheng et al., Group Sequence Policy Optimization, 2025, eqs. 5, 7 and 13. arXiv:2507.18071
        Length-Unbiased Sequence Policy Optimization (LUSPO), 2026. arXiv:2602.05261
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    per_token: bool = False

    def __post_init__(self) -> None:
        _check_clips(self.clip_low, self.clip_high)

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        log_ratio = log_ratios(logprobs, old_logprobs, mask, "sequence_token" if self.per_token else "sequence")
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return loss_of_form("clipped", logprobs, log_ratio, advantages, **bounds)


@dataclass(frozen=True)
class Reinforce(PolicyLoss):
    """REINFORCE: no ratio, no bound.

        loss_t = -A_t logprobs_t

    Exact for the first optimiser step on a rollout. GPG's loss; on-policy distillation's with the right advantages.

    References:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, 1992.
        Chu et al., GPG, 2025. arXiv:2504.02546
    """

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        return loss_of_form("reinforce", logprobs, log_ratios(logprobs, old_logprobs, mask), advantages)


@dataclass(frozen=True)
class Cispo(PolicyLoss):
    """CISPO: REINFORCE with a truncated importance weight: every token keeps a gradient.

        loss_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t logprobs_t

    TRL's `epsilon_high` is the bound itself, 1 + clip_high, and it has no lower bound (clip_low 1); verl bounds both
    sides. `clipped` says where the weight was truncated. Goes with the reduction `token_mean`.

    Args:
        clip_low: how far below 1 the weight may be; 1 = no lower bound.
        clip_high: how far above 1 the weight may be (ScaleRL: a bound of 5, so 4).
        ratio: of each token, or of the whole answer: `core.ratio.log_ratios`.
    References:
        MiniMax, MiniMax-M1, 2025, eqs. 4 and 5. arXiv:2506.13585
        Khatri et al., The Art of Scaling Reinforcement Learning Compute for LLMs (ScaleRL), 2025. arXiv:2510.13786
    """

    clip_low: float = 1.0
    clip_high: float = 4.0
    ratio: Literal["token", "sequence", "sequence_sum"] = "token"

    def __post_init__(self) -> None:
        _check_clips(self.clip_low, self.clip_high)

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        log_ratio = log_ratios(logprobs, old_logprobs, mask, self.ratio)
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return loss_of_form("cispo", logprobs, log_ratio, advantages, **bounds)


@dataclass(frozen=True)
class Sapo(PolicyLoss):
    """SAPO: a soft gate on the ratio instead of a hard bound.

        loss_t = -A_t (4 / tau) sigmoid(tau (r_t - 1)),     tau = tau_up where A_t > 0, tau_down elsewhere

    Its gradient at r = 1 is REINFORCE's and fades on both sides. Goes with the reduction `sequence_mean`.

    Args:
        tau_up: how fast the gradient fades where the advantage is positive.
        tau_down: the same elsewhere; the larger one, as pushing down spreads probability over many tokens.
        ratio: of each token, or of the whole answer: `core.ratio.log_ratios`.
    References:
        Gao et al., Soft Adaptive Policy Optimization, 2025. arXiv:2511.20347
    """

    tau_up: float = 1.0
    tau_down: float = 1.05
    ratio: RatioLevel = "token"

    def __post_init__(self) -> None:
        for name, value in (("tau_up", self.tau_up), ("tau_down", self.tau_down)):
            if not value > 0:
                raise UserError(f"{name}={value} opens the gate the wrong way or not at all: give a positive number")

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        log_ratio = log_ratios(logprobs, old_logprobs, mask, self.ratio)
        return loss_of_form("sapo", logprobs, log_ratio, advantages, tau_up=self.tau_up, tau_down=self.tau_down)


def _check_clips(clip_low: float, clip_high: float) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value > 0:
            raise UserError(f"{name}={value} leaves no room for the ratio: give a positive number, such as 0.2")
