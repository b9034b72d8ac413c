"""Every YAML that we ship: its command is real, it prints and reads back the same, and it runs a step."""

import csv
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import yaml

from rlhf_lightning.__main__ import main
from rlhf_lightning.cli.app import check_command_line
from rlhf_lightning.pipelines.chain import check_chain
from rlhf_lightning.pipelines.chain_spec import read_chain

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.y*ml"))
WORDS = ("good", "bad", "long", "short", "great", "dull", "film", "plot", "actors", "end", "was", "very")
SETTINGS = {"trainer.max_steps": 1, "trainer.limit_val_batches": 1, "trainer.log_every_n_steps": 1}
ON_POLICY = ("PPOModule", "GRPOModule", "OnlineDPOModule")
RECORDS = {
    "SFTModule": {"prompt": "the film", "completion": "was"},
    "BradleyTerry": {"prompt": "the film", "chosen": "was good", "rejected": "was bad"},
    "PlackettLuce": {"prompt": "the film", "completions": ["good", "bad", "dull"], "ranks": [1, 3, 2]},
    "Regression": {"prompt": "the film", "completion": "was", "rating": 0.5},
    "StepCorrectness": {"prompt": "the film", "completions": ["was good", "was bad"], "labels": [True, False]},
    "KTOModule": {"prompt": "the film", "completion": "was", "label": True},
    "PPOModule": {"prompt": "the film"},
    "GRPOModule": {"prompt": "the film", "answer": "good"},
    "Countdown": {"prompt": "the film", "numbers": [3, 25, 7], "target": 82},
    "OnlineDPOModule": {"prompt": "the film"},
    "DPOModule": {"prompt": "the film", "chosen": "was good", "rejected": "was bad", "margin": 1.0},
    "TPO": {"prompt": "the film", "chosen": "was good", "rejected": "was bad", "gold": "was great"},
    "ListwiseDPO": {"prompt": "the film", "completions": ["good", "bad", "dull"], "ranks": [1, 3, 2]},
}


def content(config: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / config).read_text())


def needing_packages(configs: list[str]) -> list[Any]:
    """The configs as parameters of a test, those that name an optional package skipped where it is missing."""
    missing = importlib.util.find_spec("bitsandbytes") is None
    skip = pytest.mark.skipif(missing, reason="needs bitsandbytes: pip install 'rlhf-lightning[quant]'")
    return [
        pytest.param(config, marks=skip) if "bitsandbytes.optim" in (REPOSITORY / config).read_text() else config
        for config in configs
    ]


STAGES = [config for config in CONFIGS if "model" in content(config)]
CHAINS = [config for config in CONFIGS if "stages" in content(config)]
ENGINES = [config for config in CONFIGS if config.startswith("configs/engines/")]
OVERLAYS = [config for config in CONFIGS if config.startswith("configs/trainer/")]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])


def printed(args: list[str], capsys) -> str:
    capsys.readouterr()
    assert main([*args, "--print_config"]) == 0
    return capsys.readouterr().out


def test_no_config_is_left_out():
    assert CONFIGS
    assert sorted(STAGES + CHAINS + ENGINES + OVERLAYS) == CONFIGS, (
        "a YAML that is neither a stage, a chain, an engine nor a trainer overlay"
    )


@pytest.mark.parametrize("config", needing_packages(CONFIGS))
def test_the_commands_in_its_head_are_real(config):
    head = [line for line in (REPOSITORY / config).read_text().splitlines() if line.startswith("#")]
    commands = [shlex.split(match[1]) for line in head if (match := re.match(r"#\s+rlhf-lightning (.*)", line))]
    assert head[0].startswith("# rlhf-lightning ")
    assert config in commands[0]
    for command in commands:
        if command[0] == "chain":
            settings = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
            read_chain(command[command.index("--config") + 1], settings)
        else:
            check_command_line(command)


