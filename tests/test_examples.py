"""The examples run, through the command line, as their heads say."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from rlhf_lightning.__main__ import main
from rlhf_lightning.cli.app import check_command_line

REPOSITORY = Path(__file__).resolve().parents[1]
OWN = ["--model", "shorter_answers.ShorterAnswersPPO", "--allow_module", "shorter_answers"]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    yield
    for example in EXAMPLES:
        sys.modules.pop(example.stem, None)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_command_in_its_head_is_real(example, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    head = example.read_text().split('"""')[1]
    head = re.sub(r"\\\n\s*", "", head)  # a command may go on in the next line
    commands = re.findall(r"^(?:PYTHONPATH=examples )?rlhf-lightning (.*)$", head, re.MULTILINE)
    assert commands
    for command in commands:
        assert check_command_line(shlex.split(command)) == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_listed(example):
    assert example.name in (REPOSITORY / "examples" / "README.md").read_text()


def scores(folder: Path) -> dict[str, float]:
    """The metrics of a run's first rollout."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["rollout/score"]]
    return {name: float(value) for name, value in rows[0].items() if value}


def test_shorter_answers_pays_for_every_token(tmp_path, tiny_model, write_jsonl):
    records = write_jsonl(
        "prompts.jsonl", [{"prompt": word} for word in ("the film", "a plot", "the actors", "the end")]
    )
    (tmp_path / "ppo.yaml").write_text(
        json.dumps(
            {
                "seed_everything": 3,
                "trainer": {
                    "max_steps": 1,
                    "accelerator": "cpu",
                    "enable_model_summary": False,
                    "enable_progress_bar": False,
                },
                "default_callbacks": [],
                "model": {
                    "class_path": "PPOModule",
                    "init_args": {
                        "policy": {"path": str(tiny_model)},
                        "rewards": [{"reward": {"class_path": "LengthReward", "init_args": {"target": 5}}}],
                        "generation": {"max_new_tokens": 6},
                        "updates": {"inner_epochs": 1},
                    },
                },
                "data": {"train": records, "batch_size": 4},
            }
        )
    )
    common = ["fit", "--config", str(tmp_path / "ppo.yaml")]
    assert main([*common, f"--trainer.default_root_dir={tmp_path / 'plain'}"]) == 0
    own = [*OWN, "--model.price_per_token", "0.5"]
    assert main([*common, *own, f"--trainer.default_root_dir={tmp_path / 'own'}"]) == 0
    plain, shorter = scores(tmp_path / "plain"), scores(tmp_path / "own")
    # the same seed and weights give the same answers: only the score differs, by the price of their tokens
    assert shorter["rollout/length"] == plain["rollout/length"] > 0
    assert shorter["rollout/score"] == pytest.approx(plain["rollout/score"] - 0.5 * plain["rollout/length"], abs=1e-5)
    assert "price_per_token: 0.5" in (tmp_path / "own" / "config.yaml").read_text()


def test_a_misspelt_option_of_an_own_stage_is_an_error(tmp_path, capfd):
    args = ["fit", "--config", str(REPOSITORY / "configs/ppo.yaml"), *OWN]
    assert main([*args, "--model.price_per_tokn=1"]) == 2
    assert "price_per_token" in capfd.readouterr().err
