"""Every YAML that we ship: read by the command line, printed and read again, headed by the command that runs it."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import yaml

from rlhf_lightning.__main__ import main
from rlhf_lightning.cli.app import check_command_line
from rlhf_lightning.pipelines.chain import check_chain
from rlhf_lightning.pipelines.chain_spec import read_chain

WORDS = ("good", "bad", "long", "short", "great", "dull", "film", "plot")
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml"))


def content(config: str) -> dict:
    return yaml.safe_load((REPOSITORY / config).read_text())


STAGES = [config for config in CONFIGS if "model" in content(config)]
CHAINS = [config for config in CONFIGS if "stages" in content(config)]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_begins_with_the_command_that_runs_it(config):
    first = (REPOSITORY / config).read_text().splitlines()[0]
    assert first.startswith("# rlhf-lightning ")
    assert config in first


@pytest.mark.parametrize("config", STAGES)
def test_print_config_round_trips(config, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    assert main(["fit", "--config", config, "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert main(["fit", "--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


@pytest.fixture(scope="module")
def tiny_reward(tmp_path_factory, tiny_model) -> str:
    """Export of an untrained reward model."""
    from rlhf_lightning import ModelSpec, load_scalar_model, load_tokenizer
    from rlhf_lightning.models.export import export_scalar_model

    spec = ModelSpec(path=str(tiny_model))
    folder = tmp_path_factory.mktemp("models") / "reward"
    return str(export_scalar_model(load_scalar_model(spec), load_tokenizer(spec), folder))


RECORDS = {
    "SFTModule": {"prompt": "the film", "completion": " was good"},
    "RewardModule": {"prompt": "the film", "chosen": " was good", "rejected": " was bad"},
    "PPOModule": {"prompt": "the film"},
}


@pytest.mark.parametrize("config", STAGES)
def test_every_stage_runs_a_step_on_a_tiny_model(
    config, tmp_path, monkeypatch, tiny_model, tiny_tokenizer, tiny_reward
):
    """All keys as they are, but for what lies on disk and for sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    run = content(config)
    record = RECORDS[run["model"]["class_path"]]
    (tmp_path / "records.jsonl").write_text(
        "".join(json.dumps({key: f"{value} {word}" for key, value in record.items()}) + "\n" for word in WORDS)
    )

    def tiny(node: Any) -> Any:
        if isinstance(node, list):
            return [tiny(item) for item in node]
        if not isinstance(node, dict):
            return node
        changed = {key: tiny(value) for key, value in node.items()}
        if isinstance(node.get("path"), str):
            changed["path"] = tiny_reward if "reward" in node["path"] else str(tiny_model)
        if isinstance(node.get("tokenizer"), str):
            changed["tokenizer"] = str(tiny_tokenizer)
        return changed

    run["model"] = tiny(run["model"])
    if "generation" in run["model"]["init_args"]:
        run["model"]["init_args"]["generation"]["max_new_tokens"] = 4
    run["data"] |= {key: "records.jsonl" for key in ("train", "val") if key in run["data"]}
    run["data"] |= {key: size for key, size in (("batch_size", 4), ("tokens_per_batch", 64)) if key in run["data"]}
    run["trainer"] |= {"fast_dev_run": 1, "accelerator": "cpu", "devices": 1, "enable_model_summary": False}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    assert main(["fit", "--config", "tiny.yaml"]) == 0


@pytest.mark.parametrize("config", CHAINS)
def test_every_stage_of_a_chain_can_be_read(config, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    check_chain(read_chain(config), check_command_line)
