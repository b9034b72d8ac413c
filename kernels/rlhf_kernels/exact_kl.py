"""KL divergence between two distributions over the whole vocabulary, per row of logits, with its gradient."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import check_float, check_mask, check_number, check_per_token, check_some
from rlhf_kernels.rows import pieces, take_rows, work_dtype
from rlhf_kernels.scaling import scaled

Direction = Literal["forward", "reverse"]
FORWARD, REVERSE = 0.0, 1.0
"""The KL divergences, as the share of the reference in a mixture (see `linear_jsd`)."""
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 24}
"""Logits that the reference works on at a time."""


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: Direction = "reverse",
    weights: Tensor | None = None,
) -> Tensor:
    """KL divergence per token, over the full vocabulary; gradient to `logits` only.

        reverse: KL(policy || reference) = sum_i p_i (log p_i - log q_i)    what the KL-regularised objective penalises
        forward: KL(reference || policy) = sum_i q_i (log q_i - log p_i)    what distillation minimises

    with p = softmax(logits / temperature), q = softmax(ref_logits / temperature). The gradient is computed in the same
    pass; if `weights` holds all the factors of the loss, so that the loss is the plain sum of the result, nothing is
    read again in the backward pass.

    Args:
        logits: [..., V] of the policy.
        ref_logits: [..., V] of the reference; no gradient.
        mask: [...] True = wanted; elsewhere 0, not read.
        temperature: divides both logits.
        direction: see above.
        weights: [...] factor on each token's KL and gradient; None = 1.
    Returns:
        [...] in float32 (float64 where the logits are).
    """
    check_float("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits has shape (): give [..., vocab]")
    check_per_token("ref_logits", ref_logits, "logits", logits, logits.shape)
    check_some("logits", logits, "row")
    check_kl("logits", logits, mask, weights, temperature)
    learns = logits.requires_grad and torch.is_grad_enabled()
    beta, weights = beta_of(direction), None if weights is None else weights.detach()
    kl: Tensor = _op(logits, ref_logits.detach(), mask, weights, temperature, beta, learns)[0]
    return kl


def check_kl(name: str, like: Tensor, mask: Tensor | None, weights: Tensor | None, temperature: float) -> None:
    if mask is not None:
        check_mask(mask, name, like, like.shape[:-1])
    if weights is not None:
        check_per_token("weights", weights, name, like, like.shape[:-1])
    check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


def beta_of(direction: Direction) -> float:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction!r}: use forward, KL(reference || policy), or reverse, the other way")
    return FORWARD if direction == "forward" else REVERSE


def _kl_block(
    logits: Tensor, ref_logits: Tensor, weights: Tensor | None, temperature: float, beta: float, out: Tensor | None
) -> Tensor:
    x, y = logits.to(work_dtype(logits)), ref_logits.to(work_dtype(logits))
    if temperature != 1.0:
        x, y = x / temperature, y / temperature
    (log_p, p), (log_q, q) = _softmax(x), _softmax(y)
    share = 1.0
    if beta == FORWARD:
        kl, log_ratio = _expected(q, log_q - log_p)
        of_policy = kl
    elif beta == REVERSE:
        kl, log_ratio = _expected(p, log_p - log_q)
        of_policy = kl
    else:
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        of_ref, _ = _expected(q, log_q - log_m)
        of_policy, log_ratio = _expected(p, log_p - log_m)
        share = 1 - beta
        kl = beta * of_ref + share * of_policy
    if out is not None:
        # of the JSD too: d/dp_i is (1 - beta) log(p_i / m_i), as what the mixture contributes adds up to a constant
        grads = p - q if beta == FORWARD else p * (log_ratio - of_policy[:, None])
        factor = torch.full_like(kl, share) if weights is None else share * weights.to(kl.dtype)
        out.copy_(grads.mul_((factor / temperature)[:, None]))
    return kl if weights is None else kl * weights.to(kl.dtype)


def _expected(p: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i p_i log_ratio_i, and the ratios as they count."""
    # a token that cannot occur adds nothing, whatever the ratio: 0 * inf is NaN. A NaN row stays NaN.
    log_ratio = torch.where(p == 0, 0.0, log_ratio)
    return (p * log_ratio).sum(-1), log_ratio  # summed in pairs: a dot product of 150k terms loses two digits more


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm and softmax of rows. The sum is taken in pairs; torch's log_softmax adds in order and is 1e-5 off."""
    d = x - x.amax(-1, keepdim=True)
    e = d.exp()
    total = e.sum(-1, keepdim=True)
    return d.sub_(total.log()), e.div_(total)


def kl_rows(
    op: str,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    beta: float,
    out: Tensor | None,
) -> Tensor:
    """Weighted KL of each row of [..., V], flat; the gradient in the logits goes to `out`, if given (may be logits).

    Args:
        beta: `FORWARD`, `REVERSE`, or the share of the reference in the mixture of a Jensen-Shannon divergence.
    """
    if use_triton(op, logits, has_kernel=beta in (FORWARD, REVERSE)):
        from rlhf_kernels.triton_kl import kl_rows_triton

        kl: Tensor = kl_rows_triton(logits, ref_logits, mask, weights, temperature, beta == FORWARD, out)
        return kl
    vocab = logits.shape[-1]
    num_rows = logits.numel() // max(1, vocab)
    kl = torch.zeros(num_rows, dtype=work_dtype(logits), device=logits.device)
    kept = torch.arange(num_rows, device=logits.device) if mask is None else mask.nonzero()[:, 0]
    flat_out = None if out is None else out.view(-1, vocab)
    if flat_out is not None and mask is not None:
        flat_out[~mask] = 0
    block = _BLOCK_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"]
    for rows in pieces(kept, max(1, block // vocab)):
        some, ref_some = take_rows(logits, rows), take_rows(ref_logits, rows)
        grads = None if flat_out is None else torch.empty_like(some)
        kl[rows] = _kl_block(some, ref_some, None if weights is None else weights[rows], temperature, beta, grads)
        if flat_out is not None and grads is not None:
            flat_out[rows] = grads.to(flat_out.dtype)
    return kl


@torch.library.custom_op("rlhf_kernels::exact_kl", mutates_args=())
def _op(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    beta: float,
    learns: bool,
) -> tuple[Tensor, Tensor]:
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if learns else logits.new_empty(0)
    flat_mask = None if mask is None else mask.reshape(-1)
    flat_weights = None if weights is None else weights.reshape(-1)
    out = grads if learns else None
    kl = kl_rows("exact_kl", logits, ref_logits, flat_mask, flat_weights, temperature, beta, out)
    return kl.view(logits.shape[:-1]), grads


@_op.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    learns = others[-1]
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if learns else logits.new_empty(0)
    return torch.empty(logits.shape[:-1], dtype=work_dtype(logits), device=logits.device), grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_kl: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_kl is None:
        return (None,) * 7
    return scaled("exact_kl", ctx.saved_tensors[0], d_kl), *(None,) * 6


_op.register_autograd(_backward, setup_context=_setup)
