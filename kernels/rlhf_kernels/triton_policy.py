# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""One launch for the policy loss: statistics, loss and gradient of each row, the gradient pass in reverse order.

A persistent program owns a row at a time. Its second pass starts with the columns read last, of which the L2 cache
still holds a part (a row of 152k bfloat16 is 0.3 MB): memory sees one write and between one and two reads per element.
What is written asks to leave the cache first. The loss arithmetic is that of `arithmetic`, inlined.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import arithmetic
from rlhf_kernels.backend import on_device, scalars
from rlhf_kernels.rows import Transform
from rlhf_kernels.spec import PolicyLossSpec
from rlhf_kernels.triton_rows import (
    PER_ROW,
    VARIES,
    Layout,
    bytes_of,
    flags,
    grad_of_columns,
    inverse_temperature_of,
    lanes_for,
    launch_options,
    layout,
    num_plain,
    num_programs,
    out_place,
    plain_block,
    row_place,
    row_registers,
    special_block,
    special_blocks,
    stats_of_row,
    store_zeros,
)

if TYPE_CHECKING:
    from rlhf_kernels.gluon_policy import Plan

policy_term = triton.jit(arithmetic.bind(arithmetic.policy_term, tl))
kl_term = triton.jit(arithmetic.bind(arithmetic.kl_term, tl))


@triton.jit
def row_inputs(
    row, keep, old_ptr, advantages_ptr, ref_ptr, weights_ptr, ESTIMATOR: tl.constexpr, WEIGHTS: tl.constexpr
):
    """What the loss of a row takes besides its logits, in the dtypes it comes in; any number where there is none."""
    old = tl.load(old_ptr + row, mask=keep, other=0.0)
    advantage = tl.load(advantages_ptr + row, mask=keep, other=0.0)
    reference = old
    if ESTIMATOR:
        reference = tl.load(ref_ptr + row, mask=keep, other=0.0)
    weight = old
    if WEIGHTS:
        weight = tl.load(weights_ptr + row, mask=keep, other=0.0)
    return old, advantage, reference, weight


