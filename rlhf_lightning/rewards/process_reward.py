"""A trained process reward model as a reward function: how far each step of an answer can be trusted."""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.data.encode import Encoded, encode_prompt, encode_steps
from rlhf_lightning.rewards.scalar_reader import ScalarReader

Combined = Literal["min", "product", "mean", "last"]


class ProcessRewardScore(RewardFn):
    """How probable a process reward model finds it that an answer's steps are right: a number from 0 to 1.

        p_i   = sigma(score at the last token of step i)
        score = min_i p_i, or the product, the mean, or the last p_i

    The model is what `RewardModule` exports after `pooling: steps`. The answer is cut at `separator`, blank steps
    passed over, and read as in training: each step followed by the separator, through the model's own tokenizer. An
    answer without a step scores 0. Parts: `steps`, their number, and `first_wrong`, the share of steps before the first
    whose p is below 1/2 (1: none is).

    Args:
        path: folder of the process reward model, or its hub id.
        separator: what ends a step, as it was in training (`data.step_separator`).
        combine: `min` (the weakest step decides), `product` (all are right, taken to be independent), `mean`, `last`.
        batch_size: how many answers are read at once.
        max_length: tokens of prompt and answer together; longer ones lose the beginning of the prompt first. Null = the
            model's context.
        dtype: of the weights: float32, bfloat16 or float16.
        tokenizer: folder or hub id of its tokenizer; null = `path`.
        chat_template: a Jinja chat template or a file holding one; null = the tokenizer's own.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.

    References:
        Lightman et al., Let's Verify Step by Step (product), 2023. arXiv:2305.20050
        Wang et al., Math-Shepherd (min), 2023. arXiv:2312.08935
    """

    def __init__(
        self,
        path: str,
        separator: str = "\n",
        combine: Combined = "min",
        batch_size: int = 32,
        max_length: int | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if combine not in ("min", "product", "mean", "last"):
            raise UserError(f"combine={combine!r} of {path!r}: use min, product, mean or last")
        if not separator:
            raise UserError(f"separator='' of {path!r} ends no step: give what stood between steps in training")
        self.reader = ScalarReader(path, batch_size, max_length, dtype, tokenizer, chat_template, trust_remote_code)
        self.separator = separator
        self.combine = combine

    def to(self, device: torch.device | str) -> None:
        """Load the model, unless that has been done, and move it."""
        self.reader.to(device)

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        if self.reader.model.pooling != "steps":
            raise UserError(
                f"{self.reader.spec.path!r} scores whole answers (pooling {self.reader.model.pooling}), not steps: use "
                "RewardModelScore, or give the export of a run with pooling: steps"
            )
        steps = [[s for s in sample.completion.split(self.separator) if s.strip()] for sample in samples]
        asked = [i for i, of_sample in enumerate(steps) if of_sample]
        right = [[] for _ in samples]  # type: list[list[float]]
        for i, said in zip(asked, self.reader.scores([self._encode(samples[i], steps[i]) for i in asked]), strict=True):
            right[i] = torch.sigmoid(said.double()).tolist()
        return DetailedScores(
            scores=[self._combined(p) if p else 0.0 for p in right],
            parts={
                "steps": [float(len(of_sample)) for of_sample in steps],
                "first_wrong": [_before_first_wrong(p) for p in right],
            },
        )

    def _combined(self, right: list[float]) -> float:
        how = {"min": min, "product": math.prod, "mean": lambda p: sum(p) / len(p), "last": lambda p: p[-1]}
        return float(how[self.combine](right))  # type: ignore[operator]

    def _encode(self, sample: Sample, steps: list[str]) -> Encoded:
        messages = self.reader.conversation(sample)
        prompt = sample.prompt if messages is None else messages
        ids, ends = encode_steps(self.reader.tokenizer, prompt, steps, separator=self.separator)
        last = set(ends)
        encoded = Encoded(ids, [i in last for i in range(len(ids))])
        prompt_length = len(encode_prompt(self.reader.tokenizer, prompt))
        return self.reader.cut(encoded, prompt_length, has_bos=messages is None)


def _before_first_wrong(right: list[float]) -> float:
    """Share of steps before the first that is more probably wrong than right."""
    wrong = [i for i, p in enumerate(right) if p < 0.5]
    return (wrong[0] if wrong else len(right)) / max(len(right), 1)
