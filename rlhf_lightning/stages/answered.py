"""Prompts, their answers and what was said of them: what a rollout hands on to be prepared for training."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.rewards.combine import ScoredSamples


@dataclass(frozen=True)
class Answered:
    """Prompts with their answers and what the reward functions say about them."""

    prompts: PromptBatch
    answers: Generated
    scored: ScoredSamples
    groups: Tensor
    """Which prompt each answer is to [batch]: answers with one number are compared with each other."""
    staleness: Tensor
    """Rollouts that the policy was trained on between sampling an answer and now [batch]."""
    baseline: Tensor | None = None
    """Score that each answer is compared with [batch], where the credit wants one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """How they were come by."""

    def select(self, rows: Tensor, *, first_group: int) -> "Answered":
        """The answers at `rows`, their groups numbered from `first_group` on."""
        return replace(
            self,
            answers=self.answers.select(rows),
            scored=self.scored.select(rows.tolist()),
            groups=self.groups[rows].unique(return_inverse=True)[1] + first_group,
            staleness=self.staleness[rows],
            baseline=None if self.baseline is None else self.baseline[rows],
        )


def without_dropped(answers: Generated, scored: ScoredSamples) -> Generated:
    """Nothing counts of the answers that a reward function could not score: they carry no loss and enter no mean."""
    if scored.valid is None:
        return answers
    return replace(answers, mask=answers.mask & scored.valid.to(answers.mask.device)[:, None])
