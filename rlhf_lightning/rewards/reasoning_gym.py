"""Tasks of the package reasoning-gym, scored by their own rules."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.columns import column_of
from rlhf_lightning.rewards.extract import AnswerPattern

BLOCKED = {
    # eval() on the answer
    "binary_matrix": "evaluates the answer",
    "n_queens": "evaluates the answer",
    "spiral_matrix": "evaluates the answer",
    "string_insertion": "evaluates the answer",
    # sympy.parse_expr() on the answer, which is eval() after a rewrite of its tokens
    "countdown": "evaluates the answer through sympy; use the reward Countdown",
    "intermediate_integration": "evaluates the answer through sympy",
    "polynomial_multiplication": "evaluates the answer through sympy",
    "puzzle24": "evaluates the answer through sympy; use the reward Countdown with target 24",
    "simple_integration": "evaluates the answer through sympy",
    # eval() on text of the record: data would be a program
    "bitwise_arithmetic": "evaluates text of the record",
    "number_sorting": "evaluates text of the record",
}
"""Tasks whose scoring runs text as Python, by reasoning-gym 0.1.25's source."""


class ReasoningGym(RewardFn):
    """The task's own `score_answer`, from 0 to 1.

    A record is what reasoning-gym generates: `question` (the prompt), `answer`, and `metadata` with `source_dataset`.

    Tasks whose scoring evaluates text as Python are refused by name: see `BLOCKED`. The others are trusted, as far as
    the installed package is.

    Args:
        pattern: where the answer stands in the completion: the last match, group 1 if it has one; null = all of it.
        answer_column, metadata_column: columns with the key and the task's data.
    """

    def __init__(
        self,
        pattern: str | None = r"(?s)<answer>\s*(.*?)\s*</answer>",
        answer_column: str = "answer",
        metadata_column: str = "metadata",
    ) -> None:
        self._pattern = None if pattern is None else AnswerPattern(pattern)
        self.answer_column = answer_column
        self.metadata_column = metadata_column
        self._tasks: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tasks": {}}

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        keys = column_of(samples, self.answer_column, reward="ReasoningGym", option="answer_column")
        metadata = column_of(samples, self.metadata_column, reward="ReasoningGym", option="metadata_column")
        said = [s.completion if self._pattern is None else self._pattern.last(s.completion) for s in samples]
        scores = []
        for sample, answer, key, data in zip(samples, said, keys, metadata, strict=True):
            if not isinstance(data, Mapping) or not isinstance(data.get("source_dataset"), str):
                raise UserError(
                    f"ReasoningGym: column {self.metadata_column!r} holds {data!r:.60}: the metadata of a task, with "
                    "source_dataset, is needed"
                )
            task = self._task(data["source_dataset"])
            entry = {"question": sample.record.get("question", sample.prompt), "answer": key, "metadata": data}
            scores.append(0.0 if answer is None else float(task.score_answer(answer, entry)))
        return DetailedScores(scores, {"answered": [float(answer is not None) for answer in said]})

    def _task(self, name: str) -> Any:
        if name in BLOCKED:
            raise UserError(
                f"ReasoningGym: task {name!r} is blocked, for its scoring {BLOCKED[name]}: leave its records out"
            )
        if name not in self._tasks:
            try:
                import reasoning_gym
                from reasoning_gym.factory import DATASETS
            except ModuleNotFoundError as error:
                raise UserError("ReasoningGym needs the package reasoning-gym: pip install reasoning-gym") from error
            if name not in DATASETS:
                raise UserError(f"ReasoningGym: the installed reasoning-gym has no task {name!r}")
            self._tasks[name] = reasoning_gym.create_dataset(name, size=1, seed=0)
        return self._tasks[name]
