# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Whitening in two launches: float64 sums of fixed pieces, then every program adds those in one order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device

BLOCK = 1024
MAX_PIECES = 1024


@triton.jit(do_not_specialize=["size", "steps"])
def moments_kernel(x_ptr, mask_ptr, pieces_ptr, size: tl.int64, steps, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    count = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    for i in range(steps):
        at = (program.to(tl.int64) * steps + i) * BLOCK + tl.arange(0, BLOCK)
        counts = tl.load(mask_ptr + at, mask=at < size, other=0) != 0
        x = tl.load(x_ptr + at, mask=counts, other=0.0).to(tl.float64)
        count += tl.sum(counts.to(tl.int32), 0).to(tl.float64)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
    tl.store(pieces_ptr + program * 3, count)
    tl.store(pieces_ptr + program * 3 + 1, total)
    tl.store(pieces_ptr + program * 3 + 2, squares)


@triton.jit(do_not_specialize=["size", "pieces"])
def whiten_kernel(
    x_ptr, mask_ptr, pieces_ptr, out_ptr, size: tl.int64, pieces,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    piece = tl.arange(0, PIECES)
    inside = piece < pieces
    count = tl.sum(tl.load(pieces_ptr + piece * 3, mask=inside, other=0.0), 0)
    total = tl.sum(tl.load(pieces_ptr + piece * 3 + 1, mask=inside, other=0.0), 0)
    squares = tl.sum(tl.load(pieces_ptr + piece * 3 + 2, mask=inside, other=0.0), 0)
    count = tl.where(count < 1.0, 1.0, count)
    mean = total / count
    variance = squares / count - mean * mean
    scale = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + 1e-8)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(mask_ptr + at, mask=at < size, other=0) != 0
    y = (tl.load(x_ptr + at, mask=counts, other=0.0).to(tl.float64) - mean) * scale
    if not SHIFT:
        y = y + mean
    tl.store(out_ptr + at, tl.where(counts, y, 0.0).to(tl.float32).to(out_ptr.dtype.element_ty), mask=at < size)


@on_device
def whiten_triton(x: Tensor, mask: Tensor, shift_mean: bool, moments: Tensor | None) -> Tensor:
    """`masked_whiten`: one read for the moments, one read and one write for the result."""
    x, flags = x.contiguous(), mask.contiguous().view(torch.uint8)
    out = torch.empty_like(x)
    size = x.numel()
    if moments is None:
        steps = triton.cdiv(triton.cdiv(size, BLOCK), MAX_PIECES)
        pieces = triton.cdiv(size, BLOCK * steps)
        sums = torch.empty((pieces, 3), dtype=torch.float64, device=x.device)
        moments_kernel[(pieces,)](x, flags, sums, size, steps, BLOCK=BLOCK, num_warps=4)
    else:
        sums, pieces = moments.double().reshape(1, 3).contiguous(), 1
    constants: dict[str, Any] = {"BLOCK": BLOCK, "PIECES": MAX_PIECES, "SHIFT": shift_mean, "num_warps": 4}
    whiten_kernel[(triton.cdiv(size, BLOCK),)](x, flags, sums, out, size, pieces, **constants)
    return out


KERNELS: dict[str, Any] = {"moments": moments_kernel, "whiten": whiten_kernel}
