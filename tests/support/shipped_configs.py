"""Every YAML that we ship, and what makes one of them run for a step on a tiny model."""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.y*ml"))
WORDS = ("good", "bad", "long", "short", "great", "dull", "film", "plot", "actors", "end", "was", "very")
SETTINGS = {"trainer.max_steps": 1, "trainer.limit_val_batches": 1, "trainer.log_every_n_steps": 1}
ON_POLICY = ("PPOModule", "GRPOModule", "OnlineDPOModule", "GKDModule")
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
    "GKDModule": {"prompt": "the film"},
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


def untrained_reward(model: str, folder: Path) -> str:
    """Export of an untrained reward model."""
    from rlhf_lightning import ModelSpec, load_scalar_model, load_tokenizer
    from rlhf_lightning.models.export import export_scalar_model

    spec = ModelSpec(path=model)
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


def stand_ins(
    run: dict[str, Any], folder: Path, model: str, tokenizer: str, reward: str, accelerator: str = "cpu"
) -> list[str]:
    """Options for what lies on disk and for sizes; all other keys stay as the YAML has them."""
    options = SETTINGS | {"trainer.default_root_dir": str(folder / "run"), "trainer.accelerator": accelerator}
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
