"""The stated rule by which over-long records are cut.

    1. the beginning of the prompt goes (its BOS stays), until the record fits or one prompt token is left;
    2. then the end of the completion goes.

`cut_first: completion` leaves step 1 out. The answers of one prompt (a pair, a ranking) lose the same part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.data.encode import Encoded

Overlong = Literal["truncate", "drop", "error", "split"]


@dataclass(frozen=True)
class LengthRule:
    """How long records may be and what happens to longer ones."""

    max_length: int
    """Tokens of prompt and completion."""
    max_prompt_length: int | None = None
    """Tokens of the prompt alone."""
    overlong: Overlong = "truncate"
    """What happens to a longer record; "split" cuts texts into pieces of max_length."""
    cut_first: Literal["prompt", "completion"] = "prompt"
    """Where truncation begins."""

    def fits(self, records: Sequence[Encoded], prompt_length: int) -> bool:
        """Whether all answers of one prompt are short enough."""
        longest = max(len(record.ids) for record in records)
        return longest <= self.max_length and prompt_length <= (self.max_prompt_length or prompt_length)

    def cut(self, records: Sequence[Encoded], prompt_length: int, bos_length: int) -> list[Encoded]:
        """The answers of one prompt, cut to fit.

        Args:
            records: prompt and answer each, with the same prompt.
            prompt_length: tokens of the prompt.
            bos_length: how many of its first tokens are never cut.
        """
        excess = max(len(record.ids) for record in records) - self.max_length
        removable = max(prompt_length - max(bos_length, 1), 0)
        removed = prompt_length - self.max_prompt_length if self.max_prompt_length else 0
        if self.cut_first == "prompt":
            removed = max(removed, excess)
        removed = min(max(removed, 0), removable)
        return [self._cut_one(record, bos_length, removed) for record in records]

    def _cut_one(self, record: Encoded, bos_length: int, removed: int) -> Encoded:
        kept = [*range(bos_length), *range(bos_length + removed, len(record.ids))][: self.max_length]
        return Encoded([record.ids[i] for i in kept], [record.mask[i] for i in kept])

    def split(self, record: Encoded) -> list[Encoded]:
        """A text in pieces of max_length."""
        starts = range(0, len(record.ids), self.max_length)
        pieces = [slice(start, start + self.max_length) for start in starts]
        return [Encoded(record.ids[piece], record.mask[piece]) for piece in pieces]


def cut_prompt(ids: Sequence[int], limit: int, bos_length: int) -> list[int]:
    """A prompt without the tokens behind its BOS that are too many."""
    excess = max(len(ids) - limit, 0)
    return [*ids[:bos_length], *ids[bos_length + excess :]]


def prompt_length_of(record: Encoded) -> int:
    """Tokens in front of the first trained one."""
    return next((i for i, counts in enumerate(record.mask) if counts), len(record.mask))
