"""One process on NCCL: what ddp and fsdp2 do to a run of one GPU is nothing."""

import json

import pytest
import torch
from on_gpu import ACCELERATOR, or_skip

or_skip()

from one_step import records
from parallel_fits import SPECS, assert_same, drawing_grpo, fit, of_stage, outcome, sampling_ppo

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.parallel import FSDP2Strategy

pytestmark = pytest.mark.gpu


def run(stage, model, folder, **options):
    (folder / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    return of_stage(stage, str(model), folder, accelerator=ACCELERATOR, **options)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_losses_and_weights_are_those_of_a_plain_run(stage, strategy, tiny_model, tmp_path):
    expected = run(stage, tiny_model, tmp_path)
    assert_same(run(stage, tiny_model, tmp_path, strategy=strategy), expected, tolerance=1e-4)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_answers_sampled_from_shards_are_those_of_a_plain_run(stage, tiny_model, tmp_path):
    (tmp_path / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    outcomes = []
    for strategy in ("auto", "fsdp2"):
        module = sampling_ppo(str(tiny_model)) if stage == "ppo" else drawing_grpo(str(tiny_model), "draws again")
        module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        losses = fit(module, stage, tmp_path, accelerator=ACCELERATOR, strategy=strategy)
        outcomes.append(outcome(module, losses))
    expected, found = outcomes
    assert len(set(expected["losses"])) > 1
    assert_same(found, expected, tolerance=1e-3, steps=len(expected["losses"]))


def test_a_group_of_two_wants_two_devices(tiny_model, tmp_path):
    with pytest.raises(UserError, match="1 processes cannot be cut into groups of tensor_parallel_size=2: use a divis"):
        run("sft", tiny_model, tmp_path, strategy=FSDP2Strategy(tensor_parallel_size=2))


@pytest.mark.parametrize("spec", ["lora", "gradient checkpointing", "offload"])
def test_shards_with_what_changes_a_model(spec, tiny_model, tmp_path):
    expected = run("sft", tiny_model, tmp_path, spec=dict(SPECS[spec]))
    assert_same(run("sft", tiny_model, tmp_path, spec=dict(SPECS[spec]), strategy="fsdp2"), expected, tolerance=1e-4)


def test_shards_in_bfloat16_are_as_near_as_rounding_lets_them(tiny_model, tmp_path):
    expected = run("sft", tiny_model, tmp_path)
    strategy = FSDP2Strategy(param_dtype="bfloat16", reduce_dtype="float32")
    assert_same(run("sft", tiny_model, tmp_path, strategy=strategy, precision="bf16-mixed"), expected, tolerance=5e-2)
