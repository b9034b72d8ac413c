"""Programs that must pass tests."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.columns import column_of
from rlhf_lightning.rewards.sandbox import Sandbox

FENCE = re.compile(r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class _Verdict:
    passed: list[bool]
    timed_out: bool


class CodeTests(RewardFn):
    """1 if the Python program in the answer passes all hidden tests, else 0; in a sandbox (bubblewrap), or not at all.

    The program is the last fenced block of the answer (```python), or all of the answer. The tests are a column:

    - text: code that asserts, or that defines `check(candidate)` (HumanEval), or a list of such texts (MBPP);
    - a list of `{stdin, stdout}`: the program is a script, and its output is compared, white space at line ends aside.

    The program runs without network, environment or files, as nobody, within limits of time, memory, processes and
    output. The tests run in a second sandbox, which sends the program only the inputs of its functions and gets plain
    values back (numbers, text, lists, tuples, sets, dicts, ...): the program can neither read the tests nor reach the
    verdict, and an object that claims to equal everything cannot be returned. Functions that change their arguments in
    place, or take functions, cannot be tested so. Only the standard library can be imported.

    The metrics hold `passed_frac` and `timed_out`.

    Args:
        tests_column: column with the tests.
        entry_point_column: column with the name of the function that `check` is given.
        prefix_column: column with code that goes before the program and before the tests (HumanEval: prompt).
        partial: score the share of tests passed instead of all or nothing.
        limit_s: seconds (wall clock) for a program and all its tests; for each test of a script.
        memory_mb: address space of a process.
        num_workers: programs that run at once.
        python: the Python that runs them; null = this one, or the system's where user nobody cannot read this one.

    Raises:
        UserError: when the stage begins: there is no bubblewrap, or it may not or does not isolate here.
    """

    def __init__(
        self,
        tests_column: str = "tests",
        entry_point_column: str = "entry_point",
        prefix_column: str | None = None,
        partial: bool = False,
        limit_s: float = 10.0,
        memory_mb: int = 512,
        num_workers: int = 4,
        python: str | None = None,
    ) -> None:
        if not limit_s > 0 or memory_mb < 64 or num_workers < 1:
            raise UserError(
                f"limit_s={limit_s}, memory_mb={memory_mb}, num_workers={num_workers} of CodeTests: seconds above 0, "
                "at least 64 MB, at least 1 worker"
            )
        self.tests_column = tests_column
        self.entry_point_column = entry_point_column
        self.prefix_column = prefix_column
        self.partial = partial
        self.num_workers = num_workers
        self.sandbox = Sandbox(limit_s, memory_mb << 20, python)

    def to(self, device: torch.device | str) -> None:
        """Called when a stage begins: no sandbox, no start."""
        self.sandbox.check()

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        tests = column_of(samples, self.tests_column, reward="CodeTests", option="tests_column")
        if self.prefix_column is None:
            prefixes = [""] * len(samples)
        else:
            prefixes = column_of(samples, self.prefix_column, reward="CodeTests", option="prefix_column")
        jobs = [
            (_program(sample.completion, prefix), prefix, _tests(test, self.tests_column), self._entry_point(sample))
            for sample, prefix, test in zip(samples, prefixes, tests, strict=True)
        ]
        self.sandbox.check()
        with ThreadPoolExecutor(self.num_workers) as pool:
            verdicts = list(pool.map(lambda job: self._run(*job), jobs))
        fractions = [sum(v.passed) / len(v.passed) for v in verdicts]
        scores = fractions if self.partial else [float(all(v.passed)) for v in verdicts]
        timed_out = [float(v.timed_out) for v in verdicts]
        return DetailedScores(scores, {"passed_frac": fractions, "timed_out": timed_out})

    def _entry_point(self, sample: Sample) -> str | None:
        name = sample.record.get(self.entry_point_column)
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise UserError(
                f"CodeTests: column {self.entry_point_column!r} holds {name!r:.60}: a function's name is needed"
            )
        return name

    def _run(self, program: str, prefix: str, tests: list[Any], entry_point: str | None) -> _Verdict:
        if isinstance(tests[0], str):
            checked = self.sandbox.run_tests(program, tests, entry_point=entry_point, setup=prefix)
            return _Verdict(checked.passed, checked.timed_out)
        passed, timed_out = [], False
        for test in tests:
            ran = self.sandbox.run_script(program, test["stdin"])
            timed_out |= ran.timed_out
            passed.append(ran.succeeded and _lines(ran.output) == _lines(test["stdout"].encode()))
            if not passed[-1] and not self.partial:  # one is enough
                passed += [False] * (len(tests) - len(passed))
                break
        return _Verdict(passed, timed_out)


def _program(completion: str, prefix: str) -> str:
    """The code of an answer, behind what the prompt had begun."""
    blocks = FENCE.findall(completion)
    code = blocks[-1] if blocks else completion
    return f"{prefix}\n{code}" if prefix else code


def _tests(tests: Any, column: str) -> list[Any]:
    """A non-empty list of texts, or of {stdin, stdout}."""
    listed = [tests] if isinstance(tests, str) else tests
    if isinstance(listed, list | tuple) and listed:
        if all(isinstance(test, str) for test in listed):
            return list(listed)
        if all(isinstance(test, Mapping) and {"stdin", "stdout"} <= set(test) for test in listed):
            return [{"stdin": str(test["stdin"]), "stdout": str(test["stdout"])} for test in listed]
    raise UserError(
        f"CodeTests: column {column!r} holds {tests!r:.80}: test code, a list of such, or a list of "
        "{stdin, stdout} is needed"
    )


def _lines(output: bytes) -> list[bytes]:
    """Lines without the white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in output.rstrip().splitlines()]
