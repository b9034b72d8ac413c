"""The policy loss from hidden states: gradients in the forward pass, a chunk of logits at a time.

Three matrix products per row (logits, gradient in hidden, gradient in weight) where recomputation needs four.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import (
    check_head,
    check_row_temperature,
    check_rows,
    check_token_range,
    check_transform,
    is_rounded,
)
from rlhf_kernels.linear_exponentials import Exponentials, chunk_rows_for_exponentials, why_not_exponentials
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
    count_of,
    known,
    part_of,
    row_grads,
    row_stats,
    take_stats,
    work_dtype,
)
from rlhf_kernels.scaling import scaled
from rlhf_kernels.spec import PolicyLossOutput, PolicyLossSpec, TokenTerms, policy_terms
from rlhf_kernels.token_logprobs import split_temperature
from rlhf_kernels.vocab_shard import VocabShard, check_shard, stats_of_all, sums_of_part

Method = Literal["auto", "chunked", "fused"]
Sums = Literal["tensor_cores", "rounded"]
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
    method: Method = "auto",
    sums: Sums = "tensor_cores",
    shard: VocabShard | None = None,
) -> PolicyLossOutput:
    """`policy_loss` of logits = hidden @ weight.T + bias, which never exist in full; exact in float32.

    Rows whose mask is False cost nothing. Where neither KL nor entropy is in the loss, rows of zero advantage cost one
    product instead of three. With ratio "sequence", chunks end where sequences end; a sequence longer than a chunk has
    its logits computed twice.

        chunked   logits by torch, a chunk of rows at a time, in float32; kernels read them twice.
        fused     one kernel from hidden states to the statistics of each row and, in bfloat16, exp(logit - estimate of
                  its logsumexp), from which the gradients follow without another pass. Log-probabilities have the bits
                  of `linear_token_logprobs(method="fused")`. For bfloat16 on a Hopper GPU; without entropy in the loss,
                  softcap and shard. old_logprobs are the estimate: where log-probabilities are more than 60 nats below
                  them, or below -100, the products of 128 rows around are computed twice.
        auto      chunked.

    Args:
        hidden: [..., H]; the state that predicts the token of the same index.
        weight: [V, H]; may be tied to the embedding, or a DTensor (gathered; gradients of all ranks add).
        bias: [V], or None.
        chunk_rows: rows of logits alive at a time; None chooses by a memory budget.
        method: see above.
        sums: see `linear_token_logprobs`; what scored old_logprobs should have been given the same.
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
    rounded = is_rounded(sums, method)
    fused = _is_fused(method, hidden, weight, loss, softcap, shard)
    if fused:
        chunk = chunk_rows_for_exponentials(tokens.numel(), hidden, weight, chunk_rows, chunk)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    scalar, logprobs, entropy, ratio, clipped, kl, *_ = _op(
        hidden, weight, bias, tokens, *per_token, mask, per_row, as_divisor(denominator, hidden), numbers,
        *encode(loss), fused, rounded, with_entropy or loss.entropy_coef != 0, chunk, needs, *place,
    )  # fmt: skip
    return output(scalar, logprobs, entropy, ratio, clipped, kl)


def _is_fused(
    method: str, hidden: Tensor, weight: Tensor, loss: PolicyLossSpec, softcap: float | None, shard: VocabShard | None
) -> bool:
    if method not in ("auto", "chunked", "fused"):
        raise ValueError(f"method={method!r}: use auto, chunked or fused")
    if method != "fused":
        return False
    obstacle = why_not_exponentials(hidden, weight, loss, softcap, shards=shard is not None)
    if obstacle is not None:
        raise ValueError(f"method='fused' cannot: {obstacle}; use auto or chunked")
    return True


class _Group(NamedTuple):
    """Rows that must know each other's log-probability.

    A token's ratio is its own, so any rows make a group, those without gradient apart; a sequence's ratio is that of
    all its rows, so groups end where sequences end.
    """

    rows: Tensor | slice
    """Their numbers; a slice where all rows count, because indexing by number copies."""
    learns: bool
    """Whether they have a gradient."""
    sequences: range | None = None
    """Numbers of the sequences, where those have one ratio."""


