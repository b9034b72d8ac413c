"""docs/from_trl.md names every argument of TRL's trainers, and keys that exist."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import lightning as L
import pytest
import transformers

from rlhf_lightning import advantages, losses, rollout
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rollout import GenerationSpec
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.stages import DPOModule, GKDModule, GRPOModule, KTOModule, RewardModule, SFTModule
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_trl.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
STAGES = [SFTModule, RewardModule, DPOModule, KTOModule, GRPOModule, GKDModule]
SPECS = {
    "policy": [ModelSpec],
    "teacher": [ModelSpec],
    "generation": [GenerationSpec],
    "updates": [UpdateSpec],
    "shaping": [RewardShaping],
    "kl": [KLSpec],
    "reference_sync": [ReferenceSync],
    "loss": [x for x in vars(losses).values() if isinstance(x, type)],
    "credit": [x for x in vars(advantages).values() if isinstance(x, type)],
}
"""What the options of an option are."""


def rows(section: str) -> list[tuple[list[str], list[str]]]:
    """Names in the first and in the second column."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    cells = [line.strip("|").split("|") for line in lines]
    return [(re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)) for theirs, ours in cells]


def parameters(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


AS_FOR = {"RLOOConfig": "GRPOConfig", "DistillationConfig": "GRPOConfig", "GKDConfig": "SFTConfig"}
"""Sections that lean on another."""
CONFIGS = ["SFTConfig", "RewardConfig", "DPOConfig", "KTOConfig", "GRPOConfig", *AS_FOR]


def config_of(name: str) -> type:
    if name == "GKDConfig":
        from trl.experimental.gkd import GKDConfig

        return GKDConfig
    return getattr(trl, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_argument_of_a_trainer_is_named(name):
    known = {field.name for field in fields(config_of(name))}
    own = known - {field.name for field in fields(transformers.TrainingArguments)}
    sections = ["Every trainer", name] + ([AS_FOR[name]] if name in AS_FOR else [])
    said = {theirs for section in sections for names, _ in rows(section) for theirs in names}
    assert len(own) > 5
    assert own - said == set()
    of_its_table = {theirs for names, _ in rows(name) for theirs in names}
    assert of_its_table - known <= {"reward_funcs"}  # which is the trainer's own


def test_every_key_exists():
    keys = {key for section in SECTIONS for _, ours in rows(section) for key in ours}
    keys = {key.split(":")[0] for key in keys if key.startswith(("model.", "data.", "trainer."))}
    assert len(keys) > 60
    for key in keys:
        room, option, *below = key.split(".")
        if room == "model":
            assert any(option in parameters(stage) for stage in STAGES), key
            assert not below or any(below[0] in parameters(cls) for cls in SPECS[option]), key
        else:
            assert option in parameters(RLHFDataModule if room == "data" else L.Trainer), key


def test_every_class_exists():
    names = {
        name for section in SECTIONS for _, ours in rows(section) for name in ours if re.fullmatch("[A-Z]\\w+", name)
    }

    assert len(names) > 10
    assert [name for name in names if not any(hasattr(room, name) for room in (losses, advantages, rollout))] == []
