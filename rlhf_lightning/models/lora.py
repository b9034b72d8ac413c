"""Low-rank adapters in the decoder."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import LoraSpec


def add_adapter(model: PreTrainedModel, spec: LoraSpec, *, seed: int) -> PeftModel:
    """`model` with a fresh adapter that changes nothing yet (B = 0); everything else is frozen.

    The output head gets none: we apply its weight directly to hidden states and an adapter there would be passed by.
    The same goes for an input embedding that is also the output head.
    """
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its layers store the transpose
    )
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            adapted = wrap(model, config)
    except ValueError as error:
        raise UserError(f"lora.target_modules={spec.target_modules!r}: {error}") from error
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise UserError(
            f"lora.target_modules={spec.target_modules!r} reaches the output head, which is applied without its "
            "adapter: leave it out (all-linear does)"
        )
    embedding = model.get_input_embeddings()
    if isinstance(embedding, BaseTunerLayer) and head is not None and head.weight is embedding.weight:
        raise UserError(
            f"lora.target_modules={spec.target_modules!r} reaches the input embedding, whose weight is also the "
            "output head's: leave it out (all-linear does)"
        )
    return adapted


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """peft's `get_peft_model` without its warnings: it asks transformers by old names, and of tied layers we judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def merged(model: nn.Module) -> nn.Module:
    """A transformers model with the adapter added into its weights. Takes a PeftModel apart: give it a copy."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
