"""A frozen base in 4 or 8 bits, by bitsandbytes: loaded, kept out of checkpoints, put back for an export."""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import ModelSpec, QuantizationSpec

QUANTIZED = ("Params4bit", "Int8Params")
"""Classes of bitsandbytes' weights, by name: nothing is imported to find that a model has none."""
CHECKSUM = "base_checksum"
"""Key in a checkpoint that says which quantised base its adapters belong to."""


def bitsandbytes_config(spec: QuantizationSpec) -> BitsAndBytesConfig:
    """What transformers is told."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization: {spec.bits} bits need the package bitsandbytes, which is not installed: "
            "pip install 'rlhf-lightning[quant]', or leave quantization out"
        )
    if spec.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype),
    )


def check_trainable(spec: ModelSpec) -> None:
    """Raise if a model that is to be trained has nothing that could be."""
    if spec.quantization is not None and spec.lora is None:
        raise UserError(
            f"quantization: weights of {spec.quantization.bits} bits cannot be trained ({spec.path!r}): give lora "
            "beside it, whose adapters can, or leave quantization out"
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether some weights are bitsandbytes' integers."""
    return any(type(parameter).__name__ in QUANTIZED for parameter in module.parameters())


def settle(model: nn.Module) -> None:
    """Keep the weights as they were quantised, and refuse those that bitsandbytes would get wrong.

    On some CPUs bitsandbytes repacks a 4-bit weight when it is first evaluated, and packs it back to train: its scales
    go through bfloat16 on the way and come back as others. On all of them (0.50.2) it mixes up the scales of weights
    whose rows do not end where a block does, without a word.

    Raises:
        UserError: such a weight.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise UserError(
                f"quantization: {name} has rows of {state.shape[-1]} numbers, which 4 bits in blocks of "
                f"{state.blocksize} do not divide, and bitsandbytes would put them back wrongly: use bits: 8, or leave "
                "quantization out"
            )
    _compute_with_weights(model)
    # says at every call of 8-bit layers that their inputs are cast to float16; docs/memory.md says it once
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _compute_with_weights(model: nn.Module) -> None:
    """Let what 8-bit layers compute with move with their model.

    They compute with integers and scales that they hold beside their weight. Those move with the layer's own `to` only,
    which moving a whole model does not call: a model that was loaded on the CPU would be left there by half.
    """
    for module in model.modules():
        if type(module._parameters.get("weight")).__name__ == "Int8Params":
            module.register_forward_pre_hook(_take_weight)


def _take_weight(layer: Any, inputs: Any) -> None:
    weight, state, scales = layer.weight, layer.state, _scales(layer)
    weight.CB = weight.SCB = None
    state.CB, state.SCB = weight.data, scales


def _scales(layer: Any) -> Tensor:
    """The scales of an 8-bit layer's rows, beside its weight: the layer takes them when it first runs."""
    weight = layer.weight
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return scales.to(weight.device)


def keep_only_trained(module: nn.Module) -> None:
    """From now on the state of `module` holds what is trained, its buffers, and a checksum of the quantised base.

    The base itself is loaded again from where it came from; state of adapters over another one is refused.
    """
    module.register_state_dict_post_hook(_leave_out_base)
    module.register_load_state_dict_pre_hook(_fill_in_base)


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    kept = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    kept |= {name for name, _ in module.named_buffers() if "." not in name}  # of a scalar model: its normalisation
    for key in [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) not in kept]:
        del state[key]
    state[prefix + CHECKSUM] = _checksum(module)


def _fill_in_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    theirs = state.pop(prefix + CHECKSUM, None)
    if theirs is None:
        return  # weights of another kind: load_state_dict says what does not fit
    if not torch.equal(theirs.cpu(), _checksum(module)):
        raise UserError(
            "the checkpoint's adapters were trained over another quantised base than the one that was loaded: resume "
            "with the model folder and the quantization that it was started with"
        )
    for name, parameter in module.named_parameters(remove_duplicate=False):
        state.setdefault(prefix + name, parameter)
    for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
        for name in part._buffers.keys() - part._non_persistent_buffers_set:
            state.setdefault(f"{path}.{name}".removeprefix("."), part._buffers[name])


def _checksum(module: nn.Module) -> Tensor:
    """Two sums over all integers, the second weighted by their place in their row [2]."""
    total = torch.zeros(2, dtype=torch.int64)
    for parameter in module.parameters():
        if type(parameter).__name__ in QUANTIZED:
            rows = parameter.detach().view(torch.uint8).reshape(-1)
            rows = nn.functional.pad(rows, (0, -len(rows) % 256)).view(-1, 256)
            columns = rows.sum(0, dtype=torch.int64).cpu()
            total += torch.stack((columns.sum(), (columns * torch.arange(256)).sum()))
    return total


def put_back(weight: Any) -> Tensor:
    """A weight of 4 bits in the dtype that it had."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(weight.data, weight.quant_state)


def dequantized_state(model: nn.Module) -> Mapping[str, Tensor]:
    """The state of `model` on the CPU, quantised weights put back into the dtype that they had."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")  # its own: peft's wrapper of a layer shows that of the layer
        if type(weight).__name__ == "Params4bit":
            state[f"{name}.weight"] = put_back(weight)
        elif type(weight).__name__ == "Int8Params":
            import bitsandbytes.functional as bnb

            state[f"{name}.weight"] = bnb.int8_vectorwise_dequant(weight.data, _scales(module))
    return {name: value.detach().cpu() for name, value in state.items()}
