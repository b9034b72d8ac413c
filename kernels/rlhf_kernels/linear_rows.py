"""From hidden states to logits, a chunk of rows at a time: exact in float32, and never more than a budget of logits.

The chunk loop, the matrix products and the memory budget of every op that starts from hidden states.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.rows import Rows, work_dtype
from rlhf_kernels.vocab_shard import add_over_group

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Logits alive at a time, per device type. Few, large chunks: each adds once to the [V, H] gradient of the weight."""
KEEP_BLOCKS = {"cpu": (8, 128 << 20), "cuda": (1, 1 << 30)}
"""Logits kept from forward to backward, as blocks of so many bytes; the rest are computed twice."""
TILE_ROWS, TILE_BYTES = 2048, 64 << 20
"""Logits alive at a time where some columns of many rows are enough."""
_PRODUCT_ROWS = 128
"""Rows that a GPU multiplies together: of a last tile that is not full the rest is multiplied for nothing."""
LARGE_WEIGHT = 1 << 24
"""Numbers from which on a weight's gradient is big enough that a product for it is not split along its rows."""
_VOCAB_SLICE = 8192
"""Rows of the weight per product where slices save memory."""


def check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None and (chunk_rows < 1 or chunk_rows % 1):
        raise ValueError(f"chunk_rows={chunk_rows} must be a whole number, 1 or more; None: as a memory budget allows")


def chunk_rows_for(vocab: int, device: torch.device, chunk_rows: int | None, element_size: int = 4) -> int:
    """Rows of logits that fit in the budget, at least 1."""
    check_chunk_rows(chunk_rows)
    rows = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (vocab * element_size))
    if device.type == "cuda" and rows > _PRODUCT_ROWS:
        rows -= rows % _PRODUCT_ROWS
    return chunk_rows or rows


def chunk_rows_for_gradients(
    num_rows: int,
    vocab: int,
    size: int,
    device: torch.device,
    chunk_rows: int | None,
    element_size: int,
    *,
    mixed: bool,
) -> int:
    """As `chunk_rows_for`, or all rows: one chunk needs no float32 sum of the weight's gradient.

    Where products are mixed (`Head.mixed`) that sum takes 4 bytes per weight, and a row of logits with its gradient
    4 + 2 per word.
    """
    rows = chunk_rows_for(vocab, device, chunk_rows, element_size)
    spared = 4 * vocab * size if mixed and chunk_rows is None else 0
    return num_rows if 0 < (num_rows - rows) * vocab * (element_size + 2) <= spared else rows


def keep_for(num_rows: int, vocab: int, device: torch.device, element_size: int = 4) -> list[int]:
    """Sizes of the blocks (in numbers, not bytes) of logits that are kept for the backward pass."""
    count, size = KEEP_BLOCKS.get(device.type, KEEP_BLOCKS["cpu"])
    block = size // element_size
    return [max(0, min(block, num_rows * vocab - i * block)) for i in range(count)]


