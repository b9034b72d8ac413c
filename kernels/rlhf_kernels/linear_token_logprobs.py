"""Log-probability of one chosen token per row of hidden states; the logits never exist in full."""

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.backend import choose, use_triton
from rlhf_kernels.checks import (
    check_head,
    check_row_temperature,
    check_rows,
    check_token_range,
    check_transform,
    is_rounded,
)
from rlhf_kernels.linear_rows import (
    Head,
    HeadGrads,
    Tiles,
    as_autocast,
    check_chunk_rows,
    chunk_rows_for_gradients,
    exact,
    is_mixed,
    keep_for,
    plain,
    tile_for,
)
from rlhf_kernels.rows import (
    Rows,
    RowStats,
    RowSums,
    Transform,
    coefficients,
    finished,
    known,
    merged,
    row_grads,
    row_stats,
    row_sums,
    spread,
    take_stats,
    work_dtype,
)
from rlhf_kernels.scaling import last_use
from rlhf_kernels.token_logprobs import TokenLogprobs, split_temperature
from rlhf_kernels.vocab_shard import VocabShard, check_shard, stats_of_all, sums_of_part

Method = Literal["auto", "chunked", "fused"]
Sums = Literal["tensor_cores", "rounded"]
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
    method: Method = "auto",
    sums: Sums = "tensor_cores",
    shard: VocabShard | None = None,
) -> TokenLogprobs:
    """`token_logprobs(hidden @ weight.T + bias, tokens)`, exact in float32, a chunk of rows at a time.

    Gradients flow from logprobs, entropy and logsumexp to hidden, weight and bias. Logits are float32 sums of the
    given operands, never rounded to 16 bits; under autocast on a GPU those are cast first, as the head would.

        chunked   products of torch, a chunk of rows at a time. Logits are kept for the backward pass up to a budget and
                  computed again beyond it.
        fused     one kernel from hidden states to log-probabilities; no logit is ever in memory. Batch-invariant: the
                  bits of a token depend on its own state, not on the rows beside it. The backward pass computes the
                  logits again, in chunks. For log-probabilities of the old policy and the reference, which have none.
                  Needs a GPU, and hidden states and weight of one dtype.
        auto      chunked.

    Args:
        hidden: [..., H]; the state that predicts the token of the same index.
        weight: [V, H]; may be tied to the embedding, or a DTensor (gathered; gradients of all ranks add).
        tokens: [...] integer ids; ignored where `mask` is False.
        bias: [V], or None.
        mask: [...] True = wanted; the other rows cost nothing.
        temperature: of all rows, or one per row [...]; no gradient.
        softcap: bound on the logits (Gemma 2), or None.
        logit_scale: factor on the logits before the cap.
        with_entropy: also the entropy.
        chunk_rows: rows of logits alive at a time; None chooses by a memory budget.
        method: see above.
        sums: with `fused`, of the products of 16-bit operands. tensor_cores: they add them all, and cut bits off
            (log-probabilities 1.3e-4 from float64 with 4096 hidden units). rounded: they add 256, and those sums are
            added in rounded float32 (7.7e-6; on an H200 7.1 ms instead of 5.6 for 4096 x 4096 x 128256).
        shard: weight and bias are this process's part of the vocabulary; what is returned is over all of it. Every
            process of the group makes the same call. Not with `fused`.
    """
    check_rows(hidden, tokens, mask, name="hidden")
    check_head(hidden, weight, bias)
    check_transform(temperature, tokens.shape, softcap, logit_scale)
    weight, bias = plain(weight), None if bias is None else plain(bias)
    hidden, weight = as_autocast(hidden, weight)
    number, per_row = split_temperature(temperature, tokens)
    place = check_shard(shard, weight)
    size = 8 if hidden.dtype == torch.float64 else 4
    check_chunk_rows(chunk_rows)
    learns = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    learns = learns and torch.is_grad_enabled()
    if shard is not None and method == "fused":
        raise ValueError("method='fused' reads the whole vocabulary, and this process has a shard of it: use auto")
    rounded = is_rounded(sums, method)
    fused = _is_fused(method, hidden, weight)
    keeping = tokens.numel() if learns and not fused else 0
    keep = keep_for(keeping, weight.shape[0], hidden.device, size)
    if keeping and chunk_rows is None:
        sizes = (keeping, *weight.shape, hidden.device, None, size)
        if chunk_rows_for_gradients(*sizes, mixed=is_mixed(hidden, weight)) == keeping:
            chunk_rows, keep = keeping, [keeping * weight.shape[0]]
    logprobs, entropy, logsumexp, is_argmax, *_ = _op(
        hidden, weight, bias, tokens, mask, per_row, number, softcap or 0.0, logit_scale, with_entropy, chunk_rows,
        keep, True, fused, rounded, *place,
    )  # fmt: skip
    return TokenLogprobs(logprobs, entropy if with_entropy else None, logsumexp, is_argmax)


