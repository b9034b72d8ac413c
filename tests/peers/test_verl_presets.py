"""The presets of verl have the numbers that verl starts with, and twenty steps with them end where its own end."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import fit
from lightning.pytorch.callbacks import LambdaCallback
from peer_packages import peer_file, peer_module
from torch import Tensor
from verl_peer import actor, core_algos

from rlhf_lightning.advantages import FixedKL, Gae, GroupNormalised, kl_shaped_rewards
from rlhf_lightning.core.batches import Generated, TokenBatch
from rlhf_lightning.losses import (
    ClippedSurrogate,
    ClippedValue,
    Corrected,
    Reinforce,
    SamplerCorrection,
    SamplerFilter,
)
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, PPOModule
from rlhf_lightning.stages.critic import CriticSpec, build_critic, critic_values
from rlhf_lightning.stages.reward_shaping import KLSpec

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "presets"
CONFIG = peer_file("verl/trainer/config/_generated_ppo_trainer.yaml")


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((PRESETS / name).read_text())


@pytest.fixture(scope="module")
def theirs() -> Any:
    """verl's whole default configuration, composed."""
    return peer_module("omegaconf").OmegaConf.load(CONFIG)


def test_the_actor_config_has_the_numbers_of_the_yaml(theirs):
    """`actor()` of these tests starts from the dataclass: no comparison is with other defaults than the YAML's."""
    config, own = theirs.actor_rollout_ref.actor, actor()
    names = ["clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "loss_agg_mode", "loss_scale_factor"]
    names += ["entropy_coeff", "tau_pos", "tau_neg", "use_kl_loss", "kl_loss_coef", "kl_loss_type", "ppo_epochs"]
    assert {name: config[name] for name in names} == {name: getattr(own, name) for name in names}


@pytest.mark.parametrize("name", ["verl_ppo.yaml", "verl_grpo.yaml"])
def test_figures_that_both_share(name, theirs):
    ours = preset(name)
    init, trainer, generation = ours["model"]["init_args"], ours["trainer"], ours["model"]["init_args"]["generation"]
    config, rollout = theirs.actor_rollout_ref.actor, theirs.actor_rollout_ref.rollout
    loss = init["loss"]
    assert (loss["class_path"], config.policy_loss.loss_mode) == ("ClippedSurrogate", "vanilla")
    assert loss["init_args"] == {
        "clip_low": config.clip_ratio_low,
        "clip_high": config.clip_ratio_high,
        "dual_clip": config.clip_ratio_c,
    }
    assert (init["reduction"], config.loss_agg_mode) == ("token_mean", "token-mean")
    assert init["entropy_coef"] == config.entropy_coeff
    assert init["updates"]["inner_epochs"] == config.ppo_epochs
    assert init["updates"]["shuffle"] == config.shuffle == theirs.critic.shuffle
    assert init["updates"]["num_minibatches"] == theirs.data.train_batch_size // config.ppo_mini_batch_size
    assert ours["data"]["batch_size"] == theirs.data.train_batch_size
    assert ours["data"]["max_prompt_length"] == theirs.data.max_prompt_length
    assert generation["max_new_tokens"] == theirs.data.max_response_length
    assert (generation["temperature"], generation["top_p"], rollout.top_k) == (rollout.temperature, rollout.top_p, -1)
    optim = config.optim
    assert (init["optimizer"]["class_path"], f"{optim.optimizer_impl}.{optim.optimizer}") == (
        "torch.optim.AdamW",
        "torch.optim.AdamW",
    )
    adamw = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).defaults
    assert init["optimizer"]["init_args"] == {
        "lr": optim.lr,
        "betas": list(optim.betas),
        "eps": adamw["eps"],
        "weight_decay": optim.weight_decay,
    }
    assert (init["schedule"]["shape"], optim.lr_scheduler_type) == ("constant", "constant")
    assert init["schedule"]["warmup_frac"] == optim.lr_warmup_steps_ratio
    assert optim.lr_warmup_steps == -1  # not given
    assert trainer["gradient_clip_val"] == config.grad_clip == optim.clip_grad
    assert trainer["max_epochs"] == theirs.trainer.total_epochs
    assert init["policy"]["gradient_checkpointing"] == theirs.actor_rollout_ref.model.enable_gradient_checkpointing
    assert init["kl"]["control"] == {"class_path": "FixedKL", "init_args": {"coef": 0.0}}
    assert not theirs.algorithm.use_kl_in_reward
    assert theirs.algorithm.kl_ctrl.type == "fixed"
    assert theirs.algorithm.rollout_correction.rollout_is is theirs.algorithm.rollout_correction.rollout_rs is None
    assert not theirs.algorithm.filter_groups.enable
    assert not theirs.algorithm.use_pf_ppo
    assert ours["seed_everything"] == config.data_loader_seed


