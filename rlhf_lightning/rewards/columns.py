"""What a reward needs of a prompt's record: a column, or an error that says which."""

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample


def column_of(samples: Sequence[Sample], column: str, *, reward: str, option: str) -> list[Any]:
    """The column's value of every sample.

    Args:
        column: its name in the records.
        reward: who asks.
        option: the reward's option that names the column.
    Raises:
        UserError: a record lacks the column, or has None in it. Names column, reward and the columns that there are.
    """
    for index, sample in enumerate(samples):
        if sample.record.get(column) is None:
            there = ", ".join(sorted(sample.record)) or "none at all"
            raise UserError(
                f"{reward} needs the column {column!r}, which the record of sample {index} (prompt "
                f"{sample.prompt[:60]!r}) lacks; its columns: {there}. Name another one with {option}, or rename one "
                f"with data.columns"
            )
    return [sample.record[column] for sample in samples]


def text_column(samples: Sequence[Sample], column: str, *, reward: str, option: str) -> list[str]:
    """The column's value of every sample, which must be text or a number."""
    values = column_of(samples, column, reward=reward, option=option)
    for index, value in enumerate(values):
        if not isinstance(value, str | int | float):
            raise UserError(
                f"{reward}: column {column!r} of sample {index} holds {value!r:.60}, a {type(value).__name__}: "
                "text or a number is needed"
            )
    return [value if isinstance(value, str) else repr(value) for value in values]
