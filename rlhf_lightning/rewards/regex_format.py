"""Answers that must have a form."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample


@dataclass(frozen=True)
class RegexFormat(RewardFn):
    r"""1 if the answer has the form of a regular expression, else 0.

    `.` matches newlines too: r"\s*<think>.*</think>\s*<answer>.*</answer>\s*" is the form of a reasoner's answer.

    Args:
        pattern: the regular expression.
        how: whole = the whole completion matches; anywhere = some part of it does; once = exactly one part does.
    """

    pattern: str
    how: Literal["whole", "anywhere", "once"] = "whole"

    def __post_init__(self) -> None:
        if self.how not in ("whole", "anywhere", "once"):
            raise UserError(f"how={self.how!r} of RegexFormat: use whole, anywhere or once")
        try:
            _compiled(self.pattern)
        except re.error as error:
            raise UserError(f"pattern={self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(self._fits(sample.completion)) for sample in samples]

    def _fits(self, text: str) -> bool:
        pattern = _compiled(self.pattern)
        if self.how == "whole":
            return pattern.fullmatch(text) is not None
        if self.how == "anywhere":
            return pattern.search(text) is not None
        return sum(1 for _ in pattern.finditer(text)) == 1


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
