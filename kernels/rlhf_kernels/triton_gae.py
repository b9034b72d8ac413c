# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Generalised advantage estimation as an associative scan, fused with the KL-shaped rewards, returns and moments.

With u_t = advantage + value, the target of the critic, and W_t = gamma ((1 - lam) V_t + lam u_t), what token t adds to
the targets before it, the recursion over the tokens that count needs nothing else of the next one:

    mask True:  u_t = r_t + W_t'    W_t = gamma (1 - lam) V_t + gamma lam r_t + gamma lam W_t'    mask False: W_t = W_t'

The maps W -> c + a W are closed under composition, so they are scanned. The score of a row is what follows its last
token: the scan starts from W = score, which adds it there exactly.

A lane holds WIDTH neighbouring tokens, read and written as one vector, and composes their maps without talking to the
others; only the maps of lanes are scanned. Lane 0 is the last in time: time is reversed by addresses, not by
`reverse=True`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device, scalars
from rlhf_kernels.triton_policy import kl_term

SEGMENT_BLOCKS = 4
WIDTH = 4
"""Tokens of a lane: 16 bytes of float32."""
_POINTERS = ["rewards_ptr", "scores_ptr", "logprobs_ptr", "ref_ptr", "values_ptr", "mask_ptr", "scalars_ptr",
             "maps_ptr", "shaped_ptr", "advantages_ptr", "returns_ptr", "kl_ptr", "partials_ptr", "finished_ptr",
             "moments_ptr"]  # fmt: skip
"""Rows of any length begin anywhere: whether all of them begin at a multiple of 16 bytes is a flag, ALIGNED."""


@triton.jit
def compose(c1, a1, c2, a2):
    """First map 1 (later tokens), then map 2 (earlier tokens)."""
    return c2 + a2 * c1, a2 * a1


@triton.jit
def compose_two(c1, a1, c2, a2, c3, a3, c4, a4):
    """Of two pairs of maps."""
    return c3 + a3 * c1, a3 * a1, c4 + a4 * c2, a4 * a2


@triton.jit
def row_of(ptr, start, ALIGNED: tl.constexpr):
    """Address of the row that begins at `start`: with ALIGNED, of four numbers that one instruction reads."""
    row = ptr + start
    if ALIGNED:
        row = tl.multiple_of(row, ptr.dtype.element_ty.primitive_bitwidth // 2)
    return row


@triton.jit
def take(ptr, start, time, ALIGNED: tl.constexpr):
    return tl.load(row_of(ptr, start, ALIGNED) + time, mask=time >= 0, other=0)


@triton.jit
def put(ptr, start, time, x, ALIGNED: tl.constexpr):
    tl.store(row_of(ptr, start, ALIGNED) + time, x, mask=time >= 0)


@triton.jit
def times(T, i, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Of the tokens [LANES, 4] of the i-th block from the end; before 0 there are none."""
    end = T - i * (LANES * 4)
    if ALIGNED:
        end = tl.multiple_of(end, 4)
    return (end - 4 - 4 * tl.arange(0, LANES))[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def read(
    rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, start, time,
    REWARDS: tl.constexpr, ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Mask, values, log-probabilities of both models and rewards, as they are."""
    mask = take(mask_ptr, start, time, ALIGNED)
    value = take(values_ptr, start, time, ALIGNED)
    logprob = value
    reference = value
    reward = value
    if ESTIMATOR:
        logprob = take(logprobs_ptr, start, time, ALIGNED)
        reference = take(ref_ptr, start, time, ALIGNED)
    if REWARDS:
        reward = take(rewards_ptr, start, time, ALIGNED)
    return mask, value, logprob, reference, reward


@triton.jit
def shaped(mask, value, logprob, reference, reward, kl_coef, REWARDS: tl.constexpr, ESTIMATOR: tl.constexpr):
    """What counts, values, rewards (without the score) and KL; 0 of what does not count, which may hold anything."""
    counts = mask != 0
    kl = tl.zeros(mask.shape, tl.float32)
    total = kl
    if ESTIMATOR:
        kl, _ = kl_term(logprob.to(tl.float32) - reference.to(tl.float32), ESTIMATOR)
        kl = tl.where(counts, kl, 0.0)
        total = -kl_coef * kl
    if REWARDS:
        total += tl.where(counts, reward.to(tl.float32), 0.0)
    return counts, tl.where(counts, value.to(tl.float32), 0.0), total, kl


@triton.jit
def split4(x, LANES: tl.constexpr):
    """Columns 0 to 3 of [LANES, 4]: a lane's own registers."""
    even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LANES, 4])


