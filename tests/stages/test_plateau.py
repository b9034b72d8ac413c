"""A learning rate that falls when a metric of validation no longer does."""

from functools import partial

import lightning as L
import pytest
import torch
from fits import fit
from lightning.pytorch.cli import ReduceLROnPlateau
from one_step import records

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import SFTModule

halves = partial(ReduceLROnPlateau, monitor="val/loss", factor=0.5, patience=0, eps=0.0)


def module(model, scheduler=halves):
    # too small to change what validation says in float32: each validation after the first is no better
    return SFTModule(
        ModelSpec(path=str(model)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-12),
        lr_scheduler=scheduler,
    )


@pytest.fixture
def data(write_jsonl):
    path = write_jsonl("texts.jsonl", records("sft"))
    return {"train": path, "val": path, "batch_size": 3, "eval_batch_size": 12}


class Rates(L.Callback):
    """The learning rate that each step was taken at; a checkpoint after a step of this number."""

    def __init__(self, folder=None, step=-1):
        self.seen, self.folder, self.step = [], folder, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"] / 1e-12)

    def on_validation_end(self, trainer, module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "here.ckpt")


def test_it_falls_after_each_validation_that_is_no_better(tiny_model, data, tmp_path):
    rates = Rates()
    fit(module(tiny_model), tmp_path, data=data, max_epochs=2, val_check_interval=2, callbacks=[rates])
    # validation after steps 2, 4, 6 and 8: the first one is the best so far
    assert rates.seen == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_a_resumed_run_goes_on_with_what_it_has_seen(tiny_model, data, tmp_path):
    options = {"data": data, "max_epochs": 2, "val_check_interval": 2}
    fit(module(tiny_model), tmp_path, callbacks=[Rates(tmp_path, step=4)], **options)
    saved = torch.load(tmp_path / "here.ckpt", weights_only=True)
    assert saved["lr_schedulers"][0]["num_bad_epochs"] == 0, "it has just been lowered"
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.5e-12)
    rates = Rates()
    resumed = fit(module(tiny_model), tmp_path, ckpt_path=tmp_path / "here.ckpt", callbacks=[rates], **options)
    assert rates.seen == pytest.approx([0.5, 0.5, 0.25, 0.25])
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.125e-12)


def test_what_cannot_be_watched_is_named(tiny_model, data, tmp_path):
    with pytest.raises(UserError, match=r"torch.optim.lr_scheduler.ReduceLROnPlateau names no metric .* use lightning"):
        fit(module(tiny_model, torch.optim.lr_scheduler.ReduceLROnPlateau), tmp_path, data=data)
    misspelt = partial(ReduceLROnPlateau, monitor="val/los")
    with pytest.raises(UserError, match=r"monitor='val/los': validation logs no such metric, the nearest .*'val/loss'"):
        fit(module(tiny_model, misspelt), tmp_path, data=data)
    with pytest.raises(UserError, match=r"monitor='val/loss' is looked at after each validation, and there is none"):
        fit(module(tiny_model), tmp_path, data={**data, "val": None})
    with pytest.raises(UserError, match=r"there is none: give data.val or data.val_frac, or use schedule"):
        fit(module(tiny_model), tmp_path, data=data, limit_val_batches=0)
