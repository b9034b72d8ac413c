"""Optimiser state in host memory: on the device only while its own parameter moves."""

from functools import wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.sharded import is_sharded


class OptimizerOffload(Callback):
    """Keeps the optimiser's state in host memory between steps, and moves parameters one at a time.

    The device then holds weights, gradients and the state of one parameter. The numbers are those of the same optimiser
    without the callback, in checkpoints too; it serves every optimiser that moves each parameter by itself.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            _check(optimizer)
            if is_sharded(pl_module):
                raise UserError(
                    "OptimizerOffload: strategies fsdp2 and fsdp share out the optimiser's state already: drop one of "
                    "them"
                )
            step_one_by_one(optimizer)


def _check(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"OptimizerOffload: {name} of bitsandbytes keeps its state itself: use one of its Paged optimisers"
        )
    if isinstance(optimizer, LBFGS):
        raise UserError(f"OptimizerOffload: {name} moves all parameters as one; it serves AdamW and its like")


def step_one_by_one(optimizer: Optimizer) -> None:
    """From now on `optimizer.step` brings each parameter's state to its device, moves it, and takes the state back."""
    step = optimizer.step
    at_home: dict[Tensor, set[str]] = {}
    """Of each parameter: names of the state that came from the device. A count of steps lies on the host anyhow."""

    def take_back(parameter: Tensor) -> None:
        state = optimizer.state[parameter]
        moved = {name for name, value in state.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
        at_home.setdefault(parameter, set()).update(moved)
        state.update({name: state[name].cpu() for name in moved})

    @wraps(step)  # also marks it as the one that a schedule counts
    def one_by_one(closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = optimizer.state[parameter]
                    state.update({name: state[name].to(parameter.device) for name in at_home.get(parameter, ())})
                    alone = {**group, "params": [parameter]}
                    optimizer.param_groups = [alone]
                    step()
                    if changed := [
                        name for name, value in group.items() if name != "params" and alone[name] is not value
                    ]:
                        raise UserError(
                            f"OptimizerOffload: {type(optimizer).__name__} keeps {changed[0]} of all its parameters "
                            "together; the callback serves those that move each by itself, such as AdamW"
                        )
                    take_back(parameter)
        finally:
            optimizer.param_groups = groups
        return loss

    for parameter in optimizer.state:
        take_back(parameter)
    optimizer.step = one_by_one  # type: ignore[method-assign]
