"""Activations that wait for their backward pass in host memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.tensor import DTensor


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
    move = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        # an operation keeps a weight as a view of it (transposed, say): the storage is the same
        return tensor if tensor.untyped_storage().data_ptr() in weights else move.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else move.unpack_hook(packed)

    with saved_tensors_hooks(pack, unpack):
        yield
