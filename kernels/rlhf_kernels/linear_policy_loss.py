"""The policy loss from hidden states: gradients in the forward pass, a chunk of logits at a time.

Three matrix products per row (logits, gradient in hidden, gradient in weight) where recomputation needs four.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import check_head, check_row_temperature, check_rows, check_token_range, check_transform
from rlhf_kernels.linear_rows import Head, HeadGrads, as_autocast, chunk_rows_for_gradients, exact, is_mixed, plain
from rlhf_kernels.policy_loss import (
    as_divisor,
    check_divisor,
    check_policy,
    decode,
    encode,
    fake_outputs,
    output,
    weighted,
)
from rlhf_kernels.rows import (
    RowStats,
    Transform,
    coefficients,
    known,
    pieces,
    row_grads,
    row_stats,
    take_stats,
    work_dtype,
)
from rlhf_kernels.scaling import scaled
from rlhf_kernels.spec import PolicyLossOutput, PolicyLossSpec, policy_terms
from rlhf_kernels.token_logprobs import split_temperature
from rlhf_kernels.vocab_shard import VocabShard, check_shard, stats_of_all, sums_of_part

_NAME = "linear_policy_loss"
_DEFAULT = PolicyLossSpec()


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    denominator: float | Tensor,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    loss: PolicyLossSpec = _DEFAULT,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
    shard: VocabShard | None = None,
) -> PolicyLossOutput:
    """`policy_loss` of logits = hidden @ weight.T + bias, which never exist in full; exact in float32.

    Rows whose mask is False cost nothing. Where neither KL nor entropy is in the loss, rows of zero advantage cost one
    product instead of three. With ratio "sequence", chunks end where sequences end; a sequence longer than a chunk has
    its logits computed twice.

    Args:
        hidden: [..., H]; the state that predicts the token of the same index.
        weight: [V, H]; may be tied to the embedding, or a DTensor (gathered; gradients of all ranks add).
        bias: [V], or None.
        chunk_rows: rows of logits alive at a time; None chooses by a memory budget.
        shard: weight and bias are this process's part of the vocabulary; see `linear_token_logprobs`.
        tokens, old_logprobs, advantages, mask, denominator, ref_logprobs, weights, loss, temperature, softcap,
            logit_scale, with_entropy: as in `policy_loss`.
    """
    check_rows(hidden, tokens, mask, name="hidden")
    check_head(hidden, weight, bias)
    check_transform(temperature, tokens.shape, softcap, logit_scale)
    per_token = check_policy(tokens, mask, old_logprobs, advantages, ref_logprobs, weights, loss)
    weight, bias = plain(weight), None if bias is None else plain(bias)
    hidden, weight = as_autocast(hidden, weight)
    number, per_row = split_temperature(temperature, tokens)
    numbers = [number, softcap or 0.0, logit_scale, *loss.numbers()]
    place = check_shard(shard, weight)
    widest = weight.shape[0] if shard is None else shard.widest  # as many chunks on every process
    chunk = chunk_rows_for_gradients(
        tokens.numel(), widest, weight.shape[1], hidden.device, chunk_rows, 8 if hidden.dtype == torch.float64 else 4,
        mixed=is_mixed(hidden, weight),
    )  # fmt: skip
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    scalar, logprobs, entropy, ratio, clipped, kl, *_ = _op(
        hidden, weight, bias, tokens, *per_token, mask, per_row, as_divisor(denominator, hidden), numbers,
        *encode(loss), with_entropy or loss.entropy_coef != 0, chunk, needs, *place,
    )  # fmt: skip
    return output(scalar, logprobs, entropy, ratio, clipped, kl)


def _groups(mask: Tensor, advantages: Tensor, spec: PolicyLossSpec, chunk_rows: int) -> Iterator[tuple[Tensor, bool]]:
    """Rows that must know each other's log-probability, and whether they have a gradient.

    A token's ratio is its own, so any rows make a group, those without gradient apart; a sequence's ratio is that of
    all its rows, so groups end where sequences end.
    """
    if spec.ratio == "token":
        active = mask
        if not (spec.kl_coef or spec.entropy_coef):
            active = mask & (advantages != 0)
        for wanted, learns in ((active, True), (mask & ~active, False)):
            rows = wanted.reshape(-1).nonzero()[:, 0]
            if len(rows):
                yield from ((part, learns) for part in pieces(rows, chunk_rows))
        return
    rows = mask.reshape(-1).nonzero()[:, 0]
    sizes: list[int] = []
    for length in mask.reshape(-1, mask.shape[-1]).sum(-1).tolist():
        if sizes and sizes[-1] + length <= chunk_rows:
            sizes[-1] += length
        else:
            sizes.append(length)
    start = 0
    for size in sizes:
        if size:
            yield rows[start : start + size], True
        start += size


class _Rows:
    """Flat per-token results, filled group by group."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype, with_entropy: bool, with_kl: bool) -> None:
        def zeros(wanted: bool = True, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(tokens.numel() if wanted else 0, dtype=kind, device=tokens.device)

        self.stats = RowStats(zeros(), zeros(with_entropy), zeros(), zeros(), zeros(), zeros(kind=torch.bool))
        self.loss, self.ratio, self.kl, self.clipped = zeros(), zeros(), zeros(with_kl), zeros(kind=torch.bool)

    def put_stats(self, rows: Tensor, stats: RowStats) -> None:
        for whole, part in zip(self.stats, stats, strict=True):
            if whole.numel():
                whole[rows] = part


class _Inputs:
    """Per-token inputs, flat, and the shape of one sequence."""

    def __init__(self, mask: Tensor, old: Tensor, adv: Tensor, ref: Tensor | None, weights: Tensor | None) -> None:
        self.length = mask.shape[-1] if mask.ndim > 1 else 1
        self.mask, self.old, self.adv = mask.reshape(-1), old.reshape(-1), adv.reshape(-1)
        self.ref = None if ref is None else ref.reshape(-1)
        self.weights = None if weights is None else weights.reshape(-1)


def _group_slopes(
    rows: Tensor, inputs: _Inputs, results: _Rows, spec: PolicyLossSpec, denominator: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Writes the loss, ratio, KL and flags of a group; returns its slopes in log-probability and entropy, per row."""
    sequences = spec.ratio == "sequence"
    index = rows
    if sequences:  # all positions of the group's sequences, as [sequences, time]
        first = int(rows[0]) // inputs.length * inputs.length
        index = torch.arange(first, (int(rows[-1]) // inputs.length + 1) * inputs.length, device=rows.device)

    def take(x: Tensor) -> Tensor:
        return x[index].view(-1, inputs.length) if sequences else x[index]

    mask = take(inputs.mask)
    entropy = take(results.stats.entropy) if results.stats.entropy.numel() else None
    ref = None if inputs.ref is None else take(inputs.ref)
    logprobs = take(results.stats.logprobs)
    terms = policy_terms(logprobs, take(inputs.old), take(inputs.adv), mask, spec, ref_logprobs=ref, entropy=entropy)
    weights = None if inputs.weights is None else take(inputs.weights)
    _, d_logprob, d_entropy = weighted(terms.loss, terms.logprob_slope, mask, weights, denominator, spec)
    share = terms.loss if weights is None else torch.where(mask, terms.loss * weights.to(terms.loss.dtype), 0.0)
    results.loss[index] = share.reshape(-1)
    results.ratio[index] = terms.ratio.reshape(-1)
    results.clipped[index] = terms.clipped.reshape(-1)
    if terms.kl is not None:
        results.kl[index] = terms.kl.reshape(-1)
    d_logprob, d_entropy = d_logprob.reshape(-1), None if d_entropy is None else d_entropy.reshape(-1)
    if not sequences:
        return d_logprob, d_entropy
    return d_logprob[rows - first], None if d_entropy is None else d_entropy[rows - first]


@torch.library.custom_op("rlhf_kernels::linear_policy_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    mask: Tensor,
    row_temperature: Tensor | None,
    denominator: Tensor,
    numbers: list[float],
    form: str,
    estimator: str,
    ratio: str,
    dual: bool,
    with_entropy: bool,
    chunk_rows: int,
    needs: list[bool],
    vocab: int,
    first: int,
    processes: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_token_range(tokens, mask, vocab)
    check_row_temperature(row_temperature, mask)
    check_divisor(denominator)
    use_triton(_NAME, hidden)
    transform, spec = decode(numbers, form, estimator, ratio, dual)
    row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    transform = transform._replace(row_temperature=row_temperature)
    ids, states = tokens.reshape(-1).long() - first, hidden.reshape(-1, hidden.shape[-1])
    head = Head(hidden, weight, bias)
    inputs = _Inputs(mask, old_logprobs, advantages, ref_logprobs, weights)
    results = _Rows(tokens, head.dtype, with_entropy, ref_logprobs is not None)
    groups = _groups(mask, advantages, spec, chunk_rows)
    first_group = list(itertools.islice(groups, 1))
    # with token ratios those that learn come first, as many at a time as fit
    room_left = any(len(rows) < chunk_rows for rows, _ in first_group)
    one_tile = (ratio == "token" and room_left) or chunk_rows >= tokens.numel()
    sums = HeadGrads(head, states, bias, (needs[0], needs[1], needs[2]), group=processes, one_tile=one_tile)
    buffer = states.new_empty((min(chunk_rows, tokens.numel()), weight.shape[0]), dtype=head.dtype)
    with exact(hidden.device):
        for group, learns in itertools.chain(first_group, groups):
            chunks = pieces(group, chunk_rows)
            for rows in chunks:
                logits = head.logits(states[rows], buffer[: len(rows)])
                here = (_NAME, logits, ids[rows], transform.take(rows))
                if processes:
                    sums_here = sums_of_part(*here, with_entropy=with_entropy)
                    stats = stats_of_all(sums_here, known(ids[rows] + first, vocab), processes)
                else:
                    stats = row_stats(*here, with_entropy=with_entropy)
                results.put_stats(rows, stats)
            d_logprob, d_entropy = _group_slopes(group, inputs, results, spec, denominator)
            if not (learns and any(needs)):
                continue
            start = 0
            for rows in chunks:
                part = slice(start, start + len(rows))
                start += len(rows)
                logits = buffer[: len(rows)] if len(chunks) == 1 else head.logits(states[rows], buffer[: len(rows)])
                slopes = (d_logprob[part], None if d_entropy is None else d_entropy[part])
                _add_chunk(sums, rows, states, logits, ids, take_stats(results.stats, rows), slopes, transform)
    shape = tokens.shape
    loss = (results.loss.sum(dtype=torch.float64) / denominator.double()).to(head.dtype)
    logprobs, entropy = results.stats.logprobs.view(shape), results.stats.entropy
    entropy = entropy.view(shape) if with_entropy else entropy
    kl = results.kl.view(shape) if ref_logprobs is not None else results.kl
    d_hidden, d_weight, d_bias = sums.results(bias)
    d_hidden = d_hidden.view(hidden.shape) if needs[0] else d_hidden
    ratios, clipped = results.ratio.view(shape), results.clipped.view(shape)
    return loss, logprobs, entropy, ratios, clipped, kl, d_hidden, d_weight, d_bias


def _add_chunk(
    sums: HeadGrads,
    rows: Tensor,
    states: Tensor,
    logits: Tensor,
    ids: Tensor,
    stats: RowStats,
    slopes: tuple[Tensor, Tensor | None],
    transform: Transform,
) -> None:
    """Adds the gradients of one chunk, leaving out rows that a bound or a zero advantage stopped."""
    a, b, c = coefficients(stats, *slopes, None)
    if c is None and not rows.is_cuda:  # counting them on a GPU would make the host wait
        moving = a.nonzero()[:, 0]
        if len(moving) < 0.75 * len(rows):
            stats = take_stats(stats, moving)
            rows, logits, a, b = rows[moving], logits[moving], a[moving], b[moving]
    if len(rows):
        grads = sums.head.room_for_grads(logits)
        row_grads(_NAME, logits, ids[rows], stats, a, b, c, transform.take(rows), out=grads)
        sums.add(rows, states[rows], grads)


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ref_logprobs, with_entropy, needs = others[2], others[-6], others[-4]
    dtype = work_dtype(hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, weight.dtype)))
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    return (
        *fake_outputs(tokens, dtype, ref_logprobs is not None, with_entropy),
        d_hidden if needs[0] else weight.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0),
        torch.empty_like(bias) if bias is not None and needs[2] else weight.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    factor = grads[0]
    if factor is None:
        return (None,) * 22
    needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *(scaled(_NAME, d, factor) if need else None for d, need in needed), *(None,) * 19


_op.register_autograd(_backward, setup_context=_setup)
