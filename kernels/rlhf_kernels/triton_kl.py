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
from rlhf_kernels.triton_rows import PER_ROW, VARIES, block_for, bytes_of, exp, layout, row_offset

_VARIES = [*VARIES, "ref_stride_outer", "ref_stride_inner"]


@triton.jit
def finite(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=PER_ROW)
def kl_kernel(
    logits_ptr, ref_ptr, grads_ptr, mask_ptr, weights_ptr, scalars_ptr, kl_ptr,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, ref_stride_outer: tl.int64, ref_stride_inner: tl.int64,
    out_stride_outer: tl.int64, out_stride_inner: tl.int64, V,
    BLOCK: tl.constexpr, FORWARD: tl.constexpr, HAS_MASK: tl.constexpr, WEIGHTS: tl.constexpr, GRADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """With f the distribution the mean is over and s the other: KL = sum f (df - ds) - log sum_f + log sum_s."""
    row = tl.program_id(0)
    keep = row >= 0
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    inverse_temperature = tl.load(scalars_ptr)
    policy = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    reference = ref_ptr + row_offset(row, inner, ref_stride_outer, ref_stride_inner, ALIGNED)
    max_f = -float("inf")
    max_s = -float("inf")
    sum_f = 0.0
    sum_s = 0.0
    mean = 0.0  # sum of exp(f - max_f) ((f - max_f) - (s - max_s))
    for start in range(0, tl.where(keep, V, 0), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(policy + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        y = tl.load(reference + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x = x.to(tl.float32) * inverse_temperature
        y = y.to(tl.float32) * inverse_temperature
        if FORWARD:
            x, y = y, x
        new_f = tl.maximum(max_f, tl.max(x, 0))
        new_s = tl.maximum(max_s, tl.max(y, 0))
        base_f = finite(new_f)
        base_s = finite(new_s)
        e = exp(x - base_f)
        moved = tl.where(sum_f > 0, sum_f * ((finite(max_f) - base_f) - (finite(max_s) - base_s)), 0.0)
        shrink = exp(max_f - base_f)
        mean = (mean + moved) * shrink + tl.sum(tl.where(e > 0, e * ((x - base_f) - (y - base_s)), 0.0), 0)
        sum_f = sum_f * shrink + tl.sum(e, 0)
        sum_s = sum_s * exp(max_s - base_s) + tl.sum(exp(y - base_s), 0)
        max_f = new_f
        max_s = new_s
    log_f = tl.log(sum_f)
    log_s = tl.log(sum_s)
    kl = mean / sum_f - log_f + log_s
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights_ptr + row, mask=keep, other=0.0).to(tl.float32)
    tl.store(kl_ptr + row, tl.where(keep, kl * weight, 0.0))
    if GRADS:
        grads = grads_ptr + row_offset(row, inner, out_stride_outer, out_stride_inner, ALIGNED)
        limit = tl.where(keep & (weight != 0.0), V, 0)
        blocks = tl.cdiv(V, BLOCK)
        for i in range(blocks):
            columns = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            read = columns < limit
            x = tl.load(policy + columns, mask=read, other=-float("inf"), eviction_policy="evict_first")
            y = tl.load(reference + columns, mask=read, other=-float("inf"), eviction_policy="evict_first")
            x = x.to(tl.float32) * inverse_temperature
            y = y.to(tl.float32) * inverse_temperature
            if FORWARD:
                grad = exp(x - max_s - log_s) - exp(y - max_f - log_f)
            else:
                log_p = x - max_f - log_f
                p = exp(log_p)
                grad = tl.where(p > 0, p * (log_p - (y - max_s - log_s) - kl), p)
            grad = tl.where(read, grad * (weight * inverse_temperature), 0.0)
            tl.store(grads + columns, grad.to(grads_ptr.dtype.element_ty), mask=columns < V)


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
    block, warps = block_for(vocab, 4096)
    if num_rows:
        kl_kernel[(num_rows,)](
            rows.tensor, ref.tensor, target.tensor, bytes_of(mask, kl), kl if weights is None else weights.contiguous(),
            scalars(logits.device, 1.0 / temperature), kl, rows.inner, rows.outer, rows.stride, ref.outer, ref.stride,
            target.outer, target.stride, vocab,
            BLOCK=block, FORWARD=forward, HAS_MASK=mask is not None, WEIGHTS=weights is not None,
            GRADS=out is not None, ALIGNED=rows.aligned and ref.aligned and target.aligned, num_warps=warps,
        )  # fmt: skip
    return kl


KERNELS: dict[str, Any] = {"kl": kl_kernel}
