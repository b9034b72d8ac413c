"""A few steps of a stage under any strategy, what is compared of them, and the cases that strategies share."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from one_step import module_for, records
from torch import Tensor, nn

from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO
from rlhf_lightning.callbacks.sample_logger import SampleLogger
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.reference import BEMA, ReferenceSync
from rlhf_lightning.models.sharded import whole_state_dict
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import DPOModule, GRPOModule, PPOModule, SFTModule
from rlhf_lightning.stages.grpo import DynamicSampling

STAGES = ("sft", "reward", "dpo", "ppo", "grpo")
EVALUATED = ("sft", "reward", "ppo")
STEPS = 5
LOSSES = ("train/loss", "policy/loss", "value/loss")
Case = Callable[[str, Path, int], dict[str, Any]]
"""Of model, folder and number of processes: what is compared."""
SPECS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraSpec(r=2)},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "without padding": {"padding_free": True},
    "offload": {"activation_offload": True, "gradient_checkpointing": True},
}
DRAWS: dict[str, dict[str, Any]] = {
    "draws again": {"dynamic_sampling": DynamicSampling(max_batches=3)},
    "replays": {"replay": ReplaySpec(capacity=8)},
}


class Losses(L.Callback):
    """The losses of every optimiser step, added."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if self._step < trainer.global_step:
            self._step = trainer.global_step
            seen = trainer.callback_metrics
            self.values.append(sum(float(seen[name]) for name in LOSSES if name in seen))


