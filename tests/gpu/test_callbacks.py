"""What watches a run does so on a GPU too, and changes nothing of it."""

import json
import math
import os
import signal

import pytest
import torch
from on_gpu import ACCELERATOR, DEVICE, ON_GPU, or_skip

or_skip()

import lightning as L
from one_step import records

from rlhf_lightning.callbacks import (
    GracefulStop,
    Health,
    LastCheckpoint,
    MetricsCSV,
    NaNGuard,
    OptimizerOffload,
    Throughput,
)
from rlhf_lightning.core.errors import Stopped, UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, SFTModule

pytestmark = pytest.mark.gpu


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


class Poisoned(SFTModule):
    """Its loss is NaN on the micro-batches in `at`."""

    at = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx in self.at else loss


def fit(module, stage, folder, callbacks, logger=False, ckpt_path=None, **options):
    file = folder / f"{stage}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    trainer = L.Trainer(
        **{"accelerator": ACCELERATOR, "devices": 1, "max_epochs": 1, **options},
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    data = RLHFDataModule(train=str(file), batch_size=4, shuffle=False, pin_memory=ON_GPU)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return {name: value.cpu() for name, value in module.state_dict().items()}


def test_a_step_that_is_not_finite_is_not_taken(tiny_model, tmp_path, capfd):
    module = Poisoned(ModelSpec(path=str(tiny_model)), optimizer=adamw, seed=0)
    module.at = (2,)
    fit(module, "sft", tmp_path, [NaNGuard()])
    alone = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=adamw, seed=0)
    fit(alone, "sft", tmp_path, [], limit_train_batches=2)
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-5, atol=1e-6)
    assert "step 2 refused: 1 of 1 micro-batches have a loss of nan" in capfd.readouterr().err
    kept = torch.load(tmp_path / "nonfinite/step-2-rank-0.pt", weights_only=True)["batches"]
    assert kept[0]["tokens"].device.type == "cpu"


def test_weights_that_broke_are_named(tiny_model, tmp_path):
    module = Poisoned(ModelSpec(path=str(tiny_model)), optimizer=adamw, seed=0)
    module.at = (0, 1, 2)
    with pytest.raises(UserError, match="3 optimiser steps in a row were refused"):
        fit(module, "sft", tmp_path, [NaNGuard(stop_after=3)])


def test_health_and_throughput_of_an_on_policy_run(tiny_model, tmp_path):
    module = GRPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=8, num_samples=4),
        optimizer=adamw,
        seed=1,
    )
    watch = [Health(in_a_row=1, finished_frac=1.1), Throughput(), NaNGuard()]
    fit(module, "grpo", tmp_path, watch, logger=MetricsCSV(tmp_path), max_epochs=2)
    logged = (tmp_path / "metrics.csv").read_text()
    for name in ("throughput/train_tokens_per_s", "throughput/rollout_tokens_per_s", "time/generate_s"):
        assert name in logged
    said = [json.loads(line)["name"] for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert "missing_eos" in said
    assert "ratio_not_1" not in said


class Stop(L.Callback):
    """Has the process told to end, in the middle of a step."""

    def on_before_zero_grad(self, trainer, module, optimizer):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_told_to_end_is_gone_on_with(tiny_model, tmp_path):
    def run(callbacks, **options):
        module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=adamw, seed=0)
        fit(module, "sft", tmp_path, callbacks, deterministic=True, **options)
        return weights(module)

    try:
        expected = run([])
        with pytest.raises(Stopped):
            run([Stop(), GracefulStop(), LastCheckpoint(dirpath=tmp_path)])
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
        again = run([], ckpt_path=str(tmp_path / "last.ckpt"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [name for name, value in expected.items() if not torch.equal(again[name], value)]


class Places(L.Callback):
    """Where the optimiser's state lies between two steps; Lightning takes it to the host when a run is over."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, *_):
        self.seen |= {state["exp_avg"].device.type for state in trainer.optimizers[0].state.values()}


def test_an_optimiser_in_host_memory_takes_the_same_steps(tiny_model, tmp_path):
    def run(callbacks, **options):
        module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=adamw, seed=0)
        fit(module, "sft", tmp_path, callbacks, gradient_clip_val=1.0, **options)
        return module

    places, moved = Places(), Places()
    expected = run([places])
    assert places.seen == {DEVICE}
    offloaded = run([OptimizerOffload(), moved, LastCheckpoint(dirpath=tmp_path)])
    assert moved.seen == {"cpu"}
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(offloaded)[name], value, rtol=1e-5, atol=1e-6)
    # what it wrote is resumed with it or without
    ends = [run(more, ckpt_path=str(tmp_path / "last.ckpt"), max_epochs=2) for more in ([], [OptimizerOffload()])]
    for name, value in weights(ends[0]).items():
        assert not torch.equal(value, weights(expected)[name])
        torch.testing.assert_close(weights(ends[1])[name], value, rtol=1e-5, atol=1e-6)
