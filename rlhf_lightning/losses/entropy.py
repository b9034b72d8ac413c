"""Which tokens carry the policy gradient, by their entropy."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import on_one_rank

DIGITS = ((20, 11), (10, 10), (0, 10))
"""Shift and width of the three digits that a non-negative float32 is read in, most significant first."""


def top_entropy_mask(
    entropy: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    top_frac: float,
    *,
    add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
) -> Bool[Tensor, "batch time"]:
    """True at the share of tokens with the highest entropy, among all that count, over all ranks.

    Of n tokens those are kept whose entropy is at least the k-th smallest's, k = ceil((1 - top_frac) (n - 1)) from 0:
    n - k tokens, more where entropies are equal. The scope is what is passed: pass a whole rollout for a result that
    does not depend on micro-batches (TRL passes one micro-batch of all ranks, and keeps the same tokens then).

    The policy loss is to be multiplied by it; the denominators, the KL term and the credit stay those of all tokens.

    Args:
        entropy: of each token's distribution (nats); no gradient.
        top_frac: share of the tokens to keep (the paper: 0.2).
        add_over_ranks: adds a tensor over all ranks.
    References:
        Wang et al., Beyond the 80/20 Rule, 2025, eq. 5. arXiv:2506.01939
    """
    if not 0 < top_frac <= 1:
        raise UserError(f"top_frac={top_frac} is no share of the tokens: give more than 0 and at most 1, such as 0.2")
    # a float32 from 0 up has the order of its bits read as an integer
    bits = entropy.detach().float().clamp(min=0).abs().contiguous().view(torch.int32)
    count = add_over_ranks(mask.sum().double())
    k = ((1 - top_frac) * (count - 1) - 1e-6).clamp(min=0).ceil().long()  # a rounding error is no further token
    return mask & (bits >= _kth_smallest(bits, mask, k, add_over_ranks))


def _kth_smallest(
    bits: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    k: Int[Tensor, ""],
    add_over_ranks: Callable[[Tensor], Tensor],
) -> Int[Tensor, ""]:
    """The entry with k smaller ones among those that count, over all ranks: three histograms, no gathering."""
    chosen = torch.zeros((), dtype=bits.dtype, device=bits.device)
    among = mask
    for shift, width in DIGITS:
        digit = (bits >> shift) & (2**width - 1)
        zeros = torch.zeros(2**width, dtype=torch.float64, device=bits.device)
        histogram = zeros.index_add(0, digit.flatten(), among.flatten().double())
        # whole numbers: of fractions a GPU has no cumulated sum that is deterministic
        up_to = add_over_ranks(histogram).long().cumsum(0)
        pick = (up_to <= k).sum().clamp(max=2**width - 1)
        k = k - torch.where(pick > 0, up_to[(pick - 1).clamp(min=0)], 0)
        among = among & (digit == pick)
        chosen = chosen | (pick << shift).to(bits.dtype)
    return chosen
