"""Generalised advantage estimation over rows with holes."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(advantage)
    columns = []
    for t in range(values.shape[1] - 1, -1, -1):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counts, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        columns.append(torch.where(counts, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, torch.where(mask, advantages + values, 0.0)
