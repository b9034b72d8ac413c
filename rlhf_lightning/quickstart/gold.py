"""The quickstart's scorers as reward functions. All read prompt and answer as one text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.quickstart.language import gold_score, is_grammatical, sentiment


@dataclass(frozen=True)
class ReviewGold(RewardFn):
    """Sentiment minus repetition minus broken grammar: what a good review is worth."""

    name: ClassVar[str] = "gold"
    repetition_coef: float = 1.5
    """Weight of the share of repeated word pairs."""
    ungrammaticality_coef: float = 1.0
    """Weight of 0.5 to 1 for a text that is no review of the language."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [
            gold_score(
                sample.prompt + sample.completion,
                repetition_coef=self.repetition_coef,
                ungrammaticality_coef=self.ungrammaticality_coef,
            )
            for sample in samples
        ]


@dataclass(frozen=True)
class Grammatical(RewardFn):
    """1 for an answer that ended by itself and makes, with its prompt, a review of the language; else 0."""

    name: ClassVar[str] = "grammatical"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(sample.finished and is_grammatical(sample.prompt + sample.completion)) for sample in samples]


@dataclass(frozen=True)
class Sentiment(RewardFn):
    """From -1 (all blame) to 1 (all praise)."""

    name: ClassVar[str] = "sentiment"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [sentiment(sample.prompt + sample.completion) for sample in samples]
