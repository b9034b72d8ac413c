"""Two-digit addition, learnt from demonstrations of which a share is wrong."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.pipelines.files import write_folder, write_jsonl
from rlhf_lightning.tasks.characters import character_tokenizer

NUMBERS = range(10, 100)
SUMS = range(2 * NUMBERS[0], 2 * NUMBERS[-1] + 1)


@dataclass(frozen=True)
class MakeAddition:
    """Writes demonstrations, prompts with their answers, and a tokenizer of characters into one folder.

    sft.jsonl and more.jsonl hold `prompt` ("12+85=") and `completion` ("097", three digits always), of which a share is
    another sum, drawn evenly; whoever imitates them perfectly is right as often as they are. prompts.jsonl and
    val.jsonl hold `prompt` and `answer`. No sum of val.jsonl is in another file.
    """

    out_dir: str
    """Folder to write."""
    num_demonstrations: int = 64000
    """Records of sft.jsonl, drawn with replacement."""
    num_more: int = 0
    """Records of more.jsonl, drawn in the same way: what one may train on instead of rewards."""
    num_prompts: int = 6400
    """Different prompts to sample from while training on rewards."""
    num_val: int = 512
    """Prompts held out."""
    wrong_frac: float = 0.5
    """Share of the demonstrations that are wrong."""
    seed: int = 0
    """Names all draws."""

    def run(self) -> dict[str, float]:
        if not 0 <= self.wrong_frac < 1:
            raise UserError(f"wrong_frac={self.wrong_frac}: use a share of the demonstrations that leaves some right")
        pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
        if self.num_val + self.num_prompts > len(pairs):
            raise UserError(
                f"num_prompts={self.num_prompts} and num_val={self.num_val}: there are {len(pairs)} sums of two "
                "two-digit numbers; use less"
            )
        random.Random(counter_seed(self.seed, "addition", "pairs")).shuffle(pairs)
        held_out, known = pairs[: self.num_val], pairs[self.num_val :]
        folder = Path(self.out_dir)
        write_jsonl(folder / "sft.jsonl", self._demonstrations("sft", self.num_demonstrations, known))
        if self.num_more:
            write_jsonl(folder / "more.jsonl", self._demonstrations("more", self.num_more, known))
        write_jsonl(folder / "prompts.jsonl", map(_asked, known[: self.num_prompts]))
        write_jsonl(folder / "val.jsonl", map(_asked, held_out))
        write_folder(folder / "tokenizer", character_tokenizer("0123456789+=").save_pretrained)
        return {"num_known": float(len(known)), "num_val": float(len(held_out))}

    def _demonstrations(self, purpose: str, count: int, pairs: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
        rng = random.Random(counter_seed(self.seed, "addition", purpose))
        for _ in range(count):
            a, b = rng.choice(pairs)
            said = a + b
            if rng.random() < self.wrong_frac:
                said = rng.choice([number for number in SUMS if number != a + b])
            yield {"prompt": f"{a}+{b}=", "completion": f"{said:03d}"}


def _asked(pair: tuple[int, int]) -> dict[str, Any]:
    a, b = pair
    return {"prompt": f"{a}+{b}=", "answer": f"{a + b:03d}"}
