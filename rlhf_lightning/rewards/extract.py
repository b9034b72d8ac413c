r"""Where the final answer stands in a text: the last \boxed{}, the last ####, or the last match of a pattern."""

import re
from dataclasses import dataclass
from functools import lru_cache

from rlhf_lightning.core.errors import UserError

BOXES = ("\\boxed", "\\fbox")
HASHES = re.compile(r"####[ \t]*([^\n]*)")


@dataclass(frozen=True)
class AnswerPattern:
    """A regular expression whose last match is the answer: group 1 if it has one, else the whole match."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            compiled = _compiled(self.pattern)
        except re.error as error:
            raise UserError(f"pattern={self.pattern!r} is no regular expression: {error}") from error
        if compiled.groups > 1:
            raise UserError(f"pattern={self.pattern!r} has {compiled.groups} groups: give at most 1, the answer")

    def last(self, text: str) -> str | None:
        """The answer, or None."""
        found = None
        for found in _compiled(self.pattern).finditer(text):  # noqa: B007  the last one is wanted
            pass
        return None if found is None else found[found.re.groups]


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces matched; None without one that is closed.

    >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = max(text.rfind(box) for box in BOXES)
    if start < 0:
        return None
    opening = text.find("{", start)
    word = text[start:].split("{")[0]
    if opening < 0 or word.strip() not in BOXES:
        return None
    depth = 0
    for place in range(opening, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : place]
    return None


def final_answer(text: str, pattern: AnswerPattern | None = None) -> str | None:
    r"""The answer by `pattern` if one is given, else by the last \boxed{}, else by the last ####; None without any."""
    if pattern is not None:
        return pattern.last(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    hashes = HASHES.findall(text)
    return hashes[-1].strip() if hashes else None


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
