"""Which policy loss: the options of `policy_loss` and `linear_policy_loss`, and what they return."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.arithmetic import CISPO, CLIPPED, REINFORCE, SAPO, torch_kl_term, torch_policy_term

FORMS = {"clipped": CLIPPED, "reinforce": REINFORCE, "cispo": CISPO, "sapo": SAPO}
ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


@dataclass(frozen=True)
class PolicyLossSpec:
    """A policy loss per token: form(ratio, advantage) + kl_coef * KL estimate - entropy_coef * entropy.

    References:
        clipped: Schulman et al., Proximal Policy Optimization Algorithms, 2017. arXiv:1707.06347
        dual_clip: Ye et al., Mastering Complex Control in MOBA Games, 2019. arXiv:1912.09729
        ratio "sequence": Zheng et al., Group Sequence Policy Optimization, 2025. arXiv:2507.18071
        cispo: MiniMax-M1, 2025. arXiv:2506.13585
        sapo: Gao et al., Soft Adaptive Policy Optimization, 2025. arXiv:2511.20347
    """

    form: Literal["clipped", "reinforce", "cispo", "sapo"] = "clipped"
    """How a ratio and an advantage become a loss; formulas in `arithmetic.policy_term`."""
    clip_low: float = 0.2
    """The ratio is bounded below by 1 - clip_low (clipped, cispo)."""
    clip_high: float = 0.2
    """The ratio is bounded above by 1 + clip_high (clipped, cispo)."""
    dual_clip: float | None = None
    """Largest ratio a token of negative advantage is pushed down from (clipped); None = no bound."""
    kl_coef: float = 0.0
    """Weight of the KL estimate to the reference; needs ref_logprobs."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL, from the sampled token alone."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; its gradient is exact."""
    ratio: Literal["token", "sequence"] = "token"
    """`sequence`: one ratio per row, exp of the mean log-ratio of its tokens that count (GSPO)."""
    sapo_tau_up: float = 1.0
    """Temperature of SAPO's gate where the advantage is positive."""
    sapo_tau_down: float = 1.05
    """Temperature of SAPO's gate elsewhere."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}: use {', '.join(FORMS)}")
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: use {', '.join(ESTIMATORS)}")
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"ratio={self.ratio!r}: use token or sequence")
        if not (self.clip_low >= 0 and self.clip_high >= 0):
            raise ValueError(f"clip_low={self.clip_low}, clip_high={self.clip_high}: give distances from 1, not signed")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1 (3 is usual); None switches it off")
        if not (self.sapo_tau_up > 0 and self.sapo_tau_down > 0):
            raise ValueError(f"sapo_tau_up={self.sapo_tau_up}, sapo_tau_down={self.sapo_tau_down} must be positive")
        if not all(-math.inf < coef < math.inf for coef in (self.kl_coef, self.entropy_coef)):
            raise ValueError(f"kl_coef={self.kl_coef}, entropy_coef={self.entropy_coef} must be finite; 0 switches off")

    def numbers(self) -> tuple[float, ...]:
        """The options a kernel reads at run time, in its order."""
        dual = 0.0 if self.dual_clip is None else self.dual_clip
        bounds = (self.clip_low, self.clip_high, dual, self.sapo_tau_up, self.sapo_tau_down)
        return (*bounds, self.kl_coef, self.entropy_coef)

    def choices(self) -> tuple[int, int, bool]:
        """The options a kernel is compiled for: form, KL estimator (0 = none), dual clip."""
        return FORMS[self.form], ESTIMATORS[self.kl_estimator] if self.kl_coef else 0, self.dual_clip is not None


class PolicyLossOutput(NamedTuple):
    """The scalar to differentiate, and what each token did; all but `loss` carry no gradient and are 0 where masked."""

    loss: Tensor
    """Sum over tokens of weight * loss, divided by the denominator."""
    logprobs: Tensor
    """Log-probability of each token (nats)."""
    entropy: Tensor | None
    """Entropy of each token's distribution (nats), if asked for or in the loss."""
    ratio: Tensor
    """Policy over sampling policy, per token; with ratio "sequence" the row's, at each of its tokens."""
    clipped: Tensor
    """Whether a bound stopped the token's gradient."""
    kl: Tensor | None
    """KL estimate per token, if ref_logprobs are given and kl_coef is not 0."""


class TokenTerms(NamedTuple):
    """Loss per token and its slopes; see `policy_terms`."""

    loss: Tensor
    logprob_slope: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor | None


def policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    spec: PolicyLossSpec,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> TokenTerms:
    """Loss of each token and its slope in that token's log-probability: the eager path, on log-probabilities.

    The slope in the entropy is -entropy_coef. With ratio "sequence" the slope is that of the whole row's loss, which
    is exact when the row's tokens share one advantage and one weight, and GSPO-token's otherwise.

    Args:
        mask: True = counts; elsewhere everything returned is 0.
        entropy: needed if spec.entropy_coef is not 0.
    """
    dtype = logprobs.dtype
    old_logprobs, advantages = old_logprobs.to(dtype), advantages.to(dtype)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    if spec.ratio == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    form, estimator, dual = spec.choices()
    bounds = spec.numbers()[:5]
    loss, slope, ratio, clipped = torch_policy_term(logprobs, log_ratio, advantages, *bounds, form, dual)
    kl = None
    if estimator:
        if ref_logprobs is None:
            raise ValueError(f"kl_coef={spec.kl_coef} needs ref_logprobs")
        kl, kl_slope = torch_kl_term(torch.where(mask, logprobs - ref_logprobs.to(dtype), 0.0), estimator)
        loss = loss + spec.kl_coef * kl
        slope = slope + spec.kl_coef * kl_slope
        kl = torch.where(mask, kl, 0.0)
    if spec.entropy_coef:
        if entropy is None:
            raise ValueError(f"entropy_coef={spec.entropy_coef} needs the entropy")
        loss = loss - spec.entropy_coef * entropy
    return TokenTerms(
        torch.where(mask, loss, 0.0),
        torch.where(mask, slope, 0.0),
        torch.where(mask, ratio, 0.0),
        clipped & mask,
        kl,
    )
