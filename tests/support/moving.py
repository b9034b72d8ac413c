"""Models whose weights move, and how far an engine's log-probabilities are from a policy's."""

from typing import TypeVar

import torch
from torch import nn

from rlhf_lightning.core.batches import Generated
from rlhf_lightning.models.policy import Policy

ModelT = TypeVar("ModelT", bound=nn.Module)


def moved(model: ModelT, seed: int = 3) -> ModelT:
    """The model with every trained weight changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gap(policy: Policy, answers: Generated, temperature: float = 1.0) -> float:
    """Largest difference between the policy's log-probabilities and the engine's."""
    assert answers.sampler_logprobs is not None
    with torch.no_grad():
        own = policy(answers, temperature=temperature).logprobs
    return (own - answers.sampler_logprobs)[answers.mask].abs().max().item()
