"""The frontier of reward against KL that no policy can cross, estimated from samples of the model it starts from."""

import math
from pathlib import Path

import torch

from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.pipelines.sampling import Sampler, rate
from rlhf_lightning.rewards.sentiment import VaderSentiment
from rlhf_lightning.rollout.spec import GenerationSpec

ORACLE_COEFS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01)


def oracle(model: Path, prompts: Path, num_prompts: int = 48, num_samples: int = 512) -> list[dict[str, float]]:
    """The best (gold, KL) that any policy can reach, from samples of the base model.

    The optimum of E[gold] - coef KL(pi || base) is pi ~ base exp(gold / coef), prompt by prompt. With n samples of the
    base model and weights w ~ exp(gold / coef):  gold = sum w g,  KL = sum w log(n w).
    """
    generation = GenerationSpec(max_new_tokens=32, num_samples=num_samples)
    sampler = Sampler.from_folder(str(model), generation, counter_seed(0, "oracle"), 2)
    gold = []
    for answered in sampler(read_jsonl(prompts)[:num_prompts], "oracle"):
        gold.append(torch.tensor(rate(VaderSentiment(), answered.samples)).view(-1, num_samples))
    g = torch.cat(gold).double()  # [prompts, samples]
    points = []
    for coef in ORACLE_COEFS:
        w = torch.softmax(g / coef, -1)
        kl = (w * torch.log((w * num_samples).clamp(min=1e-30))).sum(-1)
        effective = 1 / w.square().sum(-1)
        points.append(
            {
                "coef": coef,
                "gold": (w * g).sum(-1).mean().item(),
                "kl": kl.mean().item(),
                "ess": effective.mean().item(),
            }
        )
    return points


def frontier_at(points: list[dict[str, float]], kl: float) -> float:
    """Gold of the frontier at a KL, linear between points; beyond the last one its gold (a concave curve's bound is
    above that, so this is the stricter test)."""
    before = {"kl": 0.0, "gold": -math.inf}
    for point in points:
        if kl <= point["kl"]:
            if before["gold"] == -math.inf:
                return point["gold"]
            share = (kl - before["kl"]) / (point["kl"] - before["kl"])
            return before["gold"] + share * (point["gold"] - before["gold"])
        before = point
    return before["gold"]
