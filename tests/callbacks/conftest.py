"""A tiny SFT and a tiny PPO run, trained once for the room's tests."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from rlhf_lightning import ModelSpec, PPOModule, RLHFDataModule, SFTModule
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def trainer_of(tmp_path):
    """Makes a trainer with the given callbacks whose run folder is `tmp_path`."""

    def make(*callbacks, **options):
        options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, **options}
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
            callbacks=list(callbacks),
            **options,
        )

    return make


@pytest.fixture
def sft(tmp_path, tiny_model) -> tuple[SFTModule, RLHFDataModule]:
    """Four records of prompt and completion in batches of 2."""
    words = ["good", "bad", "long", "short"]
    records = [{"prompt": f"the {word} film", "completion": f" was {word}"} for word in words]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = RLHFDataModule(train=str(tmp_path / "train.jsonl"), batch_size=2, max_length=16, shuffle=False)
    return SFTModule(ModelSpec(path=str(tiny_model)), optimizer=sgd, seed=0), data


@pytest.fixture
def ppo(tmp_path: Path, tiny_model) -> tuple[PPOModule, RLHFDataModule]:
    """Two batches of two prompts; the reward is the length of the answer."""
    from rlhf_lightning.core.interfaces import RewardFn
    from rlhf_lightning.rewards.combine import WeightedReward

    class Length(RewardFn):
        def __call__(self, samples):
            return [float(len(sample.completion.split())) for sample in samples]

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n{"prompt": "a plot"}\n{"prompt": "the end"}\n')
    data = RLHFDataModule(train=str(tmp_path / "prompts.jsonl"), batch_size=2, shuffle=False)
    module = PPOModule(
        ModelSpec(path=str(tiny_model)),
        rewards=[WeightedReward(Length())],
        generation=GenerationSpec(max_new_tokens=4),
        updates=UpdateSpec(inner_epochs=2),
        optimizer=sgd,
        seed=0,
    )
    return module, data
