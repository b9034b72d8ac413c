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
MERGE_ROWS, MERGE_PIECES = 32, 64
FAR = tl.constexpr(60.0)
"""Nats that an offset may be below the logsumexp of its row: exp of it is far from the end of float32 and bfloat16."""


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
def add_tile(
    z, first_row, first, offset, maximum, others, chosen, weighted, token, exponentials_ptr, bias_ptr, scalars_ptr,
    inverse_temperature, V,
    BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, EXPONENTIALS: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum of exp(x - maximum) without the token, x of the token, and entropy's sum, with the columns
    of logits z. With EXPONENTIALS also writes exp(x - offset), 0 at the token."""
    columns = first + tl.arange(0, z.shape[1])
    inside = columns < V
    if BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    x = transformed(z, scalars_ptr, inverse_temperature, SCALED, CAPPED)
    x = tl.where(inside[None, :], x, -float("inf"))
    top = tl.max(x, 1)
    base = tl.where(top == -float("inf"), 0.0, top)
    is_token = columns[None, :] == token[:, None]
    # a sum, not a maximum, which would forget a NaN; all but one of its terms are 0
    chosen += tl.sum(tl.where(is_token, x, 0.0), 1)
    d = x - base[:, None]
    e = tl.where(is_token, 0.0, exp(d))
    if EXPONENTIALS:
        # of a row whose offset is far off this may be infinite: the row is written again; and where all of them are
        # -inf, base is a stand-in that has nothing to do with the offset
        factor = tl.where(top == -float("inf"), 0.0, exp(base - offset))
        exponentials_ptr.store([first_row, first], (e * factor[:, None]).to(exponentials_ptr.dtype))
    moments = tl.sum(tl.where(e > 0, e * d, 0.0), 1) if ENTROPY else weighted
    maximum, others, weighted = merged(maximum, others, weighted, top, tl.sum(e, 1), moments, ENTROPY)
    return maximum, others, chosen, weighted


@triton.jit
def halves(z):
    """The first and the last columns of z."""
    return tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))


@triton.jit(do_not_specialize=["num_rows", "stride_hidden", "stride_weight"], do_not_specialize_on_alignment=PER_ROW)
def linear_stats_kernel(
    hidden_ptr, weight_ptr, bias_ptr, tokens_ptr, temperature_ptr, scalars_ptr, partials_ptr,
    exponentials_ptr, offset_ptr, wanted_ptr,
    num_rows, stride_hidden: tl.int64, stride_weight: tl.int64, V, H,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PIECE_TILES: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, EXPONENTIALS: tl.constexpr,
    PROMOTE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial sums [4, pieces, N] of the columns of each piece: maximum, others, chosen, weighted.

    With DESCRIPTORS, hidden_ptr and weight_ptr are tensor descriptors of [N, H] and [V, H]. With EXPONENTIALS,
    exponentials_ptr is one of [N, V], which gets exp(x - offset), and only the blocks of rows with wanted[1 + block]
    are computed: none if wanted[0] is 0.
    PARTS: of a tile's columns, whose sums are made one after the other.
    PROMOTE > 0: tensor cores add so many steps of BLOCK_H, from 0, and their sums are added in rounded float32.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    pieces = tl.cdiv(V, BLOCK_V * PIECE_TILES)
    items = row_blocks * pieces
    if EXPONENTIALS:
        items = tl.where(tl.load(wanted_ptr) != 0, items, 0)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # a group of rows at a time, whose states stay in the L2 cache; neighbours read the same columns of the weight
        first_block = item // (GROUP * pieces) * GROUP
        blocks = tl.minimum(row_blocks - first_block, GROUP)
        within = item - first_block * pieces
        block = first_block + within % blocks
        first_row = block * BLOCK_N
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
        offset = others
        start = piece * PIECE_TILES * BLOCK_V
        end = tl.minimum(start + PIECE_TILES * BLOCK_V, V)
        if EXPONENTIALS:
            offset = tl.load(offset_ptr + rows, mask=there, other=0.0)
            end = tl.where(tl.load(wanted_ptr + 1 + block) != 0, end, start)
        for first in range(start, end, BLOCK_V):
            z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            part = z
            if not DESCRIPTORS:
                h_tile = tile_pointers(hidden_ptr, first_row, num_rows, stride_hidden, BLOCK_N, BLOCK_H, ALIGNED)
                w_tile = tile_pointers(weight_ptr, first, V, stride_weight, BLOCK_V, BLOCK_H, ALIGNED)
            for k in range(0, H, BLOCK_H):
                if DESCRIPTORS:
                    h = hidden_ptr.load([first_row, k])
                    w = weight_ptr.load([first, k])
                else:
                    inside = (k + tl.arange(0, BLOCK_H) < H)[None, :]
                    h = tl.load(h_tile + k, mask=inside, other=0.0)
                    w = tl.load(w_tile + k, mask=inside, other=0.0)
                if PROMOTE == 0:
                    z = tl.dot(h, w.T, z, input_precision="ieee")
                else:
                    part = tl.dot(h, w.T, part, input_precision="ieee")
                    if k // BLOCK_H % PROMOTE == PROMOTE - 1:
                        z += part
                        part = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            if PROMOTE > 0:
                z += part
            parts = (z,)
            if PARTS == 2:
                parts = halves(z)
            if PARTS == 4:
                left, right = halves(z)
                parts = halves(left) + halves(right)
            for part in tl.static_range(PARTS):
                column = first + part * (BLOCK_V // PARTS)
                # never false of the first; a branch also keeps the assembler from working on two parts at once
                if column < end:
                    maximum, others, chosen, weighted = add_tile(
                        parts[part], first_row, column, offset, maximum, others, chosen, weighted, token,
                        exponentials_ptr, bias_ptr, scalars_ptr, inverse_temperature, V,
                        BIAS, SCALED, CAPPED, ENTROPY, EXPONENTIALS,
                    )  # fmt: skip
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
    offset_ptr, wanted_ptr,
    num_rows, pieces, V,
    MERGE_ROWS: tl.constexpr, MERGE_PIECES: tl.constexpr, ENTROPY: tl.constexpr, EXPONENTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Statistics of whole rows from the pieces, MERGE_PIECES at a time, first to last.

    With EXPONENTIALS, an offset that is too far from the logsumexp becomes it, and its block of rows wanted once more.
    """
    rows = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    there = rows < num_rows
    maximum = tl.full([MERGE_ROWS], -float("inf"), tl.float32)
    others = tl.zeros([MERGE_ROWS], tl.float32)
    weighted = tl.zeros([MERGE_ROWS], tl.float32)
    chosen = tl.zeros([MERGE_ROWS], tl.float32)
    size = pieces.to(tl.int64) * num_rows
    for start in range(0, pieces, MERGE_PIECES):
        numbers = start + tl.arange(0, MERGE_PIECES)
        inside = (numbers < pieces)[:, None] & there[None, :]
        at = partials_ptr + numbers.to(tl.int64)[:, None] * num_rows + rows[None, :]
        tops = tl.load(at, mask=inside, other=-float("inf"))
        more = tl.load(at + size, mask=inside, other=0.0)
        chosen += tl.sum(tl.load(at + 2 * size, mask=inside, other=0.0), 0)
        top = tl.max(tops, 0)
        d = tops - tl.where(top == -float("inf"), 0.0, top)[None, :]
        shrink = exp(d)
        some = others
        if ENTROPY:
            moved = tl.where(more > 0, more * d, 0.0)
            some = tl.sum((tl.load(at + 3 * size, mask=inside, other=0.0) + moved) * shrink, 0)
        more = tl.sum(more * shrink, 0)
        maximum, others, weighted = merged(maximum, others, weighted, top, more, some, ENTROPY)
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
    if EXPONENTIALS:
        far = there & (maximum - tl.load(offset_ptr + rows, mask=there, other=0.0) + log_sum > FAR)
        tl.store(offset_ptr + rows, maximum + log_sum, mask=far)
        # whoever writes, writes 1
        tl.store(wanted_ptr + 1 + rows // BLOCK_N, 1, mask=far)
        tl.store(wanted_ptr, 1, mask=tl.max(far.to(tl.int32), 0) > 0)


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
    piece: int = PIECE_TILES
    """Tiles of vocabulary that a program sums up before it writes."""
    parts: int = 1
    """Of the columns (1, 2 or 4), whose sums are made one after the other: what is made of all of a wide tile at once
    does not fit in registers."""
    promote: int = 0
    """Steps that tensor cores add, from 0, before their sum is added in rounded float32; 0: all."""


WIDE_TILE = Tile(128, 256, 64, 3, 8, piece=PIECE_TILES // 2, parts=4)
"""16-bit operands, 144 KiB of shared memory, and 16 for the columns that are stored: Hopper and later have 227."""
SQUARE_TILE = Tile(128, 128, 64, 4, 8)
"""16-bit operands, 128 KiB."""
NARROW_TILE = Tile(64, 128, 32, 4, 8)
"""16-bit operands, 48 KiB: consumer cards have 99 KiB and AMD's 64. Also where a row may start anywhere: that costs
registers."""
FLOAT_TILE = Tile(64, 64, 32, 3, 8)
"""float32 operands, multiplied as such (no TF32): no tensor cores."""
PROMOTED = 256
"""Products that tensor cores add before their sum is added in rounded float32, where that is asked for."""
_INTERPRETED_TILE = Tile(16, 32, 16, 1, 1)


def tile_for_device(dtype: torch.dtype, aligned: bool, shared_bytes: int, *, rounded: bool = False) -> Tile:
    """By what a model and a device have, never by N. With `rounded`, 16-bit operands have a second sum in registers."""
    if dtype == torch.float32:
        return FLOAT_TILE
    tile = WIDE_TILE if shared_bytes >= 200 << 10 and not rounded else SQUARE_TILE
    if not aligned or shared_bytes < 160 << 10:
        tile = NARROW_TILE
    return tile._replace(promote=PROMOTED // tile.depth) if rounded else tile


def tile_on(device: torch.device, dtype: torch.dtype, aligned: bool, *, rounded: bool = False) -> Tile:
    """`tile_for_device` of a device, or the interpreter's."""
    if device.type == "cuda":
        return tile_for_device(dtype, aligned, _shared_bytes(device), rounded=rounded)
    return _INTERPRETED_TILE._replace(promote=4) if rounded else _INTERPRETED_TILE


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
    return aligned and _has_copy_engine(x.device)


def _has_copy_engine(device: torch.device) -> bool:
    """Or an interpreter that plays it."""
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


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
    rounded: bool = False,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> RowStats:
    """`rows.row_stats_reference` of hidden @ weight.T + bias, in two launches.

    Args:
        hidden: [N, H].
        weight: [V, H], of the same dtype.
        tokens: [N] int64.
        rounded: whether sums of 256 products of 16-bit operands are added in rounded float32, not by tensor cores.
        tile: None chooses by dtype and device.
        descriptors: whether the copy engine loads the tiles; None: where it can.
    """
    product = Product(hidden, weight, bias, tokens, transform, with_entropy, tile, descriptors, rounded)
    product.launch()
    return product.merge()


class Product:
    """The arguments of the two kernels, for one chunk of rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        transform: Transform,
        with_entropy: bool,
        tile: Tile | None = None,
        descriptors: bool | None = None,
        rounded: bool = False,
    ) -> None:
        (self.num_rows, self.size), self.vocab, device = hidden.shape, weight.shape[0], hidden.device
        self.aligned = self.size % 16 == 0
        self.hidden, self.weight = (_in_rows(x, self.aligned) for x in (hidden, weight))
        if descriptors is None and rounded and self.aligned and _has_copy_engine(device):
            descriptors = True  # even of copies: with a second sum no register is left for addresses
        if descriptors:
            self.hidden, self.weight = (
                x if can_describe(x) else x.clone(memory_format=torch.contiguous_format)
                for x in (self.hidden, self.weight)
            )
        elif descriptors is None:
            descriptors = can_describe(self.hidden) and can_describe(self.weight)
        tile = tile or tile_on(device, hidden.dtype, self.aligned, rounded=rounded)
        self.tile, self.descriptors, self.transform, self.with_entropy = tile, descriptors, transform, with_entropy
        self.pieces = triton.cdiv(self.vocab, tile.columns * tile.piece)
        sizes = (3 + with_entropy, self.pieces, self.num_rows)
        self.partials = torch.empty(sizes, dtype=torch.float32, device=device)
        self.bias = self.partials if bias is None else bias.float().contiguous()
        self.has_bias, self.tokens = bias is not None, tokens.contiguous()

    def launch(self, exponentials: Tensor | None = None, offset: Tensor | None = None, wanted: Any = None) -> None:
        """Partial sums of all pieces; with `exponentials` also those, see the kernel."""
        tile, device = self.tile, self.hidden.device
        operands: tuple[Any, Any] = (self.hidden, self.weight)
        if self.descriptors:
            blocks = ([tile.rows, tile.depth], [tile.columns, tile.depth])
            operands = (_described(self.hidden, blocks[0]), _described(self.weight, blocks[1]))
        stored = exponentials is not None
        target = (
            self.partials if exponentials is None else _described(exponentials, [tile.rows, tile.columns // tile.parts])
        )
        temperatures = self.transform.row_temperature
        items = triton.cdiv(self.num_rows, tile.rows) * self.pieces
        linear_stats_kernel[(min(items, num_programs(device)),)](
            *operands, self.bias, self.tokens, self.tokens if temperatures is None else temperatures.contiguous(),
            numbers(self.transform, device), self.partials, target, offset if stored else self.partials,
            wanted if stored else self.partials, self.num_rows, self.hidden.stride(0), self.weight.stride(0),
            self.vocab, self.size,
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_H=tile.depth, PIECE_TILES=tile.piece,
            GROUP=group_for(self.size, self.hidden.element_size(), tile), DESCRIPTORS=self.descriptors,
            ALIGNED=self.aligned, BIAS=self.has_bias, ENTROPY=self.with_entropy, EXPONENTIALS=stored,
            PROMOTE=tile.promote, PARTS=tile.parts,
            num_stages=tile.stages, **flags(self.transform), **launch_options(tile.warps, LINEAR_REGISTERS),
        )  # fmt: skip

    def merge(self, offset: Tensor | None = None, wanted: Tensor | None = None) -> RowStats:
        """Statistics of whole rows; see the kernel for the arguments."""
        num_rows, device = self.num_rows, self.hidden.device
        logprobs, maximum, log_sum, miss = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(4))
        entropy = torch.empty(num_rows if self.with_entropy else 0, dtype=torch.float32, device=device)
        is_argmax = torch.empty(num_rows, dtype=torch.bool, device=device)
        linear_merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
            self.partials, self.tokens, logprobs, entropy, maximum, log_sum, miss, is_argmax.view(torch.uint8),
            self.partials if offset is None else offset, self.partials if wanted is None else wanted,
            num_rows, self.pieces, self.vocab,
            MERGE_ROWS=MERGE_ROWS, MERGE_PIECES=MERGE_PIECES, ENTROPY=self.with_entropy,
            EXPONENTIALS=offset is not None, BLOCK_N=self.tile.rows, num_warps=4,
        )  # fmt: skip
        return RowStats(logprobs, entropy, maximum, log_sum, miss, is_argmax)


def _described(x: Tensor, block: list[int]) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


KERNELS: dict[str, Any] = {"linear_stats": linear_stats_kernel, "linear_merge": linear_merge_kernel}
