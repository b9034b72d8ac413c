"""Which model: a folder, a hub id, or a config to build from; and how it is held."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters: the weights stay frozen and W x becomes W x + (alpha / r) B A x.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. arXiv:2106.09685
    """

    r: int = 8
    """Rank of the update."""
    alpha: float = 16
    """Scale of the update, divided by r."""
    dropout: float = 0.0
    """Dropout on the adapter's input; `disable_dropout` does not touch it."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get one; all-linear = every linear layer but the output head."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, its tokenizer, and how it is held in memory."""

    path: str | None = None
    """Hugging Face folder or hub id. Give this or `config`."""
    config: dict[str, Any] | None = None
    """A transformers config to build a new model from: {model_type: llama, hidden_size: 64, ...}. `vocab_size` and the
    special token ids default to the tokenizer's."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None: `path`."""
    chat_template: str | None = None
    """A Jinja chat template, or a file holding one; None: the tokenizer's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = "float32"
    """Of the weights: float32, bfloat16, float16, or auto (as stored)."""
    attn_implementation: str = "sdpa"
    """sdpa, eager, flash_attention_2 (needs flash-attn) or flex_attention."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraSpec | None = None
    """Train low-rank adapters instead of the weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for authors you trust."""
    disable_dropout: bool = True
    """Set the model's dropout to 0, so that log-probabilities are a function of the weights alone."""
    seed: int = 0
    """Of new weights: those of a model built from `config`, and of adapters."""
