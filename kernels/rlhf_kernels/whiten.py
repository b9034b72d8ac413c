"""Whitening over the entries that count."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import check_float, check_mask


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, moments: Tensor | None = None) -> Tensor:
    """Scale the entries that count to standard deviation 1, and to mean 0 if `shift_mean`; elsewhere 0.

        y = (x - mean) / sqrt(var + 1e-8) [+ mean unless shift_mean]        var divided by n, not n - 1

    Moments are float64 sums in a fixed order: the same numbers give the same bits. No gradient: x is a target.

    Args:
        x: any shape.
        mask: like x; True = counts.
        shift_mean: True gives a zero-mean result; False keeps the mean of x.
        moments: [3] count, sum and sum of squares to use instead of those of x, added over ranks; None = of x.
    """
    check_float("x", x)
    check_mask(mask, "x", x, x.shape)
    if moments is not None:
        check_float("moments", moments)
        if moments.shape != (3,):
            raise ValueError(f"moments has shape {tuple(moments.shape)}: give [3], count, sum and sum of squares")
    moments = None if moments is None else moments.detach().to(x.device)
    result: Tensor = _op(x.detach(), mask, shift_mean, moments)
    return result


@torch.library.custom_op("rlhf_kernels::masked_whiten", mutates_args=())
def _op(x: Tensor, mask: Tensor, shift_mean: bool, moments: Tensor | None) -> Tensor:
    if use_triton("masked_whiten", x) and x.numel():
        from rlhf_kernels.triton_whiten import whiten_triton

        return whiten_triton(x, mask, shift_mean, moments)
    kept = torch.where(mask, x, 0.0).double()
    if moments is None:
        moments = torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))
    count = moments[0].double().clamp(min=1)
    mean = moments[1].double() / count
    var = (moments[2].double() / count - mean.square()).clamp(min=0)
    whitened = (kept - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(x.dtype)


@_op.register_fake
def _(x: Tensor, *_others: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
