"""A policy's weights as its Hugging Face checkpoint would hold them, one after another: for engines that sample."""

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.quantized import is_quantized
from rlhf_lightning.models.sharded import is_sharded


@torch.no_grad()
def checkpoint_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, with an adapter added in. Nothing is copied but the weights that an adapter changes.

    Raises:
        UserError: the weights are shared out over processes, or quantised.
    """
    if is_sharded(policy):
        raise UserError(
            "trainer.strategy shares the policy's weights out over processes, and an engine with weights of its own "
            "takes them whole: use strategy ddp, or the engine HFGenerate"
        )
    if is_quantized(policy):
        raise UserError(
            "the policy's base is quantised, and an engine with weights of its own takes them whole: leave "
            "quantization out, or use the engine HFGenerate"
        )
    model = policy.causal_lm
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    yield from revert_weight_conversion(model, dict(_merged(model, layers))).items()


def _merged(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.state_dict().items():
        inside, _, own = name.partition(".base_layer.")
        if not own:
            if not any(name.startswith(f"{layer}.") for layer in layers):
                yield name, weight
            continue
        if own == "weight":
            layer = layers[inside]
            for adapter in [] if layer.merged else layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
        yield f"{inside}.{own}", weight