def trainer_for(folder: Path, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": STEPS, "gradient_clip_val": 0.5}
    return L.Trainer(
        **{**defaults, "enable_checkpointing": False, "accumulate_grad_batches": 3, **options},
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
    )


def fit(
    module: L.LightningModule,
    stage: str,
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    batch_size: int | None = None,
    validated: bool = False,
    **options: Any,
) -> list[float]:
    """Train on the twelve records of `stage`; the losses. A step is an epoch: the same, however many share it.

    Args:
        validated: on the same records, after every epoch.
    """
    together = batch_size or (12 if stage in ("ppo", "grpo", "gkd") else 4)
    losses = Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(folder, [losses, *callbacks], **options)
        readers = options.get("devices", 1) // getattr(options.get("strategy"), "tensor_parallel_size", 1)
        records_of = str(folder / f"{stage}.jsonl")
        size = together // max(readers, 1)
        # of the twelve beside its own answers a step sees all: three micro-batches of four
        beside = {"pretraining": str(folder / "sft.jsonl"), "pretraining_batch_size": 4 // max(readers, 1)}
        data = RLHFDataModule(
            train=records_of,
            val=records_of if validated else None,
            batch_size=size,
            **(beside if stage == "gkd" else {}),
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return losses.values


def outcome(module: L.LightningModule, losses: list[float]) -> dict[str, Any]:
    """Losses, and the weights of every trained model, whole."""
    weights: dict[str, Tensor] = {}
    for name in ("policy", "model", "critic"):
        if isinstance(model := getattr(module, name, None), nn.Module):
            weights |= {f"{name}.{key}": value for key, value in whole_state_dict(model).items()}
    return {"losses": losses, "weights": weights}


def of_stage(stage: str, model: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Five steps; `spec` are options of the model."""
    module = module_for(stage, model, **options.pop("spec", {}))
    return outcome(module, fit(module, stage, folder, **options))


def write_records(folder: Path) -> None:
    for stage in (*STAGES, "kto", "taught", "gkd"):
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(stage)))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def compared(stage: str, strategy: Callable[[], Any], **options: Any) -> Case:
    """Five steps of a stage, to be compared with one process."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        return of_stage(stage, model, folder, devices=world, strategy=strategy(), **options)

    return case


def sampling_ppo(model: str) -> PPOModule:
    """PPO on answers that it samples itself, one by one: ranks take different numbers of steps to sample theirs."""
    return PPOModule(
        ModelSpec(path=model),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=12, rows_at_once=1),
        updates=UpdateSpec(inner_epochs=2, num_minibatches=1),
        rows_at_once=4,
        optimizer=adamw,
        seed=3,
    )


def drawing_grpo(model: str, draws: str) -> GRPOModule:
    """GRPO on pairs of answers that it samples itself, many of one length and so without a difference."""
    return GRPOModule(
        ModelSpec(path=model),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=4, num_samples=2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        seed=3,
        **DRAWS[draws],
    )


class Watch(L.Callback):
    """What a run looks like from inside."""

    def __init__(self) -> None:
        self.here = self.everywhere = 0
        """Elements of frozen models."""
        self.in_checkpoint: list[str] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for parameter in (p for model in module.frozen_models() for p in model.parameters()):
            self.here += getattr(parameter, "to_local", lambda whole=parameter: whole)().numel()
            self.everywhere += parameter.numel()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.in_checkpoint = sorted(checkpoint["state_dict"])


def resumed(stage: str, strategy: Callable[[], Any] = lambda: "fsdp2", **options: Any) -> Case:
    """A run of four epochs, and one that is stopped after the second and goes on from its checkpoint."""

    def made(model: str) -> L.LightningModule:
        if stage == "grpo":
            return drawing_grpo(model, "replays")
        if stage == "dpo":
            sync = ReferenceSync(every=1, bema=BEMA(every=1, lag=2.0))
            return DPOModule(ModelSpec(path=model), reference_sync=sync, optimizer=adamw)
        return sampling_ppo(model) if stage == "ppo" else SFTModule(ModelSpec(path=model), optimizer=adamw)

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        def given() -> dict[str, Any]:
            return {"devices": world, "strategy": strategy(), **options}

        whole, first, second, watch = made(model), made(model), made(model), Watch()
        losses = fit(whole, stage, folder, max_epochs=4, **given())
        keep = ModelCheckpoint(dirpath=folder / f"{stage} half", filename="half", enable_version_counter=False)
        fit(first, stage, folder, max_epochs=2, callbacks=[keep, watch], enable_checkpointing=True, **given())
        path = folder / f"{stage} half" / "half.ckpt"
        rest = fit(second, stage, folder, max_epochs=4, ckpt_path=path, **given())
        return {
            "whole": outcome(whole, losses),
            "resumed": outcome(second, losses[: len(losses) - len(rest)] + rest),
            "in_checkpoint": watch.in_checkpoint,
            "frozen_share": watch.here / max(watch.everywhere, 1),
        }

    return case


class Evaluated(L.Callback):
    """What every validation logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = trainer.callback_metrics
        self.rows.append({name: float(value) for name, value in seen.items() if name.startswith("val/")})


def evaluated(stage: str, strategy: Callable[[int], Any], **trainer: Any) -> Case:
    """Two epochs with a validation after each: what it logs, and the rows of `samples.jsonl`."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        module = sampling_ppo(model) if stage == "ppo" else module_for(stage, model)
        seen, given = Evaluated(), strategy(world)
        samples = folder / f"{stage} {given if isinstance(given, str) else 'groups'} {world}.samples.jsonl"
        table = SampleLogger(num_prompts=2, max_new_tokens=6, file=samples.name, show=False)
        options = {"devices": world, "strategy": given, "num_sanity_val_steps": 0, **trainer}
        fit(module, stage, folder, max_epochs=2, callbacks=[seen, table], validated=True, **options)
        rows = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
        return {"evaluated": seen.rows, "samples": rows}

    return case


def result(folder: Path, name: str) -> dict[str, Any]:
    """What the processes of a case gave."""
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5, steps: int = STEPS) -> None:
    """Losses and weights of two `outcome`s."""
    assert len(expected["losses"]) == steps
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance, abs=tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=tolerance, atol=tolerance, msg=name)


def assert_evaluated_alike(found: dict[str, Any], expected: dict[str, Any], *, samples: bool = True) -> None:
    """What `evaluated` gave twice: metrics to 1e-5, samples to the letter."""
    assert len(expected["evaluated"]) == 2
    assert [row.keys() for row in found["evaluated"]] == [row.keys() for row in expected["evaluated"]]
    for ours, theirs in zip(found["evaluated"], expected["evaluated"], strict=True):
        assert ours, "nothing was logged"
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    if samples:
        assert found["samples"] == expected["samples"]
