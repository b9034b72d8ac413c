"""Twenty optimiser steps of OpenRLHF's actor and critic trainers beside our stages, on one fixed rollout.

Their experience maker, replay buffer, actor, losses and training loops are their own; what is replaced is the answers,
and DeepSpeed: a loss divided by the micro-batches of a step, a norm, AdamW. Ours is a stage under Lightning's trainer.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fits import fit
from openrlhf_peer import openrlhf_arguments, their_actor
from peer_packages import peer_module
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama import LlamaModel, LlamaPreTrainedModel

from rlhf_lightning.advantages import BatchCentred, Centred, FixedKL, Gae, GroupNormalised, LeaveOneOut
from rlhf_lightning.core.batches import Generated
from rlhf_lightning.losses import ClippedSurrogate, ClippedValue, Gspo, SamplerCorrection, SamplerFilter
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, PPOModule
from rlhf_lightning.stages.critic import CriticSpec
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping

ppo_actor = peer_module("openrlhf.trainer.ray.ppo_actor")
ppo_critic = peer_module("openrlhf.trainer.ray.ppo_critic")
maker = peer_module("openrlhf.trainer.ppo_utils.experience_maker")
models = peer_module("openrlhf.models.model")
controllers = peer_module("openrlhf.trainer.ppo_utils.kl_controller")
Experience = peer_module("openrlhf.trainer.ppo_utils.experience").Experience

MAX_LENGTH, STEPS, TEMPERATURE, COEF = 7, 20, 0.8, 0.05
PROMPTS = [[1, 4, 5], [1, 8]]
ANSWERS = [[6, 7, 2], [9, 10, 11, 12, 2], [4], [13, 5, 6, 7, 8, 9, 10], [11, 2], [12, 4, 4, 2]]
"""Three answers to each prompt; the third and the fourth were cut off."""
SCORES = torch.tensor([1.0, -0.5, 2.0, 0.25, 3.0, -1.0])
NOISE = [0.3 * torch.randn(len(a), generator=torch.Generator().manual_seed(i)) for i, a in enumerate(ANSWERS)]
"""By how much the engine that sampled was wrong about each token."""


# --- theirs


class Group:
    """Their group of actors, here one model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def async_run_method_batch(self, method_name: str, **inputs: Any) -> Any:
        triples = zip(inputs["sequences"], inputs["action_mask"], inputs["attention_mask"], strict=True)
        return [[self.model(tokens, action_mask=acts, attention_mask=real) for tokens, acts, real in triples]]


class Strategy:
    """What is left of their DeepSpeed strategy on one process."""

    ring_attn_group = ds_device_mesh = None

    def __init__(self, args: Any, micro_batches: int, max_norm: float | None) -> None:
        self.args, self.accumulated_gradient, self.max_norm = args, micro_batches, max_norm
        self.taken, self._seen = 0, 0

    def is_rank_0(self) -> bool:
        return False  # no progress bar

    def all_reduce(self, x: Any) -> Any:
        return x

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def backward(self, loss: Tensor, model: Any, optimizer: Any) -> None:
        (loss / self.accumulated_gradient).backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str = "") -> None:
        self._seen += 1
        if self._seen % self.accumulated_gradient:
            return
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.taken += 1


def samples() -> list[Any]:
    made = []
    for row, (answer, noise) in enumerate(zip(ANSWERS, NOISE, strict=True)):
        prompt, length = PROMPTS[row // 3], len(answer)
        acts = torch.arange(len(prompt) + length - 1) >= len(prompt) - 1
        made.append(
            Experience(
                sequences=torch.tensor([prompt + answer]),
                attention_mask=torch.ones(1, len(prompt) + length, dtype=torch.long),
                action_mask=acts[None].long(),
                rollout_log_probs=torch.cat((torch.zeros(len(prompt) - 1), noise))[None],
                rewards=SCORES[row : row + 1].clone(),
                response_length=torch.tensor([length]),
                truncated=torch.tensor([answer[-1] != 2]),
                total_length=torch.tensor([len(prompt) + length]),
                info={"reward": SCORES[row : row + 1].clone()},
            )
        )
    return made


def their_run(monkeypatch: Any, model: Any, *, max_norm: float | None = 1.0, critic: Any = None, **options: Any) -> Any:
    """Their actor after twenty steps of three micro-batches; `critic` is trained in place."""
    args = openrlhf_arguments(
        rollout__n_samples_per_prompt=3,
        rollout__micro_batch_size=2,
        rollout__max_new_tokens=MAX_LENGTH,
        train__max_epochs=STEPS,
        algo__kl__init_coef=COEF,
        **options,
    )
    monkeypatch.setattr(maker, "ray", SimpleNamespace(get=lambda x: x, put=lambda x: x))
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", lambda: None)
    actor, reference = their_actor(model, temperature=TEMPERATURE), their_actor(model, temperature=TEMPERATURE)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.2)  # not the policy, and ours likewise
    theirs = maker.RemoteExperienceMaker(
        Group(actor),
        None if critic is None else Group(critic),
        None,
        Group(reference),
        controllers.FixedKLController(COEF),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0),
    )
    made = theirs.make_experience_batch(samples())
    for experience in made:  # the engine's own log-probabilities: the policy's, and some noise
        noise = experience.rollout_log_probs
        experience.rollout_log_probs = (experience.action_log_probs + noise) * experience.action_mask
    strategies = []
    trainers = [(ppo_actor.ActorPPOTrainer, actor, 1e-3), (ppo_critic.CriticPPOTrainer, critic, 5e-3)]
    for build, network, rate in trainers[: 1 if critic is None else 2]:
        strategies.append(Strategy(args, 3, max_norm))
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = SimpleNamespace(get_last_lr=lambda: [0.0])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        shared = {"micro_train_batch_size": 2, "dataloader_pin_memory": False}
        if build is ppo_actor.ActorPPOTrainer:
            trainer = build(strategies[-1], network, None, optimizer, schedule, **shared)
        else:
            trainer = build(strategies[-1], network, optimizer, schedule, value_clip=args.critic.value_clip, **shared)
        for experience in made:
            trainer.replay_buffer.append(Experience(**vars(experience)))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
        with torch.compiler.set_stance("force_eager"):
            trainer.ppo_train(COEF) if build is ppo_actor.ActorPPOTrainer else trainer.ppo_train()
        assert strategies[-1].taken == STEPS
    return actor.model


