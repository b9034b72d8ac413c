"""Rewards that follow from the text alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample


def repetition(text: str, ngram: int = 2) -> float:
    """Share of a text's n-grams of words that it has said before: 0 = no n-gram twice, towards 1 = a loop.

    1 - distinct n-grams / n-grams, without regard to case; 0 for a text of fewer than `ngram` words.
    """
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(ngram)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Repetition(RewardFn):
    """Minus the share of repeated n-grams of words: 0 for a text that repeats nothing, towards -1 for a loop.

    Args:
        ngram: words per n-gram.
    """

    ngram: int = 2

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise UserError(f"ngram={self.ngram}: give 1 or more words per n-gram, such as 2")

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [-repetition(sample.completion, self.ngram) for sample in samples]


@dataclass(frozen=True)
class LengthReward(RewardFn):
    """1 for an answer of the target length, falling linearly to 0 at length 0 and at twice the target, and not below.

        score = max(0, 1 - |length - target| / target)

    Args:
        target: the length that gets 1.
        unit: what is counted: tokens (the end token included), words or characters.
    """

    target: int = 50
    unit: Literal["tokens", "words", "characters"] = "tokens"

    def __post_init__(self) -> None:
        if self.target < 1:
            raise UserError(f"target={self.target}: give a length of at least 1")
        if self.unit not in ("tokens", "words", "characters"):
            raise UserError(f"unit={self.unit!r} is unknown: use tokens, words or characters")

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [max(0.0, 1 - abs(self._length(sample) - self.target) / self.target) for sample in samples]

    def _length(self, sample: Sample) -> int:
        if self.unit == "tokens":
            return len(sample.tokens)
        return len(sample.completion.split() if self.unit == "words" else sample.completion)


@dataclass(frozen=True)
class Keyword(RewardFn):
    """Share of the wanted words that an answer holds, minus the share of the unwanted ones: from -1 to 1.

    Whole words or phrases count, without regard to case; how often they occur does not.

    Args:
        wanted: words or phrases that should occur.
        unwanted: words or phrases that should not.
    """

    wanted: list[str] = field(default_factory=list)
    unwanted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.wanted and not self.unwanted:
            raise UserError("Keyword has nothing to look for: give `wanted` or `unwanted` words")
        if not all(word.strip() for word in [*self.wanted, *self.unwanted]):
            raise UserError("Keyword was given an empty word, which every text holds: remove it")

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [
            _share_found(self.wanted, sample.completion) - _share_found(self.unwanted, sample.completion)
            for sample in samples
        ]


def _share_found(words: Sequence[str], text: str) -> float:
    # \b would fail at the edge of a keyword such as "C++"
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in words]
    return sum(found) / len(found) if found else 0.0
