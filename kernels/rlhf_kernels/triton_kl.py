# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Full-vocabulary KL of each row and its gradient, in one launch: one read of both logits, one write."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device, scalars
from rlhf_kernels.rows import work_dtype
from rlhf_kernels.triton_rows import (
    LOG2E,
    PER_ROW,
    VARIES,
    bytes_of,
    exp,
    lanes_for,
    layout,
    out_place,
    row_place,
    store_zeros,
)

_VARIES = [*VARIES, "ref_stride_outer", "ref_stride_inner"]


@triton.jit
def finite(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def add_columns(x, y, scale, max_f, max_s, sum_f, sum_s, mean):
    """The sums of each lane with more columns of f (x) and s (y)."""
    new_f = tl.maximum(max_f, tl.max(x, 1))
    new_s = tl.maximum(max_s, tl.max(y, 1))
    base_f = finite(new_f)
    base_s = finite(new_s)
    moved = tl.where(sum_f > 0, sum_f * ((finite(max_f) - base_f) - (finite(max_s) - base_s)), 0.0)
    shrink = tl.exp2((max_f - base_f) * scale)
    d = x - base_f[:, None]
    e = tl.exp2(d * scale)
    d_s = y - base_s[:, None]
    mean = (mean + moved) * shrink + tl.sum(tl.where(e > 0, e * (d - d_s), 0.0), 1)
    sum_f = sum_f * shrink + tl.sum(e, 1)
    sum_s = sum_s * tl.exp2((max_s - base_s) * scale) + tl.sum(tl.exp2(d_s * scale), 1)
    return new_f, new_s, sum_f, sum_s, mean


@triton.jit
def kl_grad(x, y, max_f, max_s, log_f, log_s, kl, inverse_temperature, factor, FORWARD: tl.constexpr):
    """In some columns of a row, from the logits of both."""
    x = x.to(tl.float32) * inverse_temperature
    y = y.to(tl.float32) * inverse_temperature
    if FORWARD:
        grad = exp(x - max_s - log_s) - exp(y - max_f - log_f)
    else:
        log_p = x - max_f - log_f
        p = exp(log_p)
        grad = tl.where(p > 0, p * (log_p - (y - max_s - log_s) - kl), p)
    return grad * factor


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=PER_ROW)
def kl_kernel(
    logits_ptr, ref_ptr, grads_ptr, mask_ptr, weights_ptr, scalars_ptr, kl_ptr,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, ref_stride_outer: tl.int64, ref_stride_inner: tl.int64,
    out_stride_outer: tl.int64, out_stride_inner: tl.int64, V,
    LANES: tl.constexpr, WIDTH: tl.constexpr, FORWARD: tl.constexpr, HAS_MASK: tl.constexpr, WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr, ALIGNED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """With f the distribution the mean is over and s the other: KL = sum f (df - ds) - log sum_f + log sum_s.

    As in `triton_rows.stats_of_row`, lanes keep sums of their own, of logits before the temperature.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    row = tl.program_id(0)
    keep = row >= 0
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    inverse_temperature = tl.load(scalars_ptr)
    scale = inverse_temperature * LOG2E
    policy, low = row_place(logits_ptr, row, inner, stride_outer, stride_inner, ALIGNED)
    reference = out_place(ref_ptr, row, inner, ref_stride_outer, ref_stride_inner, low, ALIGNED, TOGETHER)
    first = reference if FORWARD else policy
    second = policy if FORWARD else reference
    max_f = tl.full([LANES], -float("inf"), tl.float32)
    max_s = tl.full([LANES], -float("inf"), tl.float32)
    sum_f = tl.zeros([LANES], tl.float32)
    sum_s = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES], tl.float32)  # sum of exp(f - max_f) ((f - max_f) - (s - max_s))
    limit = tl.where(keep, V + low, 0)
    offsets = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    whole = limit // BLOCK * BLOCK
    ragged = (low > 0) & (whole > 0)
    for start in range(tl.where(ragged, BLOCK, 0), whole, BLOCK):
        x = tl.load(first + start + offsets, eviction_policy="evict_last").to(tl.float32)
        y = tl.load(second + start + offsets, eviction_policy="evict_last").to(tl.float32)
        max_f, max_s, sum_f, sum_s, mean = add_columns(x, y, scale, max_f, max_s, sum_f, sum_s, mean)
    for end in range(tl.where(whole < limit, 0, 1), tl.where(ragged, 2, 1)):  # the last block, the first
        places = tl.where(end == 0, whole, 0) + offsets
        inside = (places >= low) & (places < limit)
        x = tl.load(first + places, mask=inside, other=-float("inf")).to(tl.float32)
        y = tl.load(second + places, mask=inside, other=-float("inf")).to(tl.float32)
        max_f, max_s, sum_f, sum_s, mean = add_columns(x, y, scale, max_f, max_s, sum_f, sum_s, mean)
    top_f = tl.max(max_f, 0)
    top_s = tl.max(max_s, 0)
    moved = (finite(max_f) - finite(top_f)) - (finite(max_s) - finite(top_s))
    shrink = tl.exp2((max_f - finite(top_f)) * scale)
    mean = tl.sum((mean + tl.where(sum_f > 0, sum_f * moved, 0.0)) * shrink, 0) * inverse_temperature
    sum_f = tl.sum(sum_f * shrink, 0)
    sum_s = tl.sum(sum_s * tl.exp2((max_s - finite(top_s)) * scale), 0)
    max_f = top_f * inverse_temperature
    max_s = top_s * inverse_temperature
    log_f = tl.log(sum_f)
    log_s = tl.log(sum_s)
    kl = mean / sum_f - log_f + log_s
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights_ptr + row, mask=keep, other=0.0).to(tl.float32)
    tl.store(kl_ptr + row, tl.where(keep, kl * weight, 0.0))
    if GRADS:
        grads = out_place(grads_ptr, row, inner, out_stride_outer, out_stride_inner, low, ALIGNED, TOGETHER)
        active = keep & (weight != 0.0)
        factor = weight * inverse_temperature
        blocks = tl.cdiv(V + low, BLOCK)
        for i in range(blocks):
            start = (blocks - 1 - i) * BLOCK
            places = start + tl.arange(0, BLOCK)
            inside = (places >= low) & (places < V + low)
            full = (start >= low) & (start + BLOCK <= V + low)
            if active & full:
                x = tl.load(policy + places, eviction_policy="evict_first")
                y = tl.load(reference + places, eviction_policy="evict_first")
                grad = kl_grad(x, y, max_f, max_s, log_f, log_s, kl, inverse_temperature, factor, FORWARD)
                tl.store(grads + places, grad.to(grads_ptr.dtype.element_ty))
            elif active:
                x = tl.load(policy + places, mask=inside, other=-float("inf"), eviction_policy="evict_first")
                y = tl.load(reference + places, mask=inside, other=-float("inf"), eviction_policy="evict_first")
                grad = kl_grad(x, y, max_f, max_s, log_f, log_s, kl, inverse_temperature, factor, FORWARD)
                tl.store(grads + places, grad.to(grads_ptr.dtype.element_ty), mask=inside)
            else:
                store_zeros(grads + places, inside, full, BLOCK)


@on_device
def kl_rows_triton(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    forward: bool,
    out: Tensor | None,
) -> Tensor:
    """`exact_kl.kl_rows` in one launch; `out` may be `logits` where that is contiguous."""
    rows = layout(logits)
    ref = layout(ref_logits, inner=rows.inner)
    target = rows if out is None else layout(out, inner=rows.inner)
    vocab = logits.shape[-1]
    num_rows = logits.numel() // max(1, vocab)
    kl = torch.empty(num_rows, dtype=work_dtype(logits), device=logits.device)
    aligned = rows.aligned and ref.aligned and target.aligned
    size = max(logits.element_size(), ref_logits.element_size())
    lanes, width, warps = lanes_for(vocab, size)
    if num_rows:
        kl_kernel[(num_rows,)](
            rows.tensor, ref.tensor, target.tensor, bytes_of(mask, kl), kl if weights is None else weights.contiguous(),
            scalars(logits.device, 1.0 / temperature), kl, rows.inner, rows.outer, rows.stride, ref.outer, ref.stride,
            target.outer, target.stride, vocab,
            LANES=lanes, WIDTH=width, FORWARD=forward, HAS_MASK=mask is not None, WEIGHTS=weights is not None,
            GRADS=out is not None, ALIGNED=aligned,
            TOGETHER=aligned or (rows.together(ref) and rows.together(target)), num_warps=warps,
        )  # fmt: skip
    return kl


KERNELS: dict[str, Any] = {"kl": kl_kernel}