# --- ours


def rollout() -> Generated:
    prompt, time = 3, 3 + MAX_LENGTH
    tokens = torch.zeros(6, time, dtype=torch.long)
    real, mask = torch.zeros(6, time, dtype=torch.bool), torch.zeros(6, time, dtype=torch.bool)
    for row, answer in enumerate(ANSWERS):
        both = PROMPTS[row // 3] + answer
        first = prompt - len(PROMPTS[row // 3])
        tokens[row, first : first + len(both)] = torch.tensor(both)
        real[row, first : first + len(both)] = True
        mask[row, prompt : prompt + len(answer)] = True
    finished = torch.tensor([answer[-1] == 2 for answer in ANSWERS])
    return Generated(tokens, real, mask, (real.cumsum(1) - 1).clamp(min=0), finished)


class FixedAnswers:
    """The fixed rollout in place of an engine's, and a reference that is not the policy."""

    def generate(self, prompts: Any, seed: int) -> Generated:
        answers = rollout()
        if not self.generation.keep_logprobs:
            return answers
        said = self.policy(answers, temperature=TEMPERATURE).logprobs.detach()
        noise = torch.zeros_like(said)
        noise[answers.mask] = torch.cat(NOISE)
        return Generated(**vars(answers) | {"sampler_logprobs": said + noise})

    def score(self, prompts: Any, answers: Generated) -> ScoredSamples:
        return ScoredSamples(total=SCORES, at_end=SCORES, per_token=None, breakdown={"score": SCORES})

    def configure_model(self) -> None:
        super().configure_model()
        with torch.no_grad():
            for parameter in self.reference.policy.parameters():
                parameter.mul_(1.2)


class FixedGRPO(FixedAnswers, GRPOModule):
    pass


class FixedPPO(FixedAnswers, PPOModule):
    pass


def our_run(
    kind: type, model: Any, folder: Any, write_jsonl: Any, *, max_norm: float | None = 1.0, **options: Any
) -> Any:
    keeps = "correction" in options or options.get("old_logprobs") == "sampler"
    module = kind(
        ModelSpec(path=str(model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(
            max_new_tokens=MAX_LENGTH, num_samples=3, temperature=TEMPERATURE, keep_logprobs=keeps
        ),
        updates=UpdateSpec(inner_epochs=STEPS),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        **options,
    )
    data = {"train": write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "was"}]), "batch_size": 2}
    trainer = fit(module, folder, data=data, gradient_clip_val=max_norm)
    assert trainer.global_step == STEPS
    return module


def assert_same_weights(ours: Any, theirs: Any, model: Any) -> None:
    start = dict(load_policy(ModelSpec(path=str(model))).causal_lm.named_parameters())
    moved = 0.0
    for (name, mine), other in zip(ours.policy.causal_lm.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=name)
        moved = max(moved, float((mine - start[name]).detach().abs().max()))
    assert moved > 5e-3


IN_REWARD = KLSpec(FixedKL(COEF), bound=10.0, credited="to_come")
UNBIASED = {"loss_estimator": "k3+", "loss_importance_weighted": True, "loss_max_weight": 10.0}
REGION = SamplerCorrection(cap=None, filters=[SamplerFilter("binary_kl", "mean", high=0.02)])


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        pytest.param(  # GRPO, its KL and entropy averaged over tokens, its loss over answers
            {
                "algo__advantage__estimator": "group_norm",
                "algo__kl__use_loss": True,
                "algo__kl__estimator": "k3",
                "actor__entropy_coef": 0.05,
                "actor__loss_agg_mode": "seq-mean-token-mean",
                "actor__dual_clip": 1.3,
                "actor__eps_clip_low_high": (0.1, 0.15),
            },
            {
                "credit": GroupNormalised(floor=1e-9),
                "loss": ClippedSurrogate(0.1, 0.15, 1.3),
                "kl": KLSpec(
                    FixedKL(0.0), loss_coef=COEF, loss_estimator="k3", loss_importance_weighted=False, bound=10.0
                ),
                "entropy_coef": 0.05,
                "reduction": "sequence_mean",
                "auxiliary_reduction": "token_mean",
                "clip_advantages": 10.0,
            },
            id="grpo",
        ),
        pytest.param(  # REINFORCE++-baseline with KL in the loss, unbiased in its gradient
            {
                "algo__advantage__estimator": "reinforce_baseline",
                "algo__kl__use_loss": True,
                "algo__kl__estimator": "k2",
                "algo__kl__unbiased_gradient": True,
            },
            {
                "credit": Centred(),
                "whiten_advantages": True,
                "kl": KLSpec(FixedKL(0.0), loss_coef=COEF, **UNBIASED),
                "reduction": "token_mean",
            },
            id="reinforce_baseline",
        ),
        pytest.param(
            {"algo__advantage__estimator": "rloo"},
            {"credit": LeaveOneOut(), "kl": IN_REWARD, "reduction": "token_mean"},
            id="rloo",
        ),
        pytest.param(  # whose ratio a correction takes to the engine
            {
                "algo__advantage__estimator": "dr_grpo",
                "algo__kl__use_loss": True,
                "algo__kl__estimator": "k3",
                "actor__policy_loss_type": "gspo",
                "actor__eps_clip_low_high": (0.1, 0.12),
                "algo__advantage__is_correction_level": "token",
            },
            {
                "credit": Centred(),
                "kl": KLSpec(FixedKL(0.0), loss_coef=COEF, loss_importance_weighted=False, bound=10.0),
                "loss": Gspo(0.1, 0.12),
                "old_logprobs": "sampler",
                "reduction": "sequence_mean",
                "auxiliary_reduction": "token_mean",
            },
            id="gspo",
        ),
        pytest.param(  # FlashREINFORCE
            {
                "algo__advantage__estimator": "flash_reinforce",
                "actor__loss_agg_mode": "seq-mean-token-mean",
                "algo__advantage__is_correction_level": "seq",
                "algo__advantage__is_correction_gating": "binary_kl",
                "algo__advantage__is_correction_threshold": [0.0, 0.02],
            },
            {"credit": BatchCentred(), "kl": IN_REWARD, "reduction": "sequence_mean", "correction": REGION},
            id="flash_reinforce",
        ),
    ],
)
def test_twenty_steps_without_a_critic(options, ours, tiny_model, tmp_path, write_jsonl, monkeypatch):
    theirs = their_run(monkeypatch, tiny_model, **options)
    assert_same_weights(our_run(FixedGRPO, tiny_model, tmp_path, write_jsonl, **ours), theirs, tiny_model)


