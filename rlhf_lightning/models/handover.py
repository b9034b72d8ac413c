"""A policy's weights as its Hugging Face checkpoint would hold them, one after another: for engines that sample."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.lora import is_adapted_layer, is_trained_beside
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.quantized import QUANTIZED, put_back
from rlhf_lightning.models.sharded import is_sharded


def checkpoint_weights(policy: Policy, *, with_adapter: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Names and weights. Copied are those that an adapter changes or that were quantised, one at a time.

    (A family whose checkpoints hold weights in other pieces than its modules do has all of them at once.) A head that
    is the embedding comes under both names: vLLM reloads module by module, and would leave the head without weights.

    Args:
        with_adapter: add an adapter in; without, the weights are those under it.

    Raises:
        UserError: the weights are shared out over processes, in 8 bits, or changed by more than W + s B A.
    """
    if is_sharded(policy):
        raise UserError(
            "trainer.strategy shares the policy's weights out over processes, and an engine with weights of its own "
            "takes them whole: use strategy ddp, or the engine HFGenerate"
        )
    kinds = {type(parameter).__name__ for parameter in policy.parameters()}
    if "Int8Params" in kinds:
        raise UserError(
            "policy.quantization.bits=8 rounds the layers' inputs besides their weights, which an engine with weights "
            "of its own does not: use bits: 4, leave quantization out, or use the engine HFGenerate"
        )
    _check_adapter(policy)
    model = policy.causal_lm
    return _as_in_checkpoint(model, _weights(model, with_adapter=with_adapter))


def tied_weights(policy: Policy) -> dict[str, str]:
    """Of `checkpoint_weights`, names of what is given under another name already: {the second name: the first}."""
    tied = getattr(policy.causal_lm, "all_tied_weights_keys", {})
    state = policy.causal_lm.state_dict()
    both = {name: first for name, first in tied.items() if name in state and first in state}
    return {name: first for name, first in both.items() if state[name].data_ptr() == state[first].data_ptr()}


@torch.no_grad()
def adapter_weights(policy: Policy) -> dict[str, Tensor]:
    """A and s B of every layer with an adapter: what is added to its weight is their product, s = 1 from then on.

    Named `LAYER.lora_A.weight` [rank, in] and `LAYER.lora_B.weight` [out, rank], by the layer's name in the decoder.

    Raises:
        UserError: there is no adapter, or one that these tensors do not say.
    """
    remedy = "set engine.adapter: merged"
    if not policy.has_adapter:
        raise UserError(
            f"engine.adapter='sent' sends a low-rank adapter, and the policy has none: give policy.lora, or {remedy}"
        )
    _check_adapter(policy)
    told: dict[str, Tensor] = {}
    for name, layer in _layers(policy.causal_lm).items():
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise UserError(
                f"engine.adapter='sent' sends adapters of linear layers, and {name} is another "
                f"({type(layer.get_base_layer()).__name__}): leave it out of lora.target_modules, or {remedy}"
            )
        active = layer.active_adapters
        if len(active) != 1 or layer.merged:
            state = "one that is merged into the weights" if layer.merged else f"{len(active)} at a time"
            raise UserError(
                f"engine.adapter='sent' sends one adapter beside the weights, and {name} has {state}: {remedy}"
            )
        down, up = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight  # type: ignore[index]
        told[f"{name}.lora_A.weight"] = down.detach().clone()
        told[f"{name}.lora_B.weight"] = up.detach() * layer.scaling[active[0]]  # type: ignore[index]
    return told


def adapter_rank(weights: Mapping[str, Tensor]) -> int:
    """The largest rank among what `adapter_weights` gave."""
    return max(weight.shape[0] for name, weight in weights.items() if name.endswith(".lora_A.weight"))


class GivenBase:
    """Remembers which frozen weights an engine holds, to give them again only if they are others now."""

    def __init__(self) -> None:
        self._policy: weakref.ref[Policy] | None = None
        self._state: list[tuple[int, int]] = []

    def give(self, policy: Policy) -> None:
        """The engine holds the base of `policy` as it is."""
        self._policy, self._state = weakref.ref(policy), _state(policy)

    def forget(self) -> None:
        """The engine holds nothing."""
        self._policy = None

    def is_of(self, policy: Policy) -> bool:
        """Whether the engine holds what lies under the adapter of `policy`."""
        return self._policy is not None and self._policy() is policy and self._state == _state(policy)


def _state(policy: Policy) -> list[tuple[int, int]]:
    """Where every weight but the adapter's lies, and how often torch has written to it."""
    named = policy.causal_lm.named_parameters()
    return [(weight.data_ptr(), weight._version) for name, weight in named if ".lora_" not in name]


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if is_adapted_layer(layer)}


def _check_adapter(policy: Policy) -> None:
    """Raise for an adapter that does more than add s B A to weights: nobody would notice what is left out."""
    for name, module in policy.causal_lm.named_modules():
        more = is_trained_beside(module)
        if is_adapted_layer(module):
            kinds = [*getattr(module, "lora_variant", {}).values(), *getattr(module, "lora_bias", {}).values()]
            more = any(kinds) or not hasattr(module, "lora_A")
        if more:
            raise UserError(
                f"the adapter of {name} is more than a low-rank update of weights (DoRA, biases, modules_to_save or "
                "another kind than LoRA), which is not handed over to engines with weights of their own: use plain "
                "LoRA, or the engine HFGenerate"
            )


@torch.no_grad()
def _as_in_checkpoint(model: nn.Module, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        yield from revert_weight_conversion(model, dict(weights)).items()
        return
    for name, weight in weights:
        yield from revert_weight_conversion(model, {name: weight}).items()


def _weights(model: nn.Module, *, with_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    layers = _layers(model)
    quantised = {name: weight for name, weight in model.named_parameters() if type(weight).__name__ in QUANTIZED}
    for name, weight in model.state_dict().items():
        if name.rpartition(".weight.")[0] + ".weight" in quantised:
            continue  # scales of the weight that stands before them
        if name in quantised:
            weight = put_back(quantised[name])
        inside, _, own = name.partition(".base_layer.")
        if not own:
            if not any(name.startswith(f"{layer}.") for layer in layers):
                yield name, weight
            continue
        if own == "weight" and with_adapter:
            layer = layers[inside]
            for adapter in [] if layer.merged else layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        yield f"{inside}.{own}", weight
