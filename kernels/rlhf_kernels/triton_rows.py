# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Kernels of one row of logits: statistics in one read, gradient in one read and one write; formulas in `rows`.

Legend: N = rows, V = vocabulary. Rows are addressed by two strides, so that logits[:, :-1] needs no copy; offsets are
int64. What changes from call to call (lengths, temperatures, coefficients) is read from memory or not specialised:
only the vocabulary, the dtype and the flags in capitals compile anew.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device, scalars
from rlhf_kernels.rows import RowStats, Transform, work_dtype

VARIES = ["inner", "stride_outer", "stride_inner", "out_stride_outer", "out_stride_inner", "num_rows"]
"""Strides are annotated as int64 besides: past 2^31 an integer would be of another type, so another kernel."""
PER_ROW = [
    "tokens_ptr", "mask_ptr", "temperature_ptr", "scalars_ptr", "denominator_ptr", "old_ptr", "advantages_ptr",
    "weights_ptr", "factor_ptr", "logprobs_ptr", "entropy_ptr", "maximum_ptr", "log_sum_ptr", "miss_ptr", "argmax_ptr",
    "a_ptr", "b_ptr", "c_ptr", "loss_ptr", "ratio_ptr", "clipped_ptr", "kl_ptr",
]  # fmt: skip
"""Read or written a number at a time, often from the middle of a tensor (a chunk of rows, tokens[1:]): whether that is
a multiple of 16 bytes must not be compiled in."""


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, ALIGNED: tl.constexpr):
    offset = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def tanh_and_slope(u):
    """By its series near 0, where 1 - exp(-2 u) has lost the digits of u."""
    shrunk = tl.exp(-2.0 * tl.abs(u))
    share = 1.0 / (1.0 + shrunk)
    square = u * u
    series = 0.1333333333 - square * (0.0539682540 - square * 0.0218694885)
    series = u * (1.0 - square * (0.3333333333 - square * series))
    far = tl.where(u < 0, -1.0, 1.0) * (1.0 - shrunk) * share
    return tl.where(square < 0.0625, series, far), 4.0 * shrunk * share * share


