"""Several reward functions as one of them: mean, worst case, mean minus disagreement, or behind a gate."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.combine import WeightedReward, check_names, score_samples

MODES = ("sum", "mean", "worst_case", "uncertainty_penalised", "gated")
NORMALISATIONS = (None, "min_max", "z")


class Ensemble(RewardFn):
    """Several reward functions combined into one score per sample.

        x_f = weight_f normalise(score_f)
        sum                     sum_f x_f
        mean                    mean_f x_f
        worst_case              min_f x_f                                 (WCO)
        uncertainty_penalised   mean_f x_f - variance_coef var_f x_f      (UWO; population variance)
        gated                   sum of the others if score_gate >= gate_min, else gated_score

    A member of weight 0 is logged and takes no part. A member that scores tokens counts with their sum. Every member's
    own score is kept in the metrics, as `reward/<name>/<member>`; a sample that a member drops is dropped.

    Args:
        members: the functions, each with weight, name, on_error and timeout_s.
        mode: how they become one number.
        normalise: brings members to one scale over the samples of a call (one rank's rollout), dropped ones left out.
            min_max: (s - min) / (max - min); z: (s - mean) / population standard deviation; 0 where all are equal.
        variance_coef: λ of uncertainty_penalised: what a unit of variance between members costs.
        gate: name of the member that must pass, in mode gated; compared as it scores, neither weighted nor normalised.
        gate_min: the least score that passes.
        gated_score: of a sample that does not pass.

    References:
        Coste et al., Reward Model Ensembles Help Mitigate Overoptimization, 2023. arXiv:2310.02743
    """

    def __init__(
        self,
        members: list[WeightedReward],
        mode: Literal["sum", "mean", "worst_case", "uncertainty_penalised", "gated"] = "mean",
        normalise: Literal["min_max", "z"] | None = None,
        variance_coef: float = 0.5,
        gate: str | None = None,
        gate_min: float = 1.0,
        gated_score: float = 0.0,
    ) -> None:
        check_names(members)
        if mode not in MODES:
            raise UserError(f"mode={mode!r} of an Ensemble: use one of {', '.join(MODES)}")
        if normalise not in NORMALISATIONS:
            raise UserError(f"normalise={normalise!r} of an Ensemble: use min_max, z or null")
        if not variance_coef >= 0:
            raise UserError(f"variance_coef={variance_coef} would reward disagreement: give 0 or more")
        labels = [member.label for member in members]
        if (gate is not None) != (mode == "gated"):
            raise UserError(
                f"mode={mode!r} with gate={gate!r}: mode gated needs the name of a member, no other mode has one"
            )
        if gate is not None and gate not in labels:
            raise UserError(f"gate={gate!r} is none of the members: {', '.join(labels)}")
        self._voting = [member for member in members if member.weight != 0 and member.label != gate]
        if not self._voting:
            raise UserError(f"no member of this Ensemble counts ({', '.join(labels)}): give one a weight other than 0")
        self.members = members
        self.mode = mode
        self.normalise = normalise
        self.variance_coef = variance_coef
        self.gate = gate
        self.gate_min = gate_min
        self.gated_score = gated_score

    def to(self, device: torch.device | str) -> None:
        for member in self.members:
            member.reward.to(device)

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        scored = score_samples(self.members, samples)
        counts = scored.counts
        x = torch.stack([m.weight * self._normalised(scored.breakdown[m.label], counts) for m in self._voting])
        scores = self._combined(x)  # [batch]
        if self.gate is not None:
            passed = scored.breakdown[self.gate] >= self.gate_min
            scores = torch.where(passed, scores, self.gated_score)
        parts = {name: values.tolist() for name, values in (scored.breakdown | scored.parts).items()}
        return DetailedScores(scores.tolist(), parts, counts.tolist())

    def _combined(self, x: Tensor) -> Tensor:
        """One number per sample from those of the members [members, batch]."""
        if self.mode in ("sum", "gated"):
            return x.sum(0)
        if self.mode == "worst_case":
            return x.amin(0)
        penalty = self.variance_coef * x.var(0, correction=0) if self.mode == "uncertainty_penalised" else 0.0
        return x.mean(0) - penalty

    def _normalised(self, scores: Tensor, counts: Tensor) -> Tensor:
        seen = scores[counts]
        if self.normalise is None or not len(seen):
            return scores
        if self.normalise == "min_max":
            shift, scale = seen.amin(), seen.amax() - seen.amin()
        else:
            shift, scale = seen.mean(), seen.std(correction=0)
        # all equal, up to rounding: nothing tells the samples apart
        alike = scale <= 1e-6 * seen.abs().amax()
        return torch.where(alike, 0.0, (scores - shift) / torch.where(alike, 1.0, scale))
