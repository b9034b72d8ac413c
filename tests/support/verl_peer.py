"""What the tests against verl share: a ragged batch, its actor's config, comparison of value and gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer_packages import peer_module
from torch import Tensor

core_algos = peer_module("verl.trainer.ppo.core_algos")

LENGTHS = (7, 1, 4, 6, 9, 3, 9, 2, 5)
"""Of the answers; none is as long as the batch is wide."""
GROUPS = (0, 0, 0, 1, 1, 1, 2, 2, 2)
WIDTH = 10


@dataclass(frozen=True)
class Ragged:
    """A batch of answers, on the left of its rows, with numbers on the padding that must not count."""

    mask: Tensor
    logprobs: Tensor
    """A leaf with a gradient."""
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantages: Tensor
    """The same at each token of an answer."""
    per_token: Tensor
    """Different at each token."""
    scores: Tensor
    rewards: Tensor
    """The scores, at the last tokens."""
    values: Tensor
    groups: Tensor

    @property
    def uid(self) -> np.ndarray:
        """The groups, as verl has them: names of any kind."""
        return np.array([f"prompt {group}" for group in self.groups.tolist()], dtype=object)

    @property
    def response_mask(self) -> Tensor:
        return self.mask.to(torch.int64)


def ragged(dtype: torch.dtype = torch.float64, *, seed: int = 0, spread: float = 0.4) -> Ragged:
    """Log-probabilities around -1.5, the old ones `spread` nats from them."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    lengths = torch.tensor(LENGTHS)
    rows = len(lengths)
    mask = torch.arange(WIDTH) < lengths[:, None]
    logprobs = -(1.5 + 0.8 * normal(rows, WIDTH)).abs() - 0.05
    old, ref = ((logprobs + spread * normal(rows, WIDTH)).clamp(max=-0.02) for _ in range(2))
    sampler = (old + spread * normal(rows, WIDTH)).clamp(max=-0.02)
    scores = normal(rows)
    rewards = torch.zeros(rows, WIDTH, dtype=dtype)
    rewards[torch.arange(rows), lengths - 1] = scores
    return Ragged(
        mask=mask,
        logprobs=logprobs.requires_grad_(),
        old=old,
        ref=ref,
        sampler=sampler,
        advantages=normal(rows, 1).expand(rows, WIDTH) * mask,
        per_token=normal(rows, WIDTH) * mask,
        scores=scores,
        rewards=rewards,
        values=normal(rows, WIDTH),
        groups=torch.tensor(GROUPS),
    )


def actor(**options: Any) -> Any:
    """verl's ActorConfig; what is not named is its default. `policy_loss` takes that part's own options."""
    configs = peer_module("verl.workers.config.actor")
    policy_loss = configs.PolicyLossConfig(**options.pop("policy_loss", {}))
    return configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **options
    )


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Sums of a few dozen terms in another order; verl adds 1e-8 to the counts that it divides by."""
    return {"rtol": 1e-7, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance(ours.dtype))


def assert_same_loss(batch: Ragged, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    """Two scalar losses of `batch.logprobs`, and their gradients, which must not vanish."""
    mine, other = ours(), theirs()
    assert_same(mine, other)
    gradient, expected = (torch.autograd.grad(loss, batch.logprobs)[0] for loss in (mine, other))
    assert expected.abs().max() > 1e-3, "a comparison of zeros shows nothing"
    assert (gradient[~batch.mask] == 0).all()
    assert_same(gradient, expected)
