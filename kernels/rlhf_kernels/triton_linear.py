# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""From hidden states to the statistics of each row, in two launches; the logits exist a tile at a time, in registers.

Legend: N rows, V vocabulary, H hidden. A persistent program owns a block of rows and a piece of PIECE_TILES tiles of
vocabulary at a time. It multiplies tile after tile, keeps the running maximum and sums of each row in registers, and
writes them once per piece; the second launch merges the pieces of a row in the order of the vocabulary.

The order in which a row's numbers are added depends on V, H, the dtype and the device, and on nothing else: not on N,
not on the row's place, not on which program is first. No atomics, no split of H, no tuning by timing. So a row has the
same bits in any batch.

References:
    Milakov and Gimelshein, Online normalizer calculation for softmax, 2018. arXiv:1805.02867
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlhf_kernels.backend import on_device
from rlhf_kernels.rows import RowStats, Transform
from rlhf_kernels.triton_rows import PER_ROW, exp, flags, launch_options, log1p, num_programs, numbers, transformed

PIECE_TILES = 8
"""Tiles of vocabulary per program and block of rows: pieces enough to fill a device, partial sums few enough to forget.

A part of the order of addition: it must not depend on N."""
GROUP_BYTES = 8 << 20
"""Of states that meet the whole vocabulary together, and stay in the L2 cache (50 or 60 MiB) beside what passes by."""
MERGE_ROWS = 32


