"""Which model: a folder, a hub id, or a config to build from; and how it is held."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters: the weights stay frozen and W x becomes W x + (alpha / r) B A x.

    Args:
        r: rank of the update.
        alpha: scale of the update, divided by r.
        dropout: dropout on the adapter's input; `disable_dropout` does not touch it.
        target_modules: names of the layers that get one; all-linear = every linear layer but the output head.
    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. arXiv:2106.09685
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, its tokenizer, and how it is held in memory.

    Args:
        path: Hugging Face folder or hub id. Give this or `config`.
        config: a transformers config to build a new model from: {model_type: llama, hidden_size: 64, ...}; `vocab_size`
            and the special token ids default to the tokenizer's.
        tokenizer: folder or hub id of the tokenizer; null: `path`.
        chat_template: a Jinja chat template, or a file holding one; null: the tokenizer's own.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights: float32, bfloat16, float16, or auto (as stored).
        attn_implementation: sdpa, eager, flash_attention_2 (needs flash-attn) or flex_attention.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        lora: train low-rank adapters instead of the weights.
        trust_remote_code: run Python code that comes with the model; only for authors you trust.
        disable_dropout: set the model's dropout to 0, so that log-probabilities depend on the weights alone.
        seed: of new weights: those of a model built from `config`, and of adapters.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    lora: LoraSpec | None = None
    trust_remote_code: bool = False
    disable_dropout: bool = True
    seed: int = 0
