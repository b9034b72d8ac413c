"""Which answers of a rollout are trained on, and how often, by their scores: policy filtration."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.core.errors import UserError

LEAST = 1e-8
"""What is added to every weight, so that something can be drawn where all of them are 0."""


@dataclass(frozen=True)
class Resample:
    """Draws as many answers as there are, with replacement, in proportion to a weight of their score.

        power        |score|^power
        best_worst   1 for the best and for the worst score of the rollout, 0 for all others
        best_random  0.4 for the best, 0.1 for all others

    A reward model is surer of high and of low scores than of those in between, so these are trained on more often.
    After credit and whitening, which are from all answers. Each process draws from its own answers; best and worst are
    those of all of them. verl's `pf_ppo`: pow, max_min, max_random.

    Args:
        by: what the weight is.
        power: of `by: power`; the larger, the more of the extreme scores.
    References:
        Shen and Zhang, Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (PF-PPO), 2024. arXiv:2409.06957
    """

    by: Literal["power", "best_worst", "best_random"] = "power"
    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UserError(
                f"resample.power={self.power} would prefer scores near 0, or none: give a positive number, such as 2"
            )

    def weights(self, scores: Tensor, best: Tensor, worst: Tensor) -> Tensor:
        """How readily each answer is drawn [batch], up to a common factor.

        Args:
            scores: of the answers [batch].
            best: largest score of the whole rollout.
            worst: smallest.
        """
        if self.by == "power":
            weights = scores.abs() ** self.power
        elif self.by == "best_worst":
            weights = ((scores == best) | (scores == worst)).to(scores)
        else:
            weights = torch.where(scores == best, 0.4, 0.1)
        return weights + LEAST

    def draw(self, scores: Tensor, counts: Tensor, best: Tensor, worst: Tensor, *, seed: int) -> Tensor:
        """Rows to train on [batch]: of the answers that count; all rows as they are where none does.

        Args:
            counts: False for an answer that was dropped [batch].
            seed: names the draw.
        Raises:
            UserError: a weight is beyond float32.
        """
        if not counts.any():
            return torch.arange(len(scores), device=scores.device)
        generator = torch.Generator().manual_seed(seed)
        weights = torch.where(counts, self.weights(scores, best, worst), 0.0).cpu()
        if not bool(weights.sum().isfinite()):
            largest = float(scores.abs().max())
            raise UserError(
                f"resample.power={self.power:g} of a score of {largest:g} is too large a weight to draw by: "
                "lower power, or the weights in rewards"
            )
        return torch.multinomial(weights, len(scores), replacement=True, generator=generator).to(scores.device)