@triton.jit
def tile_pointers(ptr, first, size, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of COLUMNS elements of each of ROWS rows; rows beyond `size` point at the last, so are safe to read."""
    rows = tl.minimum(first + tl.arange(0, ROWS), size - 1)
    offsets = rows.to(tl.int64) * stride
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 16)
    return ptr + offsets[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def merged(maximum, others, weighted, new_maximum, new_others, new_weighted, ENTROPY: tl.constexpr):
    """Running maximum, sum of exp(x - maximum), and sum of exp(x - maximum) (x - maximum), of the columns of both."""
    top = tl.maximum(maximum, new_maximum)
    base = tl.where(top == -float("inf"), 0.0, top)
    shrink = exp(maximum - base)
    new_shrink = exp(new_maximum - base)
    if ENTROPY:
        moved = tl.where(others > 0, others * (maximum - base), 0.0)
        new_moved = tl.where(new_others > 0, new_others * (new_maximum - base), 0.0)
        weighted = (weighted + moved) * shrink + (new_weighted + new_moved) * new_shrink
    return top, others * shrink + new_others * new_shrink, weighted


@triton.jit
def sums_of_tile(
    z, columns, token, bias_ptr, scalars_ptr, inverse_temperature, V,
    BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Of logits [rows, columns]: maximum, sum of exp(x - maximum) without the token, x of the token, entropy's sum."""
    inside = columns < V
    if BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    x = transformed(z, scalars_ptr, inverse_temperature, SCALED, CAPPED)
    x = tl.where(inside[None, :], x, -float("inf"))
    maximum = tl.max(x, 1)
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    is_token = columns[None, :] == token[:, None]
    # a sum, not a maximum, which would forget a NaN; all but one of its terms are 0
    chosen = tl.sum(tl.where(is_token, x, 0.0), 1)
    d = x - base[:, None]
    e = tl.where(is_token, 0.0, exp(d))
    weighted = tl.sum(tl.where(e > 0, e * d, 0.0), 1) if ENTROPY else chosen
    return maximum, tl.sum(e, 1), chosen, weighted


@triton.jit(do_not_specialize=["num_rows", "stride_hidden", "stride_weight"], do_not_specialize_on_alignment=PER_ROW)
def linear_stats_kernel(
    hidden_ptr, weight_ptr, bias_ptr, tokens_ptr, temperature_ptr, scalars_ptr, partials_ptr,
    num_rows, stride_hidden: tl.int64, stride_weight: tl.int64, V, H,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PIECE_TILES: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Partial sums [4, pieces, N] of the columns of each piece: maximum, others, chosen, weighted.

    With DESCRIPTORS, hidden_ptr and weight_ptr are tensor descriptors of [N, H] and [V, H].
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    pieces = tl.cdiv(V, BLOCK_V * PIECE_TILES)
    for item in range(tl.program_id(0), row_blocks * pieces, tl.num_programs(0)):
        # a group of rows at a time, whose states stay in the L2 cache; neighbours read the same columns of the weight
        first_block = item // (GROUP * pieces) * GROUP
        blocks = tl.minimum(row_blocks - first_block, GROUP)
        within = item - first_block * pieces
        first_row = (first_block + within % blocks) * BLOCK_N
        piece = within // blocks
        rows = first_row + tl.arange(0, BLOCK_N)
        there = rows < num_rows
        token = tl.load(tokens_ptr + rows, mask=there, other=-1)
        inverse_temperature = tl.load(scalars_ptr)
        if ROW_TEMPERATURE:
            inverse_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=there, other=1.0)[:, None]
        maximum = tl.full([BLOCK_N], -float("inf"), tl.float32)
        others = tl.zeros([BLOCK_N], tl.float32)
        weighted = tl.zeros([BLOCK_N], tl.float32)
        chosen = tl.zeros([BLOCK_N], tl.float32)
        start = piece * PIECE_TILES * BLOCK_V
        for first in range(start, tl.minimum(start + PIECE_TILES * BLOCK_V, V), BLOCK_V):
            z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            if DESCRIPTORS:
                for k in range(0, H, BLOCK_H):
                    h = hidden_ptr.load([first_row, k])
                    w = weight_ptr.load([first, k])
                    z = tl.dot(h, w.T, z, input_precision="ieee")
            else:
                h_tile = tile_pointers(hidden_ptr, first_row, num_rows, stride_hidden, BLOCK_N, BLOCK_H, ALIGNED)
                w_tile = tile_pointers(weight_ptr, first, V, stride_weight, BLOCK_V, BLOCK_H, ALIGNED)
                for k in range(0, H, BLOCK_H):
                    inside = (k + tl.arange(0, BLOCK_H) < H)[None, :]
                    h = tl.load(h_tile + k, mask=inside, other=0.0)
                    w = tl.load(w_tile + k, mask=inside, other=0.0)
                    z = tl.dot(h, w.T, z, input_precision="ieee")
            columns = first + tl.arange(0, BLOCK_V)
            top, more, found, moments = sums_of_tile(
                z, columns, token, bias_ptr, scalars_ptr, inverse_temperature, V, BIAS, SCALED, CAPPED, ENTROPY
            )
            chosen += found
            maximum, others, weighted = merged(maximum, others, weighted, top, more, moments, ENTROPY)
        at = partials_ptr + piece.to(tl.int64) * num_rows + rows
        size = pieces.to(tl.int64) * num_rows
        tl.store(at, maximum, mask=there)
        tl.store(at + size, others, mask=there)
        tl.store(at + 2 * size, chosen, mask=there)
        if ENTROPY:
            tl.store(at + 3 * size, weighted, mask=there)


@triton.jit(do_not_specialize=["num_rows", "pieces"], do_not_specialize_on_alignment=PER_ROW)
def linear_merge_kernel(
    partials_ptr, tokens_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr, miss_ptr, argmax_ptr,
    num_rows, pieces, V,
    MERGE_ROWS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Statistics of whole rows from the pieces, first to last."""
    rows = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    there = rows < num_rows
    maximum = tl.full([MERGE_ROWS], -float("inf"), tl.float32)
    others = tl.zeros([MERGE_ROWS], tl.float32)
    weighted = tl.zeros([MERGE_ROWS], tl.float32)
    chosen = tl.zeros([MERGE_ROWS], tl.float32)
    size = pieces.to(tl.int64) * num_rows
    at = partials_ptr + rows
    for _ in range(pieces):
        some = tl.zeros([MERGE_ROWS], tl.float32)
        if ENTROPY:
            some = tl.load(at + 3 * size, mask=there, other=0.0)
        chosen += tl.load(at + 2 * size, mask=there, other=0.0)
        top = tl.load(at, mask=there, other=-float("inf"))
        more = tl.load(at + size, mask=there, other=0.0)
        maximum, others, weighted = merged(maximum, others, weighted, top, more, some, ENTROPY)
        at += num_rows
    # an id outside [0, V) was met in no tile: its row is NaN
    token = tl.load(tokens_ptr + rows, mask=there, other=0)
    chosen = tl.where((token >= 0) & (token < V), chosen, float("nan"))
    d = chosen - maximum
    e = exp(d)
    total = others + e
    is_argmax = d == 0.0
    log_sum = tl.where(is_argmax, log1p(others), tl.log(total))
    tl.store(logprobs_ptr + rows, d - log_sum, mask=there)
    tl.store(maximum_ptr + rows, maximum, mask=there)
    tl.store(log_sum_ptr + rows, log_sum, mask=there)
    tl.store(miss_ptr + rows, others / total, mask=there)
    tl.store(argmax_ptr + rows, is_argmax.to(tl.int8), mask=there)
    if ENTROPY:
        entropy = log_sum - (weighted + tl.where(e > 0, e * d, 0.0)) / total
        tl.store(entropy_ptr + rows, entropy, mask=there)


LINEAR_REGISTERS = 255
"""As many as there are: without a ceiling the assembler aims at two programs per multiprocessor, and spills for it."""


class Tile(NamedTuple):
    """Shape of the product of one step, and how it is run: a part of the order of addition."""

    rows: int
    columns: int
    """Of the vocabulary."""
    depth: int
    """Of the hidden size."""
    stages: int
    """Loads in flight; each holds (rows + columns) * depth elements of shared memory."""
    warps: int


WIDE_TILE = Tile(128, 128, 64, 4, 8)
"""16-bit operands, 128 KiB of shared memory."""
NARROW_TILE = Tile(64, 128, 32, 4, 8)
"""16-bit operands, 48 KiB: consumer cards have 99 KiB and AMD's 64. Also where a row may start anywhere: that costs
registers."""
FLOAT_TILE = Tile(64, 64, 32, 3, 8)
"""float32 operands, multiplied as such (no TF32): no tensor cores."""
_INTERPRETED_TILE = Tile(16, 32, 16, 1, 1)


def tile_for_device(dtype: torch.dtype, aligned: bool, shared_bytes: int) -> Tile:
    """By what a model and a device have, never by N."""
    if dtype == torch.float32:
        return FLOAT_TILE
    return WIDE_TILE if aligned and shared_bytes >= 160 << 10 else NARROW_TILE


def group_for(size: int, element_size: int, tile: Tile) -> int:
    """Blocks of rows of a group."""
    return max(1, GROUP_BYTES // (size * element_size * tile.rows))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def can_describe(x: Tensor) -> bool:
    """Whether the copy engine takes x [rows, columns]: 16-byte boundaries, no overlap, on a device that has one."""
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    aligned = aligned and x.stride(0) >= x.shape[1]  # one row repeated (expand) has stride 0
    return aligned and (not x.is_cuda or (not torch.version.hip and torch.cuda.get_device_capability(x.device)[0] >= 9))


def _in_rows(x: Tensor, aligned: bool) -> Tensor:
    """Rows of neighbouring elements, that start at multiples of 16 where their length is one; a copy if need be."""
    return x if x.stride(1) == 1 and (x.stride(0) % 16 == 0 or not aligned) else x.contiguous()


@on_device
def linear_stats_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    transform: Transform,
    *,
    with_entropy: bool,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> RowStats:
    """`rows.row_stats_reference` of hidden @ weight.T + bias, in two launches.

    Args:
        hidden: [N, H].
        weight: [V, H], of the same dtype.
        tokens: [N] int64.
        tile: None chooses by dtype and device.
        descriptors: whether the copy engine loads the tiles; None: where it can.
    """
    (num_rows, size), vocab, device = hidden.shape, weight.shape[0], hidden.device
    aligned = size % 16 == 0
    hidden, weight = (_in_rows(x, aligned) for x in (hidden, weight))
    if tile is None:
        interpreted = device.type != "cuda"
        tile = _INTERPRETED_TILE if interpreted else tile_for_device(hidden.dtype, aligned, _shared_bytes(device))
    if descriptors is None:
        descriptors = can_describe(hidden) and can_describe(weight)
    operands: tuple[Any, Any] = (hidden, weight)
    if descriptors:
        blocks = ([tile.rows, tile.depth], [tile.columns, tile.depth])
        operands = tuple(
            TensorDescriptor(x, list(x.shape), list(x.stride()), block)
            for x, block in zip(operands, blocks, strict=True)
        )
    pieces = triton.cdiv(vocab, tile.columns * PIECE_TILES)
    items = triton.cdiv(num_rows, tile.rows) * pieces
    partials = torch.empty((3 + with_entropy, pieces, num_rows), dtype=torch.float32, device=device)
    logprobs, maximum, log_sum, miss = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(4))
    entropy = torch.empty(num_rows if with_entropy else 0, dtype=torch.float32, device=device)
    is_argmax = torch.empty(num_rows, dtype=torch.bool, device=device)
    tokens = tokens.contiguous()
    linear_stats_kernel[(min(items, num_programs(device)),)](
        *operands, partials if bias is None else bias.float().contiguous(), tokens,
        tokens if transform.row_temperature is None else transform.row_temperature.contiguous(),
        numbers(transform, device), partials, num_rows, hidden.stride(0), weight.stride(0), vocab, size,
        BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_H=tile.depth, PIECE_TILES=PIECE_TILES,
        GROUP=group_for(size, hidden.element_size(), tile), DESCRIPTORS=descriptors,
        ALIGNED=aligned, BIAS=bias is not None, ENTROPY=with_entropy,
        num_stages=tile.stages, **flags(transform), **launch_options(tile.warps, LINEAR_REGISTERS),
    )  # fmt: skip
    linear_merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        partials, tokens, logprobs, entropy, maximum, log_sum, miss, is_argmax.view(torch.uint8), num_rows, pieces,
        vocab, MERGE_ROWS=MERGE_ROWS, ENTROPY=with_entropy, num_warps=1,
    )  # fmt: skip
    return RowStats(logprobs, entropy, maximum, log_sum, miss, is_argmax)


KERNELS: dict[str, Any] = {"linear_stats": linear_stats_kernel, "linear_merge": linear_merge_kernel}
