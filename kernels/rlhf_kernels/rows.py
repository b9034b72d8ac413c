"""One row of logits: its log-probability, entropy and arg-max match, and the gradient of any function of them.

Every op that ends in a softmax is made of these two steps. With x the row after scale, cap and temperature, m its
maximum, d = x - m, s = sum exp(d), p = exp(d) / s, and y the row's token,

    log p_y = d_y - log s        entropy = log s - sum p d        logsumexp = m + log s

and the gradient of a function f of the three in x is

    df/dx_i = a ([i = y] - p_i) + p_i (b + c d_i)

with a = df/dlog p_y, b = df/dlogsumexp + df/dentropy (log s - entropy), c = -df/dentropy. At i = y the first term is
a * miss with miss = 1 - p_y summed over the other columns: the difference itself would lose every digit where p_y is
near 1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton

_BLOCK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 26}
"""Elements the reference works on at a time: its temporaries stay in the cache of a core, or fill an accelerator."""

_GONE = -1e4
"""exp of it is 0 even in float64. Stands for -inf where a factor could make 0 * -inf, which is NaN."""


def _block_rows(width: int, device: torch.device) -> int:
    return max(1, _BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // width)


class Transform(NamedTuple):
    """What happens to logits before the softmax: x = cap(scale * logits) / temperature."""

    temperature: float = 1.0
    """Of every row, unless `row_temperature` is given."""
    row_temperature: Tensor | None = None
    """[rows] float32, or None."""
    softcap: float = 0.0
    """cap(z) = softcap * tanh(z / softcap); 0 = none."""
    logit_scale: float = 1.0
    """Factor before the cap."""

    def take(self, rows: Tensor | slice) -> "Transform":
        """The same for some of the rows."""
        return self if self.row_temperature is None else self._replace(row_temperature=self.row_temperature[rows])


class Rows:
    """The rows that count, in order, some at a time; slices where all do, because indexing by number copies."""

    def __init__(self, mask: Tensor | None, num_rows: int) -> None:
        self.numbers = None
        self.count = num_rows
        # Asking whether all count makes the host wait, but so does counting those that do.
        if mask is not None and not bool(mask.all()):
            self.numbers = mask.reshape(-1).nonzero()[:, 0]
            self.count = len(self.numbers)

    def chunks(self, size: int) -> Iterator[tuple[int, int, Tensor | slice]]:
        """Start and end among the rows that count, and the rows: numbers, or a slice."""
        for start in range(0, self.count, size):
            end = min(start + size, self.count)
            yield start, end, slice(start, end) if self.numbers is None else self.numbers[start:end]


def pieces(rows: Tensor, size: int) -> list[Tensor]:
    """`rows` cut into views of at most `size`."""
    return [rows] if len(rows) <= size else [rows[start : start + size] for start in range(0, len(rows), size)]


def count_of(rows: Tensor | slice) -> int:
    """How many rows that is: their numbers, or a slice from start to stop."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def part_of(rows: Tensor | slice, start: int, stop: int) -> Tensor | slice:
    """rows[start:stop] of numbers, or of a slice."""
    return slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of [..., V] by number, as [len(rows), V]; x may have any strides, and only those rows are copied."""
    if x.ndim == 1:
        x = x[None]
    return x[torch.unravel_index(rows, x.shape[:-1])] if x.ndim > 2 else x[rows]


class RowStats(NamedTuple):
    """Per row; float32, or float64 where the logits are."""

    logprobs: Tensor
    """log p_y."""
    entropy: Tensor
    """Entropy, or an empty tensor if not asked for."""
    maximum: Tensor
    """m."""
    log_sum: Tensor
    """log s: m + log s is the logsumexp, kept apart because near 1e4 a float32 has no digits left for log s."""
    miss: Tensor
    """1 - p_y, without cancellation."""
    is_argmax: Tensor
    """Whether no column is above the token's (a tie counts as a match)."""


def take_stats(stats: RowStats, rows: Tensor | slice) -> RowStats:
    """Of some of the rows; a field that was not asked for stays empty."""
    return RowStats(*(field[rows] if field.numel() else field for field in stats))


def work_dtype(x: Tensor) -> torch.dtype:
    """What softmaxes are computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_blocks(x: Tensor) -> list[Tensor]:
    """[..., V] as views [rows, V], in order, that together are x: one where its strides allow, never a copy."""
    if x.ndim <= 2:
        return [x.view(-1, x.shape[-1])]
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:
        return [block for part in x.unbind(0) for block in row_blocks(part)]


def transformed(logits: Tensor, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """x, and the slope of the cap where there is one. May be `logits` itself: do not write to it."""
    x = logits.to(work_dtype(logits))
    slope = None
    if transform.logit_scale != 1.0:
        x = x * transform.logit_scale
    if transform.softcap:
        tanh = torch.tanh(x / transform.softcap)
        x = tanh * transform.softcap
        slope = 1 - tanh.square()
    if transform.row_temperature is not None:
        x = x / transform.row_temperature[:, None].to(x.dtype)
    elif transform.temperature != 1.0:
        x = x / transform.temperature
    return x, slope


class RowSums(NamedTuple):
    """Of some columns of each row: what the statistics of whole rows are put together from."""

    maximum: Tensor
    """Largest x among these columns, m."""
    others: Tensor
    """Sum of exp(x - m) over these columns but the token's."""
    chosen: Tensor
    """x of the token; -inf if its column is not among these."""
    weighted: Tensor
    """Sum of exp(x - m) (x - m), the token's too; empty where no entropy is asked for."""


