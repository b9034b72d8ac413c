"""Full-vocabulary KL divergence per token from the hidden states of two models; neither's logits exist in full."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import check_device, check_float, check_head, check_shape, check_some
from rlhf_kernels.exact_kl import FORWARD, REVERSE, Direction, beta_of, check_kl, kl_rows
from rlhf_kernels.linear_rows import Head, HeadGrads, as_autocast, chunk_rows_for, exact, plain
from rlhf_kernels.rows import Rows, work_dtype

_NAMES = {FORWARD: "linear_exact_kl", REVERSE: "linear_exact_kl"}
"""What an op is called, by its beta; between the two: linear_jsd."""


def linear_exact_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: Direction = "reverse",
    chunk_rows: int | None = None,
) -> Tensor:
    """`exact_kl` of hidden @ weight.T + bias and ref_hidden @ ref_weight.T + ref_bias, a chunk of rows at a time.

    Gradients to hidden, weight and bias; the logits are computed again for them.

    Args:
        hidden: [..., H] of the policy.
        weight: [V, H].
        ref_hidden: [..., H2] of the reference; no gradient.
        ref_weight: [V, H2]; may be `weight` itself, which then gets the policy's gradient only.
        mask: [...] True = wanted; elsewhere 0, at no cost.
        temperature: divides both logits.
        direction: reverse = KL(policy || reference), forward = KL(reference || policy).
        chunk_rows: rows of logits (of each model) alive at a time; None chooses by a memory budget.
    Returns:
        [...] in float32 (float64 where the hidden states are).
    """
    policy, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    return of_two_heads(*policy, *reference, mask, temperature, beta_of(direction), chunk_rows)


def of_two_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    beta: float,
    chunk_rows: int | None,
) -> Tensor:
    """What `linear_exact_kl` and `linear_jsd` have in common; `beta` as in `kl_rows`."""
    for name, states in (("hidden", hidden), ("ref_hidden", ref_hidden)):
        check_float(name, states)
        if states.ndim == 0:
            raise ValueError(f"{name} has shape (): give [..., hidden size]")
        check_some(name, states, "row")
    check_device("ref_hidden", ref_hidden, "hidden", hidden)
    check_head(hidden, weight, bias)
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check_shape("ref_hidden[..., 0]", ref_hidden[..., 0], "hidden", hidden.shape[:-1])
    check_shape("ref_weight[:, 0]", ref_weight[:, 0], "weight", weight.shape[:1])
    check_kl("hidden", hidden, mask, None, temperature)
    weight, bias = plain(weight), None if bias is None else plain(bias)
    ref_weight, ref_bias = plain(ref_weight).detach(), None if ref_bias is None else plain(ref_bias).detach()
    (hidden, weight), (ref_hidden, ref_weight) = as_autocast(hidden, weight), as_autocast(ref_hidden, ref_weight)
    chunk = chunk_rows_for(weight.shape[0], hidden.device, chunk_rows, 16 if hidden.dtype == torch.float64 else 8)
    kl: Tensor = _op(hidden, weight, bias, ref_hidden.detach(), ref_weight, ref_bias, mask, temperature, beta, chunk)
    return kl


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    beta: float,
    chunk_rows: int,
    d_kl: Tensor | None = None,
    sums: HeadGrads | None = None,
) -> Tensor:
    """KL of each row; with `d_kl` and `sums`, also the gradients of sum(d_kl * kl), added to `sums`."""
    states, ref_states = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.reshape(-1, ref_hidden.shape[-1])
    counting = Rows(mask, len(states))
    head, ref_head = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
    name = _NAMES.get(beta, "linear_jsd")
    use_triton(name, hidden, has_kernel=beta in _NAMES)
    kl = torch.zeros(len(states), dtype=head.dtype, device=hidden.device)
    size = (min(chunk_rows, counting.count), weight.shape[0])
    buffer, ref_buffer = kl.new_empty(size), kl.new_empty(size, dtype=ref_head.dtype)
    with exact(hidden.device):
        for start, end, rows in counting.chunks(chunk_rows):
            logits = head.logits(states[rows], buffer[: end - start])
            ref_logits = ref_head.logits(ref_states[rows], ref_buffer[: end - start])
            factor = None if d_kl is None else d_kl[rows]
            out = None if sums is None else head.room_for_grads(logits)
            kl[rows] = kl_rows(name, logits, ref_logits.to(head.dtype), None, factor, temperature, beta, out)
            if sums is not None and out is not None:
                sums.add(rows, states[rows], out)
    return kl


@torch.library.custom_op("rlhf_kernels::linear_exact_kl", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    beta: float,
    chunk_rows: int,
) -> Tensor:
    policy, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    return _chunks(*policy, *reference, mask, temperature, beta, chunk_rows).view(hidden.shape[:-1])


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, *_others: Any) -> Tensor:
    dtype = work_dtype(hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, weight.dtype)))
    return torch.empty(hidden.shape[:-1], dtype=dtype, device=hidden.device)


@torch.library.custom_op("rlhf_kernels::linear_exact_kl_grad", mutates_args=())
def _grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    d_kl: Tensor,
    temperature: float,
    beta: float,
    chunk_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    policy, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    states = hidden.reshape(-1, hidden.shape[-1])
    sums = HeadGrads(Head(hidden, weight, bias), states, bias, (needs[0], needs[1], needs[2]))
    _chunks(*policy, *reference, mask, temperature, beta, chunk_rows, d_kl.reshape(-1), sums)
    d_hidden, d_weight, d_bias = sums.results(bias)
    return d_hidden.view(hidden.shape) if needs[0] else d_hidden, d_weight, d_bias


@_grad.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = others[-1]
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    return (
        d_hidden if needs[0] else weight.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0),
        torch.empty_like(bias) if bias is not None and needs[2] else weight.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature, ctx.beta, ctx.chunk_rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_kl: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = _grad(*ctx.saved_tensors, d_kl, ctx.temperature, ctx.beta, ctx.chunk_rows, needs)
    return *(d if need else None for d, need in zip(results, needs, strict=True)), *(None,) * 7


_op.register_autograd(_backward, setup_context=_setup)
