"""Log-probability of one chosen token per row of hidden states; the logits never exist in full."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import check_head, check_rows, check_softcap, check_temperature, check_token_range
from rlhf_kernels.linear_rows import Head, HeadGrads, chunk_rows_for, exact, keep_rows_for, plain
from rlhf_kernels.rows import (
    Rows,
    RowStats,
    Transform,
    coefficients,
    row_grads,
    row_stats,
    spread,
    take_stats,
    work_dtype,
)
from rlhf_kernels.token_logprobs import TokenLogprobs, split_temperature

_NAME = "linear_token_logprobs"


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
) -> TokenLogprobs:
    """`token_logprobs(hidden @ weight.T + bias, tokens)`, exact in float32, a chunk of rows at a time.

    Gradients flow from logprobs, entropy and logsumexp to hidden, weight and bias. Logits are float32 sums of the
    given operands, never rounded to 16 bits. They are kept for the backward pass up to a budget and computed again
    beyond it.

    Args:
        hidden: [..., H]; the state that predicts the token of the same index.
        weight: [V, H]; may be tied to the embedding, or a DTensor (gathered for the call).
        tokens: [...] integer ids; ignored where `mask` is False.
        bias: [V], or None.
        mask: [...] True = wanted; the other rows cost nothing.
        temperature: of all rows, or one per row [...]; no gradient.
        softcap: bound on the logits (Gemma 2), or None.
        logit_scale: factor on the logits before the cap.
        with_entropy: also the entropy.
        chunk_rows: rows of logits alive at a time; None chooses by a memory budget.
    """
    check_rows(hidden, tokens, mask, name="hidden")
    check_head(hidden, weight, bias)
    check_temperature(temperature, tokens.shape)
    check_softcap(softcap)
    weight, bias = plain(weight), None if bias is None else plain(bias)
    number, per_row = split_temperature(temperature, tokens)
    size = 8 if hidden.dtype == torch.float64 else 4
    chunk = chunk_rows_for(weight.shape[0], hidden.device, chunk_rows, size)
    learns = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = keep_rows_for(tokens.numel(), weight.shape[0], hidden.device, size) if learns else 0
    keep = keep if torch.is_grad_enabled() else 0
    logprobs, entropy, logsumexp, is_argmax, *_ = _op(
        hidden, weight, bias, tokens, mask, per_row, number, softcap or 0.0, logit_scale, with_entropy, chunk, keep
    )
    return TokenLogprobs(logprobs, entropy if with_entropy else None, logsumexp, is_argmax)


@torch.library.custom_op("rlhf_kernels::linear_token_logprobs", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    with_entropy: bool,
    chunk_rows: int,
    keep_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_token_range(tokens, mask, weight.shape[0])
    use_triton(_NAME, hidden)
    ids, states = tokens.reshape(-1).long(), hidden.reshape(-1, hidden.shape[-1])
    row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    transform = Transform(temperature, row_temperature, softcap, logit_scale)
    counting = Rows(mask, ids.numel())
    head = Head(hidden, weight, bias)
    saved = hidden.new_empty((keep_rows, weight.shape[0]), dtype=head.dtype)
    buffer = saved[:0]
    parts = []
    with exact(hidden.device):
        for start, end, rows in counting.chunks(chunk_rows):
            logits = saved[start:end]
            if len(logits) < end - start:
                if len(buffer) < end - start:
                    buffer = saved.new_empty((end - start, weight.shape[0]))
                logits = buffer[: end - start]
            head.logits(states[rows], logits)
            parts.append(row_stats(_NAME, logits, ids[rows], transform.take(rows), with_entropy=with_entropy))
            _keep_part(saved, logits, start)
    logprobs, entropy, maximum, log_sum, miss, is_argmax = _gather(parts, counting, tokens, with_entropy, head.dtype)
    return logprobs, entropy, maximum + log_sum, is_argmax, maximum, log_sum, miss, saved


def _keep_part(saved: Tensor, logits: Tensor, start: int) -> None:
    """A chunk that only begins within the budget was computed elsewhere: keep the part that fits."""
    room = len(saved) - start
    if 0 < room < len(logits):
        saved[start:] = logits[:room]


def _gather(
    parts: list[RowStats], counting: Rows, tokens: Tensor, with_entropy: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Chunks of rows that count -> the shape of `tokens`, 0 elsewhere."""
    if not parts:
        zero = torch.zeros(tokens.shape, dtype=dtype, device=tokens.device)
        entropy = zero.clone() if with_entropy else zero.new_empty(0)
        return zero, entropy, zero.clone(), zero.clone(), zero.clone(), torch.zeros_like(zero, dtype=torch.bool)
    fields = []
    for index, field in enumerate(zip(*parts, strict=True)):
        whole = field[0] if len(field) == 1 else torch.cat(field)
        if index == 1 and not with_entropy:
            fields.append(whole)
        elif counting.numbers is None:
            fields.append(whole.view(tokens.shape))
        else:
            fields.append(spread(whole, counting.numbers, tokens.numel()).view(tokens.shape))
    return tuple(fields)


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, tokens: Tensor, mask: Any, row_temperature: Any, temperature: Any,
    softcap: Any, logit_scale: Any, with_entropy: bool, chunk_rows: Any, keep_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = work_dtype(hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, weight.dtype)))
    logprobs, logsumexp, maximum, log_sum, miss = (
        torch.empty(tokens.shape, dtype=dtype, device=hidden.device) for _ in range(5)
    )
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    saved = logprobs.new_empty((keep_rows, weight.shape[0]))
    return logprobs, entropy, logsumexp, torch.empty_like(logprobs, dtype=torch.bool), maximum, log_sum, miss, saved