def _groups(mask: Tensor, advantages: Tensor, spec: PolicyLossSpec, chunk_rows: int) -> Iterator[_Group]:
    """All rows that count, once. On a GPU the host waits for their numbers, once."""
    if spec.ratio == "token":
        active = mask
        if not (spec.kl_coef or spec.entropy_coef):
            active = mask & (advantages != 0)
        order = _in_order(2 - mask.to(torch.int8) - active.to(torch.int8))
        num_active, num_rows = torch.stack((active.sum(), mask.sum())).tolist()
        rows = slice(0, num_rows) if num_active == mask.numel() else order
        for start, stop, learns in ((0, num_active, True), (num_active, num_rows, False)):
            if start < stop:
                yield from (_Group(part, learns) for part in _pieces(part_of(rows, start, stop), chunk_rows))
        return
    order, start = _in_order(1 - mask.to(torch.int8)), 0
    first, count = 0, 0
    lengths = mask.reshape(-1, mask.shape[-1]).sum(-1).tolist()
    rows = slice(0, mask.numel()) if sum(lengths) == mask.numel() else order
    for number, length in enumerate([*lengths, chunk_rows]):  # the last ends the group before it, and makes none
        if count and count + length > chunk_rows:
            yield _Group(part_of(rows, start, start + count), True, range(first, number))
            first, start, count = number, start + count, 0
        count += length


def _pieces(rows: Tensor | slice, size: int) -> list[Tensor | slice]:
    """`rows` cut into parts of at most `size`."""
    count = count_of(rows)
    if count <= size:
        return [rows]
    return [part_of(rows, start, min(start + size, count)) for start in range(0, count, size)]


def _in_order(key: Tensor) -> Tensor:
    """Numbers of the rows by their key, and in their order where it is the same."""
    return key.reshape(-1).sort(stable=True).indices


class _Rows:
    """Flat per-token results, filled group by group."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype, with_entropy: bool, with_kl: bool) -> None:
        def zeros(wanted: bool = True, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(tokens.numel() if wanted else 0, dtype=kind, device=tokens.device)

        self.stats = RowStats(zeros(), zeros(with_entropy), zeros(), zeros(), zeros(), zeros(kind=torch.bool))
        self.loss, self.ratio, self.kl, self.clipped = zeros(), zeros(), zeros(with_kl), zeros(kind=torch.bool)

    def put_stats(self, rows: Tensor | slice, stats: RowStats) -> None:
        if count_of(rows) == self.stats.logprobs.numel():
            self.stats = stats
            return
        for whole, part in zip(self.stats, stats, strict=True):
            if whole.numel():
                whole[rows] = part

    def put(self, rows: Tensor | slice, terms: TokenTerms, loss: Tensor) -> None:
        """What follows from the statistics; `loss` is each row's share, weighted."""
        values = {"loss": loss, "ratio": terms.ratio, "clipped": terms.clipped, "kl": terms.kl}
        for name, value in values.items():
            if value is not None and count_of(rows) == self.loss.numel():
                setattr(self, name, value.reshape(-1))
            elif value is not None:
                getattr(self, name)[rows] = value.reshape(-1)


class _Inputs:
    """Per-token inputs, flat, and the shape of one sequence."""

    def __init__(self, mask: Tensor, old: Tensor, adv: Tensor, ref: Tensor | None, weights: Tensor | None) -> None:
        self.length = mask.shape[-1] if mask.ndim > 1 else 1
        self.mask, self.old, self.adv = mask.reshape(-1), old.reshape(-1), adv.reshape(-1)
        self.ref = None if ref is None else ref.reshape(-1)
        self.weights = None if weights is None else weights.reshape(-1)


class _Logits:
    """The logits of one chunk of rows at a time."""

    def __init__(
        self,
        head: Head,
        states: Tensor,
        ids: Tensor,
        transform: Transform,
        chunk_rows: int,
        place: tuple[int, int, str],
        with_entropy: bool,
    ) -> None:
        self.head, self.states, self.ids, self.transform = head, states, ids, transform
        self.with_entropy, (self.vocab, self.first, self.processes) = with_entropy, place
        self.buffer = states.new_empty((chunk_rows, head.vocab), dtype=head.dtype)

    def _compute(self, rows: Tensor | slice) -> Tensor:
        return self.head.logits(self.states[rows], self.buffer[: count_of(rows)])

    def stats(self, rows: Tensor | slice, *, keep: bool) -> RowStats:
        """Statistics of some rows; with `keep`, `add` of the same rows comes next."""
        ids = self.ids[rows]
        here = (_NAME, self._compute(rows), ids, self.transform.take(rows))
        if not self.processes:
            return row_stats(*here, with_entropy=self.with_entropy)
        sums = sums_of_part(*here, with_entropy=self.with_entropy)
        return stats_of_all(sums, known(ids + self.first, self.vocab), self.processes)

    def add(
        self,
        sums: HeadGrads,
        rows: Tensor | slice,
        stats: RowStats,
        d_logprob: Tensor,
        d_entropy: Tensor | None,
        *,
        kept: bool,
    ) -> None:
        """Adds the gradients of some rows, leaving out those that a bound or a zero advantage stopped."""
        logits = self.buffer[: count_of(rows)] if kept else self._compute(rows)
        a, b, c = coefficients(stats, d_logprob, d_entropy, None)
        if c is None and not logits.is_cuda:  # counting them on a GPU would make the host wait
            moving = a.nonzero()[:, 0]
            if len(moving) < 0.75 * len(a):
                stats = take_stats(stats, moving)
                rows = moving + rows.start if isinstance(rows, slice) else rows[moving]
                logits, a, b = logits[moving], a[moving], b[moving]
        if len(a):
            grads = self.head.room_for_grads(logits)
            row_grads(_NAME, logits, self.ids[rows], stats, a, b, c, self.transform.take(rows), out=grads)
            sums.add(rows, self.states[rows], grads)