def test_ppo_has_the_numbers_of_verl(theirs):
    init, critic = preset("verl_ppo.yaml")["model"]["init_args"], theirs.critic
    assert (init["credit"]["class_path"], theirs.algorithm.adv_estimator) == ("Gae", "gae")
    assert init["credit"]["init_args"] == {"gamma": theirs.algorithm.gamma, "lam": theirs.algorithm.lam}
    assert init["whiten_advantages"] == "sample"
    assert init["value_loss"]["init_args"] == {"clip": critic.cliprange_value}
    assert critic.loss_agg_mode == theirs.actor_rollout_ref.actor.loss_agg_mode
    assert (critic.ppo_epochs, critic.ppo_mini_batch_size) == (1, theirs.actor_rollout_ref.actor.ppo_mini_batch_size)
    assert init["critic"]["learning_rate"] == critic.optim.lr
    assert (init["critic"]["clip_apart"], critic.grad_clip) == (True, theirs.actor_rollout_ref.actor.grad_clip)
    assert (critic.optim.betas, critic.optim.weight_decay) == (
        theirs.actor_rollout_ref.actor.optim.betas,
        theirs.actor_rollout_ref.actor.optim.weight_decay,
    )
    assert init["critic_warmup_steps"] == theirs.trainer.critic_warmup
    assert init["generation"]["num_samples"] == theirs.actor_rollout_ref.rollout.n
    assert (init["kl"]["loss_coef"], theirs.actor_rollout_ref.actor.use_kl_loss) == (0.0, False)


def test_grpo_has_the_numbers_of_verl(theirs):
    init, config = preset("verl_grpo.yaml")["model"]["init_args"], theirs.actor_rollout_ref.actor
    credit = init["credit"]["init_args"]
    assert credit == {"ddof": 1, "floor": 1e-6, "std_over": "group"}
    assert theirs.algorithm.norm_adv_by_std_in_grpo
    assert (init["kl"]["loss_coef"], init["kl"]["loss_estimator"]) == (config.kl_loss_coef, "k3")
    assert config.kl_loss_type == "low_var_kl"
    assert (init["kl"]["loss_importance_weighted"], init["kl"]["bound"]) == (False, 10.0)
    held = core_algos.kl_penalty(torch.tensor([-9.0]), torch.tensor([0.0]), config.kl_loss_type)
    assert held.item() == init["kl"]["bound"]


# --- twenty steps

PROMPTS = [[1, 4, 5], [1, 8]]
ANSWERS = [[6, 7, 2], [9, 10, 11, 12, 2], [4], [13, 5, 6, 7, 8, 9, 10], [11, 2], [12, 4, 4, 2]]
SCORES = torch.tensor([1.0, 0.0, 0.25, 3.0, 3.5, -1.0])
START, WIDTH = 3, 7