@pytest.mark.parametrize("config", needing_packages(STAGES))
def test_what_print_config_prints_is_read_back_the_same(config, capsys, tmp_path):
    first = printed(["fit", "--config", config], capsys)
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(["fit", "--config", str(tmp_path / "printed.yaml")], capsys) == first


@pytest.mark.parametrize("config", OVERLAYS)
def test_an_overlay_sets_its_keys_and_leaves_the_others(config, capsys):
    plain = yaml.safe_load(printed(["fit", "--config", "configs/sft.yaml"], capsys))
    overlaid = yaml.safe_load(printed(["fit", "--config", "configs/sft.yaml", "--trainer", config], capsys))
    assert overlaid["trainer"] == plain["trainer"] | content(config)
    assert {**overlaid, "trainer": None} == {**plain, "trainer": None}


@pytest.mark.parametrize("config", ENGINES)
def test_an_engine_is_set_and_all_else_is_left(config, capsys):
    """What it samples is shown in tests/vllm."""
    plain = yaml.safe_load(printed(["fit", "--config", "configs/grpo.yaml"], capsys))
    with_engine = yaml.safe_load(printed(["fit", "--config", "configs/grpo.yaml", "--model.engine", config], capsys))
    engine = with_engine["model"]["init_args"].pop("engine")
    assert plain["model"]["init_args"].pop("engine") == {"class_path": "rlhf_lightning.rollout.HFGenerate"}
    assert engine["class_path"] == f"rlhf_lightning.rollout.{content(config)['class_path']}"
    assert engine["init_args"].items() >= content(config)["init_args"].items()
    assert with_engine == plain


@pytest.mark.parametrize("config", CHAINS)
def test_every_stage_of_a_chain_can_be_read(config):
    spec = read_chain(config)
    assert {stage.config for stage in spec.stages if stage.config} <= set(STAGES)
    check_chain(spec, check_command_line)


# --- one step of each


@pytest.fixture(scope="module")
def tiny_reward(tmp_path_factory, tiny_model) -> str:
    """Export of an untrained reward model."""
    from rlhf_lightning import ModelSpec, load_scalar_model, load_tokenizer
    from rlhf_lightning.models.export import export_scalar_model

    spec = ModelSpec(path=str(tiny_model))
    folder = tmp_path_factory.mktemp("models") / "reward"
    return str(export_scalar_model(load_scalar_model(spec), load_tokenizer(spec), folder))


def record_kind(run: dict[str, Any]) -> str:
    name = run["model"]["class_path"]
    for weighted in run["model"]["init_args"].get("rewards", []):
        if weighted["reward"]["class_path"] in RECORDS:
            return weighted["reward"]["class_path"]
    loss = run["model"]["init_args"].get("loss", {}).get("class_path", "BradleyTerry")
    return loss if loss in RECORDS and name in ("RewardModule", "DPOModule") else name


def write_records(path: Path, record: dict[str, Any]) -> str:
    """A dozen records that differ in their prompt, and, where there are labels, have both in turn."""
    records = [record | {"prompt": f"{record['prompt']} {word}"} for word in WORDS]
    if "label" in record:
        records = [made | {"label": i % 2 == 0} for i, made in enumerate(records)]
    path.write_text("".join(json.dumps(made) + "\n" for made in records))
    return str(path)


