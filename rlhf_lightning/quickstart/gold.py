"""The quickstart's gold scorer as a reward function, and the checks that its report counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.quickstart.language import gold_score, is_grammatical, sentiment


@dataclass(frozen=True)
class ReviewGold(RewardFn):
    """Scores the whole review, prompt and answer: sentiment minus repetition minus broken grammar.

    Args:
        repetition_coef: weight of the share of repeated word pairs.
        ungrammaticality_coef: weight of 0.5 to 1 for a text that is no review of the language.
    """

    name: ClassVar[str] = "gold"
    repetition_coef: float = 1.5
    ungrammaticality_coef: float = 1.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [
            gold_score(
                sample.prompt + sample.completion,
                repetition_coef=self.repetition_coef,
                ungrammaticality_coef=self.ungrammaticality_coef,
            )
            for sample in samples
        ]


def grammatical(samples: Sequence[Sample]) -> list[float]:
    """1 for each sample that is, prompt and answer together, a finished review of the language; else 0."""
    return [float(sample.finished and is_grammatical(sample.prompt + sample.completion)) for sample in samples]


def review_sentiment(samples: Sequence[Sample]) -> list[float]:
    """Sentiment of each sample, prompt and answer together, from -1 to 1."""
    return [sentiment(sample.prompt + sample.completion) for sample in samples]