@torch.library.custom_op("rlhf_kernels::linear_token_logprobs_grad", mutates_args=())
def _grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    stats: list[Tensor],
    saved: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    numbers: list[float],
    chunk_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    ids, states = tokens.reshape(-1).long(), hidden.reshape(-1, hidden.shape[-1])
    row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    transform = Transform(numbers[0], row_temperature, numbers[1], numbers[2])
    counting = Rows(mask, ids.numel())
    head = Head(hidden, weight, bias)
    logprobs, entropy, maximum, log_sum, miss = (field.reshape(-1) for field in stats)
    flat = RowStats(logprobs, entropy, maximum, log_sum, miss, miss.new_empty(0))
    d_outputs = (None if d is None else d.reshape(-1) for d in (d_logprob, d_entropy, d_logsumexp))
    a, b, c = coefficients(flat, *d_outputs)
    sums = HeadGrads(head, states, bias, (needs[0], needs[1], needs[2]))
    buffer = saved.new_empty((min(chunk_rows, counting.count), weight.shape[0]))
    with exact(hidden.device):
        for start, end, rows in counting.chunks(chunk_rows):
            grads = buffer[: end - start]
            logits = saved[start:end]
            some_states = states[rows]
            if len(logits) < len(grads):
                grads[: len(logits)] = logits
                head.logits(some_states[len(logits) :], grads[len(logits) :])
                logits = grads
            chunk = take_stats(flat, rows)
            some = None if c is None else c[rows]
            row_grads(_NAME, logits, ids[rows], chunk, a[rows], b[rows], some, transform.take(rows), out=grads)
            sums.add(rows, some_states, grads)
    d_hidden, d_weight, d_bias = sums.results(bias)
    return d_hidden.view(hidden.shape) if needs[0] else d_hidden, d_weight, d_bias


@_grad.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = others[-1]
    nothing = weight.new_empty(0)
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else nothing
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0)
    return d_hidden, d_weight, torch.empty_like(bias) if bias is not None and needs[2] else weight.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, tokens, mask, row_temperature, *numbers, ctx.with_entropy, ctx.chunk_rows, _ = inputs
    logprobs, entropy, _, is_argmax, maximum, log_sum, miss, saved = output
    ctx.numbers = numbers
    stats = (logprobs, entropy, maximum, log_sum, miss)
    ctx.save_for_backward(hidden, weight, bias, tokens, mask, row_temperature, saved, *stats)
    ctx.mark_non_differentiable(is_argmax, maximum, log_sum, miss, saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, tokens, mask, row_temperature, saved, *stats = ctx.saved_tensors
    d_logprob, d_entropy, d_logsumexp = grads[:3]
    needs = list(ctx.needs_input_grad[:3])
    d_entropy = d_entropy if ctx.with_entropy else None
    results = _grad(
        hidden, weight, bias, tokens, mask, row_temperature, stats, saved, d_logprob, d_entropy, d_logsumexp,
        ctx.numbers, ctx.chunk_rows, needs,
    )  # fmt: skip
    return *(d if need else None for d, need in zip(results, needs, strict=True)), *(None,) * 9


_op.register_autograd(_backward, setup_context=_setup)
