"""The presets of OpenRLHF have the numbers that its own command line starts with, and its schedule but for one step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from openrlhf_peer import openrlhf_arguments
from peer_packages import peer_module
from transformers import get_scheduler

from rlhf_lightning.stages.schedule import Schedule

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "presets"
SHAPES = {"cosine_with_min_lr": "cosine"}
REDUCTIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean"}
HELD = 10.0
"""Their KL per token is held within this, by a constant of its source: test_openrlhf_losses.py."""


def preset(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    read = yaml.safe_load((PRESETS / f"openrlhf_{name}.yaml").read_text())
    return read, read["model"]["init_args"]


def assert_shared(whole: dict[str, Any], ours: dict[str, Any], theirs: Any) -> None:
    """What PPO and GRPO have in common."""
    answers = ours["generation"]["num_samples"]
    assert answers == theirs.rollout.n_samples_per_prompt
    assert whole["seed_everything"] == theirs.train.seed
    assert whole["trainer"]["max_epochs"] == theirs.train.num_episodes
    assert whole["trainer"]["gradient_clip_val"] == theirs.actor.max_norm == theirs.critic.max_norm
    assert whole["data"]["batch_size"] == theirs.rollout.batch_size
    assert ours["updates"]["inner_epochs"] == theirs.train.max_epochs
    assert ours["updates"]["num_minibatches"] == theirs.rollout.batch_size * answers / theirs.train.batch_size
    assert theirs.rollout.max_new_tokens is None
    assert ours["generation"]["max_new_tokens"] + whole["data"]["max_prompt_length"] == theirs.data.max_len
    assert ours["generation"]["temperature"] == theirs.rollout.temperature
    assert ours["generation"]["top_p"] == theirs.rollout.top_p
    assert ours["policy"]["gradient_checkpointing"] == theirs.actor.gradient_checkpointing_enable
    loss = ours["loss"]["init_args"]
    assert (loss["clip_low"], loss["clip_high"]) == theirs.actor.eps_clip_low_high
    assert loss["dual_clip"] == theirs.actor.dual_clip
    assert (ours["loss"]["class_path"], theirs.actor.policy_loss_type) == ("ClippedSurrogate", "ppo")
    assert ours["reduction"] == REDUCTIONS[theirs.actor.loss_agg_mode]
    assert ours["kl"]["bound"] == HELD
    assert (ours["entropy_coef"], theirs.actor.entropy_coef) == (0.0, None)
    adam = theirs.actor.adam
    assert ours["optimizer"]["init_args"] == {
        "lr": adam.lr,
        "betas": list(adam.betas),
        "eps": adam.eps,
        "weight_decay": adam.weight_decay,
    }
    assert ours["schedule"] == {
        "shape": SHAPES[theirs.actor.lr_scheduler],
        "warmup_frac": theirs.actor.lr_warmup_ratio,
        "final_frac": theirs.actor.min_lr_ratio,
    }
    # what neither preset speaks of, because it is off
    assert theirs.algo.advantage.is_correction_level == "off"
    assert not theirs.algo.dynamic_filtering_enable
    assert theirs.reward.overlong_buffer_len is None
    assert theirs.reward.stop_properly_penalty_coef is None
    assert not theirs.train.enable_ema
    assert theirs.actor.aux_loss_coef == 0
    assert theirs.actor.optim == "adam"


def test_ppo_has_the_numbers_of_openrlhf():
    whole, ours = preset("ppo")
    theirs = openrlhf_arguments()
    assert_shared(whole, ours, theirs)
    assert (ours["credit"]["class_path"], theirs.algo.advantage.estimator) == ("Gae", "gae")
    assert ours["credit"]["init_args"] == {"gamma": theirs.algo.advantage.gamma, "lam": theirs.algo.advantage.lambd}
    assert ours["value_loss"]["init_args"]["clip"] == theirs.critic.value_clip
    critic = theirs.critic.adam
    assert ours["critic"]["learning_rate"] == critic.lr
    assert (critic.betas, critic.eps, critic.weight_decay) == (
        theirs.actor.adam.betas,
        theirs.actor.adam.eps,
        theirs.actor.adam.weight_decay,
    )
    assert (-ours["shaping"]["clip"], ours["shaping"]["clip"]) == theirs.reward.clip_range
    assert ours["kl"]["control"] == {"class_path": "FixedKL", "init_args": {"coef": theirs.algo.kl.init_coef}}
    assert theirs.algo.kl.target is None
    assert ours["kl"]["estimator"] == theirs.algo.kl.estimator
    assert not theirs.algo.kl.use_loss
    assert ours["whiten_advantages"] is not theirs.algo.advantage.no_std_norm
    steps = ours["updates"]["inner_epochs"] * ours["updates"]["num_minibatches"]
    # their actor waits for as many rollouts as are not later than that one, counted from 0
    assert ours["critic_warmup_steps"] == (theirs.critic.freezing_steps + 1) * steps


def test_grpo_has_the_numbers_of_openrlhf():
    whole, ours = preset("grpo")
    theirs = openrlhf_arguments(
        algo__advantage__estimator="group_norm",
        algo__kl__use_loss=True,
        algo__kl__estimator="k3",
        rollout__n_samples_per_prompt=8,
    )
    assert_shared(whole, ours, theirs)
    assert ours["credit"] == {
        "class_path": "GroupNormalised",
        "init_args": {"ddof": 1, "floor": 1e-9, "std_over": "group"},  # in test_openrlhf_advantages.py
    }
    assert (-ours["clip_advantages"], ours["clip_advantages"]) == theirs.reward.clip_range
    assert "shaping" not in ours
    assert ours["kl"]["control"]["init_args"]["coef"] == 0
    assert ours["kl"]["loss_coef"] == theirs.algo.kl.init_coef
    assert ours["kl"]["loss_estimator"] == theirs.algo.kl.estimator
    assert ours["kl"]["loss_importance_weighted"] == theirs.algo.kl.unbiased_gradient
    assert openrlhf_arguments().rollout.n_samples_per_prompt == 1


def test_differs_the_warm_up_begins_with_a_step():
    """Theirs, as in transformers, begins at a rate of 0: its first step changes nothing. After it, both are alike."""
    strategy = peer_module("openrlhf.utils.deepspeed.deepspeed")
    assert strategy.get_scheduler is get_scheduler
    theirs, total = openrlhf_arguments().actor, 100
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        theirs.lr_scheduler,
        optimizer,
        num_warmup_steps=3,
        num_training_steps=total,
        scheduler_specific_kwargs={"min_lr_rate": theirs.min_lr_ratio},
    )
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = Schedule("cosine", theirs.lr_warmup_ratio, theirs.min_lr_ratio)
    mine = [ours.factor(step, total) for step in range(total)]
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert mine[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert mine[3:] == pytest.approx(rates[3:])