class Tiles:
    """The logits of all rows that count, cut into tiles: some columns of some rows at a time, in a fixed order.

    A kernel reads whole rows. Plain torch is given some columns of many rows instead: the products are larger, and each
    part of the weight's gradient is written once, not read and written again for every chunk of rows. The first tiles
    live in the blocks of `kept` as long as there is room; the others share one buffer.
    """

    def __init__(
        self, kept: list[Tensor], counting: Rows, vocab: int, size: tuple[int, int], *, release: bool = False
    ) -> None:
        self.kept, self.counting, self.vocab = kept, counting, vocab
        self.rows, self.columns = size
        self.release = release
        """Give back a block when its last tile has been seen: the gradient of the weight grows into its memory."""
        self.block, self.used = 0, 0
        self.buffer: Tensor | None = None

    @property
    def count(self) -> int:
        return math.ceil(self.counting.count / self.rows) * math.ceil(self.vocab / self.columns)

    def __iter__(self) -> Iterator[tuple[Tensor | slice, Iterator[tuple[range, Tensor, bool]]]]:
        """Rows (numbers, or a slice), and their tiles: columns, memory, whether that is kept."""
        self.block, self.used = 0, 0
        for start, end, rows in self.counting.chunks(self.rows):
            yield rows, self._columns(end - start)
        while self.release and self.block < len(self.kept):
            self._next_block()

    def _columns(self, num_rows: int) -> Iterator[tuple[range, Tensor, bool]]:
        for first in range(0, self.vocab, self.columns):
            columns = range(first, min(first + self.columns, self.vocab))
            shape = (num_rows, len(columns))
            place = self._room(num_rows * len(columns))
            yield columns, self.spare(shape) if place is None else place.view(shape), place is not None

    def _room(self, size: int) -> Tensor | None:
        """The next so many kept numbers, in one block; None where there is no room left."""
        while self.block < len(self.kept):
            block, start = self.kept[self.block], self.used
            if start + size <= len(block):
                self.used += size
                return block[start : self.used]
            self._next_block()
        return None

    def _next_block(self) -> None:
        if self.release:  # all tiles of this one have been seen
            self.kept[self.block].untyped_storage().resize_(0)
        self.block, self.used = self.block + 1, 0

    def spare(self, shape: tuple[int, int]) -> Tensor:
        """Memory for one tile that is not kept."""
        size = shape[0] * shape[1]
        if self.buffer is None or len(self.buffer) < size:
            self.buffer = self.kept[0].new_empty(size)
        return self.buffer[:size].view(shape)


def tile_for(
    num_rows: int, vocab: int, device: torch.device, chunk_rows: int | None, element_size: int, *, whole_rows: bool
) -> tuple[int, int]:
    """Rows and columns of a tile."""
    if whole_rows:
        return chunk_rows_for(vocab, device, chunk_rows, element_size), vocab
    rows = chunk_rows or TILE_ROWS
    lines = max(1, TILE_BYTES // (max(1, min(rows, num_rows)) * element_size * 64))
    if lines * 64 >= vocab:
        return rows, vocab
    # An odd number of 64s: rows a multiple of 4096 bytes apart compete for the same lines of the cache.
    return rows, (lines - 1 | 1) * 64


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast inside, which would round logits to 16 bits; nor TF32, which rounds float32 operands to 11."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(float32_products())
        yield


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Products of float32 in float32, whatever `torch.set_float32_matmul_precision` says (Lightning advises "high").

    torch has an old and a new switch, and refuses to read the old one after the new one was used: the one that the
    user turned is turned back.
    """
    matmul = torch.backends.cuda.matmul
    switch = "fp32_precision"
    before: Any = getattr(matmul, switch)
    if before in ("ieee", "none"):
        yield
        return
    with contextlib.suppress(RuntimeError):  # the old one cannot be read any more
        before, switch = matmul.allow_tf32, "allow_tf32"
    setattr(matmul, switch, False if switch == "allow_tf32" else "ieee")
    try:
        yield
    finally:
        setattr(matmul, switch, before)


def has_tensor_cores(weight: Tensor) -> bool:
    """Whether torch multiplies 16-bit operands into float32 where `weight` is."""
    return weight.is_cuda


def is_mixed(hidden: Tensor, weight: Tensor) -> bool:
    """Whether both are 16-bit, and multiplied as such into float32."""
    return hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16) and has_tensor_cores(weight)


def as_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands in the dtype of autocast, where that reaches tensor cores; their products stay float32.

    What the head itself would do in a forward pass. Without it autocast's float32 head would be multiplied in float32,
    at a small part of the speed. Elsewhere the operands are taken as they are.
    """
    device = weight.device.type
    if not has_tensor_cores(weight) or not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    # autocast leaves float64 alone, and so does this
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))  # type: ignore[return-value]