def _is_fused(method: str, hidden: Tensor, weight: Tensor) -> bool:
    if method not in ("auto", "chunked", "fused"):
        raise ValueError(f"method={method!r}: use auto, chunked or fused")
    if method != "fused":
        return False
    choice = choose(hidden)
    if choice.backend != "triton":
        raise ValueError(f"method='fused' is a kernel that does not run here ({choice.reason}): use auto or chunked")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"method='fused' multiplies operands of one dtype, but hidden is {hidden.dtype} and weight {weight.dtype}: "
            "cast one of them, or use auto or chunked"
        )
    return True


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
    chunk_rows: int | None,
    keep: list[int],
    release: bool,
    fused: bool,
    rounded: bool,
    vocab: int,
    first: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    # release: the backward pass may free the kept logits, because the caller does not hold on to them
    check_token_range(tokens, mask, vocab)
    check_row_temperature(row_temperature, mask)
    kernels = use_triton(_NAME, hidden)
    ids, states = tokens.reshape(-1).long() - first, hidden.reshape(-1, hidden.shape[-1])
    row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    transform = Transform(temperature, row_temperature, softcap, logit_scale)
    counting = Rows(mask, ids.numel())
    is_known = known(ids + first, vocab)
    head = Head(hidden, weight, bias)
    kept = [hidden.new_empty(size, dtype=head.dtype) for size in keep]
    budget = (hidden.device, chunk_rows, kept[0].element_size())
    size = tile_for(counting.count, head.vocab, *budget, whole_rows=kernels)
    tiles = Tiles(kept, counting, head.vocab, size)
    parts: list[RowStats] = []
    shares: list[RowSums] = []
    every = slice(None) if counting.numbers is None else counting.numbers
    if fused and counting.count:
        from rlhf_kernels.triton_linear import linear_stats_triton

        inputs = (states[every], weight, bias, ids[every], transform.take(every))
        parts.append(linear_stats_triton(*inputs, with_entropy=with_entropy, rounded=rounded))
    with exact(hidden.device):
        for rows, some in () if fused else tiles:
            sums = None
            for columns, tile, _ in some:
                head.logits(states[rows], tile, columns)
                here = (tile, ids[rows] - columns.start, transform.take(rows))
                if kernels and group:
                    sums = sums_of_part(_NAME, *here, with_entropy=with_entropy)
                elif kernels:
                    parts.append(row_stats(_NAME, *here, with_entropy=with_entropy))
                else:
                    part = row_sums(*here, with_entropy=with_entropy)
                    sums = part if sums is None else merged(sums, part)
            if sums is not None and group:
                shares.append(sums)
            elif sums is not None:
                parts.append(finished(sums, is_known[rows]))
    if shares:  # once for all chunks
        together = RowSums(*(torch.cat(field) for field in zip(*shares, strict=True)))
        parts = [stats_of_all(together, is_known[every], group)]
    logprobs, entropy, maximum, log_sum, miss, is_argmax = _gather(parts, counting, tokens, with_entropy, head.dtype)
    tile_size = torch.tensor(size, device="cpu")
    return logprobs, entropy, maximum + log_sum, is_argmax, maximum, log_sum, miss, tile_size, kept


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
    softcap: Any, logit_scale: Any, with_entropy: bool, chunk_rows: Any, keep: list[int], *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dtype = work_dtype(hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, weight.dtype)))
    logprobs, logsumexp, maximum, log_sum, miss = (
        torch.empty(tokens.shape, dtype=dtype, device=hidden.device) for _ in range(5)
    )
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    is_argmax, kept = torch.empty_like(logprobs, dtype=torch.bool), [logprobs.new_empty(size) for size in keep]
    tile_size = torch.empty(2, dtype=torch.long, device="cpu")
    return logprobs, entropy, logsumexp, is_argmax, maximum, log_sum, miss, tile_size, kept


