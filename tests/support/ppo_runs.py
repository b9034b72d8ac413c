"""Small PPO stages, and two answers behind padding to measure them by."""

import torch
from one_step import records

from rlhf_lightning.core.batches import Generated
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import PPOModule

NAN = float("nan")
# two answers of 3 and 1 tokens behind prompts of 2 and 1; padding holds NaN so that a leak shows
MASK = torch.tensor([[False, False, True, True, True], [False, False, True, False, False]])
REAL = torch.tensor([[True, True, True, True, True], [False, True, True, False, False]])


def on_mask(*values: float) -> torch.Tensor:
    filled = torch.zeros(MASK.shape)
    filled[MASK] = torch.tensor(values, dtype=torch.float32)
    return filled


def ppo(model, **options) -> PPOModule:
    defaults = {
        "generation": GenerationSpec(max_new_tokens=5),
        "updates": UpdateSpec(inner_epochs=1),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "seed": 1,
    }
    return PPOModule(ModelSpec(path=str(model)), [WeightedReward(LengthReward(target=3))], **(defaults | options))


def answers(finished=(True, True)) -> Generated:
    return Generated(torch.zeros(MASK.shape, dtype=torch.long), REAL, MASK, MASK.long(), torch.tensor(finished))


def scored(*totals: float) -> ScoredSamples:
    total = torch.tensor(totals)
    return ScoredSamples(total=total, at_end=total, per_token=None, breakdown={"length": total})


def prompts(write_jsonl, count: int = 12) -> str:
    return write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:count]])
