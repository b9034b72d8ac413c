# The body of a kernel is not Python: its arguments and variables have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator, assignment, attr-defined"
"""The policy loss of rows that fit on a multiprocessor: memory sees one read and one write of each.

A program owns a row at a time and keeps all of it, cut into blocks: the first in registers, the others in shared
memory, each block in a place of its own. Two passes go through them: the statistics of a row, then its gradient. As
soon as the second has used a block, the same block of the next row is asked for in its place; and the first pass of
that row follows through the places LAG steps behind, so that memory is asked to read and to write all the time. Written
in Gluon, in which a program says where its numbers are kept; the arithmetic is that of `triton_rows` and
`triton_policy`, compiled into it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from rlhf_kernels.triton_policy import loss_of_row, row_inputs
from rlhf_kernels.triton_rows import (
    LOG2E,
    PER_ROW,
    VARIES,
    add_columns,
    capped,
    finished_stats,
    grad_of_columns,
    inverse_temperature_of,
    row_offset,
    token_logit,
)

copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Two names of one function: triton 3.9's and 3.6's."""


@gluon.constexpr_function
def grid_layout(lanes, count, warps):
    """Of [vectors, threads, count]: a lane is a vector of `count` numbers, and the lanes of a thread are far apart."""
    return gl.BlockedLayout([lanes // (32 * warps), 1, count], [1, 32, 1], [1, warps, 1], [2, 1, 0])


@gluon.jit
def lane_numbers(LANES: gl.constexpr, COUNT: gl.constexpr):
    """Which lane of its block each vector is, as [vectors, threads, 1]."""
    THREADS: gl.constexpr = 32 * gl.num_warps()
    GRID: gl.constexpr = grid_layout(LANES, COUNT, gl.num_warps())
    thread = gl.arange(0, THREADS, gl.SliceLayout(0, gl.SliceLayout(2, GRID)))[None, :][:, :, None]
    vector = gl.arange(0, LANES // THREADS, gl.SliceLayout(1, gl.SliceLayout(2, GRID)))[:, None][:, :, None]
    return thread, vector * THREADS


@gluon.jit
def vectors_of(block_ptr, LANES: gl.constexpr, COUNT: gl.constexpr):
    """Pointers [vectors, threads, COUNT] to a block; those of a thread differ by constants, a part of instructions."""
    GRID: gl.constexpr = grid_layout(LANES, COUNT, gl.num_warps())
    thread, others = lane_numbers(LANES, COUNT)
    number = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, GRID)))[None, :][:, None, :]
    return block_ptr + (thread * COUNT).to(gl.int64) + number + others * COUNT


@gluon.jit
def vectors_before(limit, LANES: gl.constexpr, WIDTH: gl.constexpr, COUNT: gl.constexpr):
    """Which vectors of a block, of WIDTH columns each, are among its first `limit` columns: a whole one is, or not."""
    thread, others = lane_numbers(LANES, COUNT)
    return thread * WIDTH + others * WIDTH < limit


@gluon.jit
def words_of(row_ptr):
    """A row as 32-bit words, two logits each where a logit has 16 bits: the compiler would give each a register."""
    return row_ptr.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def ask_for_blocks(slots, block_ptr, limit, LANES: gl.constexpr, WIDTH: gl.constexpr):
    """Asks for neighbouring blocks, together of LANES lanes, as far as they are among the first `limit` columns."""
    inside = vectors_before(limit, LANES, WIDTH, slots.shape[2])
    copy_to_shared(slots, vectors_of(words_of(block_ptr), LANES, slots.shape[2]), mask=inside)
    async_copy.commit_group()


