"""Mathematical answers, compared as mathematics."""

import importlib.util
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.columns import text_column
from rlhf_lightning.rewards.extract import AnswerPattern, final_answer
from rlhf_lightning.rewards.worker_pool import WorkerPool

WORKER = Path(__file__).with_name("math_worker.py")
MAX_LENGTH = 2000
"""Characters of an answer; a longer one is wrong unread."""
PLAIN = re.compile(r"[-+]?(\d{1,40}|\d{1,3}(,\d{3}){1,12})(\.\d{0,40})?|[-+]?\.\d{1,40}")
ROUNDING = 6
"""Decimal places that numbers must agree in, as math-verify has it."""


class MathAnswer(RewardFn):
    r"""1 if the answer is mathematically the key (1/2 = 0.5 = \frac{1}{2}), else 0, also without an answer.

    The answer is the last \boxed{}, else what follows the last ####; or the last match of `pattern`. The key is taken
    out of its column in the same way, or is all of it. Plain numbers are compared at once, to six decimal places.
    Everything else goes to math-verify (package math-verify) in processes of their own, which are killed at `limit_s`:
    no verdict, score 0. The answer is read by a grammar and never evaluated: `math_worker` says why.

    The metrics hold `answered` (an answer was found) and `timed_out`.

    Args:
        answer_column: column with the key, or with a solution that ends in it (`... #### 18`).
        pattern: where the answer stands, as a regular expression: its last match, group 1 if it has one.
        limit_s: seconds (wall clock) that a comparison may take.
        num_workers: processes that compare.
    """

    def __init__(
        self, answer_column: str = "answer", pattern: str | None = None, limit_s: float = 3.0, num_workers: int = 2
    ) -> None:
        if not limit_s > 0 or num_workers < 1:
            raise UserError(f"limit_s={limit_s}, num_workers={num_workers} of MathAnswer: seconds above 0, at least 1")
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("MathAnswer needs the package math-verify: pip install math-verify")
        self.answer_column = answer_column
        self.limit_s = limit_s
        self.num_workers = num_workers
        self._pattern = None if pattern is None else AnswerPattern(pattern)
        self._pool: WorkerPool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        keys = text_column(samples, self.answer_column, reward="MathAnswer", option="answer_column")
        golds = [self._answer(key) or key.strip() for key in keys]
        said = [self._answer(sample.completion) for sample in samples]
        verdicts: list[bool | None] = [_compare_numbers(g, s) for g, s in zip(golds, said, strict=True)]
        hard = [i for i, verdict in enumerate(verdicts) if verdict is None]
        answers = self._workers().map([{"gold": golds[i], "answer": said[i]} for i in hard]) if hard else []
        timed_out = [0.0] * len(samples)
        for index, answer in zip(hard, answers, strict=True):
            verdicts[index] = answer is not None and answer["equal"]
            timed_out[index] = float(answer is None)
        return DetailedScores(
            [float(bool(verdict)) for verdict in verdicts],
            {"answered": [float(s is not None) for s in said], "timed_out": timed_out},
        )

    def _answer(self, text: str) -> str | None:
        found = final_answer(text, self._pattern)
        return None if found is None else found.strip().strip("$").strip()

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(WORKER, self.limit_s, self.num_workers)
        return self._pool


def _compare_numbers(gold: str, said: str | None) -> bool | None:
    """The verdict where it takes no mathematics; None where it does."""
    if said is None or not said or len(said) > MAX_LENGTH:
        return False
    if said == gold:
        return True
    numbers = [_number(text) for text in (gold, said)]
    if numbers[0] is None or numbers[1] is None:
        return None
    return round(numbers[0], ROUNDING) == round(numbers[1], ROUNDING)


def _number(text: str) -> Fraction | None:
    """A plain number, perhaps with commas, a dollar in front or a full stop behind; None for anything else."""
    text = text.removeprefix("\\").removeprefix("$").strip()
    if PLAIN.fullmatch(text) is None:
        text = text.removesuffix(".")
        if PLAIN.fullmatch(text) is None:
            return None
    return Fraction(text.replace(",", "").removesuffix("."))
