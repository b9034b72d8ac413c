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
`reverse=True`. Lanes begin at multiples of WIDTH in memory, wherever rows begin: the first and the last of a row may
lie half in its neighbours, whose numbers are read (never past the 16 bytes that hold the row's own) and dropped. So the
lanes of a row, and with them its last bits, depend on where the row lies, where T is no multiple of WIDTH.

A program reads one segment of a row once and keeps it in registers. It makes the map of its segment known, waits for
the maps of the segments that follow in time (decoupled look-back) and goes on from there. What programs tell each other
are words of 64 bits that are 0 until they hold a number: no number and its flag can be seen apart, so no order between
two of them matters, and everything is added up in the order of the row, never of arrival.

- Nobody waits for what cannot come: a program takes a ticket when it runs, and waits only for lower ones. (Rows of one
  segment have no tickets: there the last program alone waits, and leaves room for the others.)
- All words are 0 again at the end. The earliest segment of a row waits until the others have told their moments, after
  which they read no map, and clears what the row has said; the very last program clears what the rows have.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device, scalars
from rlhf_kernels.triton_policy import kl_term
from rlhf_kernels.triton_rows import launch_options

WIDTH = 4
"""Tokens of a lane: 16 bytes of float32."""
LANES, WARPS = 256, 4
"""Lanes of a segment of a row that has more than one, and warps of its program: two lanes per thread."""
STREAM_TOKENS = 8 << 20
"""Up to so many, what is read and written asks to leave the cache first. On an H200 that takes 64 x 32768 from 22.2 to
19.8 microseconds, and 512 x 8192 from 39.6 to 37.2; 512 x 32768 from 139 to 144."""
MOMENTS = 3
"""Count, sum and sum of squares of the advantages."""
_POINTERS = ["rewards_ptr", "scores_ptr", "logprobs_ptr", "ref_ptr", "values_ptr", "mask_ptr", "scalars_ptr",
             "words_ptr", "shaped_ptr", "advantages_ptr", "returns_ptr", "kl_ptr", "moments_ptr"]  # fmt: skip


@triton.jit
def compose(c1, a1, c2, a2):
    """First map 1 (later tokens), then map 2 (earlier tokens)."""
    return c2 + a2 * c1, a2 * a1


@triton.jit
def add_two(x1, y1, x2, y2):
    return x1 + x2, y1 + y2


@triton.jit
def add_three(x1, y1, z1, x2, y2, z2):
    return x1 + x2, y1 + y2, z1 + z2


@triton.jit
def lanes_at(ptr, first):
    """Address of the lane that begins at `first`: of four numbers that one instruction reads."""
    return tl.multiple_of(ptr + first, ptr.dtype.element_ty.primitive_bitwidth // 2)


@triton.jit
def take(ptr, first, offset, some, STREAM: tl.constexpr):
    evict: tl.constexpr = "evict_first" if STREAM else ""
    return tl.load(lanes_at(ptr, first) + offset, mask=some, other=0, eviction_policy=evict)


@triton.jit
def put(ptr, first, offset, x, begin, T, ragged, STREAM: tl.constexpr):
    """Whole lanes as vectors; where one at either end of a row is only in part the row's, also a number at a time."""
    cache: tl.constexpr = ".cs" if STREAM else ""
    tl.store(lanes_at(ptr, first) + offset, x, mask=(begin >= 0) & (begin + 4 <= T), cache_modifier=cache)
    if ragged:
        which = tl.arange(0, 4)[None, :]
        tl.store(lanes_at(ptr, first) + offset, x, mask=(which >= -begin) & (which < T - begin))


@triton.jit
def shaped(mask, inside, value, logprob, reference, reward, kl_coef, REWARDS: tl.constexpr, ESTIMATOR: tl.constexpr):
    """What counts, values, rewards (without the score) and KL; 0 of what does not count, which may hold anything."""
    counts = (mask != 0) & inside
    kl = tl.zeros(mask.shape, tl.float32)
    total = kl
    if ESTIMATOR:
        kl, _ = kl_term(logprob.to(tl.float32) - reference.to(tl.float32), ESTIMATOR)
        kl = tl.where(counts, kl, 0.0)
        total = -kl_coef * kl
    if REWARDS:
        total += reward.to(tl.float32)
    return counts, tl.where(counts, value.to(tl.float32), 0.0), tl.where(counts, total, 0.0), kl


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
def token_maps(counts, value, reward, gamma, lam, LANES: tl.constexpr):
    """The maps of the four tokens of each lane."""
    decay = gamma * lam
    c0, c1, c2, c3 = split4(gamma * (1 - lam) * value + decay * reward, LANES)  # 0 where none counts, as they are
    a0, a1, a2, a3 = split4(tl.where(counts, decay, 1.0), LANES)
    return c0, c1, c2, c3, a0, a1, a2, a3


@triton.jit
def lane_map(counts, value, reward, gamma, lam, LANES: tl.constexpr):
    """All four of each lane composed, the last first."""
    c0, c1, c2, c3, a0, a1, a2, a3 = token_maps(counts, value, reward, gamma, lam, LANES)
    return c0 + a0 * (c1 + a1 * (c2 + a2 * c3)), a0 * a1 * (a2 * a3)


@triton.jit
def targets(W, counts, value, reward, gamma, lam, LANES: tl.constexpr):
    """Of each token, if W follows its lane."""
    _, c1, c2, c3, _, a1, a2, a3 = token_maps(counts, value, reward, gamma, lam, LANES)
    w2 = c3 + a3 * W
    w1 = c2 + a2 * w2
    return reward + join4(c1 + a1 * w1, w1, w2, W, LANES)


@triton.jit
def last_of(x, LANES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LANES) == LANES - 1, x, 0.0), 0)


