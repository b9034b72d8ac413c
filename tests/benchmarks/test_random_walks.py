"""The smallest run that shows learning: SFT, then GRPO, from the shipped chain, with a smaller model."""

import json
from pathlib import Path

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest

from rlhf_lightning.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "sft.trainer.max_steps": 200,
    "sft.model.init_args.policy.config.hidden_size": 64,
    "sft.model.init_args.policy.config.intermediate_size": 172,
    "sft.model.init_args.policy.config.num_hidden_layers": 2,
    "sft.model.init_args.optimizer.init_args.lr": 3.0e-3,
    "grpo.model.init_args.optimizer.init_args.lr": 1.0e-3,
    "evaluate.num_shown": 1,
}


@pytest.mark.slow
def test_grpo_finds_the_short_ways_that_imitation_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    settings = SMALL | {"run_dir": tmp_path}
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert main(["chain", "--config", "configs/random_walks/chain.yaml", *given]) == 0
    models = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())["models"]
    reached = {name: model["figures"]["optimality"]["mean"] for name, model in models.items()}
    assert reached["sft"] < 0.5
    assert reached["grpo"] > 0.9
