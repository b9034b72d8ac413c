"""`strategy: fsdp2`: weights, gradients and optimiser state shared out over all processes."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.quantized import is_quantized
from rlhf_lightning.models.sharded import reshard
from rlhf_lightning.models.vocab_parallel import VocabParallelHead
from rlhf_lightning.parallel.fsdp1 import FSDP1Strategy
from rlhf_lightning.parallel.shard import check_all_sharded, models_of, shard_model
from rlhf_lightning.parallel.single_file import (
    SingleFile,
    check_callbacks,
    check_optimizers,
    without_inference_mode,
)

Dtype = Literal["float32", "bfloat16", "float16"]
ValueT = TypeVar("ValueT")


class FSDP2Strategy(SingleFile, ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy`, with the sharding done that it leaves to the user.

    Each process reads its own share of every batch and holds 1 / processes of every weight, gradient and optimiser
    state, and of a frozen reference. A layer is gathered while it runs. (Lightning's own default on one machine is
    tensor parallelism over all devices, which shards nothing by itself and gives all of them the same data.)

    Checkpoints are one file, gathered on the first process and written by the trainer's CheckpointIO: `generate` and
    `export` read them in one process.

    Args:
        num_replicas: groups of processes of which each holds the whole model (HSDP): weights are gathered within a
            group only, gradients added over all. As a rule one group per machine.
        tensor_parallel_size: processes that read the same records and share out the vocabulary of output heads: each
            computes the logits of its tokens alone. Such a group holds the whole model, as one of `num_replicas` does.
        reshard_after_forward: let go of a layer's weights between its forward and backward pass; false gathers half as
            often and needs memory for all weights.
        param_dtype: weights are gathered, and layers computed, in this dtype; None: their own.
        reduce_dtype: gradients are added over processes in this dtype; None: `param_dtype`.
        process_group_backend: nccl, gloo; None: what fits the device.
        timeout_minutes: how long a process waits for the others before the run fails.

    References:
        Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, 2023. arXiv:2304.11277
    """

    def __init__(
        self,
        num_replicas: int = 1,
        tensor_parallel_size: int = 1,
        reshard_after_forward: bool = True,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype | None = None,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        if num_replicas < 1:
            raise UserError(f"num_replicas={num_replicas}: 1 shards over all processes, 2 makes two groups of them")
        if tensor_parallel_size < 1:
            raise UserError(f"tensor_parallel_size={tensor_parallel_size}: 1 keeps heads whole, 2 cuts them over two")
        if tensor_parallel_size > 1 and num_replicas > 1:
            raise UserError(
                f"tensor_parallel_size={tensor_parallel_size} makes groups that each hold the whole model, and "
                f"num_replicas={num_replicas} would make others: leave num_replicas out"
            )
        if not timeout_minutes > 0:
            raise UserError(f"timeout_minutes={timeout_minutes}: give a positive number")
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.num_replicas = num_replicas
        self.tensor_parallel_size = tensor_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.precision_policy = MixedPrecisionPolicy(param_dtype=_dtype(param_dtype), reduce_dtype=_dtype(reduce_dtype))
        self._shard_mesh: DeviceMesh | None = None

    @property
    def sharded_root(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    # ---- building --------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        if processes % self.num_replicas:
            raise UserError(
                f"strategy fsdp2: {processes} processes cannot be shared out over num_replicas={self.num_replicas} "
                "groups: use a divisor"
            )
        if processes % self.tensor_parallel_size:
            raise UserError(
                f"strategy fsdp2: {processes} processes cannot be cut into groups of "
                f"tensor_parallel_size={self.tensor_parallel_size}: use a divisor"
            )
        self._data_parallel_size = processes // self.tensor_parallel_size
        self._tensor_parallel_size = self.tensor_parallel_size
        super().setup_environment()
        if self.tensor_parallel_size > 1:  # copies over those that read other records
            self._shard_mesh = self.device_mesh
        elif self.num_replicas == 1:
            self._shard_mesh = self.device_mesh["data_parallel"]
        else:
            shape = (self.num_replicas, processes // self.num_replicas)
            self._shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        assert self._shard_mesh is not None
        check_callbacks(trainer, "fsdp2")
        frozen = getattr(module, "frozen_models", list)()
        for model in [*models_of(module), *frozen]:
            if is_quantized(model):
                raise UserError(
                    "strategy fsdp2 cannot share out weights that bitsandbytes has quantised: leave quantization out, "
                    "or use strategy: ddp, under which each process holds them all"
                )
            shard_model(
                model,
                self._shard_mesh,
                self.precision_policy,
                reshard_after_forward=self.reshard_after_forward,
                cut_vocabulary=self.tensor_parallel_size > 1,
            )
        if trainer.state.fn != TrainerFn.PREDICTING:
            for model in getattr(module, "reward_models", list)():
                # scores are as exact as the dtype that was asked for them says, whatever the policy is computed in
                shard_model(model, self._shard_mesh, MixedPrecisionPolicy(), reshard_after_forward=True)
        reshard(module)
        check_all_sharded(module)
        without_inference_mode(trainer)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers, "fsdp2")
        for optimizer in self.optimizers:
            # a forward pass without a backward leaves embedding and head gathered: stale after the step. A hook before
            # the step would come too soon: Lightning runs forward and backward inside it
            optimizer.register_step_post_hook(self._after_step)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self.tensor_parallel_size > 1:
            assert self.lightning_module is not None
            for head in self.lightning_module.modules():
                if isinstance(head, VocabParallelHead):
                    head.average_gradients()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.lightning_module is not None
        reshard(self.lightning_module)

    def of_first(self, make: Callable[[], ValueT]) -> ValueT:
        """What the first process of a tensor-parallel group makes, on all of them; the others do not call `make`."""
        group = self.device_mesh["tensor_parallel"].get_group()
        made = [make() if group.rank() == 0 else None]
        first = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast_object_list(made, src=first, group=group)
        return cast(ValueT, made[0])


def check_strategy(strategy: Any) -> None:
    """Raise for strategies of Lightning that share weights out and that stages, exports and checkpoints do not know."""
    if isinstance(strategy, FSDPStrategy) and not isinstance(strategy, FSDP1Strategy):
        what = (
            "as Lightning has it (FSDP1) flattens weights into units that sampling, exports and checkpoints do not know"
        )
    elif isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        what = "leaves it to the module to share out weights: nothing would be, and no gradient be added"
    elif isinstance(strategy, DeepSpeedStrategy):
        what = "steps, clips and shares out weights by itself, which stages, exports and checkpoints do not know"
    else:
        return
    raise UserError(
        f"trainer.strategy: {type(strategy).__name__} {what}: use strategy: fsdp2 for models that one device has no "
        "room for, or ddp"
    )


def _dtype(name: Dtype | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="weights, gradients and optimiser state sharded over all processes (FSDP2)"
)
