"""A programmatic gold reward: how positive a text is by a lexicon."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.rewards.text_rules import repetition


@dataclass(frozen=True)
class VaderSentiment(RewardFn):
    """Sentiment of the answer by the VADER lexicon, from -1 (negative) to 1 (positive), minus repetition.

        score = compound - repetition_penalty (1 - distinct bigrams / bigrams)

    Needs the package vaderSentiment. Cheap, deterministic and known in full: a gold reward to measure trained reward
    models, and their over-optimisation, against.

    Args:
        repetition_penalty: factor on the share of repeated bigrams of words; 0 = sentiment alone.
    References:
        Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, 2014.
    """

    repetition_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not self.repetition_penalty >= 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty} would reward repetition: give 0 or more")

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        analyzer = _analyzer()
        return [
            analyzer.polarity_scores(sample.completion)["compound"]
            - self.repetition_penalty * repetition(sample.completion)
            for sample in samples
        ]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise UserError("VaderSentiment needs the package vaderSentiment: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()