@triton.jit
def transformed(z, scalars_ptr, inverse_temperature, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """The logits after scale, cap and temperature, and their slope."""
    x = z.to(tl.float32)
    slope = tl.where(x == x, 1.0, 1.0)  # not x * 0 + 1: x may be infinite
    if SCALED:
        scale = tl.load(scalars_ptr + 2)
        x = x * scale
        slope = slope * scale
    if CAPPED:
        cap = tl.load(scalars_ptr + 1)
        tanh, bend = tanh_and_slope(x / cap)
        x = cap * tanh
        slope = slope * bend
    return x * inverse_temperature, slope * inverse_temperature


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0: by its series where 1 + u would forget u."""
    return tl.where(u < 1e-3, u * (1.0 - u * (0.5 - u * (0.3333333333 - 0.25 * u))), tl.log(1.0 + u))


@triton.jit
def inverse_temperature_of(temperature_ptr, scalars_ptr, row, keep, ROW_TEMPERATURE: tl.constexpr):
    if ROW_TEMPERATURE:
        return 1.0 / tl.load(temperature_ptr + row, mask=keep, other=1.0)
    return tl.load(scalars_ptr)


@triton.jit
def stats_of_row(
    row_ptr, token, inverse_temperature, scalars_ptr, V, keep,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One pass: running maximum m, sum of exp(x - m) over the other columns, and sum of exp(x - m) (x - m).

    A row with keep False is not read.
    """
    maximum = -float("inf")
    others = 0.0
    weighted = 0.0
    for start in range(0, tl.where(keep, V, 0), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(row_ptr + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x, _ = transformed(z, scalars_ptr, inverse_temperature, SCALED, CAPPED)
        x = tl.where(inside, x, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(x, 0))
        base = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        d = x - base
        e = tl.where(columns == token, 0.0, tl.exp(d))
        shrink = tl.exp(maximum - base)
        if ENTROPY:
            moved = tl.where(others > 0, others * (maximum - base), 0.0)
            weighted = (weighted + moved) * shrink + tl.sum(tl.where(e > 0, e * d, 0.0), 0)
        others = others * shrink + tl.sum(e, 0)
        maximum = new_maximum
    # an id outside [0, V) reads nothing and makes its row NaN
    known = keep & (token >= 0) & (token < V)
    z = tl.load(row_ptr + token, mask=known, other=float("nan"))
    chosen, _ = transformed(z, scalars_ptr, inverse_temperature, SCALED, CAPPED)
    d = chosen - maximum
    e = tl.exp(d)
    total = others + e
    is_argmax = d == 0.0
    log_sum = tl.where(is_argmax, log1p(others), tl.log(total))
    entropy = 0.0
    if ENTROPY:
        entropy = log_sum - (weighted + tl.where(e > 0, e * d, 0.0)) / total
    return d - log_sum, entropy, maximum, log_sum, others / total, is_argmax


@triton.jit
def grad_of_block(
    x, slope, columns, token, maximum, log_sum, miss, a, b, c,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    d = x - maximum
    p = tl.exp(d - log_sum)
    inner = b - a
    at_token = b
    if ENTROPY:
        bend = tl.where(p > 0, c * d, 0.0)
        inner = inner + bend
        at_token = at_token + bend
    return tl.where(columns == token, a * miss + p * at_token, p * inner) * slope


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=PER_ROW)
def row_stats_kernel(
    logits_ptr, tokens_ptr, mask_ptr, temperature_ptr, scalars_ptr,
    logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr, miss_ptr, argmax_ptr,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, V,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    keep = row >= 0
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    token = tl.load(tokens_ptr + row, mask=keep, other=0)
    inverse_temperature = inverse_temperature_of(temperature_ptr, scalars_ptr, row, keep, ROW_TEMPERATURE)
    row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    logprob, entropy, maximum, log_sum, miss, is_argmax = stats_of_row(
        row_ptr, token, inverse_temperature, scalars_ptr, V, keep, BLOCK, SCALED, CAPPED, ENTROPY
    )
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(maximum_ptr + row, tl.where(keep, maximum, 0.0))
    tl.store(log_sum_ptr + row, tl.where(keep, log_sum, 0.0))
    tl.store(miss_ptr + row, tl.where(keep, miss, 0.0))
    tl.store(argmax_ptr + row, (keep & is_argmax).to(tl.int8))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0))


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=PER_ROW)
def row_grads_kernel(
    logits_ptr, out_ptr, tokens_ptr, mask_ptr, temperature_ptr, scalars_ptr,
    maximum_ptr, log_sum_ptr, miss_ptr, a_ptr, b_ptr, c_ptr,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, out_stride_outer: tl.int64, out_stride_inner: tl.int64, V,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = row >= 0
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    a = tl.load(a_ptr + row, mask=keep, other=0.0)
    b = tl.load(b_ptr + row, mask=keep, other=0.0)
    c = 0.0
    active = (a != 0.0) | (b != 0.0)
    if ENTROPY:
        c = tl.load(c_ptr + row, mask=keep, other=0.0)
        active = active | (c != 0.0)
    token = tl.load(tokens_ptr + row, mask=keep, other=0)
    inverse_temperature = inverse_temperature_of(temperature_ptr, scalars_ptr, row, keep, ROW_TEMPERATURE)
    # a row without coefficient is not read: its gradient is 0 whatever it holds
    read = columns < tl.where(active, V, 0)
    offset = row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    z = tl.load(logits_ptr + offset + columns, mask=read, other=-float("inf"))
    x, slope = transformed(z, scalars_ptr, inverse_temperature, SCALED, CAPPED)
    maximum = tl.load(maximum_ptr + row)
    grad = grad_of_block(
        x, slope, columns, token, maximum, tl.load(log_sum_ptr + row), tl.load(miss_ptr + row), a, b, c, ENTROPY
    )
    grad = tl.where(read, grad, 0.0)
    out = out_ptr + row_offset(row, inner, out_stride_outer, out_stride_inner, ALIGNED) + columns
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=columns < V)


@triton.jit(do_not_specialize=["factor_stride"], do_not_specialize_on_alignment=PER_ROW)
def scale_rows_kernel(grads_ptr, factor_ptr, factor_stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * factor_stride)
    if factor != 1.0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        pointers = grads_ptr + row * V + columns
        grads = tl.load(pointers, mask=columns < V, other=0.0).to(tl.float32)
        tl.store(pointers, (grads * factor).to(grads_ptr.dtype.element_ty), mask=columns < V)


class Layout(NamedTuple):
    """How rows of a tensor are addressed: row n is at (n // inner) * outer + (n % inner) * stride."""

    tensor: Tensor
    inner: int
    outer: int
    stride: int

    @property
    def aligned(self) -> bool:
        """Whether every row starts where the first does, as far as vector loads care."""
        return all(size % 16 == 0 for size in (self.tensor.shape[-1], self.outer, self.stride))


def layout(x: Tensor, *, inner: int | None = None) -> Layout:
    """Of [..., V]; copied only where no two strides describe it."""
    vocab = x.shape[-1]
    rows = x.numel() // vocab
    if x.stride(-1) != 1 and vocab > 1:
        x = x.contiguous()
    if x.ndim == 3 and inner in (None, x.shape[1]):
        return Layout(x, x.shape[1], x.stride(0), x.stride(1))
    if x.ndim != 2:
        x = x.reshape(-1, vocab)
    if inner is None or inner == rows:
        return Layout(x, max(1, rows), 0, x.stride(0))
    return Layout(x, inner, inner * x.stride(0), x.stride(0))


def block_for(vocab: int, largest: int) -> tuple[int, int]:
    """Columns per step, and warps: at most 16 elements per thread, so that nothing spills."""
    block = min(largest, max(16, triton.next_power_of_2(vocab)))
    return block, min(16, max(1, block // 512))


STATS_REGISTERS = 96
"""Without a ceiling the assembler aims at full occupancy and spills a register or two to get there."""


def launch_options(warps: int, registers: int) -> dict[str, int]:
    """Warps, and the ceiling on registers per thread where the compiler knows one (NVIDIA)."""
    return {"num_warps": warps} if torch.version.hip else {"num_warps": warps, "maxnreg": registers}


def flags(transform: Transform) -> dict[str, bool]:
    return {
        "ROW_TEMPERATURE": transform.row_temperature is not None,
        "SCALED": transform.logit_scale != 1.0,
        "CAPPED": transform.softcap != 0.0,
    }


def numbers(transform: Transform, device: torch.device) -> Tensor:
    return scalars(device, 1.0 / transform.temperature, transform.softcap, transform.logit_scale)


def bytes_of(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask as bytes; any tensor where there is none, to stand for a pointer that is not followed."""
    return like if mask is None else mask.contiguous().view(torch.uint8)


@on_device
def row_stats_triton(
    logits: Tensor, tokens: Tensor, transform: Transform, *, with_entropy: bool, mask: Tensor | None = None
) -> RowStats:
    """`rows.row_stats_reference` in one launch, on [..., V] of any strides."""
    rows = layout(logits)
    num_rows, vocab = tokens.numel(), logits.shape[-1]
    # each output its own storage: an op may not return views of one tensor
    sizes = (num_rows, num_rows if with_entropy else 0, num_rows, num_rows, num_rows)
    logprobs, entropy, maximum, log_sum, miss = (
        torch.empty(size, dtype=work_dtype(logits), device=logits.device) for size in sizes
    )
    argmax = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    block, warps = block_for(vocab, 4096)
    if num_rows:
        row_stats_kernel[(num_rows,)](
            rows.tensor, tokens.contiguous(), bytes_of(mask, tokens), _temperatures(transform, tokens),
            numbers(transform, logits.device), logprobs, entropy, maximum, log_sum, miss, argmax.view(torch.uint8),
            rows.inner, rows.outer, rows.stride, vocab,
            BLOCK=block, HAS_MASK=mask is not None, ENTROPY=with_entropy, ALIGNED=rows.aligned,
            **flags(transform), **launch_options(warps, STATS_REGISTERS),
        )  # fmt: skip
    return RowStats(logprobs, entropy, maximum, log_sum, miss, argmax)


def _temperatures(transform: Transform, like: Tensor) -> Tensor:
    return like if transform.row_temperature is None else transform.row_temperature.contiguous()


@on_device
def row_grads_triton(
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
    """`rows.row_grads_reference` in one launch; `out` may be `logits`."""
    rows = layout(logits)
    target = rows if out is logits else layout(out, inner=rows.inner)
    num_rows, vocab = tokens.numel(), logits.shape[-1]
    block, warps = block_for(vocab, 4096)
    if num_rows:
        row_grads_kernel[(num_rows, triton.cdiv(vocab, block))](
            rows.tensor, target.tensor, tokens.contiguous(), bytes_of(mask, tokens), _temperatures(transform, tokens),
            numbers(transform, logits.device), stats.maximum.contiguous(), stats.log_sum.contiguous(),
            stats.miss.contiguous(), a.contiguous(), b.contiguous(), a if c is None else c.contiguous(),
            rows.inner, rows.outer, rows.stride, target.outer, target.stride, vocab,
            BLOCK=block, HAS_MASK=mask is not None, ENTROPY=c is not None, ALIGNED=rows.aligned and target.aligned,
            num_warps=warps, **flags(transform),
        )  # fmt: skip
    if out is logits and rows.tensor.data_ptr() != logits.data_ptr():  # no two strides described it: that was a copy
        logits.copy_(rows.tensor.view(logits.shape))
    return out


@on_device
def scale_rows_triton(grads: Tensor, factor: Tensor) -> None:
    """grads [..., n] *= factor, a scalar or one per row; a row whose factor is 1 is neither read nor written."""
    assert grads.is_contiguous()
    factor = factor.float().contiguous()
    width = grads.shape[-1] if grads.ndim else 1
    rows = grads.numel() // max(1, width)
    block, warps = block_for(width, 4096)
    if rows:
        stride = 0 if factor.ndim == 0 else 1
        scale_rows_kernel[(rows, triton.cdiv(width, block))](grads, factor, stride, width, BLOCK=block, num_warps=warps)


KERNELS: dict[str, Any] = {
    "row_stats": row_stats_kernel,
    "row_grads": row_grads_kernel,
    "scale_rows": scale_rows_kernel,
}
