"""A trained reward model as a reward function."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.data.collate import collate_tokens
from rlhf_lightning.data.encode import Encoded, encode_pair
from rlhf_lightning.data.text import text_encoder
from rlhf_lightning.data.truncation import LengthRule, prompt_length_of
from rlhf_lightning.models.loading import HEAD_FILE, load_scalar_model, load_tokenizer
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.conversation import prompt_messages

logger = logging.getLogger(__name__)


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
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} of reward model {path!r}: give at least 1")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length={max_length} of reward model {path!r}: give at least 1, or null")
        if add_eos not in ("finished", "always", "never"):
            raise UserError(f"add_eos={add_eos!r} of reward model {path!r}: use finished, always or never")
        self.spec = ModelSpec(
            path=path,
            dtype=dtype,
            tokenizer=tokenizer,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
        )
        self.path = path
        self.batch_size = batch_size
        self.max_length = max_length
        self.add_eos = add_eos
        self._device = torch.device("cpu")
        self._loaded: tuple[ScalarModel, PreTrainedTokenizerBase] | None = None
        self._told_of_cuts = False

    def __getstate__(self) -> dict[str, Any]:
        # copies and worker processes read the weights again, from `path`
        return self.__dict__ | {"_loaded": None}

    def to(self, device: torch.device | str) -> None:
        """Load the model, unless that has been done, and move it."""
        self._device = torch.device(device)
        self._parts()[0].to(self._device)

    @property
    def model(self) -> ScalarModel:
        """What computes the scores; loaded when first asked for."""
        return self._parts()[0]

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        model, tokenizer = self._parts()
        encoded = [self._encode(sample, tokenizer) for sample in samples]
        # the longest first, so that rows of a batch are of a length and a batch too big for memory is seen at once
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate_tokens([encoded[i] for i in rows], tokenizer.pad_token_id)
            for i, score in zip(rows, model(batch.to(self._device)).tolist(), strict=True):
                scores[i] = score
        return scores

    def _parts(self) -> tuple[ScalarModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            model = load_scalar_model(self.spec)
            if not _has_trained_head(self.path, model):
                raise UserError(
                    f"{self.path!r} is no reward model: it was saved as {_architecture(model)}, without a head that "
                    "scores; give the export of a RewardModule run, or a sequence classifier with one label"
                )
            model.eval().requires_grad_(False)
            self._loaded = model.to(self._device), load_tokenizer(self.spec)
        return self._loaded

    def _encode(self, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        messages = prompt_messages(sample)
        if messages is not None and tokenizer.chat_template is None:
            raise UserError(
                f"reward model {self.path!r} has no chat template to read conversations with: give chat_template"
            )
        encoded = encode_pair(
            tokenizer,
            sample.prompt if messages is None else list(messages),
            sample.completion,
            add_eos=self.add_eos == "always" or (self.add_eos == "finished" and sample.finished),
            tools=sample.record.get("tools"),
        )
        if not encoded.ids:  # nothing asked and nothing said: the model still has to read something
            return Encoded([tokenizer.eos_token_id], [True])
        return self._cut(encoded, bos_length=len(text_encoder(tokenizer).prefix) if messages is None else 0)

    def _cut(self, encoded: Encoded, bos_length: int) -> Encoded:
        limit = self.max_length or _context(self._parts()[0])
        if limit is None or len(encoded) <= limit:
            return encoded
        if not self._told_of_cuts:
            logger.warning(
                "reward model %r: %d tokens of prompt and answer do not fit into %d, so the prompt's beginning goes "
                "(said once; max_length sets the limit)",
                self.path,
                len(encoded),
                limit,
            )
            self._told_of_cuts = True
        return LengthRule(max_length=limit).cut([encoded], prompt_length_of(encoded), bos_length)[0]


def _context(model: ScalarModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _architecture(model: ScalarModel) -> str:
    return (model.config.architectures or ["a model without a head"])[0]


def _has_trained_head(path: str, model: ScalarModel) -> bool:
    return _architecture(model).endswith("ForSequenceClassification") or (Path(path).expanduser() / HEAD_FILE).is_file()
