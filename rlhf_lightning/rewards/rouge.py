"""Overlap with a reference text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.columns import text_column

Key = Literal["rouge1", "rouge2", "rougeL"]
KEYS = ("rouge1", "rouge2", "rougeL")
STATISTICS = ("fmeasure", "precision", "recall")


@dataclass(frozen=True)
class Rouge(RewardFn):
    """ROUGE of the answer against a reference, by torchmetrics: from 0 (no n-gram in common) to 1 (the same words).

    Args:
        reference_column: column with the reference text.
        key: rouge1 and rouge2 count shared words and bigrams, rougeL the longest common subsequence.
        statistic: fmeasure, precision (share of the answer that is in the reference) or recall (the reverse).

    References:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004.
    """

    reference_column: str = "reference"
    key: Key = "rougeL"
    statistic: Literal["fmeasure", "precision", "recall"] = "fmeasure"

    def __post_init__(self) -> None:
        if self.key not in KEYS:
            raise UserError(f"key={self.key!r} of Rouge: use one of {', '.join(KEYS)}")
        if self.statistic not in STATISTICS:
            raise UserError(f"statistic={self.statistic!r} of Rouge: use one of {', '.join(STATISTICS)}")

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        references = text_column(samples, self.reference_column, reward="Rouge", option="reference_column")
        found = [self._measure(s.completion, r) for s, r in zip(samples, references, strict=True)]
        parts = {name: [values[name] for values in found] for name in STATISTICS}
        return DetailedScores(parts[self.statistic], parts)

    def _measure(self, said: str, reference: str) -> dict[str, float]:
        from torchmetrics.functional.text.rouge import rouge_score

        values = rouge_score(said, reference, rouge_keys=self.key)
        return {name: float(values[f"{self.key}_{name}"]) for name in STATISTICS}
