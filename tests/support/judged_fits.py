"""PPO on what trained models say of its answers: several, and one of them under a time limit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from one_step import another
from parallel_fits import Case, Evaluated, fit, outcome, sampling_ppo

from rlhf_lightning.callbacks.sample_logger import SampleLogger
from rlhf_lightning.models.export import export_scalar_model
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.models.scalar_head import init_head
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.ensemble import Ensemble
from rlhf_lightning.rewards.reward_model import RewardModelScore


def write_judge(model: str, folder: Path) -> None:
    """A reward model that has learnt nothing, whose scores differ all the same."""
    spec = another(model)
    judge = load_scalar_model(spec)
    init_head(judge.head, "normal", 5)
    export_scalar_model(judge, load_tokenizer(spec), folder / "judge")


class Shares(L.Callback):
    """How much of each judge's weights this process holds after the last rollout."""

    def __init__(self, judges: list[RewardModelScore]) -> None:
        self.judges, self.held = judges, []

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for judge in self.judges:
            parameters = list(judge.reader.model.parameters())
            here = sum(getattr(p, "to_local", lambda whole=p: whole)().numel() for p in parameters)
            self.held.append(here / sum(p.numel() for p in parameters))


def judged(strategy: Callable[[int], Any]) -> Case:
    """Two epochs with validations and a table of samples; processes run the models differently often."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        path = str(folder / "judge")
        rank, module = int(os.environ.get("LOCAL_RANK", "0")), sampling_ppo(model)
        half, whole, timed = (
            RewardModelScore(path, dtype="bfloat16", batch_size=2),
            RewardModelScore(path, batch_size=1 + 4 * rank),
            RewardModelScore(path),
        )
        if isinstance(strategy(world), str):  # processes that read records of their own
            module.rows_at_once = 1 + rank
        both = Ensemble([WeightedReward(half, name="half"), WeightedReward(whole, name="whole")])
        module.rewards = [WeightedReward(both, name="both"), WeightedReward(timed, name="timed", timeout_s=60)]
        given, seen, shares = strategy(world), Evaluated(), Shares([half, whole, timed])
        samples = folder / f"judged {given if isinstance(given, str) else 'groups'} {world}.samples.jsonl"
        table = SampleLogger(num_prompts=2, max_new_tokens=6, file=samples.name, show=False)
        options = {"devices": world, "strategy": given, "max_epochs": 2, "num_sanity_val_steps": 0}
        losses = fit(module, "ppo", folder, validated=True, callbacks=[seen, shares, table], **options)
        rows = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
        found = outcome(module, losses) | {"evaluated": seen.rows, "samples": rows, "held": shares.held}
        for name in ("half", "whole"):
            said = [row["breakdown_after"][f"both/{name}"] for row in rows if "breakdown_after" in row]
            found[name] = torch.tensor(said)
        return found

    return case
