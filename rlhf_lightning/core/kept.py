"""Log-probabilities over the part of the vocabulary that a token was drawn from: top-k, top-p, min-p made exact.

A sampler that truncates draws from the kept set, renormalised. A ratio of policies over the whole vocabulary is then no
importance ratio: the two must be renormalised over one and the same set, the one that was sampled from.
"""

import torch
from jaxtyping import Bool, Float, Int, UInt8
from rlhf_kernels.linear_rows import plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 24
"""Logits alive at a time."""


def pack_kept(kept: Bool[Tensor, "*rows vocab"]) -> UInt8[Tensor, "*rows bytes"]:
    """One bit per entry of the vocabulary, eight to the byte, the lowest bit first."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8))
    bits = padded.reshape(*kept.shape[:-1], -1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)


def unpack_kept(packed: UInt8[Tensor, "*rows bytes"], vocab: int) -> Bool[Tensor, "*rows vocab"]:
    """The inverse of `pack_kept`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    inside: Tensor = bits.flatten(-2)[..., :vocab].bool()
    return inside


def kept_logprobs(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    tokens: Int[Tensor, " rows"],
    kept: UInt8[Tensor, "rows bytes"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Log-probability of each token among the entries that were kept, without storing logits.

        z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature
        logprobs = z[token] - logsumexp of z over the kept set

    Logits are float32, a chunk of rows at a time, and computed again for the backward pass.

    Args:
        hidden: the state that predicts the token of the same row.
        kept: the set each token was drawn from, as `pack_kept` writes it.
    Returns:
        Log-probability and entropy over the kept set (nats); the share of the whole vocabulary's probability that the
        set holds (no gradient); whether the token is the set's most probable.
    References:
        DeepSeek-AI, DeepSeek-V3.2, 2025 (keep sampling mask). arXiv:2512.02556
    """
    weight, bias = plain(weight), None if bias is None else plain(bias)
    rows = max(1, _CHUNK_LOGITS // weight.shape[0])

    def chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.float() @ weight.float().t()
            if bias is not None:
                logits = logits + bias.float()
            logits = logits * logit_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits / temperature
            inside = unpack_kept(kept, logits.shape[-1])
            among = logits.masked_fill(~inside, -torch.inf)
            logsumexp = among.logsumexp(-1)
            logprobs = among.gather(-1, tokens[:, None])[:, 0] - logsumexp
            probabilities = (among - logsumexp[:, None]).exp()
            # the logits themselves, not `among`: 0 * -inf is NaN
            entropy = logsumexp - (probabilities * logits).sum(-1)
            mass = (logsumexp.detach() - logits.detach().logsumexp(-1)).exp()
            return logprobs, entropy, mass, among.detach().argmax(-1) == tokens

    parts = [
        checkpoint(chunk, h, weight, bias, t, k, use_reentrant=False)
        for h, t, k in zip(torch.split(hidden, rows), torch.split(tokens, rows), torch.split(kept, rows), strict=True)
    ]
    if not parts:
        zero = hidden.sum(-1).float()
        return zero, zero, zero.detach(), torch.zeros_like(tokens, dtype=torch.bool)
    logprobs, entropy, mass, is_argmax = (torch.cat(field) for field in zip(*parts, strict=True))
    return logprobs, entropy, mass, is_argmax