def batch() -> TokenBatch:
    """Three answers to each of two prompts, [batch, time] with time = prompt + answer."""
    tokens, real, mask = (torch.zeros(6, START + WIDTH, dtype=torch.long) for _ in range(3))
    for row, answer in enumerate(ANSWERS):
        question = PROMPTS[row // 3]
        first, last = START - len(question), START + len(answer)
        tokens[row, first:last] = torch.tensor(question + answer)
        real[row, first:last], mask[row, START:last] = 1, 1
    return TokenBatch(tokens, real.bool(), mask.bool(), (real.cumsum(1) - 1).clamp(min=0))


class FixedAnswers:
    """Sampling and scoring replaced by the rollout above."""

    sampler_logprobs: Tensor | None = None

    def generate(self, prompts: Any, seed: int) -> Generated:
        fixed = batch()
        finished = torch.tensor([answer[-1] == 2 for answer in ANSWERS])
        real, said = fixed.attention_mask, self.sampler_logprobs
        return Generated(fixed.tokens, real, fixed.mask, fixed.positions, finished, sampler_logprobs=said)

    def score(self, prompts: Any, answers: Generated) -> ScoredSamples:
        return ScoredSamples(total=SCORES, at_end=SCORES, per_token=None, breakdown={"reward": SCORES})


class FixedGRPO(FixedAnswers, GRPOModule):
    pass


class FixedPPO(FixedAnswers, PPOModule):
    pass


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


class Theirs:
    """verl's functions around a plain transformers model."""

    def __init__(self, path: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.batch = batch()
        self.mask = self.batch.mask[:, START:].long()
        self.rewards, _ = kl_shaped_rewards(
            SCORES, torch.zeros(6, WIDTH), torch.zeros(6, WIDTH), self.mask.bool(), kl_coef=0.0
        )
        with torch.no_grad():
            self.old = self.logprobs()
        self.losses: list[float] = []

    def logprobs(self) -> Tensor:
        b = self.batch
        logits = self.model(b.tokens, attention_mask=b.attention_mask.long(), position_ids=b.positions).logits
        chosen = logits[:, START - 1 : -1].log_softmax(-1).gather(-1, b.tokens[:, START:, None])[..., 0]
        return torch.where(self.mask.bool(), chosen, 0.0)

    def policy_loss(self, advantages: Tensor, config: Any) -> Tensor:
        counts = {"batch_num_tokens": int(self.mask.sum()), "global_batch_size": 6}
        config.global_batch_info.update(counts)
        function = core_algos.get_policy_loss_fn(config.policy_loss.loss_mode)
        logprobs = self.logprobs()
        loss, _ = function(self.old, logprobs, advantages, self.mask, config.loss_agg_mode, config)
        if config.use_kl_loss:
            kl = core_algos.kl_penalty(logprobs, self.old, config.kl_loss_type)  # the policy is its own reference
            loss = loss + config.kl_loss_coef * core_algos.agg_loss(kl, self.mask, config.loss_agg_mode, **counts)
        self.losses.append(loss.item())
        return loss


def assert_same_weights(ours: Any, other: Any, before: dict[str, Tensor]) -> None:
    moved = 0.0
    for (name, mine), theirs in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4, msg=name)
        moved = max(moved, float((mine - before[name]).detach().abs().max()))
    assert moved > 5e-3


def trained(module: Any, folder: Any, write_jsonl: Any, **trainer: Any) -> list[float]:
    """Ratios of the steps."""
    ratios: list[float] = []
    keep = LambdaCallback(on_train_batch_end=lambda t, *_: ratios.append(t.callback_metrics["policy/ratio"].item()))
    data = {"train": write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "was"}]), "batch_size": 2}
    assert fit(module, folder, data=data, callbacks=[keep], **trainer).global_step == 20
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert abs(ratios[-1] - 1) > 0.01, "the later steps must be off policy"
    return ratios


