"""The command line on a GPU, in bf16-mixed as configs/trainer/gpu.yaml has it: every stage, every config we ship."""

import json
import math

import pytest
import torch
import transformers
from on_gpu import ACCELERATOR, BACKEND, ON_GPU, backend_of, or_skip

or_skip()

from command_line import fit, metrics
from one_step import records
from safetensors.torch import load_file
from shipped_configs import REPOSITORY, STAGES, content, needing_packages, run_one_step, stand_ins, untrained_reward

pytestmark = pytest.mark.gpu

OVERLAY = str(REPOSITORY / "configs/trainer/gpu.yaml")
HERE = [] if ON_GPU else ["--trainer.accelerator=cpu"]
ON_POLICY = ("PPOModule", "GRPOModule", "OnlineDPOModule")
NAMES = {
    "SFTModule": "sft",
    "RewardModule": "reward",
    "DPOModule": "dpo",
    "KTOModule": "kto",
    "PPOModule": "ppo",
    "GRPOModule": "grpo",
    "OnlineDPOModule": "ppo",
}
EPOCHS = 6
LENGTH = {"reward": {"class_path": "LengthReward", "init_args": {"target": 2}}, "name": "length"}


@pytest.fixture(autouse=True)
def as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    yield
    torch.use_deterministic_algorithms(False)


def config(stage, model, folder="runs/a"):
    file = f"{stage}.jsonl"
    with open(file, "w") as out:
        out.writelines(json.dumps(record) + "\n" for record in records(NAMES[stage]))
    arguments = {
        "model" if stage == "RewardModule" else "policy": {"path": str(model)},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
    }
    if stage in ON_POLICY:
        samples = 1 if stage == "PPOModule" else 4
        arguments |= {"rewards": [LENGTH], "generation": {"max_new_tokens": 8, "num_samples": samples}}
    return {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": folder,
            "max_epochs": EPOCHS,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
            "deterministic": "warn",
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
        "model": {"class_path": stage, "init_args": arguments},
        "data": {"train": file, "val": file, "batch_size": 6},
    }


def column(folder, name):
    return [float(row[name]) for row in metrics(folder) if row.get(name)]


@pytest.mark.parametrize("stage", NAMES)
def test_a_run_learns_is_resumed_and_exports(stage, wide_model, tmp_path):
    """Resumed in the middle, the losses that follow are to the last bit those of the run that was not stopped."""
    assert fit(config(stage, wide_model), "--trainer", OVERLAY, *HERE) == 0
    loss = "policy/loss" if stage in ("PPOModule", "GRPOModule") else "train/loss"
    losses = column("runs/a", loss)
    seen = {name: value for row in metrics("runs/a") for name, value in row.items() if value}
    assert all(math.isfinite(float(value)) for value in seen.values()), seen
    if stage not in ON_POLICY:
        assert losses[-1] < losses[0]
    if stage != "RewardModule":
        assert backend_of("linear_token_logprobs") == BACKEND
    if stage == "PPOModule":
        assert backend_of("gae") == BACKEND

    half = config(stage, wide_model, "runs/b")
    assert fit(half, "--trainer", OVERLAY, *HERE, f"--trainer.max_epochs={EPOCHS // 2}") == 0
    assert fit(half, "--trainer", OVERLAY, *HERE, "--resume", "auto") == 0
    assert column("runs/b", loss) == losses

    folder = tmp_path / "runs/a/hf"
    made = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = made.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 4, 5, 6]])).logits
    assert logits.device.type == "cpu"
    assert bool(logits.isfinite().all())
    saved = torch.load(tmp_path / "runs/a/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    ours = next(value for name, value in saved.items() if name.endswith("embed_tokens.weight"))
    theirs = next(v for k, v in load_file(folder / "model.safetensors").items() if k.endswith("embed_tokens.weight"))
    assert torch.equal(ours.cpu(), theirs)


@pytest.fixture(scope="module")
def wide_reward(tmp_path_factory, wide_model):
    return untrained_reward(str(wide_model), tmp_path_factory.mktemp("models") / "reward")


@pytest.mark.parametrize("path", needing_packages(STAGES))
def test_a_config_takes_a_step(path, tmp_path, monkeypatch, wide_model, tiny_tokenizer, wide_reward):
    monkeypatch.chdir(REPOSITORY)
    run = content(path)
    options = stand_ins(run, tmp_path, str(wide_model), str(tiny_tokenizer), wide_reward, ACCELERATOR)
    given = ["--config", path, "--trainer", OVERLAY, *options]
    logged = run_one_step(given, tmp_path)
    loss = "policy/loss" if run["model"]["class_path"] in ("PPOModule", "GRPOModule") else "train/loss"
    assert math.isfinite(logged[loss])
    assert all(math.isfinite(value) for value in logged.values())
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
