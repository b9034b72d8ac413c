"""The only reductions over tokens: masked sums, means, variances, whitening, and a loss's global average.

Every other module averages through here, so that padding never leaks into a number and so that a loss does not depend
on how its batch was cut into micro-batches, ranks or packed rows.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from rlhf_kernels import masked_whiten as _masked_whiten
from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean", "fixed_length", "length_weighted", "token_sum"]


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of the entries that count, in float32 at least."""
    # where, not multiply: a masked NaN times zero is still NaN
    return torch.where(mask, x, torch.zeros_like(x)).sum(dtype=torch.promote_types(x.dtype, torch.float32))


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the entries that count; 0 where none does."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Population variance (divided by n, not n - 1) of the entries that count."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def masked_moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "3"]:
    """Count, sum and sum of squares in float64: add these over ranks, then whiten with the total."""
    kept = torch.where(mask, x, torch.zeros_like(x)).double()
    return torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))


def explained_variance(
    values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    add_over_ranks: Callable[[Tensor], Tensor] = lambda moments: moments,
) -> Float[Tensor, ""]:
    """How much of the spread of the returns the critic foresaw.

        1 - var(returns - values) / var(returns)

    Args:
        add_over_ranks: adds moments over all ranks, where there are several.
    Returns:
        1 for a perfect critic, 0 for a constant one, below 0 for one that is worse; 0 where the returns do not vary.
    """
    spread = _variance(add_over_ranks(masked_moments(returns, mask)))
    unexplained = _variance(add_over_ranks(masked_moments(returns - values, mask)))
    return torch.where(spread > 0, 1 - unexplained / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0).float()


def masked_whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    moments: Float[Tensor, "3"] | None = None,
    ddof: int = 0,
) -> Float[Tensor, "*shape"]:
    """Scale the entries that count to standard deviation 1, and to mean 0 if `shift_mean`.

        y = (x - mean) / sqrt(var + 1e-8) [+ mean unless shift_mean]

    Args:
        shift_mean: True gives a zero-mean result; False keeps the mean of x.
        moments: count, sum, sum of squares to use instead of those of x: `masked_moments` added over ranks.
        ddof: 0 divides squares by n (OpenAI, TRL), 1 by n - 1 (verl).
    Returns:
        Same shape; 0 where `mask` is False.
    References:
        Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019. arXiv:1909.08593
    """
    if ddof:
        moments = masked_moments(x, mask) if moments is None else moments.double()
        count, total, _ = moments.unbind()
        mean, var = total / count.clamp(min=1), _variance(moments) * count / (count - ddof).clamp(min=1)
        moments = torch.stack((count, total, count * (mean.square() + var)))
    return _masked_whiten(x, mask, shift_mean=shift_mean, moments=moments)


def masked_centre(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, moments: Float[Tensor, "3"] | None = None
) -> Float[Tensor, "*shape"]:
    """The entries that count less their mean, or less that of `moments`; 0 elsewhere."""
    count, total, _ = (masked_moments(x, mask) if moments is None else moments).unbind()
    return torch.where(mask, x - (total / count.clamp(min=1)).to(x), 0.0)


def _variance(moments: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    return (squares / count.clamp(min=1) - mean.square()).clamp(min=0)


def reduce_tokens(
    per_token: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    how: Reduction,
    denominator: float | Float[Tensor, ""] | None = None,
    *,
    max_length: int | None = None,
) -> Float[Tensor, ""]:
    """Average a loss per token over the whole optimiser step.

        token_mean       sum over all tokens / number of tokens              (DAPO, SFT)
        sequence_mean    sum over sequences of their token mean / sequences  (GRPO, GSPO)
        fixed_length     sum over all tokens / (sequences * max_length)      (Dr.GRPO)
        length_weighted  sum over all tokens / sequences                     (LUSPO)
        token_sum        sum over all tokens

    `length_weighted` weighs the mean of each sequence by its length. TRL's `bnpo` is `token_mean` over one micro-batch
    alone; verl's names are token-mean, seq-mean-token-mean, seq-mean-token-sum-norm, seq-mean-token-sum and
    token-sum.

    Args:
        denominator: tokens (token_mean) or sequences (the others) of the *whole optimiser step*: over micro-batches
            and ranks. None: this batch is the whole step.
        max_length: the constant L of `fixed_length`.
    References:
        Shao et al., DeepSeekMath (GRPO), 2024. arXiv:2402.03300
        Yu et al., DAPO, 2025. arXiv:2503.14476
        Liu et al., Understanding R1-Zero-Like Training (Dr.GRPO), 2025. arXiv:2503.20783
        Length-Unbiased Sequence Policy Optimization (LUSPO), 2026. arXiv:2602.05261
    """
    zeroed = torch.where(mask, per_token, torch.zeros_like(per_token))
    if how == "token_sum":
        return zeroed.sum()
    if denominator is None:
        denominator = mask.sum() if how == "token_mean" else mask.any(-1).sum()
    divisor = torch.as_tensor(denominator, dtype=torch.float32, device=per_token.device).clamp(min=1)
    if how in ("token_mean", "length_weighted"):
        return zeroed.sum() / divisor
    if how == "sequence_mean":
        return (zeroed.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / divisor
    if max_length is None:
        raise ValueError("reduction 'fixed_length' divides by a constant length: give max_length")
    return zeroed.sum() / (divisor * max_length)
