"""What is run under `fsdp` (FSDP1), on the CPU: cases by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from one_step import another, module_for
from parallel_fits import (
    EVALUATED,
    SPECS,
    STAGES,
    Case,
    adamw,
    compared,
    evaluated,
    fit,
    outcome,
    resumed,
    sampling_ppo,
    trainer_for,
)
from sharded_cases import AskInBetween, Poison, sampled
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_lightning.callbacks.hf_export import export
from rlhf_lightning.callbacks.nan_guard import NaNGuard
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.sharded import whole_state_dict
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.parallel import FSDP1Strategy
from rlhf_lightning.stages import SFTModule
from rlhf_lightning.stages.critic import CriticSpec


class OnCPU(FSDP1Strategy):
    """Without the check of the device. torch's FSDP1 is not made for a CPU, and does there what the cases show."""

    def _check_device(self) -> None:
        pass

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        # torch takes `cpu()` for a copy of a buffer that it goes on writing to
        with mock.patch.object(Tensor, "cpu", Tensor.clone):
            return super().optimizer_state(optimizer)


def strategy_for(world: int) -> Any:
    return OnCPU() if world > 1 else "auto"


def of_module(stage: str, make: Callable[[str], L.LightningModule], *callbacks: type[L.Callback]) -> Case:
    """Five steps of what `make` gives."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        module, watching = make(model), [callback() for callback in callbacks]
        return outcome(
            module, fit(module, stage, folder, devices=world, strategy=strategy_for(world), callbacks=watching)
        )

    return case


def shared_critic(model: str) -> L.LightningModule:
    module = module_for("ppo", model)
    module.critic_spec = CriticSpec(kind="shared")
    return module


def tied(model: str) -> L.LightningModule:
    shape = another(model)
    spec = replace(shape, config={**(shape.config or {}), "tie_word_embeddings": True})
    return SFTModule(spec, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))


class Tempered(SFTModule):
    """Trains a parameter that is in no model."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "temperature"):
            self.temperature = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.temperature.prod()


def tempered(model: str, folder: Path, world: int) -> dict[str, Any]:
    module = Tempered(ModelSpec(path=model), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    losses = fit(module, "sft", folder, devices=world, strategy=strategy_for(world))
    return {"losses": losses, "weights": whole_state_dict(module)}


def generation(model: str, folder: Path, world: int) -> dict[str, Any]:
    return sampled(model, folder, world, strategy_for(world), torch.distributed, "all_gather")[1]


class Exported(L.Callback):
    """Hugging Face folders of policy and critic, at the end."""

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        export(trainer, module, Path(trainer.default_root_dir) / "flattened hf")


def exported(model: str, folder: Path, **options: Any) -> dict[str, Any]:
    """The weights of policy and critic that were exported."""
    module = sampling_ppo(model)
    return outcome(module, fit(module, "ppo", folder, callbacks=[Exported()], **options))


class Guarded(Poison, NaNGuard):
    """Two poisoned steps, which are refused."""

    def __init__(self) -> None:
        Poison.__init__(self)
        NaNGuard.__init__(self)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        Poison.on_before_optimizer_step(self, trainer, module, optimizer)
        NaNGuard.on_before_optimizer_step(self, trainer, module, optimizer)


def broken_checkpoint(model: str, folder: Path, world: int) -> dict[str, Any]:
    """What is said of a checkpoint whose weights of a layer, a unit of its own, are no numbers."""
    file, said = folder / "broken.ckpt", []
    first = SFTModule(ModelSpec(path=model), optimizer=adamw)
    trainer = trainer_for(folder, max_epochs=1, devices=world, strategy=OnCPU())
    trainer.fit(first, datamodule=RLHFDataModule(train=str(folder / "sft.jsonl"), batch_size=2))
    trainer.save_checkpoint(file)
    if trainer.is_global_zero:
        saved = torch.load(file, weights_only=True)
        saved["state_dict"]["policy.model.model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
        trainer.strategy.checkpoint_io.save_checkpoint(saved, file)
    trainer.strategy.barrier()
    try:
        second = SFTModule(ModelSpec(path=model), optimizer=adamw)
        fit(second, "sft", folder, max_epochs=2, ckpt_path=file, devices=world, strategy=OnCPU())
    except UserError as error:
        said.append(str(error))
    return {"said": said}


def refused(model: str, folder: Path, world: int) -> dict[str, Any]:
    """What is said of what FSDP1 cannot do."""
    moving, apart = module_for("dpo", model), module_for("ppo", model)
    moving.reference_sync, apart.critic_spec = ReferenceSync(every=2), CriticSpec(clip_apart=True)
    ahead = sampling_ppo(model)
    ahead.updates = replace(ahead.updates, async_rollouts=True)
    said = []
    for stage, module in (("dpo", moving), ("ppo", apart), ("ppo", ahead)):
        try:
            fit(module, stage, folder, devices=world, strategy=OnCPU())
        except UserError as error:
            said.append(str(error))
    return {"said": said}


FLATTENED: dict[str, Case] = {
    **{f"{stage}, fsdp": compared(stage, OnCPU) for stage in (*STAGES, "kto", "gkd")},
    **{
        f"{stage}, fsdp, {name}": compared(stage, OnCPU, spec=SPECS[name])
        for stage, name in (
            ("sft", "lora"),
            ("dpo", "lora"),
            ("sft", "gradient checkpointing"),
            ("reward", "without padding"),
            ("sft", "offload"),
        )
    },
    **{f"{stage}, fsdp, resumed": resumed(stage, OnCPU) for stage in ("sft", "ppo", "grpo")},
    **{f"{stage}, fsdp, evaluated": evaluated(stage, strategy_for) for stage in EVALUATED},
    "ppo, fsdp, shared critic": of_module("ppo", shared_critic),
    "ppo, fsdp, poisoned": of_module("ppo", lambda model: module_for("ppo", model), Guarded),
    "ppo, fsdp, exported": lambda model, folder, world: exported(
        model, folder, devices=world, strategy=strategy_for(world)
    ),
    "ppo, fsdp, generation": generation,
    "sft, fsdp, tied": of_module("sft", tied),
    "sft, fsdp, tempered": tempered,
    "sft, fsdp, asked in between": of_module("sft", lambda model: module_for("sft", model), AskInBetween),
    "fsdp, refused": refused,
    "fsdp, broken": broken_checkpoint,
}
