"""Weights for tokens whose sampler was not quite the policy that trains: TIS, MIS, IcePop, sequence masks.

An engine that generates in another precision, with other kernels or with older weights samples from a distribution of
its own. What it said about its tokens (`sampler_logprobs`) against what the trainer says (`old_logprobs`) gives the
importance weight that the policy loss is multiplied by, token by token. Denominators stay those of all tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import on_one_rank
from rlhf_lightning.core.kl import kl_estimate
from rlhf_lightning.core.masked import masked_moments
from rlhf_lightning.core.ratio import MAX_LOG_RATIO, bounded_exp
from rlhf_lightning.losses.policy_divergence import binary_divergence


@dataclass(frozen=True)
class CorrectionOutput:
    """Weights of a rollout, and what they did."""

    weights: Float[Tensor, "batch time"]
    """What the policy loss of each token is multiplied by; 0 where the token is masked, or does not count."""
    metrics: Mapping[str, Float[Tensor, "batch time"]]
    """Per token, for means over the tokens that count: ratio (before any bound), kept_frac, truncated_frac, and kl, the
    k3 estimate of KL(sampler || trainer)."""


Measure = Literal["ratio", "k2", "k3", "binary_kl", "tv"]
Over = Literal["token", "sum", "mean", "max"]


@dataclass(frozen=True)
class SamplerFilter:
    """Drops tokens, or whole answers, by how far the sampler was from the trainer.

        q = exp(old_logprobs), p = exp(sampler_logprobs) of the token, l = log q/p

        ratio      q/p: exp of l of the token, of the answer's sum, or of its mean
        k2, k3     l^2 / 2,  q/p - 1 - l: estimates of KL(sampler || trainer)
        binary_kl  p log(p/q) + (1 - p) log((1 - p)/(1 - q)): KL(sampler || trainer) of "this token or another"
        tv         |p - q|: its total variation

    Divergences are 0 where the two agree, and have no lower bound. OpenRLHF's gating binary_kl and tv, level token and
    seq, are `over` token and mean; verl's token_k3, seq_sum_k3, seq_mean_k3 and seq_max_k3 are `measure` k3.

    Args:
        measure: what is judged.
        over: of the token, or of its answer: sum, mean or largest; the whole answer is then dropped.
        high: largest measure of what is kept.
        low: smallest ratio of what is kept; null = no bound.
    References:
        OpenRLHF, FlashREINFORCE (binary KL, mean of the answer), 2026.
        Qi et al., Rethinking the Trust Region in LLM Reinforcement Learning (DPPO: binary KL and TV), 2026.
        arXiv:2602.04879
    """

    measure: Measure
    over: Over = "token"
    high: float | None = None
    low: float | None = None

    def __post_init__(self) -> None:
        if self.measure == "ratio":
            _check_ratio_bounds("correction.filters", self.low, self.high)
            if self.over == "max":
                raise UserError("correction.filters: over='max' of a ratio has no lower side: use keep: every")
            if self.low is None and self.high is None:
                raise UserError("correction.filters: a ratio without a bound drops nothing: give low, high or both")
            return
        if self.low is not None:
            raise UserError(
                f"correction.filters: low={self.low} of {self.measure}, which is 0 where sampler and trainer agree: "
                "leave it out"
            )
        if self.high is None or not self.high > 0:
            raise UserError(
                f"correction.filters: high={self.high} of {self.measure} keeps nothing but exact tokens, or all: give "
                "a positive number, such as 0.05"
            )

    def keeps(
        self,
        old_logprobs: Float[Tensor, "batch time"],
        log_ratio: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> Bool[Tensor, "batch time"]:
        """True where a token passes, with l 0 where it is unknown or nothing counts."""
        if self.measure == "ratio":
            judged = bounded_exp(_over_answers(log_ratio, mask, self.over))
        else:
            judged = _over_answers(torch.where(mask, self._divergence(old_logprobs, log_ratio), 0.0), mask, self.over)
        return _within(judged, self.low, self.high)

    def _divergence(self, old_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
        if self.measure in ("k2", "k3"):
            held = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return kl_estimate(-held, torch.zeros_like(held), "k2" if self.measure == "k2" else "k3")
        return binary_divergence(old_logprobs, old_logprobs - log_ratio, "tv" if self.measure == "tv" else "kl")


@dataclass(frozen=True)
class SamplerCorrection:
    """How a mismatch between the sampler and the trainer is corrected.

        ratio  = exp(old_logprobs - sampler_logprobs), of the token, of the answer (sum of logs), or geometric (mean)
        weight = clip(ratio, floor, cap) if the `keep` ratio is within low and high, else 0

    | method | weight | cap | keep | low, high |
    |---|---|---|---|---|
    | TIS, token (TRL token_truncate, cap 3; verl, cap 2) | token | 2 | all | |
    | TIS, sequence (TRL sequence_truncate) | sequence | 2 | all | |
    | MIS, token (TRL token_mask) | token | null | token | null, 3 |
    | MIS, sequence (TRL's default, sequence_mask) | sequence | null | sequence | null, 3 |
    | IcePop (OpenRLHF icepop) | token | null | token | 0.5, 5 |
    | sequence mask with token weights (OpenRLHF seq-mask-tis) | token | null | geometric | 0.5, 5 |
    | veto: an answer with one such token goes (verl before 0.9) | token | 2 | every | 1e-4, null |
    | masks alone | none | | token, sequence, geometric or every | |
    | trust region (FlashREINFORCE): `filters` binary_kl over mean, high 0.05 | token | null | all | |

    A token that the sampler gave no number for (NaN) counts as sampled by the trainer: its ratio is 1.

    Args:
        weight: which ratio the loss is multiplied by; none = 1.
        cap: largest weight; null = no bound.
        floor: smallest weight of a token that is kept; null = no bound.
        keep: which ratio decides whether a token is kept at all; every = those of all tokens of its answer; all = no
            token is dropped.
        low: a token whose `keep` ratio is below gets weight 0; null = no bound.
        high: the same above.
        filters: further conditions on a token, or its answer, all of which it has to meet: `SamplerFilter`.
        normalise: divide the weights by their mean over the rollout, before `filters`: over its tokens, or its answers
            where `weight` is that of a sequence.
    References:
        Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (TIS), 2025.
        Liu et al., When Speed Kills Stability (sequence-level MIS), 2025.
        Ling Team, Every Step Evolves (IcePop), 2025. arXiv:2510.18855
    """

    weight: Literal["none", "token", "sequence"] = "token"
    cap: float | None = 2.0
    floor: float | None = None
    keep: Literal["all", "token", "sequence", "geometric", "every"] = "all"
    low: float | None = None
    high: float | None = None
    filters: list[SamplerFilter] = field(default_factory=list)
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.cap is not None and not self.cap >= 1:
            raise UserError(f"correction.cap={self.cap} would shrink exact tokens: give 1 or more, such as 2, or null")
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise UserError(f"correction.floor={self.floor} excludes a ratio of 1: give 0 to 1, such as 0.5, or null")
        _check_ratio_bounds("correction", self.low, self.high)
        if self.normalise and self.weight == "none":
            raise UserError("correction.normalise=true has no weights to divide: set weight to token or sequence")
        bounds = self.low is not None or self.high is not None
        if self.keep != "all" and not bounds:
            raise UserError(f"correction.keep={self.keep!r} needs a bound to keep within: give low, high or both")
        if self.keep == "all" and bounds:
            raise UserError(
                f"correction.low={self.low}, high={self.high} bound nothing while keep is 'all': say of which ratio, "
                "keep: token, sequence, geometric or every"
            )

    def __call__(
        self,
        old_logprobs: Float[Tensor, "batch time"],
        sampler_logprobs: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        *,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> CorrectionOutput:
        """The weights, without gradient.

        Args:
            old_logprobs: of the sampled tokens, under the policy that sampled, by the trainer's arithmetic.
            sampler_logprobs: of the same tokens, as the engine that sampled them said.
            mask: True on the tokens of the answers.
            add_over_ranks: adds a tensor over all ranks, where there are several.
        """
        difference = sampler_gap(old_logprobs, sampler_logprobs, mask)
        logs = {
            "token": difference,
            "sequence": _over_answers(difference, mask, "sum"),
            "geometric": _over_answers(difference, mask, "mean"),
        }
        weights = torch.ones_like(difference) if self.weight == "none" else bounded_exp(logs[self.weight])
        bounded = weights if self.floor is None and self.cap is None else weights.clamp(self.floor, self.cap)
        truncated = bounded != weights
        kept = mask
        if self.keep != "all":
            within = _within(bounded_exp(logs["token" if self.keep == "every" else self.keep]), self.low, self.high)
            if self.keep == "every":
                within = (within | ~mask).all(-1, keepdim=True)
            kept = kept & within
        if self.normalise:
            bounded = bounded / self._mean(torch.where(kept, bounded, 0.0), mask, add_over_ranks)
        for condition in self.filters:
            kept = kept & condition.keeps(old_logprobs.detach(), difference, mask)
        metrics = {
            "ratio": bounded_exp(difference),
            "kept_frac": kept.to(difference),
            "truncated_frac": (kept & truncated).to(difference),
            "kl": kl_estimate(-difference, torch.zeros_like(difference), "k3"),
        }
        return CorrectionOutput(weights=torch.where(kept, bounded, 0.0), metrics=metrics)

    def _mean(self, weights: Tensor, mask: Tensor, add_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the weights of all tokens, or of all answers; 1 where all of them are 0."""
        if self.weight == "sequence":  # the mean over an answer: where a filter of tokens has dropped some
            weights, mask = weights.sum(-1) / mask.sum(-1).clamp(min=1), mask.any(-1)
        count, total, _ = add_over_ranks(masked_moments(weights, mask)).unbind()
        mean = total / count.clamp(min=1)
        return torch.where(mean > 1e-8, mean, 1.0).to(weights)


def sampler_gap(
    old_logprobs: Float[Tensor, "batch time"],
    sampler_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """old_logprobs - sampler_logprobs where both are known, 0 elsewhere; no gradient."""
    difference = (old_logprobs - sampler_logprobs).detach()
    return torch.where(mask & ~difference.isnan(), difference, 0.0)


def _over_answers(x: Tensor, mask: Tensor, over: Over) -> Tensor:
    """Of each token, or of its whole answer at each of its tokens [batch, time]; `x` is 0 off `mask`."""
    if over == "token":
        return x
    if over == "max":
        return x.amax(-1, keepdim=True).expand_as(x)
    total = x.sum(-1, keepdim=True)
    return (total if over == "sum" else total / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(x)


def _within(judged: Tensor, low: float | None, high: float | None) -> Tensor:
    # without a low there is no bound: rounding leaves divergences of 0 a little below it
    return (judged >= (-torch.inf if low is None else low)) & (judged <= (torch.inf if high is None else high))


def _check_ratio_bounds(where: str, low: float | None, high: float | None) -> None:
    if low is not None and not 0 <= low <= 1:
        raise UserError(f"{where}.low={low} excludes a ratio of 1: give 0 to 1, such as 0.5, or null")
    if high is not None and not high >= 1:
        raise UserError(f"{where}.high={high} excludes a ratio of 1: give 1 or more, such as 5, or null")


def off_policy_sequence_mask(
    logprobs: Float[Tensor, "batch time"],
    sampler_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    threshold: float,
) -> Bool[Tensor, "batch time"]:
    """False at bad answers that the policy has moved away from: they teach nothing that it still does.

        kept_t = A_t >= 0  or  mean_s (sampler_logprobs_s - logprobs_s) <= threshold

    The mean covers drift in training and the mismatch of the sampler alike. TRL: `off_policy_mask_threshold`.

    Args:
        logprobs: under the policy being trained; its gradient is not used.
        sampler_logprobs: as the sampler said; `old_logprobs` where it said nothing.
        threshold: largest mean (nats per token).
    References:
        DeepSeek-AI, DeepSeek-V3.2 (off-policy sequence masking), 2025. arXiv:2512.02556
    """
    if not threshold > 0:
        raise UserError(
            f"threshold={threshold} would drop bad answers on policy as well: give a positive number, as 0.5"
        )
    gap = sampler_gap(sampler_logprobs, logprobs, mask)
    mean = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mask & ((advantages >= 0) | (mean <= threshold))
