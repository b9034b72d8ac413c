"""Learning-rate shapes over the run: warm-up, then constant, linear or cosine."""

import math
from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.core.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over the run; the optimiser's own rate is the peak.

    Args:
        shape: what follows the warm-up.
        warmup_frac: share of the run's steps that rise linearly from 0 to the peak.
        final_frac: where linear and cosine end, as a share of the peak.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup_frac: float = 0.0
    final_frac: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_frac < 1:
            raise UserError(f"schedule.warmup_frac={self.warmup_frac}: use a share of the run, 0 <= warmup_frac < 1")
        if not 0 <= self.final_frac <= 1:
            raise UserError(f"schedule.final_frac={self.final_frac}: use a share of the peak, 0 <= final_frac <= 1")

    def factor(self, step: int, total: int) -> float:
        """What the peak rate is multiplied by at `step` of `total`."""
        warmup = self.warmup_frac * total
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        if self.shape == "constant":
            return 1.0
        fall = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_frac + (1 - self.final_frac) * fall