def leaves(node: Any, key: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values; a list is a value."""
    if not isinstance(node, dict):
        return [(key, node)]
    return [leaf for name, below in node.items() for leaf in leaves(below, f"{key}.{name}" if key else name)]


def stand_ins(run: dict[str, Any], folder: Path, model: str, tokenizer: str, reward: str) -> list[str]:
    """Options for what lies on disk and for sizes; all other keys stay as the YAML has them."""
    options = SETTINGS | {"trainer.default_root_dir": str(folder / "run"), "trainer.accelerator": "cpu"}
    options |= {"trainer.enable_model_summary": False, "trainer.enable_progress_bar": False}
    for key, value in leaves(run["model"], "model"):
        if key.endswith(".path") and isinstance(value, str):
            options[key] = reward if "reward" in value else model
        elif key.endswith(".tokenizer") and isinstance(value, str):
            options[key] = tokenizer
        elif key.endswith(".rewards"):
            options[key] = [
                weighted | {"reward": {**weighted["reward"], "init_args": {**arguments, "path": reward}}}
                if "path" in (arguments := weighted["reward"].get("init_args", {}))
                else weighted
                for weighted in value
            ]
    if run["model"]["class_path"] in ON_POLICY:
        options["model.init_args.generation.max_new_tokens"] = 4
    if run["model"]["init_args"].get("shaping", {}).get("overlong_cache"):
        options["model.init_args.shaping.overlong_cache"] = 2
    records = write_records(folder / "records.jsonl", RECORDS[record_kind(run)])
    options |= {f"data.{name}": records for name in ("train", "val") if name in run["data"]}
    if "pretraining" in run["data"]:
        options["data.pretraining"] = write_records(folder / "texts.jsonl", RECORDS["SFTModule"])
    for name, small in (("batch_size", 4), ("tokens_per_batch", 64), ("max_length", 32), ("val_frac", 0.4)):
        if run["data"].get(name):
            options[f"data.{name}"] = small
    if "max_prompt_length" in run["data"]:
        options["data.max_prompt_length"] = 16
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def run_one_step(args: list[str], folder: Path) -> dict[str, float]:
    """The metrics that a run has logged, the last of each."""
    assert main(["fit", *args]) == 0
    with (folder / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(value) for row in rows for name, value in row.items() if value}


@pytest.mark.parametrize("config", needing_packages(STAGES))
def test_a_stage_takes_a_step_and_exports(config, tmp_path, tiny_model, wide_model, tiny_tokenizer, tiny_reward):
    run = content(config)
    in_few_bits = run["model"]["init_args"].get("policy", {}).get("quantization")
    options = stand_ins(run, tmp_path, str(wide_model if in_few_bits else tiny_model), str(tiny_tokenizer), tiny_reward)
    metrics = run_one_step(["--config", config, *options], tmp_path)
    loss = "policy/loss" if run["model"]["class_path"] in ("PPOModule", "GRPOModule") else "train/loss"
    assert math.isfinite(metrics[loss])
    assert all(math.isfinite(value) for value in metrics.values())
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("config", OVERLAYS)
def test_an_overlay_takes_a_step_on_one_cpu(config, tmp_path, tiny_model, tiny_tokenizer, tiny_reward):
    options = stand_ins(content("configs/sft.yaml"), tmp_path, str(tiny_model), str(tiny_tokenizer), tiny_reward)
    here = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    metrics = run_one_step(["--config", "configs/sft.yaml", "--trainer", config, *options, *here], tmp_path)
    assert math.isfinite(metrics["train/loss"])


def test_three_stages_from_one_yaml(tmp_path, tiny_model):
    """configs/chain.yaml as it stands, but for where things are and how much is done."""
    for name, kind in (("train", "SFTModule"), ("pairs", "BradleyTerry"), ("prompts", "PPOModule")):
        write_records(tmp_path / f"{name}.jsonl", RECORDS[kind])
    settings = {"model": tiny_model, "data": tmp_path, "run_dir": tmp_path / "runs"}
    for stage in ("sft", "reward", "ppo"):
        settings |= {f"{stage}.{key}": value for key, value in SETTINGS.items()}
        settings |= {
            f"{stage}.data.batch_size": 4,
            f"{stage}.data.val_frac": 0.4,
            f"{stage}.trainer.accelerator": "cpu",
        }
    settings |= {"sft.data.max_length": 32, "reward.data.max_length": 32, "ppo.data.max_prompt_length": 16}
    settings["ppo.model.init_args.generation.max_new_tokens"] = 4
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert main(["chain", "--config", "configs/chain.yaml", *given]) == 0
    for folder in ("sft/hf", "reward/hf", "ppo/hf", "ppo/hf/critic"):
        assert (tmp_path / "runs" / folder / "model.safetensors").is_file()
