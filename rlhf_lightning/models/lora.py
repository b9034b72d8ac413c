"""Low-rank adapters in the decoder.

peft is imported where an adapter is made: it brings bitsandbytes with it, and a second and more to every start.
"""

import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer


def add_adapter(model: PreTrainedModel, spec: LoraSpec, *, seed: int) -> "PeftModel":
    """`model` with a fresh adapter that changes nothing yet (B = 0); everything else is frozen.

    The output head gets none: we apply its weight directly to hidden states and an adapter there would be passed by.
    The same goes for an input embedding that is also the output head.
    """
    from peft import LoraConfig

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
    if is_adapted_layer(head):
        raise UserError(
            f"lora.target_modules={spec.target_modules!r} reaches the output head, which is applied without its "
            "adapter: leave it out (all-linear does)"
        )
    embedding = model.get_input_embeddings()
    if is_adapted_layer(embedding) and head is not None and head.weight is embedding.weight:
        raise UserError(
            f"lora.target_modules={spec.target_modules!r} reaches the input embedding, whose weight is also the "
            "output head's: leave it out (all-linear does)"
        )
    return adapted


def wrap(model: PreTrainedModel, config: "LoraConfig") -> "PeftModel":
    """peft's `get_peft_model` without its warnings: it asks transformers by old names, and of tied layers we judge."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def merged(model: nn.Module) -> nn.Module:
    """A transformers model with the adapter added into its weights. Takes a PeftModel apart: give it a copy."""
    return model.merge_and_unload() if is_adapted(model) else model


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model in peft's wrapper, if there is one; its layers still hold the adapter."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: nn.Module) -> "TypeGuard[PeftModel]":
    """Whether `model` is peft's wrapper around one that has adapters."""
    return _is_of("peft", "PeftModel", model)


def is_adapted_layer(layer: nn.Module) -> "TypeGuard[BaseTunerLayer]":
    """Whether this layer itself has an adapter."""
    return _is_of("peft.tuners.tuners_utils", "BaseTunerLayer", layer)


def is_trained_beside(module: nn.Module) -> bool:
    """Whether peft trains `module` as it is, beside the adapters: `modules_to_save` and such."""
    return _is_of("peft.utils.other", "AuxiliaryTrainingWrapper", module)


def _is_of(home: str, kind: str, module: nn.Module) -> bool:
    """Whether `module` is of a class of peft's; nothing is if nobody has imported peft."""
    return home in sys.modules and isinstance(module, getattr(sys.modules[home], kind))
