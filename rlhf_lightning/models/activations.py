"""Activations that wait for their backward pass in host memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

ALIGNED_TO = 16
"""Numbers that an operation may ask a row to begin at a multiple of."""


@contextmanager
def on_host(module: nn.Module, wanted: bool = True) -> Iterator[None]:
    """What a forward pass inside keeps for its backward pass lies in host memory until then; weights stay in place.

    Of layers that are checkpointed that is their inputs; of others all that their operations keep.

    Args:
        module: whose weights are not to be moved.
        wanted: False: nothing is done.
    """
    if not wanted or not torch.is_grad_enabled():
        yield
        return
    # of sharded weights the part that is here; what is gathered from them is not told from activations
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    weights = {part.untyped_storage().data_ptr() for part in parts}

    def pack(tensor: Tensor) -> Any:
        # an operation keeps a weight as a view of it (transposed, say): the storage is the same
        return tensor if tensor.untyped_storage().data_ptr() in weights else send_away(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else bring_back(*packed)

    with saved_tensors_hooks(pack, unpack):
        yield


def send_away(tensor: Tensor) -> tuple[torch.device, torch.Size, Tensor]:
    """Where a tensor was, its shape, and a copy in host memory, laid out as `bring_back` will lay it out again.

    torch's own `save_on_cpu` brings back rows without a gap: an operation that had aligned what it kept (sdpa on a GPU
    pads the rows of a mask) would refuse it in its backward pass. What is expanded travels once.
    """
    if tensor.device.type == "cpu":
        return tensor.device, tensor.shape, tensor
    once = tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
    host = torch.empty_strided(
        once.shape, aligned_strides(once), dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
    )
    return tensor.device, tensor.shape, host.copy_(once)


def bring_back(device: torch.device, shape: torch.Size, host: Tensor) -> Tensor:
    """The tensor that was sent away."""
    if device.type == "cpu":
        return host
    back = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    return back.copy_(host, non_blocking=True).expand(shape)


def aligned_strides(tensor: Tensor) -> Sequence[int]:
    """Strides of a copy with the same order of dimensions and the same alignment, without what else lies in between."""
    strides, span = [0] * tensor.dim(), 1
    for dim in sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim])):
        step = math.gcd(tensor.stride(dim), ALIGNED_TO)
        strides[dim] = -(-span // step) * step
        span += max(tensor.shape[dim] - 1, 0) * strides[dim]
    return strides
