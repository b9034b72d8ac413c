"""What is refused before any arithmetic, with the value and the remedy in the message."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_DEVICES = ("cpu", "cuda", "meta", "mps", "xpu")


def check_float(name: str, x: Tensor) -> None:
    if isinstance(x, nn.Module):
        raise ValueError(
            f"{name} is a {type(x).__name__}: give its weight tensor. A LoRA-wrapped head has to be merged first "
            "(weight + scaling * B @ A), or its adapter would be silently ignored"
        )
    check_tensor(name, x)
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {x.dtype}: give float32, bfloat16, float16 or float64")
    if x.device.type not in _DEVICES:
        raise ValueError(f"{name} is on {x.device}: supported devices are {', '.join(_DEVICES)}; move it there")


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}: give a tensor")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but {like_name} on {like.device}: move one of them")


def check_some(name: str, x: Tensor, what: str) -> None:
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: there is no {what}; skip the empty batch")


def check_per_token(name: str, x: Tensor, like_name: str, like: Tensor, shape: Sequence[int]) -> None:
    """One float per token, beside `like`."""
    check_float(name, x)
    check_shape(name, x, like_name, shape)
    check_device(name, x, like_name, like)


def check_shape(name: str, x: Tensor, like_name: str, shape: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)} but {like_name} asks for {tuple(shape)}")


def check_rows(logits: Tensor, tokens: Tensor, mask: Tensor | None, *, name: str = "logits") -> None:
    """Logits (or hidden states) [..., V], tokens [...], mask [...] belong together."""
    check_float(name, logits)
    check_tensor("tokens", tokens)
    if tokens.dtype not in _INTEGERS:
        raise ValueError(f"tokens has dtype {tokens.dtype}: give integer token ids (torch.int64)")
    if logits.ndim == 0 or tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)} but {name} has shape {tuple(logits.shape)}: "
            f"{name} needs exactly one more (last) axis"
        )
    check_some(name, logits, "row to score")
    check_device("tokens", tokens, name, logits)
    if mask is not None:
        check_mask(mask, "tokens", tokens, tokens.shape)


def check_mask(mask: Tensor, like_name: str, like: Tensor, shape: Sequence[int]) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}: give booleans, True = counts (mask.bool())")
    check_shape("mask", mask, like_name, shape)
    check_device("mask", mask, like_name, like)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    check_float(f"{prefix}weight", weight)
    if weight.ndim != 2 or weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)} but {prefix}hidden has shape {tuple(hidden.shape)}: "
            f"the weight of a head is [vocab, {hidden.shape[-1]}]"
        )
    check_some(f"{prefix}weight", weight, "word")
    check_device(f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if bias is not None:
        check_per_token(f"{prefix}bias", bias, f"{prefix}weight {tuple(weight.shape)}", weight, weight.shape[:1])


def check_number(name: str, x: float) -> None:
    if isinstance(x, Tensor):
        raise ValueError(f"{name} is a tensor of shape {tuple(x.shape)}: give one number for all rows")
    if not -math.inf < x < math.inf:  # torch.compile follows a comparison, not isfinite
        raise ValueError(f"{name}={x} must be finite")


def is_rounded(sums: str, method: str) -> bool:
    """Whether the fused kernel is to add partial sums in rounded float32; refuses what is not offered."""
    if sums not in ("tensor_cores", "rounded"):
        raise ValueError(f"sums={sums!r}: use tensor_cores or rounded")
    if sums == "rounded" and method != "fused":
        raise ValueError(f"sums='rounded' is how the fused kernel adds, and method={method!r}: use method='fused'")
    return sums == "rounded"


def check_transform(
    temperature: float | Tensor, shape: Sequence[int], softcap: float | None, logit_scale: float
) -> None:
    """What becomes of the logits before the softmax."""
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature requires a gradient, and none is computed: detach it")
        if temperature.dtype not in (*_FLOATS, *_INTEGERS):
            raise ValueError(f"temperature has dtype {temperature.dtype}: give positive numbers, float32")
        if temperature.numel() != 1:
            check_shape("temperature", temperature, "tokens", shape)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; for greedy choices use is_argmax")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be positive and finite; None switches it off")
    check_number("logit_scale", logit_scale)


def check_row_temperature(temperature: Tensor | None, mask: Tensor | None) -> None:
    """Reads it, so only on the CPU."""
    if temperature is None or temperature.device.type != "cpu":
        return
    bad = ~((temperature > 0) & temperature.isfinite())
    bad = bad if mask is None else bad & mask
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = float(temperature[tuple(where)])
        raise ValueError(
            f"temperature={value} at {where} must be positive and finite; for greedy choices use is_argmax"
        )


def check_token_range(tokens: Tensor, mask: Tensor | None, vocab: int) -> None:
    """Reads the ids, so only on the CPU; on a GPU no id out of range is read, and its row is NaN."""
    if tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    low, high = torch.aminmax(tokens)
    if int(low) >= 0 and int(high) < vocab:
        return
    bad = (tokens < 0) | (tokens >= vocab)
    if mask is not None:
        bad = bad & mask
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = int(tokens[tuple(where)])
        raise ValueError(
            f"token id {value} at {where} is outside [0, {vocab}): set mask False where no token counts, "
            "or use the tokenizer the model was made for"
        )
