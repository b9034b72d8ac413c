"""Models whose weights are shared out over processes: gathered for as long as they are used, saved whole.

By FSDP2 each model is a root of its own; by FSDP1 the whole LightningModule is the one root of all its models.

Of a model that is not sharded everything here is a no-op or the plain thing, so that callers need not ask.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

RESHARDS = "reshards_after_forward"
"""Attribute of a sharded unit: whether its weights are let go after each forward pass."""
ROOT = "fsdp1_root"
"""Attribute of a module and its models: the root unit of FSDP1 that they are in."""
WRAPPED = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of weights below a unit."""


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds only its part of the weights."""
    if root_of(module) is not None:
        return True
    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules())


def root_of(module: nn.Module) -> FullyShardedDataParallel | None:
    """The root unit of FSDP1 that a LightningModule or one of its models is in."""
    return vars(module).get(ROOT)


def set_root(module: nn.Module, root: FullyShardedDataParallel) -> None:
    """Remember what `root_of` gives; not as a submodule, which the root would be of itself."""
    vars(module)[ROOT] = root


def plain_name(name: str) -> str:
    """The name of a weight as if nothing were sharded."""
    return name.replace(WRAPPED, "")


def reshard(module: nn.Module) -> None:
    """Let go of gathered weights: the next forward pass gathers them anew, with what the optimiser made of them."""
    for unit in _units(module):
        unit.reshard()
    if (root := root_of(module)) is not None:
        _reshard_flattened(root)


def _reshard_flattened(root: FullyShardedDataParallel) -> None:
    """By itself FSDP1 lets go of its root, and of units without a gradient, in no forward pass but the next."""
    from torch.distributed.fsdp._runtime_utils import _reshard  # a private name, that nobody else shall depend on

    root.check_is_root()  # makes ready what a first use would
    for unit in FullyShardedDataParallel.fsdp_modules(root):
        handle: Any = unit._handle
        if handle is None or not is_idle(unit):
            continue
        is_whole = handle.uses_sharded_strategy and not handle.is_sharded(handle.flat_param)
        if is_whole or not handle.uses_sharded_strategy:  # of one process: views, not parameters, are left in place
            _reshard(unit, handle, is_whole)


@contextmanager
def gathered_once(module: nn.Module, *, before_use: bool = False) -> Iterator[None]:
    """While inside, each unit's weights stay after its first use: one all-gather per unit, however often it runs.

    Generation uses every layer once a token. Ranks may run the model differently often, if each does so at least once:
    after the first time nothing is exchanged. Needs memory for the whole model. Weights must not change inside.

    Args:
        before_use: gather on the way in: then nothing is exchanged inside, and a rank need not run the model at all.
            FSDP1 always does, and all models of the root.
    """
    if (root := root_of(module)) is not None:
        with _summoned(root):
            yield
        return
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


@contextmanager
def _summoned(root: FullyShardedDataParallel) -> Iterator[None]:
    """All units of FSDP1 whole that are not already, and their layers run as they are: nothing lets them go inside."""
    units = [unit for unit in FullyShardedDataParallel.fsdp_modules(root) if is_idle(unit)]
    with ExitStack() as stack:
        for unit in units:  # one by one: inside a step the root is whole, and its layers are not
            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False))
            vars(unit)["forward"] = unit.module.__call__
            stack.callback(vars(unit).pop, "forward")
        yield


def is_idle(unit: FullyShardedDataParallel) -> bool:
    """Whether a unit of FSDP1 neither runs nor is whole."""
    return unit.training_state.name == "IDLE"


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU. Of a sharded module all ranks must call this; those but the first are given {}."""
    if not is_sharded(module):
        return {name: value.cpu() for name, value in module.state_dict().items()}
    reshard(module)
    if (root := root_of(module)) is not None:
        return _flattened_state_dict(root, module)
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state_dict(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Take up whole weights, which every rank has; a sharded module keeps its part."""
    if not is_sharded(module):
        module.load_state_dict(state, strict=strict)
        return
    reshard(module)
    root = root_of(module)
    assert root is None or root.module is module, "of FSDP1 only all weights can be taken up"
    set_model_state_dict(root or module, dict(state), options=StateDictOptions(full_state_dict=True, strict=strict))


def writes_files(module: nn.Module) -> bool:
    """Whether this process is the one to write what all have gathered."""
    return not is_sharded(module) or torch.distributed.get_rank() == 0


def _flattened_state_dict(root: FullyShardedDataParallel, module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module that FSDP1 has flattened; one unit is whole at a time.

    Not by its own state dict, which takes no weights to the host where nothing is shared out (one process), and ends a
    process on the CPU.
    """
    under = next(name for name, part in root.module.named_modules() if part is module)
    under = f"{plain_name(under)}." if under else ""
    units = {name: part for name, part in root.module.named_modules() if isinstance(part, FullyShardedDataParallel)}
    state: dict[str, Tensor] = {}
    for place, unit in ({"": root} | units).items():  # the root first: what is used first becomes one
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            if torch.distributed.get_rank() != 0:
                continue
            for name, value in _saved(root.module):
                if name.rpartition(WRAPPED)[0] == f"{place}." * bool(place) and plain_name(name).startswith(under):
                    state[plain_name(name).removeprefix(under)] = value.detach().to("cpu", copy=True)
    return state


def _saved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict is made of: parameters, under each of their names, and buffers that are to be saved."""
    yield from module.named_parameters(remove_duplicate=False)
    for place, part in module.named_modules():
        for name, value in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{place}.{name}" if place else name, value


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))
