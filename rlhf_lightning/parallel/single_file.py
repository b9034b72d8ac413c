"""Checkpoints in one file, of models whose weights are shared out; and validation that leaves them trainable."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.sharded import load_whole_state_dict, plain_name, reshard

if TYPE_CHECKING:
    Strategy = ParallelStrategy
else:
    Strategy = object


def check_callbacks(trainer: Trainer, strategy: str) -> None:
    """Raise for callbacks of Lightning that keep whole weights beside those that are shared out."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            raise UserError(
                f"{type(callback).__name__} averages whole weights, and strategy {strategy} shares them out: leave the "
                "callback out, or use strategy: ddp"
            )


def check_optimizers(optimizers: Iterable[Optimizer], strategy: str, whole: tuple[str, ...] = ()) -> None:
    """Raise for optimisers whose state does not follow weights that are shared out.

    Args:
        whole: names of those that ask for the shape of a weight, or for its norm.
    """
    for optimizer in optimizers:
        kind = type(getattr(optimizer, "optimizer", optimizer))
        if kind.__module__.startswith("bitsandbytes"):
            raise UserError(
                f"optimizer {kind.__name__} of bitsandbytes keeps its state in blocks of numbers, which strategy "
                f"{strategy} cannot share out or save: use torch.optim.AdamW, or strategy: ddp"
            )
        if kind.__name__ in whole:
            raise UserError(
                f"optimizer {kind.__name__} goes by rows, columns or norms of weights, of which strategy {strategy} "
                "shows it flat parts: use torch.optim.AdamW, or strategy: ddp"
            )


class SingleFile(Strategy):
    """What a sharding strategy of Lightning is given, to write one file by the trainer's CheckpointIO and read it.

    Weights are gathered on the first process, and so is the optimiser's state, by names of parameters.
    """

    @property
    def sharded_root(self) -> nn.Module:
        """The module that all shared-out weights are in."""
        raise NotImplementedError

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, by names of parameters, on the first process; {} on the others."""
        reshard(self.sharded_root)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.sharded_root, getattr(optimizer, "optimizer", optimizer), options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What the trainer's CheckpointIO reads; weights and optimiser state are taken up already."""
        path = self.broadcast(checkpoint_path)
        if Path(path).is_dir():
            raise UserError(
                f"{path} is a folder, a checkpoint in shards; strategies fsdp2 and fsdp write and read single files"
            )
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        module = self.lightning_module
        assert module is not None
        load_whole_state_dict(module, checkpoint["state_dict"], strict=module.strict_loading)
        if module.trainer.state.fn == TrainerFn.FITTING:
            states = checkpoint.get("optimizer_states", [])
            for optimizer, state in zip(self.optimizers, states, strict=True):
                self._load_optimizer(optimizer, state, path)
        return checkpoint

    def _load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any], path: Any) -> None:
        names = {id(parameter): plain_name(name) for name, parameter in self.sharded_root.named_parameters()}
        ours = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        theirs = [name for group in state["param_groups"] for name in group["params"]]
        if sorted(map(str, ours)) != sorted(map(str, theirs)):
            raise UserError(
                f"{path} holds an optimiser's state that is not by these parameters' names: it was written under "
                "another strategy, or for another model. Resume with the strategy it was written with, or start a new "
                "run from the exported model"
            )
        if not state["state"]:  # plain SGD keeps nothing, and torch asks the state for its device
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})
            return
        # not strict: a parameter that has had no gradient yet has no state
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(self.sharded_root, optimizer, dict(state), options=options)


def without_inference_mode(trainer: Trainer) -> None:
    """Weights are gathered into tensors that training uses again, and inference mode would leave its own kind there."""
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.inference_mode = False
    trainer.predict_loop.inference_mode = False