def test_twenty_steps_of_ppo(tiny_model, tmp_path, write_jsonl, monkeypatch):
    """Without a norm: theirs is of actor and critic apart, ours of both together."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.normalize_reward = False
    critic = models._get_critic_model(LlamaPreTrainedModel, LlamaModel, "score").from_pretrained(
        tiny_model, config=config
    )
    torch.nn.init.zeros_(critic.score.weight)
    options = {"algo__advantage__estimator": "gae", "algo__advantage__lambd": 0.9, "algo__advantage__gamma": 0.95}
    options |= {"actor__loss_agg_mode": "seq-mean-token-mean", "actor__entropy_coef": 0.05}
    theirs = their_run(monkeypatch, tiny_model, critic=critic, max_norm=None, **options)
    ours = our_run(
        FixedPPO,
        tiny_model,
        tmp_path,
        write_jsonl,
        max_norm=None,
        critic=CriticSpec(learning_rate=5e-3),
        credit=Gae(gamma=0.95, lam=0.9),
        value_loss=ClippedValue(0.5),
        value_coef=1.0,
        kl=KLSpec(FixedKL(COEF), bound=10.0),
        shaping=RewardShaping(clip=10.0),
        entropy_coef=0.05,
        reduction="sequence_mean",
        auxiliary_reduction="token_mean",
    )
    assert_same_weights(ours, theirs, tiny_model)
    torch.testing.assert_close(ours.critic.head.weight, critic.score.weight, rtol=0, atol=1e-4)
    assert critic.score.weight.abs().max() > 1e-2
    for (name, mine), other in zip(ours.critic.backbone.named_parameters(), critic.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=name)
