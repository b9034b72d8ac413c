"""What several models answer to the same held-out prompts, how good that is, and how far they have moved."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.core.kl import kl_estimate
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.pipelines.files import write_json
from rlhf_lightning.pipelines.sampling import Sampler, rate, read_prompts
from rlhf_lightning.rollout.spec import GenerationSpec

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Figure:
    """A number about a model: its mean over answers and their standard deviation."""

    mean: float
    std: float = 0.0
    is_share: bool = False
    """Whether it is the share of answers of which something is true."""

    @classmethod
    def of(cls, values: Sequence[float], *, is_share: bool = False) -> "Figure":
        numbers = torch.tensor(list(values), dtype=torch.float64)
        return cls(float(numbers.mean()), float(numbers.std(correction=0)), is_share)


@dataclass(frozen=True)
class EvaluatePolicies:
    """Samples from each model on the same prompts and writes evaluation.json: scores, KL, lengths, diversity, samples.

    KL is that of the whole answer to the reference: the sum over its tokens of log pi(token) - log pi_ref(token), both
    at the temperature of sampling, averaged over answers drawn from pi. It is exact in expectation (k1).
    """

    models: dict[str, str]
    """Name and folder of each model, in the order of the table."""
    reference: str
    """Name of the model that KL is measured against."""
    scores: dict[str, RewardFn]
    """What to measure answers by; any number of named reward functions."""
    prompts: str
    """JSONL with a column `prompt`, held out from training."""
    out_dir: str
    """Folder for evaluation.json."""
    generation: GenerationSpec = GenerationSpec()
    """How answers are sampled."""
    limit: int | None = 256
    """Use this many prompts."""
    num_shown: int = 6
    """Prompts whose answers are kept as samples."""
    prompts_at_once: int = 64
    """Prompts answered in one batch."""
    seed: int = 0
    """Names all draws; every model gets the same."""

    def run(self) -> dict[str, float]:
        if self.reference not in self.models:
            raise UserError(f"reference={self.reference!r} is not among models: {', '.join(self.models)}")
        records = read_prompts(self.prompts, self.limit)
        reference = load_policy(ModelSpec(path=self.models[self.reference])).eval().requires_grad_(False)
        models, shown = {}, [{"prompt": r["prompt"], "answers": {}} for r in records[: self.num_shown]]
        for name, folder in self.models.items():
            sampler = Sampler.from_folder(folder, self.generation, self.seed, self.prompts_at_once)
            figures, samples, ratings = self._measure(sampler, reference, records, name)
            models[name] = {
                "path": folder,
                "figures": {key: asdict(figure) for key, figure in figures.items()},
                "ratings": {key: [round(value, 4) for value in values] for key, values in ratings.items()},
            }
            for i, entry in enumerate(shown):
                at = i * self.generation.num_samples
                scores = {key: values[at] for key, values in ratings.items()}
                entry["answers"][name] = {"completion": samples[at].completion, "scores": scores}
        evaluation = {
            "reference": self.reference,
            "num_answers": len(records) * self.generation.num_samples,
            "generation": asdict(self.generation),
            "models": models,
            "samples": shown,
        }
        write_json(Path(self.out_dir) / EVALUATION_FILE, evaluation)
        Console().print(evaluation_table(evaluation))
        return {
            f"{name}/{key}": figure["mean"]
            for name, model in models.items()
            for key, figure in model["figures"].items()
        }

    def _measure(
        self, sampler: Sampler, reference: Policy, records: Sequence[Mapping[str, Any]], name: str
    ) -> tuple[dict[str, Figure], list[Sample], dict[str, list[float]]]:
        """Figures of one model, its answers, and their scores."""
        samples: list[Sample] = []
        kl: list[float] = []
        entropy: list[float] = []
        temperature = self.generation.temperature or 1.0  # greedy answers are judged by the model as it is
        reference.to(next(sampler.policy.parameters()).device)
        for answered in sampler(records, "evaluation", title=f"evaluating {name}"):
            samples += answered.samples
            with torch.no_grad():
                own = sampler.policy(answered.answers, temperature=temperature, with_entropy=True)
                other = reference(answered.answers, temperature=temperature)
            kl += kl_estimate(own.logprobs, other.logprobs, "k1").sum(-1).tolist()
            entropy += own.entropy[answered.answers.mask].tolist()
        ratings = {key: rate(reward, samples) for key, reward in self.scores.items()}
        words = [sample.completion.split() for sample in samples]
        figures = {key: Figure.of(values, is_share=set(values) <= {0, 1}) for key, values in ratings.items()}
        figures |= {
            "kl": Figure.of(kl),
            "entropy": Figure.of(entropy),
            "length": Figure.of([len(sample.tokens) for sample in samples]),
            "finished": Figure.of([float(sample.finished) for sample in samples], is_share=True),
            "distinct_1": Figure(_distinct([(word,) for answer in words for word in answer])),
            "distinct_2": Figure(_distinct([pair for answer in words for pair in pairwise(answer)])),
        }
        return figures, samples, ratings


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """The figures of an evaluation for the terminal, a column per model."""
    models = evaluation["models"]
    table = Table(title=f"{evaluation['num_answers']} answers each, KL to {escape(evaluation['reference'])}")
    table.add_column("")
    for name in models:
        table.add_column(escape(name), justify="right")
    for key in next(iter(models.values()))["figures"]:
        cells = (shown_figure(key, model["figures"][key]) for model in models.values())
        table.add_row(escape(key.replace("_", " ")), *cells)
    return table


def shown_figure(key: str, figure: Mapping[str, Any]) -> str:
    """A figure as tables print it: a share in percent, else mean ± standard deviation."""
    if figure["is_share"]:
        return f"{figure['mean']:.1%}"
    digits = 1 if key == "length" else 2
    return f"{figure['mean']:.{digits}f}" + (f" ± {figure['std']:.{digits}f}" if figure["std"] else "")


def _distinct(items: Sequence[tuple[str, ...]]) -> float:
    """Share of different items among all."""
    return len(set(items)) / len(items) if items else 0.0