def _group_slopes(
    group: _Group, inputs: _Inputs, results: _Rows, spec: PolicyLossSpec, denominator: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Writes the loss, ratio, KL and flags of a group; returns its slopes in log-probability and entropy, per row."""
    index = group.rows
    first = 0
    if group.sequences is not None:  # all positions of the group's sequences, as [sequences, time]
        first = group.sequences.start * inputs.length
        index = slice(first, group.sequences.stop * inputs.length)

    def take(x: Tensor) -> Tensor:
        return x[index] if group.sequences is None else x[index].view(-1, inputs.length)

    mask = take(inputs.mask)
    entropy = take(results.stats.entropy) if results.stats.entropy.numel() else None
    ref = None if inputs.ref is None else take(inputs.ref)
    logprobs = take(results.stats.logprobs)
    terms = policy_terms(logprobs, take(inputs.old), take(inputs.adv), mask, spec, ref_logprobs=ref, entropy=entropy)
    weights = None if inputs.weights is None else take(inputs.weights)
    _, d_logprob, d_entropy = weighted(terms.loss, terms.logprob_slope, mask, weights, denominator, spec)
    share = terms.loss if weights is None else torch.where(mask, terms.loss * weights.to(terms.loss.dtype), 0.0)
    results.put(index, terms, share)
    d_logprob, d_entropy = d_logprob.reshape(-1), None if d_entropy is None else d_entropy.reshape(-1)
    if isinstance(group.rows, slice) or group.sequences is None:
        return d_logprob, d_entropy
    return d_logprob[group.rows - first], None if d_entropy is None else d_entropy[group.rows - first]


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
    fused: bool,
    rounded: bool,
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
    sums = HeadGrads(head, states, bias, (needs[0], needs[1], needs[2]), group=processes)
    most_rows = min(chunk_rows, tokens.numel())
    source: _Logits | Exponentials
    if fused:
        source = Exponentials(
            states, weight, bias, ids, inputs.old, transform, most_rows if any(needs) else 0,
            with_entropy=with_entropy, dtype=weight.dtype if head.mixed else head.dtype, rounded=rounded,
        )  # fmt: skip
    else:
        source = _Logits(head, states, ids, transform, most_rows, (vocab, first, processes), with_entropy)
    # here the host waits for the GPU, and then the GPU for the host: what need not come after this comes before
    groups = _groups(mask, advantages, spec, chunk_rows)
    first_group = list(itertools.islice(groups, 1))
    # with token ratios those that learn come first, as many at a time as fit
    room_left = any(count_of(group.rows) < chunk_rows for group in first_group)
    sums.one_tile = (ratio == "token" and room_left) or chunk_rows >= tokens.numel()
    with exact(hidden.device):
        for group in itertools.chain(first_group, groups):
            learns = group.learns and any(needs)
            chunks = _pieces(group.rows, most_rows)
            keep = learns and len(chunks) == 1
            for rows in chunks:
                results.put_stats(rows, source.stats(rows, keep=keep))
            d_logprob, d_entropy = _group_slopes(group, inputs, results, spec, denominator)
            start = 0
            for rows in chunks if learns else ():
                part = slice(start, start + count_of(rows))
                start = part.stop
                slopes = (d_logprob[part], None if d_entropy is None else d_entropy[part])
                source.add(sums, rows, take_stats(results.stats, rows), *slopes, kept=keep)
    shape = tokens.shape
    loss = (results.loss.sum(dtype=torch.float64) / denominator.double()).to(head.dtype)
    logprobs, entropy = results.stats.logprobs.view(shape), results.stats.entropy
    entropy = entropy.view(shape) if with_entropy else entropy
    kl = results.kl.view(shape) if ref_logprobs is not None else results.kl
    d_hidden, d_weight, d_bias = sums.results(bias)
    d_hidden = d_hidden.view(hidden.shape) if needs[0] else d_hidden
    ratios, clipped = results.ratio.view(shape), results.clipped.view(shape)
    return loss, logprobs, entropy, ratios, clipped, kl, d_hidden, d_weight, d_bias


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
        return (None,) * 24
    needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *(scaled(_NAME, d, factor) if need else None for d, need in needed), *(None,) * 21


_op.register_autograd(_backward, setup_context=_setup)