@gluon.jit
def logits_of(words, ELEMENT: gl.constexpr, LANES: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """The logits in the words of a block, as float32 [LANES, WIDTH]; they stay in their threads."""
    if ELEMENT.is_fp32():
        logits = words.to(gl.float32, bitcast=True)
    else:
        if ELEMENT.is_bf16():  # the upper half of a float32: one instruction
            low = (words << 16).to(gl.float32, bitcast=True)
            high = (words & -65536).to(gl.float32, bitcast=True)
        else:
            low = words.to(gl.int16).to(ELEMENT, bitcast=True).to(gl.float32)
            high = (words >> 16).to(gl.int16).to(ELEMENT, bitcast=True).to(gl.float32)
        logits = gl.join(low, high)
    return gl.convert_layout(logits.reshape([LANES, WIDTH]), LAYOUT, assert_trivial=True)


@gluon.jit
def anew(words):
    """The same words to a compiler that would keep what it made of them before, as float32 and in twice the space."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def store_block(block_ptr, numbers, inside, LANES: gl.constexpr, WIDTH: gl.constexpr):
    """Writes numbers [LANES, WIDTH], of the vectors inside; None = all."""
    THREADS: gl.constexpr = 32 * gl.num_warps()
    numbers = numbers.to(block_ptr.dtype.element_ty).reshape([LANES // THREADS, THREADS, WIDTH])
    numbers = gl.convert_layout(numbers, grid_layout(LANES, WIDTH, gl.num_warps()), assert_trivial=True)
    gl.store(vectors_of(block_ptr, LANES, WIDTH), numbers, mask=inside, eviction_policy="evict_first")


@gluon.jit
def add_logits(
    logits, start, column, V, scale, scalars_ptr, maximum, others, weighted,
    SPECIAL: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, SCALED: gl.constexpr, ENTROPY: gl.constexpr,
):  # fmt: skip
    """The sums of each lane with a block more; SPECIAL if the token's column may be there, or the end of the row."""
    member = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    y, _ = capped(logits, scalars_ptr, SCALED, False)
    chosen = column
    if SPECIAL:
        lane = start + gl.arange(0, logits.shape[0], gl.SliceLayout(1, LAYOUT)) * WIDTH
        y = gl.where((lane < V)[:, None], y, -float("inf"))
        # by its place in each lane: the compiler would keep the number of every column in a register
        chosen = (column - lane)[:, None]
    return add_columns(y, scale, maximum, others, weighted, member, chosen, SPECIAL, ENTROPY)


@gluon.jit
def add_step(
    slots, start, column, V, scale, scalars_ptr, maximum, others, weighted,
    ELEMENT: gl.constexpr, LANES: gl.constexpr, WIDTH: gl.constexpr, TOGETHER: gl.constexpr, LAYOUT: gl.constexpr,
    SCALED: gl.constexpr, ENTROPY: gl.constexpr,
):  # fmt: skip
    """The sums of each lane with the blocks of a step more, which begin at column `start`."""
    VECTORS: gl.constexpr = LANES // (32 * gl.num_warps())
    GRID: gl.constexpr = grid_layout(LANES, slots.shape[2], gl.num_warps())
    for part in gl.static_range(TOGETHER):
        slot = slots.slice(part * VECTORS, VECTORS)
        first = start + part * LANES * WIDTH
        # two bodies: to look for the token everywhere would cost as much as the exponentials
        if ((column >= first) & (column < first + LANES * WIDTH)) | (first + LANES * WIDTH > V):
            logits = logits_of(slot.load(GRID), ELEMENT, LANES, WIDTH, LAYOUT)
            maximum, others, weighted = add_logits(
                logits, first, column, V, scale, scalars_ptr, maximum, others, weighted, True, WIDTH, LAYOUT, SCALED,
                ENTROPY,
            )  # fmt: skip
        else:
            logits = logits_of(slot.load(GRID), ELEMENT, LANES, WIDTH, LAYOUT)
            maximum, others, weighted = add_logits(
                logits, first, column, V, scale, scalars_ptr, maximum, others, weighted, False, WIDTH, LAYOUT, SCALED,
                ENTROPY,
            )  # fmt: skip
    return maximum, others, weighted


@gluon.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=[*PER_ROW, "ref_ptr"])
def resident_policy_kernel(
    logits_ptr, grads_ptr, tokens_ptr, old_ptr, advantages_ptr, ref_ptr, weights_ptr, mask_ptr, temperature_ptr,
    scalars_ptr, denominator_ptr,
    loss_ptr, logprobs_ptr, entropy_ptr, ratio_ptr, clipped_ptr, kl_ptr,
    num_rows, inner, stride_outer: gl.int64, stride_inner: gl.int64, out_stride_outer: gl.int64,
    out_stride_inner: gl.int64, V,
    LANES: gl.constexpr, WIDTH: gl.constexpr, HELD: gl.constexpr, SLOTS: gl.constexpr, TOGETHER: gl.constexpr,
    LAG: gl.constexpr, FORM: gl.constexpr, ESTIMATOR: gl.constexpr, DUAL: gl.constexpr, ENTROPY: gl.constexpr,
    ENTROPY_LOSS: gl.constexpr, WEIGHTS: gl.constexpr, ROW_TEMPERATURE: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = logits_ptr.dtype.element_ty
    BLOCK: gl.constexpr = LANES * WIDTH
    WORDS: gl.constexpr = WIDTH * ELEMENT.primitive_bitwidth // 32
    THREADS: gl.constexpr = 32 * gl.num_warps()
    VECTORS: gl.constexpr = LANES // THREADS
    STEPS: gl.constexpr = SLOTS // TOGETHER
    GRID: gl.constexpr = grid_layout(LANES, WORDS, gl.num_warps())
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32, 1], [gl.num_warps(), 1], [1, 0])
    LANE: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    slots = gl.allocate_shared_memory(gl.int32, [STEPS, TOGETHER * VECTORS, THREADS, WORDS], PLAIN)
    zeros = gl.zeros([LANES, WIDTH], ELEMENT, LAYOUT)

    row = gl.program_id(0)
    keep = gl.load(mask_ptr + row) != 0
    token = gl.load(tokens_ptr + row, mask=keep, other=0)
    # of the row before, whose gradient is written while this one is read; before the first there is none
    held = ()
    for _block in gl.static_range(HELD):
        held += (gl.zeros([VECTORS, THREADS, WORDS], gl.int32, GRID),)
    grads_row = grads_ptr + row_offset(row, inner, out_stride_outer, out_stride_inner, True)
    written = gl.where(row < 0, V, 0)
    active = row < 0
    token_before = gl.where(row < 0, 0, -1)
    at_token = 0.0
    highest = 0.0
    log_sum = 0.0
    inverse_before = 0.0
    a = 0.0
    b = 0.0
    c = 0.0
    for row in range(gl.program_id(0), num_rows + gl.num_programs(0), gl.num_programs(0)):
        # asked for now, needed after the passes
        next_row = row + gl.num_programs(0)
        next_keep = gl.load(mask_ptr + next_row, mask=next_row < num_rows, other=0) != 0
        row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, True)
        column = gl.where(keep & (token >= 0) & (token < V), token, -1).to(gl.int32)
        z_token = token_logit(row_ptr, column, V, keep)
        old, advantage, reference, weight = row_inputs(
            row, keep, old_ptr, advantages_ptr, ref_ptr, weights_ptr, ESTIMATOR, WEIGHTS
        )
        inverse_temperature = inverse_temperature_of(temperature_ptr, scalars_ptr, row, keep, ROW_TEMPERATURE)
        scale = inverse_temperature * LOG2E
        limit = gl.where(keep, V, 0)
        maximum = gl.full([LANES], -float("inf"), gl.float32, LANE)
        others = gl.zeros([LANES], gl.float32, LANE)
        weighted = gl.zeros([LANES], gl.float32, LANE)

        asked = ()
        for block in gl.static_range(HELD):
            inside = vectors_before(written - block * BLOCK, LANES, WIDTH, WIDTH)
            if active:
                logits = logits_of(anew(held[block]), ELEMENT, LANES, WIDTH, LAYOUT)
                grad = grad_of_columns(
                    logits, column, column, highest, inverse_before, log_sum, 0.0, a, b, c, scalars_ptr, False, SCALED,
                    False, ENTROPY_LOSS,
                )  # fmt: skip
                store_block(grads_row + block * BLOCK, grad, None, LANES, WIDTH)
            else:
                store_block(grads_row + block * BLOCK, zeros, inside, LANES, WIDTH)
            pointers = vectors_of(words_of(row_ptr + block * BLOCK), LANES, WORDS)
            asked += (gl.load(pointers, mask=keep, other=0, eviction_policy="evict_first"),)
        held = asked
        for step in range(STEPS):
            start = (HELD + step * TOGETHER) * BLOCK
            if active:
                for part in gl.static_range(TOGETHER):
                    slot = slots.index(step).slice(part * VECTORS, VECTORS)
                    logits = logits_of(slot.load(GRID), ELEMENT, LANES, WIDTH, LAYOUT)
                    grad = grad_of_columns(
                        logits, column, column, highest, inverse_before, log_sum, 0.0, a, b, c, scalars_ptr, False,
                        SCALED, False, ENTROPY_LOSS,
                    )  # fmt: skip
                    inside = vectors_before(written - start - part * BLOCK, LANES, WIDTH, WIDTH)
                    store_block(grads_row + start + part * BLOCK, grad, inside, LANES, WIDTH)
            else:
                for part in gl.static_range(TOGETHER):
                    inside = vectors_before(written - start - part * BLOCK, LANES, WIDTH, WIDTH)
                    store_block(grads_row + start + part * BLOCK, zeros, inside, LANES, WIDTH)
            ask_for_blocks(slots.index(step), row_ptr + start, limit - start, LANES * TOGETHER, WIDTH)
            async_copy.wait_group(LAG)
            if keep & (step >= LAG):
                maximum, others, weighted = add_step(
                    slots.index(step - LAG), start - LAG * TOGETHER * BLOCK, column, V, scale, scalars_ptr, maximum,
                    others, weighted, ELEMENT, LANES, WIDTH, TOGETHER, LAYOUT, SCALED, ENTROPY,
                )  # fmt: skip
        for block in gl.static_range(HELD):
            logits = logits_of(held[block], ELEMENT, LANES, WIDTH, LAYOUT)
            if (column >= block * BLOCK) & (column < (block + 1) * BLOCK):
                maximum, others, weighted = add_logits(
                    logits, block * BLOCK, column, V, scale, scalars_ptr, maximum, others, weighted, True, WIDTH,
                    LAYOUT, SCALED, ENTROPY,
                )  # fmt: skip
            else:
                maximum, others, weighted = add_logits(
                    logits, block * BLOCK, column, V, scale, scalars_ptr, maximum, others, weighted, False, WIDTH,
                    LAYOUT, SCALED, ENTROPY,
                )  # fmt: skip
        async_copy.wait_group(0)
        for step in range(STEPS - LAG, gl.where(keep, STEPS, 0)):
            start = (HELD + step * TOGETHER) * BLOCK
            maximum, others, weighted = add_step(
                slots.index(step), start, column, V, scale, scalars_ptr, maximum, others, weighted, ELEMENT, LANES,
                WIDTH, TOGETHER, LAYOUT, SCALED, ENTROPY,
            )  # fmt: skip
        tl.debug_barrier()  # another thread has written the token's column, with the rest of its block
        gl.store(grads_row + token_before, at_token.to(ELEMENT), mask=active & (token_before >= 0))

        active = row < 0
        if row < num_rows:
            logprob, entropy, top, log_sum, miss, _ = finished_stats(
                maximum, others, weighted, z_token, inverse_temperature, scalars_ptr, SCALED, False, ENTROPY
            )
            a, some_b, some_c = loss_of_row(
                row, keep, logprob, entropy, log_sum, old, advantage, reference, weight, scalars_ptr, denominator_ptr,
                loss_ptr, logprobs_ptr, entropy_ptr, ratio_ptr, clipped_ptr, kl_ptr, FORM, ESTIMATOR, DUAL, ENTROPY,
                ENTROPY_LOSS, WEIGHTS,
            )  # fmt: skip
            b = gl.to_tensor(some_b)
            c = gl.to_tensor(some_c)
            highest = top * inverse_temperature
            active = keep & ((a != 0.0) | (b != 0.0) | (c != 0.0))
            at_token = grad_of_columns(
                z_token, column, column, highest, inverse_temperature, log_sum, miss, a, b, c, scalars_ptr, True,
                SCALED, False, ENTROPY_LOSS,
            )  # fmt: skip
        grads_row = grads_ptr + row_offset(row, inner, out_stride_outer, out_stride_inner, True)
        written = gl.where(row < num_rows, V, 0)
        inverse_before = inverse_temperature
        token_before = column
        token = gl.load(tokens_ptr + next_row, mask=next_keep, other=0)
        keep = next_keep