@triton.jit
def loss_of_row(
    row, keep, logprob, entropy, log_sum, old, advantage, reference, weight, scalars_ptr, denominator_ptr,
    loss_ptr, logprobs_ptr, entropy_ptr, ratio_ptr, clipped_ptr, kl_ptr,
    FORM: tl.constexpr, ESTIMATOR: tl.constexpr, DUAL: tl.constexpr, ENTROPY: tl.constexpr,
    ENTROPY_LOSS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Writes what each output says of a row; returns the coefficients a, b, c of its gradient (see `rows`)."""
    loss, slope, ratio, stopped = policy_term(
        logprob, logprob - old.to(tl.float32), advantage.to(tl.float32),
        tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4), tl.load(scalars_ptr + 5), tl.load(scalars_ptr + 6),
        tl.load(scalars_ptr + 7), FORM, DUAL,
    )  # fmt: skip
    if ESTIMATOR:
        kl_coef = tl.load(scalars_ptr + 8)
        kl, kl_slope = kl_term(logprob - reference.to(tl.float32), ESTIMATOR)
        loss += kl_coef * kl
        slope += kl_coef * kl_slope
        tl.store(kl_ptr + row, tl.where(keep, kl, 0.0))
    share = 1.0 / tl.load(denominator_ptr)
    if WEIGHTS:
        share = share * weight.to(tl.float32)
    b = 0.0
    c = 0.0
    if ENTROPY_LOSS:
        d_entropy = -tl.load(scalars_ptr + 9)
        loss += d_entropy * entropy
        b = d_entropy * (log_sum - entropy) * share
        c = -d_entropy * share
    tl.store(loss_ptr + row, tl.where(keep, loss * share, 0.0))
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(ratio_ptr + row, tl.where(keep, ratio, 0.0))
    tl.store(clipped_ptr + row, (keep & stopped).to(tl.int8))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0))
    return slope * share, b, c


@triton.jit
def write_grads(
    row_ptr, grads_row, low, token, maximum, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr, active, V,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient of a row, its last columns first; a row that is not active is not read, and gets 0."""
    offsets = tl.arange(0, BLOCK)
    limit = V + low
    at = tl.where(token >= 0, token + low, -1)
    if active:
        whole, first, apart, ragged = special_blocks(token, low, limit, BLOCK)
        for i in range(tl.where(whole < limit, 0, 1), 1 + tl.where(apart, 1, 0) + tl.where(ragged, 1, 0)):
            places = special_block(i, whole, first, apart) + offsets
            inside = (places >= low) & (places < limit)
            z = tl.load(row_ptr + places, mask=inside, other=-float("inf"), eviction_policy="evict_first")
            grad = grad_of_columns(
                z, places, at, maximum, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr, True, SCALED, CAPPED,
                ENTROPY,
            )  # fmt: skip
            tl.store(grads_row + places, grad.to(grads_row.dtype.element_ty), mask=inside)
        blocks = num_plain(whole, apart, ragged, BLOCK)
        for i in range(blocks):
            places = plain_block(blocks - 1 - i, first, apart, ragged, BLOCK) + offsets
            z = tl.load(row_ptr + places, eviction_policy="evict_first")
            grad = grad_of_columns(
                z, places, at, maximum, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr, False, SCALED,
                CAPPED, ENTROPY,
            )  # fmt: skip
            tl.store(grads_row + places, grad.to(grads_row.dtype.element_ty), eviction_policy="evict_first")
    else:
        for start in range(0, limit, BLOCK):
            places = start + offsets
            whole = (start >= low) & (start + BLOCK <= limit)
            store_zeros(grads_row + places, (places >= low) & (places < limit), whole, BLOCK)


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=[*PER_ROW, "ref_ptr"])
def policy_loss_kernel(
    logits_ptr, grads_ptr, tokens_ptr, old_ptr, advantages_ptr, ref_ptr, weights_ptr, mask_ptr, temperature_ptr,
    scalars_ptr, denominator_ptr,
    loss_ptr, logprobs_ptr, entropy_ptr, ratio_ptr, clipped_ptr, kl_ptr,
    num_rows, inner, stride_outer: tl.int64, stride_inner: tl.int64, out_stride_outer: tl.int64,
    out_stride_inner: tl.int64, V,
    LANES: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr, ESTIMATOR: tl.constexpr, DUAL: tl.constexpr,
    ENTROPY: tl.constexpr, ENTROPY_LOSS: tl.constexpr, WEIGHTS: tl.constexpr, GRADS: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        keep = tl.load(mask_ptr + row) != 0
        token = tl.load(tokens_ptr + row, mask=keep, other=0)
        inverse_temperature = inverse_temperature_of(temperature_ptr, scalars_ptr, row, keep, ROW_TEMPERATURE)
        row_ptr, low = row_place(logits_ptr, row, inner, stride_outer, stride_inner, ALIGNED)
        logprob, entropy, top, log_sum, miss, _ = stats_of_row(
            row_ptr, low, token, inverse_temperature, scalars_ptr, V, keep, LANES, WIDTH, SCALED, CAPPED, ENTROPY,
            ALIGNED, "evict_last",
        )  # fmt: skip
        old, advantage, reference, weight = row_inputs(
            row, keep, old_ptr, advantages_ptr, ref_ptr, weights_ptr, ESTIMATOR, WEIGHTS
        )
        a, b, c = loss_of_row(
            row, keep, logprob, entropy, log_sum, old, advantage, reference, weight, scalars_ptr, denominator_ptr,
            loss_ptr, logprobs_ptr, entropy_ptr, ratio_ptr, clipped_ptr, kl_ptr, FORM, ESTIMATOR, DUAL, ENTROPY,
            ENTROPY_LOSS, WEIGHTS,
        )  # fmt: skip
        if GRADS:
            active = (a != 0.0) | (b != 0.0) | (c != 0.0)
            grads_row = out_place(grads_ptr, row, inner, out_stride_outer, out_stride_inner, low, ALIGNED, TOGETHER)
            write_grads(
                row_ptr, grads_row, low, token, top * inverse_temperature, inverse_temperature, log_sum, miss, a, b, c,
                scalars_ptr, keep & active, V, LANES * WIDTH, SCALED, CAPPED, ENTROPY_LOSS,
            )  # fmt: skip


PROGRAMS = 2
"""Of `policy_loss_kernel`, per multiprocessor. With one, more of the second pass finds its row in L2 (on an H200 75 %
instead of 36 %), but while a row ends and the next begins nothing is read; the difference is in favour of two."""


def policy_lanes_for(vocab: int, element_size: int, aligned: bool) -> tuple[int, int, int]:
    """Lanes, columns of each, and warps: the few programs of a multiprocessor have to keep the memory busy alone.

    Where rows begin anywhere, half as many lanes: masks of single elements take registers.
    """
    lanes, width, warps = lanes_for(vocab, element_size)
    return lanes * (4 if aligned else 2), width, warps * 2


def resident_plan(rows: Layout, target: Layout, transform: Transform) -> "Plan | None":
    """How `gluon_policy` keeps these rows on the multiprocessors, to read each once; None where it does not.

    It is for Hopper GPUs (for others its registers have not been counted out), rows that begin at multiples of 16
    bytes and fit there, and no softcap, whose arithmetic takes longer than a second read.
    """
    device = rows.tensor.device
    begins = (rows.tensor.data_ptr(), target.tensor.data_ptr())
    if device.type != "cuda" or torch.version.hip or transform.softcap != 0.0:
        return None
    if not (rows.aligned and target.aligned) or any(begin % 16 for begin in begins):
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.major != 9:
        return None
    from rlhf_kernels.gluon_policy import plan_for

    shape, size = rows.tensor.shape, rows.tensor.element_size()
    return plan_for(shape[-1], size, properties.shared_memory_per_multiprocessor)


def launch_resident(plan: "Plan", arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Of the arguments of `policy_loss_kernel`, and those of its options that both kernels have."""
    from rlhf_kernels.gluon_policy import resident_policy_kernel

    logits, num_rows = arguments[0], arguments[17]
    kernel_options = {name: value for name, value in options.items() if name != "CAPPED"}
    resident_policy_kernel[(min(num_rows, plan.programs * num_programs(logits.device)),)](
        *arguments, LANES=plan.lanes, WIDTH=16 // logits.element_size(), HELD=plan.held, SLOTS=plan.slots,
        TOGETHER=plan.together, LAG=plan.lag, **kernel_options, **launch_options(plan.warps, plan.registers),
    )  # fmt: skip


@on_device
def policy_loss_triton(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    mask: Tensor,
    transform: Transform,
    denominator: Tensor,
    spec: PolicyLossSpec,
    with_entropy: bool,
    grads: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`policy_loss` with token ratios, in one launch and one sum; writes `grads` unless that is empty."""
    rows = layout(logits)
    learns = grads.numel() > 0
    target = layout(grads, inner=rows.inner) if learns else rows
    shape, vocab, num_rows = tokens.shape, logits.shape[-1], tokens.numel()
    form, estimator, dual = spec.choices()
    aligned = rows.aligned and target.aligned

    def new(wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=torch.float32, device=logits.device)

    def flat(x: Tensor | None) -> Tensor:
        return old_logprobs if x is None else x.contiguous()

    loss, logprobs, entropy, ratio, kl = new(), new(), new(with_entropy), new(), new(estimator != 0)
    clipped = torch.empty(shape, dtype=torch.bool, device=logits.device)
    numbers = (1.0 / transform.temperature, transform.softcap, transform.logit_scale, *spec.numbers())
    if num_rows:
        arguments = (
            rows.tensor, target.tensor, tokens.contiguous(), flat(old_logprobs), flat(advantages), flat(ref_logprobs),
            flat(weights), bytes_of(mask, tokens), flat(transform.row_temperature),
            scalars(logits.device, *numbers), denominator, loss, logprobs, entropy, ratio, clipped.view(torch.uint8),
            kl, num_rows, rows.inner, rows.outer, rows.stride, target.outer, target.stride, vocab,
        )  # fmt: skip
        options = {
            "FORM": form, "ESTIMATOR": estimator, "DUAL": dual, "ENTROPY": with_entropy,
            "ENTROPY_LOSS": spec.entropy_coef != 0, "WEIGHTS": weights is not None, **flags(transform),
        }  # fmt: skip
        plan = resident_plan(rows, target, transform) if learns else None
        if plan is not None:
            launch_resident(plan, arguments, options)
        else:
            lanes, width, warps = policy_lanes_for(vocab, logits.element_size(), aligned)
            policy_loss_kernel[(min(num_rows, PROGRAMS * num_programs(logits.device)),)](
                *arguments, LANES=lanes, WIDTH=width, GRADS=learns, ALIGNED=aligned,
                TOGETHER=aligned or rows.together(target), **options,
                **launch_options(warps, row_registers(transform.softcap != 0.0)),
            )  # fmt: skip
    total = loss.sum(dtype=torch.float64).float()
    return total, logprobs, entropy, ratio, clipped, kl, grads


KERNELS: dict[str, Any] = {"policy_loss": policy_loss_kernel}