def _located(tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether each token is one of `width` columns, and its index among them as [N, 1] (0 where it is not)."""
    inside = known(tokens, width)
    return inside, torch.where(inside, tokens, 0)[:, None]


def _held(maximum: Tensor) -> Tensor:
    """Finite, so that columns that cannot occur (x = -inf) are exp(x - m) = 0 even where there is no other."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)


def _sums_block(logits: Tensor, tokens: Tensor, transform: Transform, with_entropy: bool) -> RowSums:
    x, _ = transformed(logits, transform)
    inside, index = _located(tokens, x.shape[-1])
    maximum = x.amax(-1)
    chosen = torch.where(inside, x.gather(-1, index)[:, 0], -torch.inf)
    d = x - _held(maximum)[:, None]
    e = d.exp() if with_entropy else d.exp_()
    weighted = maximum.new_empty(0)
    if with_entropy:
        # exp(-inf) * -inf is NaN: a column that cannot occur adds nothing to the entropy
        weighted = d.clamp_(min=_GONE).mul_(e).sum(-1)
    e.scatter_(-1, index, e.gather(-1, index).masked_fill_(inside[:, None], 0.0))
    return RowSums(maximum, e.sum(-1), chosen, weighted)


def row_sums(logits: Tensor, tokens: Tensor, transform: Transform, *, with_entropy: bool) -> RowSums:
    """Sums of logits [N, width], some columns of each row; tokens [N] count from the first of them."""
    num_rows, width = logits.shape
    step = _block_rows(width, logits.device)
    if num_rows <= step:
        return _sums_block(logits, tokens, transform, with_entropy)
    parts = []
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        parts.append(_sums_block(logits[rows], tokens[rows], transform.take(rows), with_entropy))
    return RowSums(*(torch.cat(field) for field in zip(*parts, strict=True)))


def merged(first: RowSums, second: RowSums) -> RowSums:
    """Sums of the columns of both."""
    maximum = torch.maximum(first.maximum, second.maximum)
    others = weighted = maximum.new_zeros(())
    for part in (first, second):
        shift = _held(part.maximum) - _held(maximum)
        factor = shift.exp()
        others = others + factor * part.others
        if part.weighted.numel():
            total = part.others + (part.chosen - _held(part.maximum)).exp()
            weighted = weighted + factor * (part.weighted + shift * total)
    if not first.weighted.numel():
        weighted = first.weighted
    return RowSums(maximum, others, torch.maximum(first.chosen, second.chosen), weighted)


def known(tokens: Tensor, vocab: int) -> Tensor:
    """Whether an id is one of the vocabulary."""
    return (tokens >= 0) & (tokens < vocab)


def finished(sums: RowSums, is_known: Tensor) -> RowStats:
    """Statistics of whole rows; NaN where the token's id is not one of the vocabulary."""
    d = torch.where(is_known, sums.chosen, torch.nan) - sums.maximum
    total = sums.others + d.exp()
    is_argmax = d == 0
    log_sum = torch.where(is_argmax, torch.log1p(sums.others), torch.log(total))
    entropy = log_sum - sums.weighted / total if sums.weighted.numel() else sums.weighted
    return RowStats(d - log_sum, entropy, sums.maximum, log_sum, sums.others / total, is_argmax)


def row_stats_reference(logits: Tensor, tokens: Tensor, transform: Transform, *, with_entropy: bool) -> RowStats:
    """The definition. logits [N, V]; tokens [N] int64."""
    sums = row_sums(logits, tokens, transform, with_entropy=with_entropy)
    return finished(sums, known(tokens, logits.shape[-1]))


def _grads_block(
    logits: Tensor,
    tokens: Tensor,
    stats: RowStats,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    transform: Transform,
    out: Tensor,
) -> None:
    x, slope = transformed(logits, transform)
    inside, index = _located(tokens, x.shape[-1])
    maximum, scale = stats.maximum[:, None], torch.exp(-stats.log_sum)  # p = exp(d) * scale
    grad = out if out.dtype == x.dtype and (x is logits or c is None) else torch.empty_like(x)
    at_token = b
    if c is None:
        torch.sub(x, maximum, out=grad)
        chosen = grad.gather(-1, index)[:, 0]
        grad.exp_().mul_(((b - a) * scale)[:, None])
    else:
        d = (x - maximum).clamp_(min=_GONE)
        chosen = d.gather(-1, index)[:, 0]
        at_token = b + c * chosen
        torch.exp(d, out=grad)
        grad.mul_(d.mul_((c * scale)[:, None]).add_(((b - a) * scale)[:, None]))
    at_token = a * stats.miss + at_token * chosen.exp() * scale
    grad.scatter_(-1, index, torch.where(inside, at_token, grad.gather(-1, index)[:, 0])[:, None])
    if slope is not None:
        grad.mul_(slope)
    if transform.row_temperature is not None:
        grad.mul_((transform.logit_scale / transform.row_temperature.to(grad.dtype))[:, None])
    elif transform.logit_scale != transform.temperature:
        grad.mul_(transform.logit_scale / transform.temperature)
    if grad is not out:
        out.copy_(grad)


def row_grads_reference(
    logits: Tensor,
    tokens: Tensor,
    stats: RowStats,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    transform: Transform,
    *,
    out: Tensor,
) -> Tensor:
    """Writes the gradient in the logits to `out`, which may be `logits`. a, b, c are [N]; c None = zeros.

    logits may be some columns of each row [N, width]; tokens [N] then count from the first of them.
    """
    num_rows, width = logits.shape
    step = _block_rows(width, logits.device)
    if num_rows <= step:
        _grads_block(logits, tokens, stats, a, b, c, transform, out)
        return out
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        part = None if c is None else c[rows]
        some = take_stats(stats, rows)
        _grads_block(logits[rows], tokens[rows], some, a[rows], b[rows], part, transform.take(rows), out[rows])
    return out


def row_stats(
    op: str, logits: Tensor, tokens: Tensor, transform: Transform, *, with_entropy: bool, mask: Tensor | None = None
) -> RowStats:
    """Statistics of each row of [..., V]; 0 where `mask` is False. Runs the kernel where there is one.

    Args:
        tokens: [N], N = number of rows; so are `mask` and a row temperature.
    """
    if use_triton(op, logits):
        from rlhf_kernels.triton_rows import row_stats_triton

        return row_stats_triton(logits, tokens, transform, with_entropy=with_entropy, mask=mask)
    mask = None if mask is not None and bool(mask.all()) else mask
    parts, start = [], 0
    for block in row_blocks(logits):
        rows = slice(start, start + len(block))
        start += len(block)
        if mask is None:
            part = row_stats_reference(block, tokens[rows], transform.take(rows), with_entropy=with_entropy)
        else:
            kept = mask[rows].nonzero()[:, 0]
            some = transform.take(rows).take(kept)
            part = row_stats_reference(block[kept], tokens[rows][kept], some, with_entropy=with_entropy)
            part = RowStats(*(spread(field, kept, len(block)) for field in part))
        parts.append(part)
    return parts[0] if len(parts) == 1 else RowStats(*(torch.cat(field) for field in zip(*parts, strict=True)))


def row_grads(
    op: str,
    logits: Tensor,
    tokens: Tensor,
    stats: RowStats,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    transform: Transform,
    *,
    out: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Gradient in the logits [..., V], written to `out`, which may be `logits`; 0 where `mask` is False.

    Runs the kernel where there is one.
    """
    if use_triton(op, logits):
        from rlhf_kernels.triton_rows import row_grads_triton

        return row_grads_triton(logits, tokens, stats, a, b, c, transform, out=out, mask=mask)
    mask = None if mask is not None and bool(mask.all()) else mask
    start = 0
    for block in row_blocks(logits):
        rows = slice(start, start + len(block))
        start += len(block)
        target = out.view(-1, out.shape[-1])[rows] if out is not logits else block
        some = take_stats(stats, rows)
        part = None if c is None else c[rows]
        if mask is None:
            row_grads_reference(block, tokens[rows], some, a[rows], b[rows], part, transform.take(rows), out=target)
            continue
        kept = mask[rows].nonzero()[:, 0]
        some = take_stats(some, kept)
        grads = torch.empty((len(kept), block.shape[1]), dtype=out.dtype, device=out.device)
        part = None if part is None else part[kept]
        taken = (block[kept], tokens[rows][kept], some, a[rows][kept], b[rows][kept], part)
        row_grads_reference(*taken, transform.take(rows).take(kept), out=grads)
        target.zero_().index_copy_(0, kept, grads)
    return out


def spread(values: Tensor, kept: Tensor, num_rows: int) -> Tensor:
    """Per kept row -> per row, 0 elsewhere; an empty (not asked for) field stays empty."""
    if values.numel() == 0 and len(kept):
        return values
    return values.new_zeros((num_rows, *values.shape[1:])).index_copy_(0, kept, values)


def coefficients(
    stats: RowStats, d_logprob: Tensor | None, d_entropy: Tensor | None, d_logsumexp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """a, b, c of the module's formula from the gradients in the three outputs of a row; None = zero."""
    zero = torch.zeros_like(stats.maximum)
    a = zero if d_logprob is None else d_logprob
    b = zero if d_logsumexp is None else d_logsumexp
    if d_entropy is None:
        return a, b, None
    return a, b + d_entropy * (stats.log_sum - stats.entropy), -d_entropy
