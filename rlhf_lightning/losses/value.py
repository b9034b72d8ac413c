"""The critic's loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import ValueLoss


def clipped_value(
    values: Float[Tensor, "batch time"],
    old_values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    *,
    clip: float | None,
) -> tuple[Float[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Squared error of the critic, held near what it said when the answers were sampled, per token.

        v'_t   = old_values_t + clip(values_t - old_values_t, -clip, clip)
        loss_t = 1/2 max((values_t - returns_t)^2, (v'_t - returns_t)^2)

    Args:
        values: of the critic being trained.
        old_values: of the critic at sampling time; no gradient.
        returns: what the critic should have said; no gradient.
        clip: how far a value may move from the old one before its gradient stops; None = plain squared error.
    Returns:
        Loss per token, and True where clipping decided it. Masking and averaging are the caller's: see
        `core.masked.reduce_tokens`.
    References:
        Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019. arXiv:1909.08593
    """
    plain = 0.5 * (values - returns).square()
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip, clip)
    held = 0.5 * (near - returns).square()
    return torch.maximum(plain, held), held > plain


@dataclass(frozen=True)
class ClippedValue(ValueLoss):
    """Half the squared error of the critic, clipped around its value at sampling time.

    Args:
        clip: how far a value may move from the old one before its gradient stops (0.2 is usual); null = no clipping.
    """

    clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip={self.clip} would freeze the critic: give a positive number, such as 0.2, or null")

    def __call__(
        self,
        values: Float[Tensor, "batch time"],
        old_values: Float[Tensor, "batch time"],
        returns: Float[Tensor, "batch time"],
    ) -> tuple[Float[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        return clipped_value(values, old_values, returns, clip=self.clip)
