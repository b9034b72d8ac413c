# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Kernels of one row of logits: statistics in one read, gradient in one read and one write; formulas in `rows`.

Legend: N = rows, V = vocabulary. Rows are addressed by two strides, so that logits[:, :-1] needs no copy; offsets are
int64. What changes from call to call (lengths, temperatures, coefficients) is read from memory or not specialised:
only the vocabulary, the dtype and the flags in capitals compile anew.

A row may begin anywhere (a vocabulary of 50257): it is read from the multiple of STEP elements before it, in vectors
all the same, and what comes before the row is masked in the first block. Places are counted from there: column 0 is at
place `low`.
"""

import functools
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
    "a_ptr", "b_ptr", "c_ptr", "loss_ptr", "ratio_ptr", "clipped_ptr", "kl_ptr", "offset_ptr", "wanted_ptr",
]  # fmt: skip
"""Read or written a number at a time, often from the middle of a tensor (a chunk of rows, tokens[1:]): whether that is
a multiple of 16 bytes must not be compiled in."""


STEP = tl.constexpr(16)
"""Elements between places where a row may begin without `low`: a vector of any dtype, so that two tensors agree."""


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, ALIGNED: tl.constexpr):
    offset = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    if ALIGNED:
        offset = tl.multiple_of(offset, STEP)
    return offset


@triton.jit
def row_place(ptr, row, inner, stride_outer, stride_inner, ALIGNED: tl.constexpr):
    """Address of place 0 of a row, where a vector begins, and `low`, the place of its first column."""
    start = ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    if ALIGNED:
        return start, 0
    size: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    low = (start.to(tl.int64) // size % STEP).to(tl.int32)
    return tl.multiple_of(start - low, 16), low


@triton.jit
def out_place(ptr, row, inner, stride_outer, stride_inner, low, ALIGNED: tl.constexpr, TOGETHER: tl.constexpr):
    """Address of place 0 of the row of an output; with TOGETHER, its rows begin as far past a vector as the input's.

    Where both are ALIGNED, what is known of the pointers says where vectors may begin.
    """
    place = ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGNED) - low
    if TOGETHER and not ALIGNED:
        place = tl.multiple_of(place, 16)
    return place


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


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """As one multiplication and one instruction: results below 2^-126 are 0, which costs three instructions less."""
    return tl.exp2(x * LOG2E)


@triton.jit
def capped(z, scalars_ptr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """The logits after scale and cap, and their slope: 1.0, or like them."""
    y = z.to(tl.float32)
    slope = 1.0
    if SCALED:
        slope = tl.load(scalars_ptr + 2)
        y = y * slope
    if CAPPED:
        cap = tl.load(scalars_ptr + 1)
        tanh, bend = tanh_and_slope(y / cap)
        y = cap * tanh
        slope = slope * bend
    return y, slope


@triton.jit
def transformed(z, scalars_ptr, inverse_temperature, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """The logits after scale, cap and temperature."""
    y, _ = capped(z, scalars_ptr, SCALED, CAPPED)
    return y * inverse_temperature


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
def special_blocks(token, low, limit, BLOCK: tl.constexpr):
    """Which blocks of places need more than arithmetic: the token's, and those at the ends that the row does not fill.

    Where the last begins, where the token's does, whether that is another, and whether the first is one more: to look
    for the token everywhere would cost as much as the exponentials.
    """
    token = tl.where((token >= 0) & (token < limit - low), token, -1)  # an id may need 64 bits; a place needs 32
    whole = limit // BLOCK * BLOCK
    first = tl.where(token >= 0, token + low, 0).to(tl.int32) // BLOCK * BLOCK
    apart = (token >= 0) & (first < whole)
    ragged = (low > 0) & (whole > 0) & ((first > 0) | (token < 0))
    return whole, first, apart, ragged


@triton.jit
def special_block(i, whole, first, apart):
    """Where the i-th of them begins: the last (0, unless it is whole), the token's (if `apart`), the first."""
    return tl.where(i == 0, whole, tl.where(apart & (i == 1), first, 0))


@triton.jit
def plain_block(i, first, apart, ragged, BLOCK: tl.constexpr):
    """Where the i-th of the other blocks begins."""
    start = (i + tl.where(ragged, 1, 0)) * BLOCK
    return start + tl.where(apart & (start >= first), BLOCK, 0)


