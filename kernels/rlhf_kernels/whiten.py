"""Masked whitening."""

import torch
from torch import Tensor


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, moments: Tensor | None = None) -> Tensor:
    kept = torch.where(mask, x, 0.0).double()
    if moments is None:
        moments = torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))
    count = moments[0].clamp(min=1)
    mean = moments[1] / count
    var = (moments[2] / count - mean.square()).clamp(min=0)
    whitened = (kept - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(x.dtype)
