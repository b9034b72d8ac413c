"""Models whose weights are shared out over processes (FSDP2): gathered for as long as they are used, saved whole.

Of a model that is not sharded everything here is a no-op or the plain thing, so that callers need not ask.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

RESHARDS = "reshards_after_forward"
"""Attribute of a sharded unit: whether its weights are let go after each forward pass."""


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds only its part of the weights."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Let go of gathered weights: the next forward pass gathers them anew, with what the optimiser made of them."""
    for unit in _units(module):
        unit.reshard()


@contextmanager
def gathered_once(module: nn.Module, *, before_use: bool = False) -> Iterator[None]:
    """While inside, each unit's weights stay after its first use: one all-gather per unit, however often it runs.

    Generation uses every layer once a token. Ranks may run the model differently often, if each does so at least once:
    after the first time nothing is exchanged. Needs memory for the whole model. Weights must not change inside.

    Args:
        before_use: gather on the way in: then nothing is exchanged inside, and a rank need not run the model at all.
    """
    units = list(_units(module))
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        if before_use:
            unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(getattr(unit, RESHARDS), recurse=False)
            unit.reshard()


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU. Of a sharded module all ranks must call this; those but the first are given {}."""
    if not is_sharded(module):
        return {name: value.cpu() for name, value in module.state_dict().items()}
    reshard(module)
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state_dict(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Take up whole weights, which every rank has; a sharded module keeps its part."""
    if not is_sharded(module):
        module.load_state_dict(state, strict=strict)
        return
    reshard(module)
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, strict=strict))


def writes_files(module: nn.Module) -> bool:
    """Whether this process is the one to write what all have gathered."""
    return not is_sharded(module) or torch.distributed.get_rank() == 0


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))
