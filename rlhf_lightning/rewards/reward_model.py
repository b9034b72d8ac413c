"""A trained reward model as a reward function."""

from collections.abc import Sequence
from typing import Literal

import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.data.encode import Encoded, encode_pair
from rlhf_lightning.data.truncation import prompt_length_of
from rlhf_lightning.rewards.scalar_reader import ScalarReader


class RewardModelScore(RewardFn):
    """The score of a reward model: what `RewardModule` exports, or any sequence classifier with one label.

    It reads text, not the policy's tokens: prompt and answer go through the reward model's own tokenizer, and
    conversations through its own chat template. Its weights are frozen, and in no checkpoint.

    Args:
        path: folder of the reward model, or its hub id.
        batch_size: how many answers are read at once.
        max_length: tokens of prompt and answer together; longer ones lose the beginning of the prompt first. Null = the
            model's context.
        add_eos: when the answer gets the tokenizer's end token, as the reward model saw it in its training: `finished`
            answers only (not those cut off at the length limit), `always` or `never`. A chat template ends answers in
            its own way.
        dtype: of the weights: float32, bfloat16 or float16.
        tokenizer: folder or hub id of its tokenizer; null = `path`.
        chat_template: a Jinja chat template or a file holding one; null = the tokenizer's own.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 32,
        max_length: int | None = None,
        add_eos: Literal["finished", "always", "never"] = "finished",
        dtype: str = "float32",
        tokenizer: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if add_eos not in ("finished", "always", "never"):
            raise UserError(f"add_eos={add_eos!r} of reward model {path!r}: use finished, always or never")
        self.reader = ScalarReader(path, batch_size, max_length, dtype, tokenizer, chat_template, trust_remote_code)
        self.add_eos = add_eos

    def to(self, device: torch.device | str) -> None:
        """Load the model, unless that has been done, and move it."""
        self.reader.to(device)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        if self.reader.model.pooling == "steps":
            raise UserError(
                f"{self.reader.spec.path!r} is a process reward model, which scores steps and not answers: use "
                "ProcessRewardScore"
            )
        return [score.item() for score in self.reader.scores([self._encode(sample) for sample in samples])]

    def _encode(self, sample: Sample) -> Encoded:
        messages = self.reader.conversation(sample)
        encoded = encode_pair(
            self.reader.tokenizer,
            sample.prompt if messages is None else messages,
            sample.completion,
            add_eos=self.add_eos == "always" or (self.add_eos == "finished" and sample.finished),
            tools=sample.record.get("tools"),
        )
        return self.reader.cut(encoded, prompt_length_of(encoded), has_bos=messages is None)
