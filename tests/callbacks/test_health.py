import json
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.callbacks import Health, MetricsCSV
from rlhf_lightning.callbacks.health import REMEDIES, correlation, dead_frac
from rlhf_lightning.core.batches import Rollouts


def rollouts(scores, lengths, group: int = 4) -> Rollouts:
    rows, time = len(scores), max(lengths)
    mask = torch.arange(time)[None] < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(rows, time)
    names = ("old_logprobs", "ref_logprobs", "rewards", "advantages", "values", "returns")
    return Rollouts(
        tokens=zeros.long(),
        attention_mask=mask,
        mask=mask,
        positions=zeros.long(),
        finished=torch.ones(rows).bool(),
        scores=torch.tensor(scores, dtype=torch.float32),
        groups=torch.arange(rows) // group,
        **dict.fromkeys(names, zeros),
    )


HEALTHY = {
    "policy/ratio": 1.0,
    "policy/approx_kl": 0.0,
    "policy/clip_frac": 0.1,
    "rollout/kl": 2.0,
    "rollout/finished_frac": 0.9,
    "rollout/entropy": 2.0,
    "rollout/length": 20.0,
    "rollout/score": 1.0,
    "val/reward_gold": 1.0,
}
FINE = rollouts([0.0, 1.0, 2.0, 0.5] * 4, [3, 9, 4, 6, 8, 2] * 2 + [5, 7, 6, 4])


class Run:
    """Rollouts of two optimiser steps each, and a validation, as a stage would tell the callback of them."""

    def __init__(self, folder, **options) -> None:
        self.health = Health(**options)
        loop = SimpleNamespace(_should_accumulate=lambda: False)
        self.trainer = SimpleNamespace(
            default_root_dir=str(folder),
            fit_loop=loop,
            global_step=0,
            log_every_n_steps=1,
            loggers=[],
            is_global_zero=True,
            sanity_checking=False,
            callback_metrics={},
        )
        self.module = SimpleNamespace(skips_step=lambda: False)

    def rollout(self, batch=FINE, second=(), **metrics) -> None:
        """One rollout; metrics by name with __ for /, those of its second step apart."""
        self.health.on_rollout_end(self.trainer, self.module, batch)
        first = HEALTHY | {name.replace("__", "/"): value for name, value in metrics.items()}
        for found in (first, first | dict(second)):
            self.trainer.global_step += 1
            self.trainer.callback_metrics = {name: torch.tensor(value) for name, value in found.items()}
            self.health.on_train_batch_end(self.trainer, self.module, None, None, 0)
        self.health.on_validation_end(self.trainer, self.module)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def warnings_of(folder) -> list[str]:
    file = folder / "health.jsonl"
    return [json.loads(row)["name"] for row in file.read_text().splitlines()] if file.exists() else []


def test_a_healthy_run_is_not_talked_about(run, tmp_path, capsys):
    for _ in range(6):
        run.rollout()
    assert warnings_of(tmp_path) == []
    assert capsys.readouterr().err == ""


SIGNS = {
    "entropy_collapse": {"rollout__entropy": 0.1},
    "length_drift": {"rollout__length": 90.0},
    "missing_eos": {"rollout__finished_frac": 0.2},
    "clip_saturation": {"second": {"policy/clip_frac": 0.7}},
    "dead_groups": {"batch": rollouts([0.0] * 4 + [1.0] * 12, [3, 9, 4, 6] * 4)},
    "length_reward": {"batch": rollouts([float(i) for i in range(1, 17)], list(range(1, 17)))},
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_that_lasts_is_said_once_with_a_remedy(name, run, tmp_path, capsys):
    run.rollout()
    for _ in range(2):
        run.rollout(**SIGNS[name])
    assert warnings_of(tmp_path) == []
    for _ in range(4):
        run.rollout(**SIGNS[name])
    assert warnings_of(tmp_path) == [name]
    said = capsys.readouterr().err
    assert f": {name} (" in said
    assert REMEDIES[name] in said
    run.rollout()
    for _ in range(4):
        run.rollout(**SIGNS[name])
    assert warnings_of(tmp_path) == [name, name], "it was gone and came back"


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("ratio_not_1", {"policy__ratio": 1.05}),
        ("ratio_not_1", {"policy__approx_kl": 0.02}),
        ("negative_kl", {"rollout__kl": -3.0}),
    ],
)
def test_what_is_never_right_is_said_at_once(name, metrics, run, tmp_path):
    run.rollout(**metrics)
    assert warnings_of(tmp_path) == [name]


def test_later_minibatches_may_have_another_ratio_and_replayed_answers_too(run, tmp_path):
    run.rollout(second={"policy/ratio": 1.2, "policy/approx_kl": 0.1})
    run.rollout(policy__ratio=1.2, policy__off_policy_frac=0.5)
    run.module.skips_step = lambda: True
    run.rollout(policy__ratio=1.2)  # a step that was not taken measured nothing
    assert warnings_of(tmp_path) == []


def test_reward_up_while_gold_goes_down(tmp_path):
    run = Run(tmp_path, gold="val/reward_gold", in_a_row=2)
    run.rollout()
    run.rollout(rollout__score=2.0, val__reward_gold=2.0)
    run.rollout(rollout__score=1.5, val__reward_gold=1.5)  # both go down
    run.rollout(rollout__score=3.0, val__reward_gold=1.5)
    assert warnings_of(tmp_path) == []
    run.rollout(rollout__score=4.0, val__reward_gold=1.0)
    assert warnings_of(tmp_path) == ["overoptimised"]


def test_it_remembers_over_a_resume(run, tmp_path):
    run.rollout()
    for _ in range(2):
        run.rollout(rollout__entropy=0.1)
    again = Run(tmp_path)
    again.health.load_state_dict(run.health.state_dict())
    again.rollout(rollout__entropy=0.1)
    assert warnings_of(tmp_path) == ["entropy_collapse"]


def test_dead_groups_by_hand():
    groups = torch.tensor([0, 0, 1, 1, 2])
    assert dead_frac(torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0]), groups) == 0.5
    assert dead_frac(torch.tensor([1.0, 2.0]), torch.tensor([0, 1])) is None


def test_correlation_by_hand():
    x = torch.arange(16.0)
    assert correlation(x, 3 - 2 * x) == pytest.approx(-1)
    assert correlation(x, torch.ones(16)) == 0
    assert correlation(x[:15], x[:15]) == 0
    assert math.isclose(
        correlation(x, x.square()), torch.corrcoef(torch.stack((x, x.square())))[0, 1].item(), abs_tol=1e-6
    )


def test_a_real_run_feeds_it(ppo, trainer_of, tmp_path):
    module, data = ppo
    loss = module.loss
    module.loss = lambda logprobs, old, advantages, mask: loss(logprobs + 0.5 * mask, old, advantages, mask)
    trainer_of(Health(), logger=MetricsCSV(tmp_path), log_every_n_steps=1).fit(module, datamodule=data)
    assert "ratio_not_1" in warnings_of(tmp_path)
    assert "health/ratio_not_1" in (tmp_path / "metrics.csv").read_text()