@triton.jit
def map_word(c, a, seen):
    """A map and whether any token of it counts, as a word that is not 0: without one a is 1, with one a has a sign."""
    low = a.to(tl.int32, bitcast=True) | (seen.to(tl.int32) << 31)
    return (c.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def map_of(word):
    low = word.to(tl.int32)
    c = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return c, (low & 0x7FFFFFFF).to(tl.float32, bitcast=True), low < 0


@triton.jit
def after_later_lanes(word, W, LANES: tl.constexpr):
    """What follows each lane, if W follows lane 0, by the map of the lanes up to the one before it."""
    lane = tl.arange(0, LANES)
    c, a, _ = map_of(tl.where(lane == 0, 0x3F800000, tl.gather(word, tl.maximum(lane - 1, 0), 0)))
    return c + a * W


@triton.jit
def number_word(x):
    """A float64 as a word that is not 0: 0.0 is told as -0.0."""
    word = x.to(tl.int64, bitcast=True)
    return word | ((word == 0).to(tl.int64) << 63)


@triton.jit
def follow(ptr, size, W, MAPS: tl.constexpr):
    """What W becomes by the maps of `size` words, in their order, once they are all there; whether any token counts."""
    seen = 0
    for start in range(0, size, MAPS):
        which = start + tl.arange(0, MAPS)
        word = tl.load(ptr + which, mask=which < size, other=0x3F800000, volatile=True)  # or W -> 0 + 1 W
        while tl.sum((word == 0).to(tl.int32), 0) > 0:
            word = tl.load(ptr + which, mask=which < size, other=0x3F800000, volatile=True)
        c, a, counts = map_of(word)
        c, a = tl.associative_scan((c, a), 0, compose)
        W = last_of(c, MAPS) + last_of(a, MAPS) * W
        seen = tl.maximum(seen, tl.max(counts.to(tl.int32), 0))
    return W, seen


@triton.jit
def tell(ptr, stride, count, total, squares):
    tl.atomic_xchg(ptr, number_word(count), sem="relaxed")
    tl.atomic_xchg(ptr + stride, number_word(total), sem="relaxed")
    tl.atomic_xchg(ptr + 2 * stride, number_word(squares), sem="relaxed")


@triton.jit
def collect(ptr, stride, size, AT_ONCE: tl.constexpr):
    """The sums of `size` moments, in a fixed order, once they are all there; clears them."""
    counts = tl.zeros([AT_ONCE], tl.float64)
    totals = tl.zeros([AT_ONCE], tl.float64)
    squares = tl.zeros([AT_ONCE], tl.float64)
    for start in range(0, size, AT_ONCE):
        which = start + tl.arange(0, AT_ONCE)
        some = which < size
        x = tl.load(ptr + which, mask=some, other=1, volatile=True)
        y = tl.load(ptr + stride + which, mask=some, other=1, volatile=True)
        z = tl.load(ptr + 2 * stride + which, mask=some, other=1, volatile=True)
        while tl.sum(((x == 0) | (y == 0) | (z == 0)).to(tl.int32), 0) > 0:
            x = tl.load(ptr + which, mask=some, other=1, volatile=True)
            y = tl.load(ptr + stride + which, mask=some, other=1, volatile=True)
            z = tl.load(ptr + 2 * stride + which, mask=some, other=1, volatile=True)
        counts += tl.where(some, x.to(tl.float64, bitcast=True), 0.0)
        totals += tl.where(some, y.to(tl.float64, bitcast=True), 0.0)
        squares += tl.where(some, z.to(tl.float64, bitcast=True), 0.0)
        tl.debug_barrier()  # every warp has looked for itself, and would wait for ever for what another has cleared
        for moment in tl.static_range(3):
            tl.store(ptr + moment * stride + which, tl.zeros([AT_ONCE], tl.int64), mask=some)
    return tl.reduce((counts, totals, squares), 0, add_three)


@triton.jit
def clear(ptr, size, AT_ONCE: tl.constexpr):
    for start in range(0, size, AT_ONCE):
        which = start + tl.arange(0, AT_ONCE)
        tl.store(ptr + which, tl.zeros([AT_ONCE], tl.int64), mask=which < size)


@triton.jit(do_not_specialize=["T", "num_rows", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_kernel(
    rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, words_ptr,
    shaped_ptr, advantages_ptr, returns_ptr, kl_ptr, moments_ptr, T, num_rows, segments,
    LANES: tl.constexpr, REWARDS: tl.constexpr, SCORES: tl.constexpr, ESTIMATOR: tl.constexpr,
    CRITIC: tl.constexpr, SPLIT: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """One of `segments` segments of LANES lanes of a row; with SPLIT there are more than one.

    `words_ptr`: the ticket; [3, rows], the moments of each; [3 + 1 or 2, rows, segments], the moments of each segment
    and its maps. All are 0 before and after.
    """
    rows_ptr = words_ptr + 1
    row = tl.program_id(0)
    segment = 0
    if SPLIT:  # the later in time, the sooner
        ticket = tl.atomic_add(words_ptr, 1, sem="relaxed").to(tl.int32)
        segment = ticket // num_rows
        row = ticket - segment * num_rows
    parts = num_rows.to(tl.int64) * segments
    parts_ptr = rows_ptr + 3 * num_rows.to(tl.int64) + row.to(tl.int64) * segments
    maps_ptr = parts_ptr + 3 * parts
    start = row.to(tl.int64) * T
    first = ((start + T + 3) & -4) - 4 * LANES * (segment + 1)
    before = (first - start).to(tl.int32)  # the time of the tile's first token; below 0 there is none
    lane = tl.arange(0, LANES)
    offset = (4 * (LANES - 1 - lane))[:, None] + tl.arange(0, 4)[None, :]
    begin = (before + 4 * (LANES - 1 - lane))[:, None]
    time = before + offset
    inside = (time >= 0) & (time < T)
    some = begin > -4
    ragged = (before + 4 * LANES > T) | ((before < 0) & ((start & 3) != 0))

    mask = take(mask_ptr, first, offset, some, STREAM)
    value = take(values_ptr, first, offset, some, STREAM)
    logprob = value
    reference = value
    reward = value
    if ESTIMATOR:
        logprob = take(logprobs_ptr, first, offset, some, STREAM)
        reference = take(ref_ptr, first, offset, some, STREAM)
    if REWARDS:
        reward = take(rewards_ptr, first, offset, some, STREAM)
    gamma = tl.load(scalars_ptr)
    lam = tl.load(scalars_ptr + 1)
    critic_lam = tl.load(scalars_ptr + 2)
    kl_coef = tl.load(scalars_ptr + 3)
    score = 0.0
    if SCORES:
        score = tl.load(scores_ptr + row).to(tl.float32)
    counts, v, r, kl = shaped(mask, inside, value, logprob, reference, reward, kl_coef, REWARDS, ESTIMATOR)
    put(kl_ptr, first, offset, kl, begin, T, ragged, STREAM)
    count = tl.sum(tl.sum(counts.to(tl.int32), 1), 0)

    c, a = tl.associative_scan(lane_map(counts, v, r, gamma, lam, LANES), 0, compose)
    word = map_word(c, a, count > 0)
    if CRITIC:
        b, z = tl.associative_scan(lane_map(counts, v, r, gamma, critic_lam, LANES), 0, compose)
        word_critic = map_word(b, z, count > 0)
    if SPLIT:
        here = maps_ptr + segment + tl.zeros([LANES], tl.int32)
        last = lane == LANES - 1
        if segment + 1 < segments:
            tl.atomic_xchg(here, word, mask=last, sem="relaxed")
            if CRITIC:
                tl.atomic_xchg(here + parts, word_critic, mask=last, sem="relaxed")
    # what needs no other segment is written while they are waited for
    put(shaped_ptr, first, offset, r, begin, T, ragged, STREAM)
    W = score
    seen = 0
    if SPLIT:
        W, seen = follow(maps_ptr, segment, W, 32)
    u = targets(after_later_lanes(word, W, LANES), counts, v, r, gamma, lam, LANES)
    target = u
    if CRITIC:
        W_critic = score
        if SPLIT:
            W_critic, _ = follow(maps_ptr + parts, segment, W_critic, 32)
        target = targets(after_later_lanes(word_critic, W_critic, LANES), counts, v, r, gamma, critic_lam, LANES)
    advantage = tl.where(counts, u - v, 0.0)
    put(advantages_ptr, first, offset, advantage, begin, T, ragged, STREAM)
    put(returns_ptr, first, offset, tl.where(counts, target, 0.0), begin, T, ragged, STREAM)
    if SCORES:  # noqa: SIM102 - compiled in, or not; the other asked at run time
        if (seen == 0) & (count > 0):
            last_time = tl.max(tl.max(tl.where(counts, time, -1), 1), 0)
            last_reward = tl.sum(tl.sum(tl.where(time == last_time, r, 0.0), 1), 0)
            tl.debug_barrier()  # after what another thread has written there
            tl.store(shaped_ptr + start + last_time, last_reward + score)

    exact = advantage.to(tl.float64)
    total, squares = tl.reduce((tl.sum(exact, 1), tl.sum(exact * exact, 1)), 0, add_two)
    number = count.to(tl.float64)
    if segment + 1 < segments:
        tell(parts_ptr + segment, parts, number, total, squares)
    else:
        if SPLIT:
            others, total_others, squares_others = collect(parts_ptr, parts, segments - 1, 32)
            number += others
            total += total_others
            squares += squares_others
            for kind in tl.static_range(1 + CRITIC):
                clear(maps_ptr + kind * parts, segments - 1, 32)
        tell(rows_ptr + row, num_rows, number, total, squares)
        if row == num_rows - 1:
            number, total, squares = collect(rows_ptr, num_rows, num_rows, 2 * LANES)
            tl.store(moments_ptr, number)
            tl.store(moments_ptr + 1, total)
            tl.store(moments_ptr + 2, squares)
            tl.store(words_ptr, tl.zeros([], tl.int64))


def lanes_for_time(span: int) -> tuple[int, int]:
    """Lanes of a segment and warps of its program, for rows of at most `span` lanes."""
    if span > LANES:
        return LANES, WARPS
    lanes = max(32, triton.next_power_of_2(span))
    return lanes, lanes // 32


def segment_registers(critic: bool) -> int:
    """Ceiling on registers per thread: six programs on a multiprocessor of 65536, and with two lambdas four."""
    return 128 if critic else 80


def _words(device: torch.device, size: int) -> Tensor:
    """At least `size` integers that are 0 whenever no kernel runs on the current stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int64, device=device)  # a graph's own, set to 0 at every replay
    return _words_of(device, torch.cuda.current_stream(device).cuda_stream, triton.next_power_of_2(size))


@functools.lru_cache(maxsize=256)
def _words_of(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device=device)


def _in_lanes(x: Tensor) -> Tensor:
    """Contiguous, from where WIDTH neighbours are read at once."""
    x = x.contiguous()
    return x if x.data_ptr() % (WIDTH * x.element_size()) == 0 else x.clone()


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
    lanes: int | None = None,
    warps: int | None = None,
    registers: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gae.gae_reference` in one launch, of a program for each segment of `lanes` lanes of a row."""
    batch, length = values.shape
    # rows of a length that is no multiple of a lane begin anywhere within one
    span = length // WIDTH if length % WIDTH == 0 else (length + 2 * WIDTH - 2) // WIDTH
    if lanes is None or warps is None:
        lanes, warps = lanes_for_time(span)
    segments = triton.cdiv(span, lanes)
    critic = critic_lam != lam
    values = _in_lanes(values)

    def flat(x: Tensor | None) -> Tensor:
        return values if x is None else _in_lanes(x)

    tokens = (flat(logprobs), flat(ref_logprobs), values, _in_lanes(mask).view(torch.uint8))
    outputs = [torch.empty(values.shape, dtype=torch.float32, device=values.device) for _ in range(4)]
    moments = torch.empty(MOMENTS, dtype=torch.float64, device=values.device)
    words = _words(values.device, 1 + MOMENTS * batch + (MOMENTS + 1 + critic) * batch * segments)
    options: dict[str, Any] = {"num_warps": warps}
    if segments > 1:
        options = launch_options(warps, registers or segment_registers(critic))
    gae_kernel[(batch * segments,)](
        flat(rewards), values if scores is None else scores.contiguous(), *tokens,
        scalars(values.device, gamma, lam, critic_lam, kl_coef), words, *outputs, moments, length, batch, segments,
        LANES=lanes, REWARDS=rewards is not None, SCORES=scores is not None,
        ESTIMATOR=estimator if logprobs is not None else 0, CRITIC=critic, SPLIT=segments > 1,
        STREAM=values.numel() <= STREAM_TOKENS, **options,
    )  # fmt: skip
    rewards, advantages, returns, kl = outputs
    return rewards, advantages, returns, kl, moments


KERNELS: dict[str, Any] = {"gae": gae_kernel}
