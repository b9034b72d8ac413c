"""`strategy: fsdp` (FSDP1). One process shares nothing out, and flattens, gathers, clips and saves as several do."""

import json

import pytest
import torch
from on_gpu import ACCELERATOR, ON_GPU, or_skip

or_skip()

import command_line
from fsdp1_cases import OnCPU, exported
from one_step import records
from parallel_fits import (
    SPECS,
    assert_evaluated_alike,
    assert_same,
    drawing_grpo,
    evaluated,
    fit,
    of_stage,
    outcome,
    resumed,
    sampling_ppo,
    write_records,
)
from safetensors.torch import load_file
from shipped_configs import REPOSITORY

pytestmark = pytest.mark.gpu


def strategy():
    return "fsdp" if ON_GPU else OnCPU()


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path)
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def run(stage, model, folder, **options):
    return of_stage(stage, str(model), folder, accelerator=ACCELERATOR, **options)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo", "grpo", "gkd"])
def test_losses_and_weights_are_those_of_a_plain_run(stage, tiny_model, folder):
    """Five steps, clipped by norm and accumulated; with frozen references, a teacher, a critic."""
    expected = run(stage, tiny_model, folder)
    assert_same(run(stage, tiny_model, folder, strategy=strategy()), expected, tolerance=1e-4)


@pytest.mark.parametrize("spec", ["lora", "gradient checkpointing", "without padding", "offload"])
def test_with_what_changes_a_model(spec, tiny_model, folder):
    expected = run("sft", tiny_model, folder, spec=dict(SPECS[spec]))
    assert_same(run("sft", tiny_model, folder, spec=dict(SPECS[spec]), strategy=strategy()), expected, tolerance=1e-4)


def test_in_bfloat16_it_is_as_near_as_rounding_lets_it(tiny_model, folder):
    expected = run("sft", tiny_model, folder, precision="bf16-mixed")
    found = run("sft", tiny_model, folder, precision="bf16-mixed", strategy=strategy())
    assert_same(found, expected, tolerance=2e-2)
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_answers_that_it_samples_are_those_of_a_plain_run(stage, tiny_model, folder):
    outcomes = []
    for options in ({}, {"strategy": strategy()}):
        module = sampling_ppo(str(tiny_model)) if stage == "ppo" else drawing_grpo(str(tiny_model), "draws again")
        module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        outcomes.append(outcome(module, fit(module, stage, folder, accelerator=ACCELERATOR, **options)))
    expected, found = outcomes
    assert len(set(expected["losses"])) > 1
    assert_same(found, expected, tolerance=1e-3, steps=len(expected["losses"]))


@pytest.mark.parametrize("stage", ["sft", "ppo", "grpo"])
def test_a_run_resumes_with_the_same_bits(stage, tiny_model, folder):
    found = resumed(stage, strategy, accelerator=ACCELERATOR, deterministic=True)(str(tiny_model), folder, 1)
    assert found["whole"]["losses"] == found["resumed"]["losses"]
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(weight, found["resumed"]["weights"][name]), name


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_validations_and_samples_are_those_of_a_plain_run(stage, tiny_model, folder):
    plain, ours = (
        evaluated(stage, lambda _, given=given: given, accelerator=ACCELERATOR)(str(tiny_model), folder, world)
        for world, given in ((1, "auto"), (1, strategy()))
    )
    assert_evaluated_alike(ours, plain)


def test_an_export_holds_what_was_trained(tiny_model, folder):
    weights = exported(str(tiny_model), folder, strategy=strategy(), accelerator=ACCELERATOR)["weights"]
    for part, under in (("", "policy.model."), ("critic", "critic.backbone.")):
        for name, weight in load_file(folder / "flattened hf" / part / "model.safetensors").items():
            ours = "critic.head.weight" if name == "score.weight" else under + name.removeprefix("model." * bool(part))
            assert torch.equal(weight, weights[ours]), name


@pytest.mark.skipif(not ON_GPU, reason="the shipped overlay asks for a GPU; tests/parallel has the refusal")
def test_the_shipped_overlay_trains_resumes_and_exports(wide_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records("sft")))
    config = {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": "runs/a",
            "max_epochs": 4,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "SFTModule",
            "init_args": {
                "policy": {"path": str(wide_model)},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
            },
        },
        "data": {"train": "sft.jsonl", "val": "sft.jsonl", "batch_size": 6},
    }
    given = ["--trainer", str(REPOSITORY / "configs/trainer/fsdp.yaml"), "--trainer.devices=1"]
    assert command_line.fit(config, *given, "--trainer.max_epochs=2") == 0
    assert command_line.fit(config, *given, "--resume", "auto") == 0
    losses = [float(row["train/loss"]) for row in command_line.metrics("runs/a") if row.get("train/loss")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs/a/hf/model.safetensors").is_file()
