"""Jobs that sample from a model folder and write what came out as records for the next stage."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.data.encode import encode_prompt
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.pipelines.files import read_jsonl, write_jsonl
from rlhf_lightning.rewards.combine import WeightedReward, score_samples
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.samples import decode_samples
from rlhf_lightning.rollout.spec import GenerationSpec


@dataclass(frozen=True)
class Answered:
    """One batch of prompts with its answers, as tokens and as text."""

    prompts: PromptBatch
    answers: Generated
    samples: Sequence[Sample]

    def by_prompt(self) -> list[list[Sample]]:
        """The samples of each prompt."""
        copies = len(self.samples) // len(self.prompts.texts)
        return [list(self.samples[i : i + copies]) for i in range(0, len(self.samples), copies)]


@dataclass(frozen=True)
class Sampler:
    """A policy that answers prompts batch by batch, each batch with a seed of its own."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationSpec
    seed: int
    prompts_at_once: int = 64

    @classmethod
    def from_folder(cls, folder: str, generation: GenerationSpec, seed: int, prompts_at_once: int) -> "Sampler":
        """Load model and tokenizer of a Hugging Face folder, on the GPU if there is one."""
        if prompts_at_once < 1:
            raise UserError(f"prompts_at_once={prompts_at_once}: sample for at least 1 prompt at a time")
        spec = ModelSpec(path=folder)
        policy = load_policy(spec).eval().requires_grad_(False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(policy.to(device), load_tokenizer(spec), generation, seed, prompts_at_once)

    def __call__(
        self, records: Sequence[Mapping[str, Any]], purpose: str, *, title: str | None = None
    ) -> Iterator[Answered]:
        """Answer the prompts of `records` in order, under a progress bar.

        Args:
            records: with a `prompt`.
            purpose: names the draws.
            title: of the progress bar; None: the purpose.
        """
        engine = HFGenerate(self.generation, self.tokenizer)
        for first in _progress(range(0, len(records), self.prompts_at_once), title or purpose):
            prompts = self.batch(records[first : first + self.prompts_at_once], first)
            answers = engine.generate(self.policy, prompts, seed=counter_seed(self.seed, purpose, first))
            yield Answered(prompts, answers, decode_samples(self.tokenizer, prompts, answers))

    def batch(self, records: Sequence[Mapping[str, Any]], first: int) -> PromptBatch:
        """Records with a `prompt` as the model reads them; `first` is the row of the first one."""
        ids = [encode_prompt(self.tokenizer, record["prompt"]) for record in records]
        texts = [self.tokenizer.decode(row, skip_special_tokens=False) for row in ids]
        pad = self.tokenizer.pad_token_id
        batch = collate_prompts(ids, texts, records, range(first, first + len(records)), pad)
        return batch.to(next(self.policy.parameters()).device)


def read_prompts(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Records with a column `prompt`, the first `limit` of them."""
    records = read_jsonl(path)[:limit]
    for number, record in enumerate(records, start=1):
        if "prompt" not in record:
            raise UserError(f"{path}, record {number} has no column 'prompt'; it has {', '.join(record) or 'none'}")
    return records


def rate(reward: RewardFn, samples: Sequence[Sample]) -> list[float]:
    """One number per sample; what a reward function may not return is a user's error that names it."""
    return score_samples([WeightedReward(reward)], samples).total.tolist()


@dataclass(frozen=True)
class SampleCompletions:
    """Answers every prompt several times, scores the answers and writes all, the best, or a random one of each prompt.

    `keep: best` is best-of-n sampling: records to fine-tune on. `keep: random` is its control: what the same number of
    unselected answers would have done. `keep: all` writes ratings for a reward model to regress on. Empty answers are
    nothing to learn from: they are passed over.
    """

    model: str
    """Folder (or hub id) of the model that answers."""
    prompts: str
    """JSONL with a column `prompt`; other columns reach the reward function."""
    reward: RewardFn
    """What scores the answers."""
    out: str
    """JSONL to write: prompt, completion, rating."""
    keep: Literal["best", "random", "all"] = "best"
    """Which answers of each prompt are written."""
    generation: GenerationSpec = GenerationSpec(num_samples=8)
    """How answers are sampled; num_samples is the n of best-of-n."""
    only_finished: bool = False
    """Pass over answers that were cut off at the length limit."""
    limit: int | None = None
    """Use this many prompts."""
    prompts_at_once: int = 64
    """Prompts sampled for in one batch."""
    seed: int = 0
    """Names all draws."""

    def run(self) -> dict[str, float]:
        records = read_prompts(self.prompts, self.limit)
        sampler = Sampler.from_folder(self.model, self.generation, self.seed, self.prompts_at_once)
        kept: list[tuple[Sample, float]] = []
        all_ratings: list[float] = []
        for answered in sampler(records, "sampling"):
            ratings = rate(self.reward, answered.samples)
            all_ratings += ratings
            rated = iter(zip(answered.samples, ratings, strict=True))
            for samples in answered.by_prompt():
                kept += self._chosen([next(rated) for _ in samples])
        if not kept:
            raise UserError(
                f"no answer of {self.model} said something and ended by itself within {self.generation.max_new_tokens} "
                "tokens: raise generation.max_new_tokens, or set only_finished: false"
            )
        write_jsonl(
            self.out,
            ({**s.record, "prompt": s.record["prompt"], "completion": s.completion, "rating": r} for s, r in kept),
        )
        return {
            "num_prompts": float(len(records)),
            "num_records": float(len(kept)),
            "rating_mean": _mean(all_ratings),
            "kept_rating_mean": _mean([rating for _, rating in kept]),
        }

    def _chosen(self, rated: list[tuple[Sample, float]]) -> list[tuple[Sample, float]]:
        """What is kept of one prompt's answers."""
        rated = [(sample, rating) for sample, rating in rated if sample.completion.strip()]
        if self.only_finished:
            rated = [(sample, rating) for sample, rating in rated if sample.finished]
        if self.keep == "all" or not rated:
            return rated
        # answers of one prompt are drawn independently: the first is a random one
        return [max(rated, key=lambda pair: pair[1]) if self.keep == "best" else rated[0]]


@dataclass(frozen=True)
class SamplePrompts:
    """Draws prompts from a model itself: the text of the first tokens that it samples behind BOS.

    Texts that the tokenizer does not read back as the same tokens, and those that ended early, are passed over.
    """

    model: str
    """Folder (or hub id) of the model."""
    out: str
    """JSONL to write: prompt."""
    num_prompts: int = 1024
    """Prompts to write there."""
    out_val: str | None = None
    """JSONL of further prompts, for validation."""
    num_val: int = 0
    """Prompts to write there."""
    num_tokens: int = 15
    """Length of a prompt in tokens, BOS not counted."""
    temperature: float = 1.0
    """Of the draws."""
    distinct: bool = False
    """Write no prompt twice. Frequent beginnings are easy ones: without them scores come out lower."""
    rows_at_once: int = 512
    """Prompts drawn in one batch."""
    seed: int = 0
    """Names all draws."""

    def run(self) -> dict[str, float]:
        if bool(self.num_val) != bool(self.out_val):
            raise UserError(f"num_val={self.num_val} and out_val={self.out_val}: give both or neither")
        generation = GenerationSpec(max_new_tokens=self.num_tokens, temperature=self.temperature)
        sampler = Sampler.from_folder(self.model, generation, self.seed, self.rows_at_once)
        wanted, drawn = self.num_prompts + self.num_val, 0
        texts: list[str] = []
        while len(texts) < wanted:
            if drawn > 20 * (wanted + self.rows_at_once):
                raise UserError(
                    f"{self.model} gave {len(texts)} usable prompts of {self.num_tokens} tokens in {drawn} draws, of "
                    f"{wanted} wanted: ask for less, for longer ones, or set distinct: false"
                )
            draw = replace(sampler, seed=counter_seed(self.seed, "prompts", drawn))
            for answered in draw([{"prompt": ""}] * self.rows_at_once, "prompts"):
                texts += filter(None, map(self._text(sampler.tokenizer), answered.samples))
            texts = list(dict.fromkeys(texts)) if self.distinct else texts
            drawn += self.rows_at_once
        prompts = [{"prompt": text} for text in texts[:wanted]]
        write_jsonl(self.out, prompts[: self.num_prompts])
        if self.out_val:
            write_jsonl(self.out_val, prompts[self.num_prompts :])
        return {"num_prompts": float(self.num_prompts), "num_val": float(self.num_val), "drawn": float(drawn)}

    def _text(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sample], str | None]:
        opening = encode_prompt(tokenizer, "")

        def text(sample: Sample) -> str | None:
            if len(sample.tokens) < self.num_tokens or sample.finished:
                return None
            ids = [*opening, *sample.tokens]
            read = tokenizer.decode(ids, skip_special_tokens=True)
            return read if encode_prompt(tokenizer, read) == ids else None

        return text


def _progress(starts: range, title: str) -> Iterator[int]:
    """The numbers of `starts`, under a bar; where there is no terminal, with a line every ten seconds."""
    if Console().is_terminal:
        yield from track(starts, description=title, transient=True)
        return
    said = time.monotonic()
    for start in starts:
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{title}: {start} of {starts.stop} prompts", flush=True)
        yield start


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
