"""Small GRPO stages, and what is looked at of their runs."""

import torch
from one_step import records

from rlhf_lightning.advantages import (
    FixedKL,
)
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule
from rlhf_lightning.stages.reward_shaping import KLSpec

NO_KL = KLSpec(control=FixedKL(0.0))


def grpo(model, reward=None, **options) -> GRPOModule:
    defaults = {
        "generation": GenerationSpec(max_new_tokens=5, num_samples=4),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "seed": 1,
    }
    rewards = [WeightedReward(reward or LengthReward(target=3), name="reward")]
    return GRPOModule(ModelSpec(path=str(model)), rewards, **(defaults | options))


def prompts(write_jsonl, count: int = 12, **columns) -> str:
    return write_jsonl("prompts.jsonl", [{"prompt": row["prompt"], **columns} for row in records("ppo")[:count]])


class Keep:
    """Rollouts of a run, as they are given to training."""

    def __init__(self, module: GRPOModule) -> None:
        self.rollouts, collect = [], module.collect

        def keeping(draw):
            self.rollouts.append(collect(draw))
            return self.rollouts[-1]

        module.collect = keeping


class FirstToken(RewardFn):
    """1 for answers that begin with one of these tokens, else 0."""

    def __init__(self, *wanted: int) -> None:
        self.wanted = wanted

    def __call__(self, samples):
        return [float(bool(sample.tokens) and sample.tokens[0] in self.wanted) for sample in samples]


class Constant(RewardFn):
    def __call__(self, samples):
        return [1.0] * len(samples)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_change(before, module) -> float:
    return max(float((p.detach() - before[name]).abs().max()) for name, p in module.named_parameters())
