"""Decoder layers compiled one by one (torch.compile): one graph serves all layers, batch sizes and lengths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf_lightning.core.errors import UserError

MOST_GRAPHS = 64
"""Of one kind of layer. A layer is another graph with a mask or without, for one row, without gradient, with adapters
on or off, and as the first one, whose input has no gradient; torch by itself stops compiling at 8, and only logs it."""


def layers_of(decoder: Any) -> list[nn.Module]:
    """The layers of a transformers model, by the classes that it says must not be split; none if it says nothing."""
    names = set(getattr(decoder, "_no_split_modules", None) or ())
    return [part for part in decoder.modules() if type(part).__name__ in names and not isinstance(part, nn.Embedding)]


def compile_layers(decoder: Any, *, backend: str = "inductor") -> None:
    """From now on each layer of a transformers model runs compiled, for any batch size and length."""
    layers = layers_of(decoder)
    if not layers:
        raise UserError(
            f"compile: models of type {decoder.config.model_type!r} do not say what their layers are "
            "(_no_split_modules): leave compile out"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def is_compiled(module: nn.Module) -> bool:
    """Whether some layer runs compiled."""
    return any(part._compiled_call_impl is not None for part in module.modules())


@contextmanager
def not_compiled(module: nn.Module) -> Iterator[None]:
    """While inside, layers run as they are written.

    Sampling does: with a cache a layer is another graph for each layer's number, and for one token or several.
    """
    compiled = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call
