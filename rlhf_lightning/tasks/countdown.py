"""The countdown game as material: problems with a solution, and traces of a solver that tries until it has one."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.pipelines.files import write_folder, write_jsonl
from rlhf_lightning.tasks.characters import character_tokenizer

ALPHABET = "0123456789+-*/=,;:()[] "
LARGEST = 999
"""No number on the way is larger."""


@dataclass(frozen=True)
class Way:
    """One way to use all the numbers."""

    steps: tuple[str, ...]
    """As "25*3=75", in order."""
    expression: str
    """As "(25*3)+7"."""
    value: int


def ways(numbers: Sequence[int]) -> list[Way]:
    """Every way to join the numbers by + - * /: nothing on the way is below 1, a fraction, or above 999.

    Two numbers are taken at a time and give place to what they make: for three numbers at most 108 ways.
    """
    return list(_ways([(number, str(number)) for number in numbers], ()))


def _ways(items: list[tuple[int, str]], steps: tuple[str, ...]) -> Iterator[Way]:
    if len(items) == 1:
        value, expression = items[0]
        yield Way(steps, expression.removeprefix("(").removesuffix(")"), value)
        return
    for i in range(len(items)):
        for j in range(i + 1, len(items)):
            rest = [item for k, item in enumerate(items) if k not in (i, j)]
            for (a, left), sign, (b, right), value in _joined(items[i], items[j]):
                joined = (value, f"({left}{sign}{right})")
                yield from _ways([joined, *rest], (*steps, f"{a}{sign}{b}={value}"))


def _joined(
    one: tuple[int, str], other: tuple[int, str]
) -> Iterator[tuple[tuple[int, str], str, tuple[int, str], int]]:
    """What two numbers make: the larger one stands on the left."""
    large, small = (one, other) if one[0] >= other[0] else (other, one)
    a, b = large[0], small[0]
    if a + b <= LARGEST:
        yield large, "+", small, a + b
    if a * b <= LARGEST:
        yield large, "*", small, a * b
    if a > b:
        yield large, "-", small, a - b
    if a % b == 0:
        yield large, "/", small, a // b


@dataclass(frozen=True)
class Problem:
    """Numbers, and a target that they can reach."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))}={self.target}:"


@dataclass(frozen=True)
class MakeCountdown:
    """Writes traces of a solver, problems with target and numbers, and a tokenizer of characters into one folder.

    sft.jsonl holds `prompt` ("3 25 7=82:") and `completion` ("25+3=28,28*7=196;25*3=75,75+7=82;[(25*3)+7]"): ways that
    miss the target, one that reaches it, and the answer in square brackets. prompts.jsonl and val.jsonl hold `prompt`,
    `numbers` and `target`. No problem of one file is in another.
    """

    out_dir: str
    """Folder to write."""
    num_traces: int = 100000
    """Records of sft.jsonl, each of another problem."""
    num_prompts: int = 25600
    """Problems to sample from while training on rewards."""
    num_val: int = 512
    """Problems held out."""
    how_many: int = 3
    """Numbers of a problem."""
    largest_number: int = 99
    """Numbers are drawn evenly from 1 to this."""
    largest_target: int = 99
    """Targets are drawn evenly from those within reach, 10 to this."""
    max_misses: int = 3
    """Ways that miss in a trace, drawn evenly from 0 to this."""
    seed: int = 0
    """Names all draws."""

    def run(self) -> dict[str, float]:
        if not 2 <= self.how_many <= 4:
            raise UserError(f"how_many={self.how_many}: use 2 to 4 numbers; a solver lists every way to use them")
        if self.largest_number < 2 or self.largest_target < 10 or self.max_misses < 0:
            raise UserError(
                f"largest_number={self.largest_number}, largest_target={self.largest_target}, max_misses="
                f"{self.max_misses}: use at least 2, 10 and 0"
            )
        rng = random.Random(counter_seed(self.seed, "countdown"))
        wanted = self.num_val + self.num_prompts + self.num_traces
        made = list(track(self._problems(rng, wanted), "countdown", total=wanted))
        held_out, asked = made[: self.num_val], made[self.num_val : self.num_val + self.num_prompts]
        traced = made[self.num_val + self.num_prompts :]
        folder = Path(self.out_dir)
        write_jsonl(folder / "sft.jsonl", ({"prompt": p.prompt, "completion": text} for p, text in traced))
        for name, part in (("prompts", asked), ("val", held_out)):
            write_jsonl(folder / f"{name}.jsonl", (_record(problem) for problem, _ in part))
        write_folder(folder / "tokenizer", character_tokenizer(ALPHABET).save_pretrained)
        return {"num_problems": float(len(made)), "longest_trace": float(max(len(text) for _, text in made))}

    def _problems(self, rng: random.Random, wanted: int) -> Iterator[tuple[Problem, str]]:
        """Different problems, each with a trace of its solution."""
        seen: set[tuple[tuple[int, ...], int]] = set()
        idle = 0
        while len(seen) < wanted:
            numbers = tuple(rng.randint(1, self.largest_number) for _ in range(self.how_many))
            found = ways(numbers)
            targets = sorted({way.value for way in found if 10 <= way.value <= self.largest_target})
            fresh = [target for target in targets if (tuple(sorted(numbers)), target) not in seen]
            if not fresh:
                idle += 1
                if idle > 1000:
                    raise UserError(
                        f"num_traces={self.num_traces}, num_prompts={self.num_prompts}, num_val={self.num_val}: with "
                        f"largest_number={self.largest_number} and largest_target={self.largest_target} there are few "
                        f"more than {len(seen)} problems; use less, or larger numbers"
                    )
                continue
            idle = 0
            problem = Problem(numbers, rng.choice(fresh))
            seen.add((tuple(sorted(numbers)), problem.target))
            yield problem, self._trace(found, problem.target, rng)

    def _trace(self, found: list[Way], target: int, rng: random.Random) -> str:
        misses = [way for way in found if way.value != target]
        tried = rng.sample(misses, min(rng.randint(0, self.max_misses), len(misses)))
        right = rng.choice([way for way in found if way.value == target])
        return "".join(",".join(way.steps) + ";" for way in (*tried, right)) + f"[{right.expression}]"


def _record(problem: Problem) -> dict[str, Any]:
    return {"prompt": problem.prompt, "numbers": list(problem.numbers), "target": problem.target}
