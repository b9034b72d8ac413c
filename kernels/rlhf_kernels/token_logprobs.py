"""Log-probability of one chosen token per row of logits."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor | None
    logsumexp: Tensor
    is_argmax: Tensor


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    x = logits.float() * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    lse = x.logsumexp(-1)
    logprobs = x.gather(-1, tokens[..., None].long())[..., 0] - lse
    entropy = None
    if with_entropy:
        logp = x - lse[..., None]
        entropy = -(logp.exp() * logp).sum(-1)
    is_argmax = x.argmax(-1) == tokens
    if mask is not None:
        logprobs = torch.where(mask, logprobs, 0.0)
        entropy = None if entropy is None else torch.where(mask, entropy, 0.0)
        is_argmax = is_argmax & mask
    return TokenLogprobs(logprobs, entropy, lse, is_argmax)