@triton.jit
def num_plain(whole, apart, ragged, BLOCK: tl.constexpr):
    return whole // BLOCK - tl.where(apart, 1, 0) - tl.where(ragged, 1, 0)


@triton.jit
def add_columns(y, scale, maximum, others, weighted, columns, token, EXCLUDE: tl.constexpr, ENTROPY: tl.constexpr):
    """The sums of each lane with more columns, the token's not among them (EXCLUDE)."""
    top = tl.maximum(maximum, tl.max(y, 1))
    base = tl.where(top == -float("inf"), 0.0, top)
    d = y - base[:, None]
    e = tl.exp2(d * scale)
    if EXCLUDE:
        e = tl.where(columns == token, 0.0, e)
    shrink = tl.exp2((maximum - base) * scale)
    if ENTROPY:
        moved = tl.where(others > 0, others * (maximum - base), 0.0)
        weighted = (weighted + moved) * shrink + tl.sum(tl.where(e > 0, e * d, 0.0), 1)
    return top, others * shrink + tl.sum(e, 1), weighted


@triton.jit
def token_logit(row_ptr, token, V, keep):
    """An id outside [0, V) reads nothing and makes its row NaN."""
    return tl.load(row_ptr + token, mask=keep & (token >= 0) & (token < V), other=float("nan"))


