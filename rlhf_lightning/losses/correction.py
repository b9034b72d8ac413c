"""Weights for tokens whose sampler was not quite the policy that trains: TIS, MIS, IcePop, sequence masks.

An engine that generates in another precision, with other kernels or with older weights samples from a distribution of
its own. What it said about its tokens (`sampler_logprobs`) against what the trainer says (`old_logprobs`) gives the
importance weight that the policy loss is multiplied by, token by token. Denominators stay those of all tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kl import kl_estimate
from rlhf_lightning.core.ratio import bounded_exp


@dataclass(frozen=True)
class CorrectionOutput:
    """Weights of a rollout, and what they did."""

    weights: Float[Tensor, "batch time"]
    """What the policy loss of each token is multiplied by; 0 where the token is masked, or does not count."""
    metrics: Mapping[str, Float[Tensor, "batch time"]]
    """Per token, for means over the tokens that count: ratio (before any bound), kept_frac, truncated_frac, and kl, the
    k3 estimate of KL(sampler || trainer)."""


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
    | veto: an answer with one such token goes (verl's token veto) | token | 2 | every | 1e-4, null |
    | masks alone | none | | token, sequence, geometric or every | |

    A token that the sampler gave no number for (NaN) counts as sampled by the trainer: its ratio is 1.

    Args:
        weight: which ratio the loss is multiplied by; none = 1.
        cap: largest weight; null = no bound.
        floor: smallest weight of a token that is kept; null = no bound.
        keep: which ratio decides whether a token is kept at all; every = those of all tokens of its answer; all = no
            token is dropped.
        low: a token whose `keep` ratio is below gets weight 0; null = no bound.
        high: the same above.
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

    def __post_init__(self) -> None:
        if self.cap is not None and not self.cap >= 1:
            raise UserError(f"correction.cap={self.cap} would shrink exact tokens: give 1 or more, such as 2, or null")
        for name, value in (("floor", self.floor), ("low", self.low)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"correction.{name}={value} excludes a ratio of 1: give 0 to 1, such as 0.5, or null")
        if self.high is not None and not self.high >= 1:
            raise UserError(f"correction.high={self.high} excludes a ratio of 1: give 1 or more, such as 5, or null")
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
    ) -> CorrectionOutput:
        """The weights, without gradient.

        Args:
            old_logprobs: of the sampled tokens, under the policy that sampled, by the trainer's arithmetic.
            sampler_logprobs: of the same tokens, as the engine that sampled them said.
            mask: True on the tokens of the answers.
        """
        difference = sampler_gap(old_logprobs, sampler_logprobs, mask)
        total = difference.sum(-1, keepdim=True).expand_as(difference)
        logs = {
            "token": difference,
            "sequence": total,
            "geometric": total / mask.sum(-1, keepdim=True).clamp(min=1),
        }
        weights = torch.ones_like(difference) if self.weight == "none" else bounded_exp(logs[self.weight])
        bounded = weights if self.floor is None and self.cap is None else weights.clamp(self.floor, self.cap)
        kept = mask
        if self.keep != "all":
            judged = bounded_exp(logs["token" if self.keep == "every" else self.keep])
            within = judged >= (self.low or 0.0)
            if self.high is not None:
                within &= judged <= self.high
            if self.keep == "every":
                within = (within | ~mask).all(-1, keepdim=True)
            kept = kept & within
        metrics = {
            "ratio": bounded_exp(difference),
            "kept_frac": kept.to(difference),
            "truncated_frac": (kept & (bounded != weights)).to(difference),
            "kl": kl_estimate(-difference, torch.zeros_like(difference), "k3"),
        }
        return CorrectionOutput(weights=torch.where(kept, bounded, 0.0), metrics=metrics)


def sampler_gap(
    old_logprobs: Float[Tensor, "batch time"],
    sampler_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """old_logprobs - sampler_logprobs where both are known, 0 elsewhere; no gradient."""
    difference = (old_logprobs - sampler_logprobs).detach()
    return torch.where(mask & ~difference.isnan(), difference, 0.0)


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
