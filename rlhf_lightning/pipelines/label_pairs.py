"""Preference pairs by a scorer that plays the annotator, mistakes included."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.pipelines.files import write_jsonl
from rlhf_lightning.pipelines.sampling import Sampler, rate, read_prompts
from rlhf_lightning.rollout.spec import GenerationSpec


@dataclass(frozen=True)
class Annotator:
    """Says which of two answers is better, by their scores.

        P(first preferred) = (1 - 2 flip_prob) sigma(scale (score_first - score_second)) + flip_prob

    Equal scores are a tie: no preference.
    """

    scale: float | None = None
    """How sharply preference follows the difference of scores (Bradley and Terry); None: the higher score wins."""
    flip_prob: float = 0.0
    """Share of labels turned round whatever the scores."""

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise UserError(f"annotator.scale={self.scale}: use a positive number, or null for the higher score to win")
        if not 0 <= self.flip_prob < 0.5:
            raise UserError(f"annotator.flip_prob={self.flip_prob}: use a share below one half")

    def prefers_first(self, first: float, second: float, rng: random.Random) -> bool | None:
        """Whether the first answer is preferred; None = a tie."""
        if first == second:
            return None
        probability = float(first > second) if self.scale is None else _sigmoid(self.scale * (first - second))
        prefers = rng.random() < probability
        return prefers != (rng.random() < self.flip_prob)


@dataclass(frozen=True)
class LabelPairs:
    """Answers every prompt at least twice and writes pairs of its answers, labelled by the annotator.

    Of K answers to a prompt the first and second, third and fourth ... make pairs. Prompts are gone through again and
    again, with new draws, until there are enough pairs. Ties, equal answers and empty ones are dropped and counted.
    """

    model: str
    """Folder (or hub id) of the model that answers."""
    prompts: str
    """JSONL with a column `prompt`."""
    reward: RewardFn
    """What the annotator goes by."""
    out: str
    """JSONL to write: prompt, chosen, rejected, and the scores of both."""
    num_pairs: int = 4096
    """Pairs to write there."""
    out_val: str | None = None
    """JSONL of further pairs, for validation."""
    num_val: int = 0
    """Pairs to write there."""
    prompts_val: str | None = None
    """Prompts of the validation pairs; None: those of `prompts`."""
    annotator: Annotator = Annotator()
    """How scores become labels."""
    generation: GenerationSpec = GenerationSpec(num_samples=2)
    """How answers are sampled; num_samples answers per prompt, an even number."""
    prompts_at_once: int = 64
    """Prompts sampled for in one batch."""
    seed: int = 0
    """Names all draws."""

    def run(self) -> dict[str, float]:
        if self.generation.num_samples % 2:
            raise UserError(f"generation.num_samples={self.generation.num_samples}: pairs need an even number")
        if bool(self.num_val) != bool(self.out_val):
            raise UserError(f"num_val={self.num_val} and out_val={self.out_val}: give both or neither")
        sampler = Sampler.from_folder(self.model, self.generation, self.seed, self.prompts_at_once)
        train, dropped, wrong = self._pairs(sampler, self.prompts, self.num_pairs, "pairs")
        write_jsonl(self.out, train)
        result = {
            "num_pairs": float(len(train)),
            "dropped": float(dropped),
            "label_agreement": 1 - wrong / len(train),
        }
        if self.out_val:
            val, *_ = self._pairs(sampler, self.prompts_val or self.prompts, self.num_val, "validation pairs")
            write_jsonl(self.out_val, val)
            result["num_val"] = float(len(val))
        return result

    def _pairs(
        self, sampler: Sampler, prompts: str, wanted: int, purpose: str
    ) -> tuple[list[dict[str, Any]], int, int]:
        """Labelled pairs, the number dropped, and the labels that contradict the scores."""
        rng = random.Random(counter_seed(self.seed, purpose, "labels"))
        pairs: list[dict[str, Any]] = []
        dropped = wrong = 0
        for first, second, scores in self._compared(sampler, prompts, purpose):
            # records that no reward model could learn from: nothing said, or twice the same
            usable = first.completion.strip() and second.completion.strip() and first.completion != second.completion
            preferred = self.annotator.prefers_first(*scores, rng) if usable else None
            if preferred is None:
                dropped += 1
                if dropped > 20 * (wanted + len(pairs)):
                    raise UserError(
                        f"{dropped} pairs of answers by {self.model} were ties, equal or empty, {len(pairs)} were not: "
                        "the reward hardly tells its answers apart, or they are all alike"
                    )
                continue
            chosen, rejected = (first, second) if preferred else (second, first)
            better, worse = scores if preferred else scores[::-1]
            wrong += better < worse
            pairs.append(
                {
                    "prompt": first.record["prompt"],
                    "chosen": chosen.completion,
                    "rejected": rejected.completion,
                    "chosen_score": better,
                    "rejected_score": worse,
                }
            )
            if len(pairs) == wanted:
                break
        return pairs, dropped, wrong

    def _compared(
        self, sampler: Sampler, path: str, purpose: str
    ) -> Iterator[tuple[Sample, Sample, tuple[float, float]]]:
        """Pairs of different answers to the same prompt, with their scores, without end."""
        records = read_prompts(path)
        passes = 0
        while True:
            one_pass = replace(sampler, seed=counter_seed(self.seed, purpose, passes))
            for answered in one_pass(records, purpose):
                scores = rate(self.reward, answered.samples)
                for i in range(0, len(scores), 2):
                    yield answered.samples[i], answered.samples[i + 1], (scores[i], scores[i + 1])
            passes += 1


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