@triton.jit
def finished_stats(
    maximum, others, weighted, z, inverse_temperature, scalars_ptr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The statistics of a row from the sums of its lanes over the other columns, and the token's logit z."""
    scale = inverse_temperature * LOG2E
    top = tl.max(maximum, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    shrink = tl.exp2((maximum - base) * scale)
    mean = 0.0
    if ENTROPY:
        moved = tl.where(others > 0, others * (maximum - base), 0.0)
        mean = tl.sum((weighted + moved) * shrink, 0) * inverse_temperature
    rest = tl.sum(others * shrink, 0)
    y, _ = capped(z, scalars_ptr, SCALED, CAPPED)
    # by what is compared: a compiler may put the scale and the difference into one instruction, which rounds once
    is_argmax = (y == top) & (tl.abs(top) < float("inf"))
    d = tl.where(is_argmax, 0.0, (y - top) * inverse_temperature)
    e = tl.exp(d)
    total = rest + e
    log_sum = tl.where(is_argmax, log1p(rest), tl.log(total))
    entropy = 0.0
    if ENTROPY:
        entropy = log_sum - (mean + tl.where(e > 0, e * d, 0.0)) / total
    return d - log_sum, entropy, top, log_sum, rest / total, is_argmax


@triton.jit
def stats_of_row(
    row_ptr, low, token, inverse_temperature, scalars_ptr, V, keep,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """One pass: running maximum m, sum of exp(x - m) over the other columns, and sum of exp(x - m) (x - m).

    A lane takes WIDTH neighbouring columns, one vector, of every LANES * WIDTH, and keeps sums of its own: lanes meet
    once, at the end of the row. Until then the maximum is that of the logits before the temperature.
    A row with keep False is not read; `row_ptr` is its place 0.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    scale = inverse_temperature * LOG2E
    limit = tl.where(keep, V + low, 0)
    at = tl.where(token >= 0, token + low, -1)
    lane = tl.arange(0, LANES) * WIDTH
    offsets = lane[:, None] + tl.arange(0, WIDTH)[None, :]
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    others = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole, first, apart, ragged = special_blocks(token, low, limit, BLOCK)
    for i in range(num_plain(whole, apart, ragged, BLOCK)):
        places = plain_block(i, first, apart, ragged, BLOCK) + offsets
        y, _ = capped(tl.load(row_ptr + places, eviction_policy=EVICT), scalars_ptr, SCALED, CAPPED)
        maximum, others, weighted = add_columns(y, scale, maximum, others, weighted, places, at, False, ENTROPY)
    for i in range(tl.where(whole < limit, 0, 1), 1 + tl.where(apart, 1, 0) + tl.where(ragged, 1, 0)):
        start = special_block(i, whole, first, apart)
        places = start + offsets
        inside = (start + lane < limit)[:, None]  # a whole vector is, or is not
        if not ALIGNED:
            inside = (places >= low) & (places < limit)
        z = tl.load(row_ptr + places, mask=inside, other=-float("inf"), eviction_policy=EVICT)
        y, _ = capped(z, scalars_ptr, SCALED, CAPPED)
        y = tl.where(inside, y, -float("inf"))
        maximum, others, weighted = add_columns(y, scale, maximum, others, weighted, places, at, True, ENTROPY)
    z = token_logit(row_ptr + low, token, V, keep)
    return finished_stats(maximum, others, weighted, z, inverse_temperature, scalars_ptr, SCALED, CAPPED, ENTROPY)


@triton.jit
def grad_of_columns(
    z, columns, token, maximum, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr,
    HAS_TOKEN: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient in some columns of a row, the token's perhaps among them (HAS_TOKEN)."""
    y, slope = capped(z, scalars_ptr, SCALED, CAPPED)
    d = y * inverse_temperature - maximum
    p = tl.exp2(d * LOG2E - log_sum * LOG2E)
    # the slope goes to the coefficients where it is one number
    slope = slope * inverse_temperature
    bend = 0.0
    if ENTROPY:
        bend = tl.where(p > 0, c * d, 0.0)
    grad = p * (b - a + bend) * slope if CAPPED or ENTROPY else p * ((b - a) * slope)
    if HAS_TOKEN:
        grad = tl.where(columns == token, (a * miss + p * (b + bend)) * slope, grad)
    return grad


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=PER_ROW)
def row_stats_kernel(
    logits_ptr, tokens_ptr, mask_ptr, temperature_ptr, scalars_ptr,
    logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr, miss_ptr, argmax_ptr,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, V,
    LANES: tl.constexpr, WIDTH: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    keep = row >= 0
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    token = tl.load(tokens_ptr + row, mask=keep, other=0)
    inverse_temperature = inverse_temperature_of(temperature_ptr, scalars_ptr, row, keep, ROW_TEMPERATURE)
    row_ptr, low = row_place(logits_ptr, row, inner, stride_outer, stride_inner, ALIGNED)
    logprob, entropy, top, log_sum, miss, is_argmax = stats_of_row(
        row_ptr, low, token, inverse_temperature, scalars_ptr, V, keep, LANES, WIDTH, SCALED, CAPPED, ENTROPY, ALIGNED,
        "evict_first",
    )  # fmt: skip
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(maximum_ptr + row, tl.where(keep, top * inverse_temperature, 0.0))
    tl.store(log_sum_ptr + row, tl.where(keep, log_sum, 0.0))
    tl.store(miss_ptr + row, tl.where(keep, miss, 0.0))
    tl.store(argmax_ptr + row, (keep & is_argmax).to(tl.int8))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0))


@triton.jit
def store_zeros(out, inside, whole, BLOCK: tl.constexpr):
    """In a block of places, of which all are inside the row where `whole` says so."""
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    if whole:
        tl.store(out, zeros)
    else:
        tl.store(out, zeros, mask=inside)


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=PER_ROW)
def row_grads_kernel(
    logits_ptr, out_ptr, tokens_ptr, mask_ptr, temperature_ptr, scalars_ptr,
    maximum_ptr, log_sum_ptr, miss_ptr, a_ptr, b_ptr, c_ptr,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, out_stride_outer: tl.int64, out_stride_inner: tl.int64, V,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    places = start + tl.arange(0, BLOCK)
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
    row_ptr, low = row_place(logits_ptr, row, inner, stride_outer, stride_inner, ALIGNED)
    out = out_place(out_ptr, row, inner, out_stride_outer, out_stride_inner, low, ALIGNED, TOGETHER) + places
    limit = V + low
    at = tl.where(token >= 0, token + low, -1)
    whole = (start >= low) & (start + BLOCK <= limit)
    inside = (places >= low) & (places < limit)
    maximum = tl.load(maximum_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    miss = tl.load(miss_ptr + row)
    # a row without coefficient is not read: its gradient is 0 whatever it holds
    if active:
        # two bodies, each with its loads, and not a flag: a branch around arithmetic alone is computed both ways
        if whole & ((at < start) | (at >= start + BLOCK)):
            z = tl.load(row_ptr + places)
            grad = grad_of_columns(
                z, places, at, maximum, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr, False, SCALED,
                CAPPED, ENTROPY,
            )  # fmt: skip
            tl.store(out, grad.to(out_ptr.dtype.element_ty))
        else:
            z = tl.load(row_ptr + places, mask=inside, other=-float("inf"))
            grad = grad_of_columns(
                z, places, at, maximum, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr, True, SCALED,
                CAPPED, ENTROPY,
            )  # fmt: skip
            tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        store_zeros(out, inside, whole, BLOCK)


@triton.jit(do_not_specialize=["factor_stride", "num_rows"], do_not_specialize_on_alignment=PER_ROW)
def scale_rows_kernel(grads_ptr, factor_ptr, factor_stride, num_rows, V, BLOCK: tl.constexpr):
    # one factor for all rows, and it is 1: nothing to do, nor to ask for every row
    num_rows = tl.where((factor_stride == 0) & (tl.load(factor_ptr) == 1.0), 0, num_rows)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        factor = tl.load(factor_ptr + row * factor_stride)
        if factor != 1.0:
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
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
        return all(size % STEP.value == 0 for size in (self.tensor.shape[-1], self.outer, self.stride))

    def together(self, other: "Layout") -> bool:
        """Whether row n of both begins equally far past a multiple of STEP elements."""
        begins = (x.tensor.data_ptr() // x.tensor.element_size() for x in (self, other))
        pairs = (tuple(begins), (self.outer, other.outer), (self.stride, other.stride))
        return self.inner == other.inner and all((one - two) % STEP.value == 0 for one, two in pairs)


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


def lanes_for(vocab: int, element_size: int) -> tuple[int, int, int]:
    """Lanes, columns of each, and warps: a vector of 16 bytes per lane, two lanes per thread."""
    width = 16 // element_size
    lanes = min(512, max(32, triton.next_power_of_2(triton.cdiv(vocab, width))))
    return lanes, width, max(1, lanes // 64)


def block_for(vocab: int, largest: int) -> tuple[int, int]:
    """Columns per step, and warps: at most 16 elements per thread, so that nothing spills."""
    block = min(largest, max(16, triton.next_power_of_2(vocab)))
    return block, min(16, max(1, block // 512))


@functools.cache
def num_programs(device: torch.device) -> int:
    """One per multiprocessor; a few where there is no such thing."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def row_registers(capped: bool) -> int:
    """Ceiling on the registers of a thread: without one the assembler aims at full occupancy, and spills for it."""
    return 96 if capped else 64


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
    lanes, width, warps = lanes_for(vocab, logits.element_size())
    if num_rows:
        row_stats_kernel[(num_rows,)](
            rows.tensor, tokens.contiguous(), bytes_of(mask, tokens), _temperatures(transform, tokens),
            numbers(transform, logits.device), logprobs, entropy, maximum, log_sum, miss, argmax.view(torch.uint8),
            rows.inner, rows.outer, rows.stride, vocab,
            LANES=lanes, WIDTH=width, HAS_MASK=mask is not None, ENTROPY=with_entropy, ALIGNED=rows.aligned,
            **flags(transform), **launch_options(warps, row_registers(transform.softcap != 0.0)),
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
    aligned = rows.aligned and target.aligned
    places = vocab if aligned else vocab + STEP.value - 1
    if num_rows:
        row_grads_kernel[(num_rows, triton.cdiv(places, block))](
            rows.tensor, target.tensor, tokens.contiguous(), bytes_of(mask, tokens), _temperatures(transform, tokens),
            numbers(transform, logits.device), stats.maximum.contiguous(), stats.log_sum.contiguous(),
            stats.miss.contiguous(), a.contiguous(), b.contiguous(), a if c is None else c.contiguous(),
            rows.inner, rows.outer, rows.stride, target.outer, target.stride, vocab,
            BLOCK=block, HAS_MASK=mask is not None, ENTROPY=c is not None, ALIGNED=aligned,
            TOGETHER=aligned or rows.together(target), num_warps=warps, **flags(transform),
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
        programs = min(rows, 8 * num_programs(grads.device))  # most have nothing to do but ask
        scale_rows_kernel[(programs,)](grads, factor, stride, rows, width, BLOCK=block, num_warps=warps)


KERNELS: dict[str, Any] = {
    "row_stats": row_stats_kernel,
    "row_grads": row_grads_kernel,
    "scale_rows": scale_rows_kernel,
}