@triton.jit
def lane_map(counts, value, reward, gamma, lam, LANES: tl.constexpr):
    """The maps of the four tokens of each lane, the last first, and all of them composed."""
    decay = gamma * lam
    c0, c1, c2, c3 = split4(gamma * (1 - lam) * value + decay * reward, LANES)  # 0 where none counts, as they are
    a0, a1, a2, a3 = split4(tl.where(counts, decay, 1.0), LANES)
    c = c0 + a0 * (c1 + a1 * (c2 + a2 * c3))
    return c0, c1, c2, c3, a0, a1, a2, a3, c, a0 * a1 * (a2 * a3)


@triton.jit
def following(W, c1, c2, c3, a1, a2, a3, LANES: tl.constexpr):
    """What follows each of the four tokens of a lane, if W follows the lane."""
    w2 = c3 + a3 * W
    w1 = c2 + a2 * w2
    return join4(c1 + a1 * w1, w1, w2, W, LANES)


@triton.jit
def last_of(x, LANES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LANES) == LANES - 1, x, 0.0), 0)


@triton.jit
def earlier(x, first, LANES: tl.constexpr):
    """Of each lane what x is in the lane before it; `first` of lane 0."""
    lane = tl.arange(0, LANES)
    return tl.where(lane == 0, first, tl.gather(x, tl.maximum(lane - 1, 0), 0))


