"""`strategy: fsdp`: torch's first FSDP, which flattens the weights of a unit into one; on CUDA alone."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from torchmetrics import Metric

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.compiled import is_compiled
from rlhf_lightning.models.quantized import is_quantized
from rlhf_lightning.models.sharded import gathered_once, is_idle, reshard, root_of, set_root, whole_state_dict
from rlhf_lightning.parallel.shard import ENTRANCES, decoder_layers, models_of
from rlhf_lightning.parallel.single_file import (
    SingleFile,
    check_callbacks,
    check_optimizers,
    without_inference_mode,
)


class FSDP1Strategy(SingleFile, FSDPStrategy):
    """Lightning's `FSDPStrategy`, with what it leaves out: clipping by norm, and models that run outside of a step.

    For those who have to use FSDP1; `fsdp2` does all of this and more. The module is the root unit, each decoder layer
    a unit in it. Training and validation steps gather one layer after the other. Whatever runs a model in between
    (rollouts, what is measured of them, samples) needs memory for all weights: they are gathered together, once for
    `gathered_once`, else for each call. Frozen models and reward models are whole on every process.

    Checkpoints are one file, as under `fsdp2`.

    Args:
        process_group_backend: nccl, gloo; None: nccl.
        timeout_minutes: how long a process waits for the others before the run fails.
    """

    def __init__(self, process_group_backend: str | None = None, timeout_minutes: float = 30.0) -> None:
        if not timeout_minutes > 0:
            raise UserError(f"timeout_minutes={timeout_minutes}: give a positive number")
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
            use_orig_params=True,
        )

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """None: weights are gathered, and gradients added, in their own dtype. bf16-mixed is autocast, as elsewhere."""
        return None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights, on the first process; {} on the others."""
        assert self.lightning_module is not None
        return whole_state_dict(self.lightning_module)

    @property
    def sharded_root(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def setup_environment(self) -> None:
        self._check_device()
        super().setup_environment()

    def _check_device(self) -> None:
        if self.root_device.type != "cuda":
            raise UserError(
                f"strategy fsdp (FSDP1) runs on CUDA devices, and this is a {self.root_device.type}: use strategy: "
                "fsdp2, which runs on both"
            )

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        _check_module(module)
        check_callbacks(trainer, "fsdp (FSDP1)")
        self.precision_plugin = _ClipsByRoot(self.precision_plugin, lambda: self.sharded_root)
        without_inference_mode(trainer)
        super().setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if (known := root_of(model)) is not None:
            return known  # a second run of one module
        models = models_of(model)
        layers = {type(layer) for part in models for layer in decoder_layers(part)}
        root = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy(layers),
            device_id=self.root_device,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )
        for part in (model, *models):
            set_root(part, root)
        for part in models:
            for name in ("forward", *next(names for kind, names in ENTRANCES.items() if isinstance(part, kind))):
                _make_entrance(part, name, root)
        _make_way_in(root)
        for part in model.modules():  # of a user's own stage: FSDP moves parameters and buffers alone
            if isinstance(part, Metric):
                part.to(self.root_device)
        model._device = self.root_device  # type: ignore[assignment]  # weights were moved one by one, unseen by Lightning
        return root

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers, "fsdp (FSDP1)", whole=("Adafactor", "Muon"))

    # ---- letting go ------------------------------------------------------------------------------------------------

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        self._let_go()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().validation_step(*args, **kwargs)
        self._let_go()
        return result

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().test_step(*args, **kwargs)
        self._let_go()
        return result

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().predict_step(*args, **kwargs)
        self._let_go()
        return result

    def _let_go(self) -> None:
        assert self.lightning_module is not None
        reshard(self.lightning_module)


class _ClipsByRoot(FSDPPrecision):
    """Lightning's precision under FSDP1, which knows no root to clip by, and casts the numbers of a batch."""

    def __init__(self, plugin: FSDPPrecision, root: Callable[[], Any]) -> None:
        super().__init__(plugin.precision)
        self._root = root

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """The norm is over all processes; those of their parts alone would differ."""
        self._root().clip_grad_norm_(clip_val)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Weights keep the dtype that their spec gives them, unless the trainer says they shall have another."""
        return super().convert_module(module) if self.precision in ("bf16-true", "16-true") else module

    def convert_input(self, data: Any) -> Any:
        return data  # sums over a step's tokens need float32 whatever layers are computed in


def _make_entrance(model: nn.Module, name: str, root: FullyShardedDataParallel) -> None:
    """Gather all weights on the way into a method that is called outside of a step."""
    inside: Callable[..., Any] = getattr(model, name)

    def enter(*args: Any, **kwargs: Any) -> Any:
        with gathered_once(model) if is_idle(root) else nullcontext():
            return inside(*args, **kwargs)

    setattr(model, name, enter)


def _make_way_in(root: FullyShardedDataParallel) -> None:
    """Of the module's own `forward`, by which a stage measures a step's batches beforehand: one layer after another."""
    module = root.module
    inside = module.forward

    def enter(*args: Any, **kwargs: Any) -> Any:
        if not is_idle(root):
            return inside(*args, **kwargs)
        vars(module)["forward"] = inside
        try:
            return root(*args, **kwargs)
        finally:
            vars(module)["forward"] = enter
            reshard(module)

    vars(module)["forward"] = enter


def _check_module(module: LightningModule) -> None:
    """Raise for what FSDP1 cannot do."""
    refused = "strategy fsdp (FSDP1) {}: use strategy: fsdp2, or ddp"
    if any(is_quantized(model) for model in models_of(module)):
        raise UserError(
            "strategy fsdp cannot share out weights that bitsandbytes has quantised: leave quantization out, or use "
            "strategy: ddp, under which each process holds them all"
        )
    if any(is_compiled(model) for model in models_of(module)):
        raise UserError(refused.format("was not tried with compiled layers (compile)"))
    if getattr(module, "reference_sync", None) is not None:
        raise UserError(refused.format("flattens the weights that reference_sync would mix with a reference's"))
    dtypes = {weight.dtype: name for name, weight in module.named_parameters() if weight.is_floating_point()}
    if len(dtypes) > 1:
        some = " and ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
        raise UserError(
            f"strategy fsdp (FSDP1) flattens weights of one dtype together, but {some}: give the model dtype: float32 "
            "(with trainer.precision: bf16-mixed layers are computed in bfloat16 all the same), or use strategy: ddp"
        )
    critic = getattr(module, "critic_spec", None)
    if critic is not None and critic.clip_apart:
        raise UserError(refused.format("clips all gradients together, and critic.clip_apart asks for two norms"))


# Lightning refuses the name on a CPU by itself, and knows no remedy
FSDPStrategy.get_registered_strategies().remove("fsdp")
StrategyRegistry.register(
    "fsdp",
    FSDP1Strategy,
    description="weights, gradients and optimiser state flattened and sharded over all processes (FSDP1), on CUDA",
    override=True,
)
