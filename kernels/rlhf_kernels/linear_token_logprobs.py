"""Log-probability of one chosen token per row of hidden states; the logits never exist in full."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_kernels.token_logprobs import TokenLogprobs, token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
) -> TokenLogprobs:
    shape = tokens.shape
    rows = hidden.reshape(-1, hidden.shape[-1])
    ids = tokens.reshape(-1)
    kept = torch.arange(ids.numel(), device=ids.device) if mask is None else mask.reshape(-1).nonzero()[:, 0]
    rows, ids = rows[kept], ids[kept]
    chunk = chunk_rows or max(1, (1 << 26) // weight.shape[0])

    def score(h: Tensor, t: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(h.float(), w.float(), None if b is None else b.float())
        out = token_logprobs(
            logits, t, temperature=temperature, softcap=softcap, logit_scale=logit_scale, with_entropy=with_entropy
        )
        return out.logprobs, out.logprobs if out.entropy is None else out.entropy, out.logsumexp, out.is_argmax

    parts = [
        checkpoint(score, h, t, weight, bias, use_reentrant=False) if len(kept) > chunk else score(h, t, weight, bias)
        for h, t in zip(rows.split(chunk), ids.split(chunk), strict=True)
    ]

    def back(i: int) -> Tensor:
        values = torch.cat([p[i] for p in parts]) if parts else rows.new_zeros(0).float()
        return values.new_zeros(shape.numel()).index_put((kept,), values).view(shape)

    return TokenLogprobs(back(0), back(1) if with_entropy else None, back(2), back(3).bool())
