"""The countdown game: reach a target with given numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.arithmetic import NotArithmetic, calculate
from rlhf_lightning.rewards.columns import column_of
from rlhf_lightning.rewards.extract import AnswerPattern


@dataclass(frozen=True)
class Countdown(RewardFn):
    r"""Whether an expression uses every given number exactly once and comes to the target; exact fractions.

        score = 1 if correct, else format_score if well-formed, else 0

    Well-formed: the answer is there and is arithmetic (whole numbers, + - * /, brackets). The metrics hold `correct`
    and `well_formed` apart: a format score is a floor that a policy can live on without solving anything.

    Args:
        target_column: column with the number to reach.
        numbers_column: column with the list of numbers.
        pattern: where the expression stands in the completion: the last match, group 1 if it has one.
        format_score: of a well-formed answer that is wrong (TinyZero: 0.1).

    References:
        Pan et al., TinyZero, 2025. https://github.com/Jiayi-Pan/TinyZero
    """

    target_column: str = "target"
    numbers_column: str = "numbers"
    pattern: str = r"<answer>([^<]*)</answer>"
    format_score: float = 0.0

    def __post_init__(self) -> None:
        AnswerPattern(self.pattern)
        if not 0 <= self.format_score < 1:
            raise UserError(f"format_score={self.format_score} of Countdown: give at least 0 and less than 1")

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        targets = column_of(samples, self.target_column, reward="Countdown", option="target_column")
        numbers = column_of(samples, self.numbers_column, reward="Countdown", option="numbers_column")
        verdicts = [
            self._judge(sample.completion, _whole(target, self.target_column), _wholes(given, self.numbers_column))
            for sample, target, given in zip(samples, targets, numbers, strict=True)
        ]
        scores = [1.0 if correct else self.format_score * well_formed for correct, well_formed in verdicts]
        parts = {"correct": [float(c) for c, _ in verdicts], "well_formed": [float(w) for _, w in verdicts]}
        return DetailedScores(scores, parts)

    def _judge(self, completion: str, target: int, given: list[int]) -> tuple[bool, bool]:
        said = AnswerPattern(self.pattern).last(completion)
        if said is None:
            return False, False
        # "3 + 4 = 7" is how people write it; what is right of the sign is not needed
        expression = said.split("=")[0]
        try:
            value, used = calculate(expression)
        except NotArithmetic:
            return False, False
        return value == target and Counter(used) == Counter(given), True


def _whole(value: object, column: str) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise UserError(f"Countdown: column {column!r} holds {value!r:.60}: a whole number is needed") from error


def _wholes(value: object, column: str) -> list[int]:
    if not isinstance(value, list | tuple):
        raise UserError(f"Countdown: column {column!r} holds {value!r:.60}: a list of whole numbers is needed")
    return [_whole(entry, column) for entry in value]
