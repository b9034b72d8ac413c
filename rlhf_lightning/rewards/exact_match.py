"""Answers that must equal the key."""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.rewards.columns import column_of
from rlhf_lightning.rewards.extract import AnswerPattern


@dataclass(frozen=True)
class ExactMatch(RewardFn):
    """1 if the answer is the key, or one of the keys, else 0. White space at the ends and in runs never counts.

    Args:
        answer_column: column with the key: text, a number, or a list of keys of which any will do.
        pattern: where the answer stands in the completion, as a regular expression: its last match, group 1 if it has
            one; null = the whole completion.
        ignore_case: whether case counts for nothing.
        ignore_punctuation: whether ASCII punctuation counts for nothing.
    """

    answer_column: str = "answer"
    pattern: str | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False

    def __post_init__(self) -> None:
        if self.pattern is not None:
            AnswerPattern(self.pattern)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        keys = column_of(samples, self.answer_column, reward="ExactMatch", option="answer_column")
        return [float(self._is_right(sample.completion, key)) for sample, key in zip(samples, keys, strict=True)]

    def _is_right(self, completion: str, key: object) -> bool:
        said = completion if self.pattern is None else AnswerPattern(self.pattern).last(completion)
        if said is None:
            return False
        keys = key if isinstance(key, list | tuple) else [key]
        return self._plain(said) in {self._plain(str(k)) for k in keys}

    def _plain(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = text.translate(_NO_PUNCTUATION)
        return " ".join(text.split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