class Head:
    """The last linear map, prepared for many chunks: z = h W^T + b in float32 (float64 for float64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        promoted = torch.promote_types(hidden.dtype, weight.dtype)
        self.dtype = work_dtype(hidden.new_empty(0, dtype=promoted))
        self.vocab = weight.shape[0]
        # Tensor cores multiply 16-bit operands exactly and add in float32: only the output type must not be 16-bit.
        self.mixed = is_mixed(hidden, weight)
        self.slice = _VOCAB_SLICE if weight.device.type == "cpu" or weight.dtype != self.dtype else self.vocab
        self.weight = weight
        self.bias = None if bias is None else bias.to(self.dtype)

    def logits(self, hidden: Tensor, out: Tensor, columns: range | None = None) -> Tensor:
        """[rows, H] -> out [rows, V], or [rows, len(columns)]."""
        columns = columns or range(self.vocab)
        if self.mixed:
            torch.mm(hidden, self.weight[columns.start : columns.stop].t(), out_dtype=self.dtype, out=out)
        else:
            x = hidden.to(self.dtype)
            for here, part in self._slices(columns):
                torch.mm(x, part.t(), out=out[:, here])
        return out if self.bias is None else out.add_(self.bias[columns.start : columns.stop])

    def room_for_grads(self, logits: Tensor) -> Tensor:
        """Where the gradient in `logits` goes: over them, or rounded at once to what the products take."""
        return torch.empty(logits.shape, dtype=self.weight.dtype, device=logits.device) if self.mixed else logits

    def hidden_grad(self, total: Tensor | None, grads: Tensor, columns: range | None = None) -> Tensor:
        """total [rows, H] + grads @ W, of the columns that `grads` has."""
        columns = columns or range(self.vocab)
        if self.mixed:
            weight = self.weight[columns.start : columns.stop]
            product = torch.mm(grads, weight, out_dtype=self.dtype)
            return product if total is None else total.add_(product)
        total = grads.new_zeros((len(grads), self.weight.shape[1])) if total is None else total
        for here, part in self._slices(columns):
            total.addmm_(grads[:, here], part)
        return total

    def whole_weight_grad(self, grads: Tensor, hidden: Tensor) -> Tensor:
        """grads^T @ hidden of all rows and columns, summed in float32 and rounded once to the weight's dtype."""
        return torch.mm(grads.t(), hidden)

    def add_weight_grad(self, total: Tensor, grads: Tensor, hidden: Tensor, columns: range, *, first: bool) -> None:
        """total[columns] += grads^T @ hidden, or = if `first`; accumulated in float32 whatever the operands are."""
        if self.mixed:
            part = total[columns.start : columns.stop]
            product = (grads.t(), hidden)
            if first:
                torch.mm(*product, out_dtype=self.dtype, out=part)
            else:
                torch.addmm(part, *product, out_dtype=self.dtype, out=part)
            return
        x = hidden.to(self.dtype)
        for start in range(0, len(columns), self.slice):
            here = slice(start, min(start + self.slice, len(columns)))
            part = total[columns.start + here.start : columns.start + here.stop]
            part.addmm_(grads[:, here].t(), x, beta=0 if first else 1)

    def _slices(self, columns: range) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float32, a slice at a time: neither a copy nor the packed operand of a product is whole."""
        for start in range(0, len(columns), self.slice):
            here = slice(start, min(start + self.slice, len(columns)))
            yield here, self.weight[columns.start + here.start : columns.start + here.stop].to(self.dtype)


class HeadGrads:
    """Sums of the gradients in hidden states, weight and bias over tiles of logits."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        *,
        group: str = "",
        one_tile: bool = False,
    ) -> None:
        self.head, self.needs = head, needs
        self.one_tile = one_tile
        """Whether one tile is all there is: it may be said after this was made, before the first `add`."""
        self.group, self.hidden_dtype = group, hidden.dtype
        # shares of several processes are rounded once, when they have been added
        self.hidden = torch.zeros_like(hidden, dtype=head.dtype if group else hidden.dtype) if needs[0] else None
        self.hidden_sum: Tensor | None = None
        self.weight: Tensor | None = None
        self.num_written = 0  # columns of self.weight that hold something
        self.bias = torch.zeros_like(bias, dtype=head.dtype) if bias is not None and needs[2] else None

    @property
    def is_whole(self) -> bool:
        """Nothing to sum: one product is the whole; the parts of a small one might be rounded."""
        return self.one_tile and self.head.mixed and self.head.weight.numel() >= LARGE_WEIGHT

    def add(
        self,
        rows: Tensor | slice,
        hidden: Tensor,
        grads: Tensor,
        columns: range | None = None,
        *,
        factor: Tensor | None = None,
    ) -> None:
        """The share of one tile: its row numbers, hidden states [rows, H], gradients in its logits [rows, columns].

        The gradients lie where `Head.room_for_grads` said. They are to be multiplied by `factor` [rows], which goes to
        what is smaller than they are: the product of one row, and the hidden states of the other.

        The columns of the same rows come one after another, from the first to the last.
        """
        columns = columns or range(self.head.vocab)
        if self.hidden is not None:
            self.hidden_sum = self.head.hidden_grad(self.hidden_sum, grads, columns)
            if columns.stop == self.head.vocab:
                if isinstance(rows, slice):
                    _times(self.hidden_sum, factor, self.hidden.dtype, out=self.hidden[rows])
                else:
                    self.hidden[rows] = _times(self.hidden_sum, factor, self.hidden.dtype)
                self.hidden_sum = None
        if self.bias is not None:
            self.bias[columns.start : columns.stop] += _sum_of_rows(grads, factor, self.head)
        hidden = _times(hidden, factor, hidden.dtype)
        if self.needs[1] and self.is_whole:
            self.weight = self.head.whole_weight_grad(grads, hidden)
        elif self.needs[1]:
            if self.weight is None:
                self.weight = torch.empty(self.head.weight.shape, dtype=self.head.dtype, device=grads.device)
            first = columns.start >= self.num_written
            self.head.add_weight_grad(self.weight, grads, hidden, columns, first=first)
            self.num_written = max(self.num_written, columns.stop)

    def results(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in the dtypes of the inputs; an empty tensor for one that was not asked for."""
        weight = self.head.weight
        hidden = weight.new_empty(0) if self.hidden is None else self.hidden
        if self.group and self.hidden is not None:
            hidden = add_over_group(self.hidden, self.group).to(self.hidden_dtype)
        if not self.needs[1]:
            d_weight = weight.new_empty(0)
        else:
            d_weight = torch.zeros_like(weight) if self.weight is None else self.weight.to(weight.dtype)
        d_bias = weight.new_empty(0) if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return hidden, d_weight, d_bias


def _times(x: Tensor, factor: Tensor | None, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """x [rows, n] * factor [rows] in float32 at least, rounded once."""
    if factor is None:
        return x.to(dtype) if out is None else out.copy_(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    return torch.mul(x, factor[:, None], out=out)


def _sum_of_rows(grads: Tensor, factor: Tensor | None, head: Head) -> Tensor:
    """factor @ grads, [columns], in float32."""
    if factor is None:
        return grads.sum(0, dtype=head.dtype)
    if not head.mixed:
        return factor @ grads.to(head.dtype)
    # tensor cores take 16 bits: what is left of the factor after 8, 16 and 24 of them, and columns that fill a product
    parts = torch.zeros((len(factor), 8), dtype=grads.dtype, device=grads.device)
    rest = factor
    for column in parts.t()[:3]:
        column.copy_(rest)
        rest = rest - column.to(rest.dtype)
    return torch.mm(grads.t(), parts, out_dtype=head.dtype).sum(1)


def plain(weight: Tensor) -> Tensor:
    """A sharded parameter (DTensor) gathered into a plain tensor.

    Ranks hold different rows, so its gradient is the sum of theirs, sharded again as the parameter is.
    """
    sharded: Any = weight  # what a DTensor has is not declared for a Tensor
    if not hasattr(sharded, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    whole: Tensor = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    return whole
