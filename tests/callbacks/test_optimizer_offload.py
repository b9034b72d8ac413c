"""Optimiser state in host memory: parameter by parameter, with the numbers of a step over all."""

import warnings

import lightning as L
import pytest
import torch
from one_step import records

from rlhf_lightning.callbacks import OptimizerOffload
from rlhf_lightning.callbacks.optimizer_offload import step_one_by_one
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import SFTModule
from rlhf_lightning.stages.schedule import Schedule

OPTIMISERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


class SaveAt(L.Callback):
    """Writes a checkpoint after so many steps."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(model, path, folder, optimizer, callbacks, ckpt_path=None, strategy="auto"):
    module = SFTModule(
        ModelSpec(path=str(model)), optimizer=optimizer, schedule=Schedule("cosine", warmup_frac=0.2), seed=5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=4,
            strategy=strategy,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
            callbacks=callbacks,
        )
        trainer.fit(module, datamodule=RLHFDataModule(train=path, batch_size=4), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_numbers_are_those_of_the_optimiser_alone(name, tiny_model, write_jsonl, tmp_path):
    path, optimizer = write_jsonl("records.jsonl", records("sft")), OPTIMISERS[name]
    expected = dict(fit(tiny_model, path, tmp_path, optimizer, []).named_parameters())
    middle = tmp_path / "middle.ckpt"
    runs = [fit(tiny_model, path, tmp_path, optimizer, [OptimizerOffload(), SaveAt(middle, 2)])]
    # its file is one of the plain optimiser's: it is resumed with the callback or without
    runs += [
        fit(tiny_model, path, tmp_path, optimizer, callbacks, str(middle)) for callbacks in ([], [OptimizerOffload()])
    ]
    for run in runs:
        different = [name for name, parameter in run.named_parameters() if not torch.equal(parameter, expected[name])]
        assert not different


def test_one_parameter_moves_at_a_time():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters[:2], lr=0.1)
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.2})
    seen = []
    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: seen.append([(len(g["params"]), g["lr"]) for g in opt.param_groups])
    )
    step_one_by_one(optimizer)
    for parameter in (parameters[0], parameters[2]):
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert seen == [[(1, 0.1)], [(1, 0.2)]]  # what has no gradient is left out
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert parameters[2].tolist() == pytest.approx([1 - 0.2 - 0.2 * 0.01] * 2)


def test_a_failing_step_leaves_the_groups_whole():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    groups = optimizer.param_groups
    step_one_by_one(optimizer)

    def fails():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        optimizer.step(fails)
    assert optimizer.param_groups is groups


# --- what is refused


class Together(torch.optim.SGD):
    """Adapts one number for all its parameters, as Prodigy does."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["dampening"] += 0.01


def test_an_optimiser_that_moves_all_as_one_is_refused(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("records.jsonl", records("sft"))
    with pytest.raises(UserError, match="OptimizerOffload: LBFGS moves all parameters as one"):
        fit(tiny_model, path, tmp_path, torch.optim.LBFGS, [OptimizerOffload()])
    with pytest.raises(UserError, match="OptimizerOffload: Together keeps dampening of all its parameters together"):
        fit(tiny_model, path, tmp_path, lambda p: Together(p, lr=0.1), [OptimizerOffload()])


def test_bitsandbytes_has_its_own_way(tiny_model, write_jsonl, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'rlhf-lightning[quant]'")
    path = write_jsonl("records.jsonl", records("sft"))
    with pytest.raises(UserError, match="AdamW8bit of bitsandbytes keeps its state itself: use one of its Paged"):
        fit(tiny_model, path, tmp_path, lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.1), [OptimizerOffload()])


def test_sharded_state_is_not_offloaded_again(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("records.jsonl", records("sft"))
    with pytest.raises(UserError, match="strategies fsdp2 and fsdp share out the optimiser's state"):
        fit(tiny_model, path, tmp_path, OPTIMISERS["adamw"], [OptimizerOffload()], strategy="fsdp2")