class Plan(NamedTuple):
    """How rows are kept on a multiprocessor."""

    lanes: int
    """Vectors of 16 bytes in a block."""
    held: int
    """Blocks in registers."""
    slots: int
    """Blocks in shared memory."""
    warps: int
    """Of a program."""
    registers: int
    """Of a thread."""
    programs: int
    """Per multiprocessor."""
    most_together: int
    """Slots between two barriers, if their number allows."""

    @property
    def lag(self) -> int:
        """Steps between the passes: what is on its way meanwhile has to be more than memory gives in its latency."""
        return min(2, self.slots // self.together)

    @property
    def together(self) -> int:
        """Slots between two barriers."""
        return next(size for size in (self.most_together, 2, 1) if self.slots % size == 0)


CHOICES = (
    Plan(lanes=512, held=0, slots=0, warps=8, registers=80, programs=3, most_together=2),
    Plan(lanes=512, held=4, slots=0, warps=8, registers=128, programs=2, most_together=2),
    Plan(lanes=512, held=12, slots=0, warps=16, registers=128, programs=1, most_together=4),
)
"""The more rows a multiprocessor has at a time, the less it waits at their ends. `held`: at most."""
SPARE_BYTES = 2048
"""Of shared memory, per program: half for the sums that warps exchange, half the device's own."""
LEAST_BYTES = 16384
"""Of a row; a shorter one would leave threads without a column."""


def plan_for(vocab: int, element_size: int, shared_bytes: int) -> Plan | None:
    """How to keep rows where a multiprocessor has so much shared memory; None if they do not fit, or are too short."""
    row_bytes = vocab * element_size
    for choice in CHOICES:
        block_bytes = choice.lanes * 16
        blocks = triton.cdiv(row_bytes, block_bytes)
        slots = min(blocks, (shared_bytes // choice.programs - SPARE_BYTES) // block_bytes)
        if row_bytes >= LEAST_BYTES and slots > 0 and blocks - slots <= choice.held:
            return choice._replace(held=blocks - slots, slots=slots)
    return None


KERNELS: dict[str, Any] = {"policy_loss_resident": resident_policy_kernel}