def test_twenty_steps_of_grpo(tiny_model, tmp_path, write_jsonl):
    """The preset's loss, credit, KL and reduction, with a larger learning rate and more KL so that they show."""
    init = preset("verl_grpo.yaml")["model"]["init_args"]
    kl = init["kl"] | {"control": FixedKL(0.0), "loss_coef": 0.1}
    ours = FixedGRPO(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=WIDTH, num_samples=3),
        updates=UpdateSpec(inner_epochs=20),
        loss=ClippedSurrogate(**init["loss"]["init_args"]),
        credit=GroupNormalised(**init["credit"]["init_args"]),
        reduction=init["reduction"],
        kl=KLSpec(**kl),
        optimizer=adamw,
    )
    trained(ours, tmp_path, write_jsonl, gradient_clip_val=1.0)

    other = Theirs(tiny_model)
    before = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    config = actor(use_kl_loss=True, kl_loss_coef=0.1)
    index = torch.arange(2).repeat_interleave(3).numpy()
    advantages, _ = core_algos.compute_grpo_outcome_advantage(other.rewards.clone(), other.mask, index)
    optimizer = adamw(other.model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        other.policy_loss(advantages, config).backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        optimizer.step()
    assert other.losses[-1] < other.losses[0]
    assert_same_weights(ours.policy.causal_lm, other.model, before)


def test_twenty_steps_of_its_bypass_mode(tiny_model, tmp_path, write_jsonl):
    """REINFORCE with weights and a filter taken anew at every step, from the sampler's own log-probabilities."""
    other = Theirs(tiny_model)
    other.old = other.old + torch.where(other.mask.bool(), 0.2 * torch.sin(other.batch.tokens[:, START:].float()), 0.0)
    correction = SamplerCorrection(cap=1.1, filters=[SamplerFilter("ratio", low=0.5, high=2.0)])
    ours = FixedGRPO(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=WIDTH, num_samples=3, keep_logprobs=True),
        updates=UpdateSpec(inner_epochs=20),
        loss=Corrected(Reinforce(), correction),
        reduction="token_mean",
        old_logprobs="sampler",
        kl=KLSpec(control=FixedKL(0.0)),
        optimizer=adamw,
    )
    ours.sampler_logprobs = torch.nn.functional.pad(other.old, (START, 0))
    data = {"train": write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "was"}]), "batch_size": 2}
    assert fit(ours, tmp_path, data=data, gradient_clip_val=1.0).global_step == 20

    before = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    settings = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.1}
    settings |= {"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}
    config = actor(policy_loss={"loss_mode": "bypass_mode", "rollout_correction": settings})
    index = torch.arange(2).repeat_interleave(3).numpy()
    advantages, _ = core_algos.compute_grpo_outcome_advantage(other.rewards.clone(), other.mask, index)
    optimizer, dropped = adamw(other.model.parameters()), []
    for _ in range(20):
        optimizer.zero_grad()
        other.policy_loss(advantages, config).backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        optimizer.step()
        counted = other.mask.bool()
        dropped.append(int((correction(other.logprobs(), other.old, counted).weights[counted] == 0).sum()))
    assert dropped[0] == 0 < dropped[-1] < int(other.mask.sum()), "first all tokens count, in the end some"
    assert_same_weights(ours.policy.causal_lm, other.model, before)


def test_twenty_steps_of_ppo(tiny_model, tmp_path, write_jsonl):
    """The preset's GAE, whitening and losses, two learning rates, gradients of policy and critic clipped each."""
    init = preset("verl_ppo.yaml")["model"]["init_args"]
    ours = FixedPPO(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        critic=CriticSpec(kind="separate", learning_rate=1e-2, clip_apart=init["critic"]["clip_apart"]),
        generation=GenerationSpec(max_new_tokens=WIDTH, num_samples=3),
        updates=UpdateSpec(inner_epochs=20),
        loss=ClippedSurrogate(**init["loss"]["init_args"]),
        value_loss=ClippedValue(**init["value_loss"]["init_args"]),
        value_coef=init["value_coef"],
        credit=Gae(**init["credit"]["init_args"]),
        whiten_advantages=init["whiten_advantages"],
        reduction=init["reduction"],
        kl=KLSpec(control=FixedKL(init["kl"]["control"]["init_args"]["coef"])),
        optimizer=adamw,
    )
    ours.configure_model()
    critic = build_critic(ours.critic_spec, ours.policy, ours.model_spec, seed=0)
    critic.load_state_dict(copy.deepcopy(ours.critic.state_dict()))
    start = copy.deepcopy(ours.policy)
    trained(ours, tmp_path, write_jsonl, gradient_clip_val=1.0)

    other = Theirs(tiny_model)
    before = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    critic_before = {name: p.detach().clone() for name, p in critic.named_parameters()}

    def values() -> Tensor:
        return torch.where(other.mask.bool(), critic_values(critic, start, other.batch)[:, START:], 0.0)

    with torch.no_grad():
        old_values = values()
    gamma, lam = init["credit"]["init_args"].values()
    advantages, returns = core_algos.compute_gae_advantage_return(other.rewards, old_values, other.mask, gamma, lam)
    config, value_losses, clipped = actor(), [], []
    optimizer = adamw(other.model.parameters())
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        critic_optimizer.zero_grad()
        other.policy_loss(advantages, config).backward()
        loss, _ = core_algos.compute_value_loss(values(), returns, old_values, other.mask, 0.5)
        value_losses.append(loss.item())
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) for model in (other.model, critic)]
        clipped.append([float(norm) > 1 for norm in norms])
        optimizer.step()
        critic_optimizer.step()
    assert [any(of_one) for of_one in zip(*clipped, strict=True)] == [True, True]
    assert value_losses[-1] < value_losses[0]
    assert_same_weights(ours.policy.causal_lm, other.model, before)
    assert_same_weights(ours.critic, critic, critic_before)
