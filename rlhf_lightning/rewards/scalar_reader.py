"""What a trained scalar model says about texts: its weights, its tokenizer, and how much it can read."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.data.collate import collate_tokens
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.templates import Messages
from rlhf_lightning.data.text import text_encoder
from rlhf_lightning.data.truncation import LengthRule
from rlhf_lightning.models.loading import HEAD_FILE, load_scalar_model, load_tokenizer
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.conversation import prompt_messages

logger = logging.getLogger(__name__)


class ScalarReader:
    """A frozen `RewardModule` export (or any sequence classifier with one label) and its tokenizer.

    Read from disk when first asked for, in no checkpoint, and read again in copies and worker processes.

    Args:
        path: its folder, or its hub id.
        batch_size: texts read at once.
        max_length: tokens of prompt and answer together; longer ones lose the beginning of the prompt first. None: the
            model's context.
        dtype, tokenizer, chat_template, trust_remote_code: as in `ModelSpec`.
    """

    def __init__(
        self,
        path: str,
        batch_size: int,
        max_length: int | None,
        dtype: str,
        tokenizer: str | None,
        chat_template: str | None,
        trust_remote_code: bool,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} of reward model {path!r}: give at least 1")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length={max_length} of reward model {path!r}: give at least 1, or null")
        self.spec = ModelSpec(
            path=path,
            dtype=dtype,
            tokenizer=tokenizer,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
        )
        self.batch_size = batch_size
        self.max_length = max_length
        self._device = torch.device("cpu")
        self._loaded: tuple[ScalarModel, PreTrainedTokenizerBase] | None = None
        self._told_of_cuts = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    def to(self, device: torch.device | str) -> None:
        """Load the model, unless that has been done, and move it."""
        self._device = torch.device(device)
        self.model.to(self._device)

    @property
    def model(self) -> ScalarModel:
        """What computes the scores; loaded when first asked for."""
        return self._parts()[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What it reads with."""
        return self._parts()[1]

    @torch.no_grad()
    def scores(self, encoded: Sequence[Encoded]) -> list[Tensor]:
        """What the model says of each text: one number, or with pooling `steps` one per token that counts."""
        # the longest first, so that rows of a batch are of a length and a batch too big for memory is seen at once
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
        scores = [torch.empty(0)] * len(encoded)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate_tokens([encoded[i] for i in rows], self.tokenizer.pad_token_id)
            said = self.model(batch.to(self._device)).cpu()
            for row, i in enumerate(rows):
                scores[i] = said[row][batch.mask[row]] if self.model.pooling == "steps" else said[row]
        return scores

    def conversation(self, sample: Sample) -> Messages | None:
        """The messages that a sample answers; None if its prompt is a string.

        Raises:
            UserError: there are messages, and the tokenizer has no chat template.
        """
        messages = prompt_messages(sample)
        if messages is None:
            return None
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"reward model {self.spec.path!r} has no chat template to read conversations with: give chat_template"
            )
        return list(messages)

    def cut(self, encoded: Encoded, prompt_length: int, *, has_bos: bool) -> Encoded:
        """What of a text the model can read; said once if that is not all.

        Args:
            encoded: prompt and answer.
            prompt_length: tokens of the prompt.
            has_bos: whether the text begins with what the tokenizer puts in front of a string, which stays.
        """
        if not encoded.ids:  # nothing asked and nothing said: the model still has to read something
            return Encoded([self.tokenizer.eos_token_id], [True])
        limit = self.max_length or getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None or len(encoded) <= limit:
            return encoded
        if not self._told_of_cuts:
            logger.warning(
                "reward model %r: %d tokens of prompt and answer do not fit into %d, so the prompt's beginning goes "
                "(said once; max_length sets the limit)",
                self.spec.path,
                len(encoded),
                limit,
            )
            self._told_of_cuts = True
        bos_length = len(text_encoder(self.tokenizer).prefix) if has_bos else 0
        return LengthRule(max_length=limit).cut([encoded], prompt_length, bos_length)[0]

    def _parts(self) -> tuple[ScalarModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            model = load_scalar_model(self.spec)
            if not _has_trained_head(str(self.spec.path), model):
                raise UserError(
                    f"{self.spec.path!r} is no reward model: it was saved as {_architecture(model)}, without a head "
                    "that scores; give the export of a RewardModule run, or a sequence classifier with one label"
                )
            model.eval().requires_grad_(False)
            self._loaded = model.to(self._device), load_tokenizer(self.spec)
        return self._loaded


def _architecture(model: ScalarModel) -> str:
    return (model.config.architectures or ["a model without a head"])[0]


def _has_trained_head(path: str, model: ScalarModel) -> bool:
    return _architecture(model).endswith("ForSequenceClassification") or (Path(path).expanduser() / HEAD_FILE).is_file()