@torch.library.custom_op("rlhf_kernels::linear_token_logprobs_grad", mutates_args=())
def _grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    stats: list[Tensor],
    kept: list[Tensor],
    tile_size: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    numbers: list[float],
    needs: list[bool],
    release: bool,
    first: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, states = tokens.reshape(-1).long() - first, hidden.reshape(-1, hidden.shape[-1])
    row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    transform = Transform(numbers[0], row_temperature, numbers[1], numbers[2])
    counting = Rows(mask, ids.numel())
    head = Head(hidden, weight, bias)
    logprobs, entropy, maximum, log_sum, miss = (field.reshape(-1) for field in stats)
    flat = RowStats(logprobs, entropy, maximum, log_sum, miss, miss.new_empty(0))
    d_outputs = (None if d is None else d.reshape(-1) for d in (d_logprob, d_entropy, d_logsumexp))
    a, b, c = coefficients(flat, *d_outputs)
    size = tile_size.tolist()  # of the forward pass: the kept logits lie that way
    tiles = Tiles(kept, counting, head.vocab, (size[0], size[1]), release=release)
    sums = HeadGrads(head, states, bias, (needs[0], needs[1], needs[2]), group=group, one_tile=tiles.count == 1)
    with exact(hidden.device):
        for rows, some in tiles:
            for columns, tile, is_kept in some:
                if not is_kept:
                    head.logits(states[rows], tile, columns)
                out = head.room_for_grads(tile)
                if out is tile and is_kept and not release:
                    out = tiles.spare((tile.shape[0], tile.shape[1]))
                chunk = (ids[rows] - columns.start, take_stats(flat, rows), a[rows], b[rows])
                c_rows = None if c is None else c[rows]
                row_grads(_NAME, tile, *chunk, c_rows, transform.take(rows), out=out)
                sums.add(rows, states[rows], out, columns)
    d_hidden, d_weight, d_bias = sums.results(bias)
    return d_hidden.view(hidden.shape) if needs[0] else d_hidden, d_weight, d_bias


@_grad.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = others[-4]
    nothing = weight.new_empty(0)
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else nothing
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0)
    return d_hidden, d_weight, torch.empty_like(bias) if bias is not None and needs[2] else weight.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, tokens, mask, row_temperature, *numbers, ctx.with_entropy, _, _, ctx.release = inputs[:-5]
    logprobs, entropy, _, is_argmax, maximum, log_sum, miss, tile_size, kept = output
    ctx.numbers, ctx.place = numbers, inputs[-2:]
    stats = (logprobs, entropy, maximum, log_sum, miss)
    ctx.save_for_backward(hidden, weight, bias, tokens, mask, row_temperature, *stats, tile_size, *kept)
    ctx.mark_non_differentiable(is_argmax, maximum, log_sum, miss, tile_size, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, tokens, mask, row_temperature, *saved = ctx.saved_tensors
    stats, tile_size, kept = saved[:5], saved[5], saved[6:]
    d_logprob, d_entropy, d_logsumexp = grads[:3]
    needs = list(ctx.needs_input_grad[:3])
    d_entropy = d_entropy if ctx.with_entropy else None
    results = _grad(
        hidden, weight, bias, tokens, mask, row_temperature, stats, kept, tile_size, d_logprob, d_entropy, d_logsumexp,
        ctx.numbers, needs, ctx.release and last_use(kept[0]), *ctx.place,
    )  # fmt: skip
    return *(d if need else None for d, need in zip(results, needs, strict=True)), *(None,) * 15


_op.register_autograd(_backward, setup_context=_setup)
