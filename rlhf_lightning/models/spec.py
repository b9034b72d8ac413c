"""Which model: a folder, a hub id, or a config to build from; and how it is held."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from rlhf_lightning.core.errors import UserError


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

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora.r={self.r}: the rank of an update is at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout}: use a share of the adapter's input, 0 <= dropout < 1")


@dataclass(frozen=True)
class QuantizationSpec:
    """The linear layers of a frozen model in 4 or 8 bits, by bitsandbytes; adapters over them are trained (QLoRA).

        W ~ scale_b code[i],  a scale per block b of 64 weights, an index i of 4 bits per weight

    Output head, embeddings, norms and adapters keep their dtype.

    Args:
        bits: 4, or 8 (LLM.int8).
        quant_type: of 4 bits: nf4 (levels at the quantiles of a normal distribution) or fp4.
        double_quant: of 4 bits: the blocks' scales are quantised too.
        compute_dtype: of 4 bits: weights are put back into it to multiply; bfloat16, float16 or float32.
    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023. arXiv:2305.14314
        Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022. arXiv:2208.07339
    """

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for f in fields(self)[1:]:
            if self.bits == 8 and getattr(self, f.name) != f.default:
                raise UserError(f"quantization.{f.name}={getattr(self, f.name)!r} is of 4 bits; with bits: 8 drop it")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, its tokenizer, and how it is held in memory.

    Args:
        path: Hugging Face folder or hub id. Give this or `config`.
        config: a transformers config to build a new model from: {model_type: llama, hidden_size: 64, ...}; `vocab_size`
            and the special token ids default to the tokenizer's.
        tokenizer: folder or hub id of the tokenizer; null: `path`.
        chat_template: a Jinja chat template, or a file holding one; null: the tokenizer's own.
        chat_template_kwargs: values of its variables, as {enable_thinking: false}; kept in the template on export.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights: float32, bfloat16, float16, or auto (as stored).
        attn_implementation: sdpa, eager, flash_attention_2 (needs flash-attn) or flex_attention.
        padding_free: score and train on batches without computing their padding: all real tokens in one row.
        compile: layers = each decoder layer compiled by torch.compile, one graph for all lengths; sampling is not.
        activation_offload: what the backward pass needs waits for it in host memory.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        lora: train low-rank adapters instead of the weights.
        quantization: hold the weights in 4 or 8 bits; they are then frozen, and trained by `lora` (QLoRA).
        trust_remote_code: run Python code that comes with the model; only for authors you trust.
        disable_dropout: set the model's dropout to 0, so that log-probabilities depend on the weights alone.
        logprobs: how log-probabilities of tokens are taken from hidden states: chunked (matrix products, a chunk of
            logits at a time), fused (one GPU kernel: no logits, and a token's number does not depend on the batch it is
            in), or auto (chunked).
        seed: of new weights: those of a model built from `config`, and of adapters.
        check_finite: refuse weights that are NaN or infinite; reads all of them once.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = None
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    padding_free: bool = False
    compile: Literal["layers"] | None = None
    activation_offload: bool = False
    gradient_checkpointing: bool = False
    lora: LoraSpec | None = None
    quantization: QuantizationSpec | None = None
    trust_remote_code: bool = False
    disable_dropout: bool = True
    logprobs: Literal["auto", "chunked", "fused"] = "auto"
    seed: int = 0
    check_finite: bool = True