@triton.jit
def sum_of(ptr, stride, size, LANES: tl.constexpr):
    """Of float64 numbers that other programs have written: not as a cache of this multiprocessor may hold them."""
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, size, LANES):
        which = start + tl.arange(0, LANES)
        total += tl.load(ptr + which * stride, mask=which < size, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_kernel(
    rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, maps_ptr,
    shaped_ptr, advantages_ptr, returns_ptr, kl_ptr, partials_ptr, finished_ptr, moments_ptr, T, segments,
    LANES: tl.constexpr, BLOCKS: tl.constexpr, REWARDS: tl.constexpr, SCORES: tl.constexpr,
    ESTIMATOR: tl.constexpr, CRITIC: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A whole row per program, or, with SPLIT, one of `segments` pieces of BLOCKS blocks, after those that follow it.

    `maps_ptr` [rows, segments, 5] holds the maps of the segments; `finished_ptr` counts the programs that are done,
    and is 0 before and after: the last one adds up the moments of all, in their order.
    """
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    start = row * T
    gamma = tl.load(scalars_ptr)
    lam = tl.load(scalars_ptr + 1)
    critic_lam = tl.load(scalars_ptr + 2)
    kl_coef = tl.load(scalars_ptr + 3)
    score = 0.0
    if SCORES:
        score = tl.load(scores_ptr + row).to(tl.float32)
    W = score
    W_critic = score
    seen = 0.0
    first = 0
    blocks = tl.cdiv(T, LANES * 4)
    if SPLIT:
        first = segment * BLOCKS
        blocks = BLOCKS
        for later in range(segment):
            maps = maps_ptr + (row * segments + later) * 5
            seen = tl.maximum(seen, tl.load(maps))
            W = tl.load(maps + 1) + tl.load(maps + 2) * W
            if CRITIC:
                W_critic = tl.load(maps + 3) + tl.load(maps + 4) * W_critic
    count = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    mask, value, logprob, reference, reward = read(
        rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, start, times(T, first, LANES, ALIGNED), REWARDS,
        ESTIMATOR, ALIGNED,
    )  # fmt: skip
    for i in range(first, first + blocks):
        time = times(T, i, LANES, ALIGNED)
        counts, v, r, kl = shaped(mask, value, logprob, reference, reward, kl_coef, REWARDS, ESTIMATOR)
        # the next block is on its way while this one is scanned
        mask, value, logprob, reference, reward = read(
            rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, start, times(T, i + 1, LANES, ALIGNED), REWARDS,
            ESTIMATOR, ALIGNED,
        )  # fmt: skip
        _, c1, c2, c3, _, a1, a2, a3, c, a = lane_map(counts, v, r, gamma, lam, LANES)
        if CRITIC:
            _, b1, b2, b3, _, z1, z2, z3, b, z = lane_map(counts, v, r, gamma, critic_lam, LANES)
            c, a, b, z = tl.associative_scan((c, a, b, z), 0, compose_two)
            after = b + z * W_critic
            target = r + following(earlier(after, W_critic, LANES), b1, b2, b3, z1, z2, z3, LANES)
            W_critic = last_of(after, LANES)
        else:
            c, a = tl.associative_scan((c, a), 0, compose)
        after = c + a * W
        u = r + following(earlier(after, W, LANES), c1, c2, c3, a1, a2, a3, LANES)
        W = last_of(after, LANES)
        if not CRITIC:
            target = u
        if SCORES:  # noqa: SIM102 - compiled in, or not; the other asked at run time
            if seen == 0:
                last = tl.max(tl.max(tl.where(counts, time, -1), 1), 0)
                r = tl.where(time == last, r + score, r)
                seen = tl.where(last >= 0, 1.0, 0.0)
        advantage = tl.where(counts, u - v, 0.0)
        put(advantages_ptr, start, time, advantage, ALIGNED)
        put(returns_ptr, start, time, tl.where(counts, target, 0.0), ALIGNED)
        put(shaped_ptr, start, time, tl.where(counts, r, 0.0), ALIGNED)
        put(kl_ptr, start, time, kl, ALIGNED)
        count += tl.sum(counts.to(tl.float32), 1)
        exact = advantage.to(tl.float64)
        total += tl.sum(exact, 1)
        squares += tl.sum(exact * exact, 1)
    tl.store(partials_ptr + program * 3, tl.sum(count.to(tl.float64), 0))
    tl.store(partials_ptr + program * 3 + 1, tl.sum(total, 0))
    tl.store(partials_ptr + program * 3 + 2, tl.sum(squares, 0))
    if tl.atomic_add(finished_ptr, 1) == tl.num_programs(0) - 1:
        tl.store(finished_ptr, 0)
        for moment in tl.static_range(3):
            tl.store(moments_ptr + moment, sum_of(partials_ptr + moment, 3, tl.num_programs(0), LANES))


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_segment_kernel(
    rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, maps_ptr, T, segments,
    LANES: tl.constexpr, BLOCKS: tl.constexpr, REWARDS: tl.constexpr, ESTIMATOR: tl.constexpr, CRITIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of one segment whether any token counts, and c, a of its map, without the score; of both lambdas."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    gamma = tl.load(scalars_ptr)
    lam = tl.load(scalars_ptr + 1)
    critic_lam = tl.load(scalars_ptr + 2)
    kl_coef = tl.load(scalars_ptr + 3)
    seen = 0.0
    c0, a0, b0, z0 = 0.0, 1.0, 0.0, 1.0
    for i in range(segment * BLOCKS, segment * BLOCKS + BLOCKS):
        time = times(T, i, LANES, ALIGNED)
        mask, value, logprob, reference, reward = read(
            rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, row * T, time, REWARDS, ESTIMATOR, ALIGNED
        )
        counts, v, r, _ = shaped(mask, value, logprob, reference, reward, kl_coef, REWARDS, ESTIMATOR)
        seen = tl.maximum(seen, tl.max(tl.max(counts.to(tl.float32), 1), 0))
        _, _, _, _, _, _, _, _, c, a = lane_map(counts, v, r, gamma, lam, LANES)
        c, a = tl.associative_scan((c, a), 0, compose)
        c0, a0 = compose(c0, a0, last_of(c, LANES), last_of(a, LANES))
        if CRITIC:
            _, _, _, _, _, _, _, _, b, z = lane_map(counts, v, r, gamma, critic_lam, LANES)
            b, z = tl.associative_scan((b, z), 0, compose)
            b0, z0 = compose(b0, z0, last_of(b, LANES), last_of(z, LANES))
    out = maps_ptr + program * 5
    tl.store(out, seen)
    tl.store(out + 1, c0)
    tl.store(out + 2, a0)
    tl.store(out + 3, b0)
    tl.store(out + 4, z0)


def lanes_for_time(length: int) -> tuple[int, int]:
    """Lanes per scan, and warps: one lane per thread."""
    lanes = min(128, max(32, triton.next_power_of_2(triton.cdiv(length, WIDTH))))
    return lanes, lanes // 32


def in_vectors(length: int, *tensors: Tensor) -> bool:
    """Whether WIDTH neighbours from a multiple of WIDTH on lie within what one load reads, in every row of each."""
    return length % WIDTH == 0 and all(x.data_ptr() % (WIDTH * x.element_size()) == 0 for x in tensors)


def _counter(device: torch.device) -> Tensor:
    """An integer that is 0 whenever no kernel runs on the current stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # a graph's own, set to 0 at every replay
    return _counter_of(device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=256)
def _counter_of(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@on_device
def gae_triton(
    rewards: Tensor | None,
    scores: Tensor | None,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: int,
    gamma: float,
    lam: float,
    critic_lam: float,
    *,
    split: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gae.gae_reference` in one launch; few long rows are split over programs, in two launches."""
    batch, length = values.shape
    lanes, warps = lanes_for_time(length)
    per_segment = lanes * WIDTH * SEGMENT_BLOCKS
    if split is None:
        split = batch < 128 and length >= 4 * per_segment
    segments = triton.cdiv(length, per_segment) if split else 1

    def flat(x: Tensor | None) -> Tensor:
        return values if x is None else x.contiguous()

    tokens = (flat(logprobs), flat(ref_logprobs), flat(values), mask.contiguous().view(torch.uint8))
    reward, numbers = flat(rewards), scalars(values.device, gamma, lam, critic_lam, kl_coef)
    outputs = [torch.empty(values.shape, dtype=torch.float32, device=values.device) for _ in range(4)]
    partials = torch.empty((batch * segments, 3), dtype=torch.float64, device=values.device)
    moments = torch.empty(3, dtype=torch.float64, device=values.device)
    constants: dict[str, Any] = {
        "LANES": lanes, "BLOCKS": SEGMENT_BLOCKS, "REWARDS": rewards is not None,
        "ESTIMATOR": estimator if logprobs is not None else 0, "CRITIC": critic_lam != lam,
        "ALIGNED": in_vectors(length, reward, *tokens, *outputs), "num_warps": warps,
    }  # fmt: skip
    maps = outputs[0]
    if split:
        maps = torch.empty((batch * segments, 5), dtype=torch.float32, device=values.device)
        gae_segment_kernel[(batch * segments,)](reward, *tokens, numbers, maps, length, segments, **constants)
    gae_kernel[(batch * segments,)](
        reward, flat(scores), *tokens, numbers, maps, *outputs, partials, _counter(values.device), moments, length,
        segments,
        SCORES=scores is not None, SPLIT=split, **constants,
    )  # fmt: skip
    rewards, advantages, returns, kl = outputs
    return rewards, advantages, returns, kl, moments


KERNELS: dict[str, Any] = {"gae": gae_kernel, "gae_segment": gae_segment_kernel}
