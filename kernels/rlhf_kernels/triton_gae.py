# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Generalised advantage estimation as an associative scan, fused with the KL-shaped rewards, returns and moments.

Token t maps what is known after it, the discounted next value n and the next advantage g, to (n, g) before it:

    mask True:  n' = gamma V_t    g' = (r_t - V_t) + n + gamma lam g        mask False: unchanged

Maps of the form n' = h v + (1 - h) n, g' = c + k n + a g with h in {0, 1} are closed under composition, so they are
scanned. The score of a row is what follows its last token: the scan starts from n = score, and adds it there exactly.

A lane holds WIDTH neighbouring tokens, read and written as one vector, and composes their maps without talking to the
others; only the maps of lanes are scanned. What a lane needs is the map of everything after it, so it composes the
tokens of the lane after it, not its own, and then runs the recursion itself over its own. Lane 0 is the last in time:
time is reversed by addresses, not by `reverse=True`.
"""

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
             "maps_ptr", "shaped_ptr", "advantages_ptr", "returns_ptr", "kl_ptr", "moments_ptr"]  # fmt: skip
"""Rows of any length begin anywhere: whether all of them begin at a multiple of 16 bytes is a flag, ALIGNED."""


@triton.jit
def compose(h1, v1, c1, k1, a1, h2, v2, c2, k2, a2):
    """First map 1 (later tokens), then map 2 (earlier tokens)."""
    return (
        h1 + h2 - h1 * h2,
        h2 * v2 + (1 - h2) * h1 * v1,
        c2 + k2 * (h1 * v1) + a2 * c1,
        k2 * (1 - h1) + a2 * k1,
        a2 * a1,
    )


@triton.jit
def row_of(ptr, start, ALIGNED: tl.constexpr):
    """Address of the row that begins at `start`: with ALIGNED, of four numbers that one instruction reads."""
    row = ptr + start
    if ALIGNED:
        row = tl.multiple_of(row, ptr.dtype.element_ty.primitive_bitwidth // 2)
    return row


@triton.jit
def take(ptr, start, time, inside, ALIGNED: tl.constexpr):
    return tl.load(row_of(ptr, start, ALIGNED) + time, mask=inside, other=0)


@triton.jit
def put(ptr, start, time, x, ALIGNED: tl.constexpr):
    tl.store(row_of(ptr, start, ALIGNED) + time, x, mask=time >= 0)


@triton.jit
def token_inputs(
    rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, start, time, inside,
    REWARDS: tl.constexpr, ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Mask as 0 and 1, value, reward (without the score) and KL of some tokens of the row that begins at `start`."""
    mask = take(mask_ptr, start, time, inside, ALIGNED)
    # values of what does not count are read, as a vector is, and forgotten: they may be anything
    counts = mask != 0
    value = tl.where(counts, take(values_ptr, start, time, inside, ALIGNED).to(tl.float32), 0.0)
    reward = value * 0.0
    kl = value * 0.0
    if ESTIMATOR:
        logprob = tl.where(counts, take(logprobs_ptr, start, time, inside, ALIGNED).to(tl.float32), 0.0)
        reference = tl.where(counts, take(ref_ptr, start, time, inside, ALIGNED).to(tl.float32), 0.0)
        kl, _ = kl_term(logprob - reference, ESTIMATOR)
        reward = -tl.load(scalars_ptr + 3) * kl
    if REWARDS:
        reward += tl.where(counts, take(rewards_ptr, start, time, inside, ALIGNED).to(tl.float32), 0.0)
    return mask.to(tl.float32), value, reward, kl


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
def before(m, discounted, delta, decay, h, v, c, k, a):
    """The map of a token and then, after it in time, those that (h, v, c, k, a) stands for."""
    on = m > 0
    return (
        tl.where(on, 1.0, h),
        tl.where(on, discounted, v),
        tl.where(on, delta + h * v + decay * c, c),
        tl.where(on, 1.0 - h + decay * k, k),
        tl.where(on, decay * a, a),
    )


@triton.jit
def lane_map(m, value, reward, gamma, decay, LANES: tl.constexpr):
    """The map of the four tokens of each lane."""
    m0, m1, m2, m3 = split4(m, LANES)
    u0, u1, u2, u3 = split4(gamma * value, LANES)
    d0, d1, d2, d3 = split4(reward - value, LANES)
    none = tl.zeros([LANES], tl.float32)
    h, v, c, k, a = before(m3, u3, d3, decay, none, none, none, none, none + 1.0)
    h, v, c, k, a = before(m2, u2, d2, decay, h, v, c, k, a)
    h, v, c, k, a = before(m1, u1, d1, decay, h, v, c, k, a)
    return before(m0, u0, d0, decay, h, v, c, k, a)


@triton.jit
def advantages_of(m, value, reward, gamma, decay, n, g, LANES: tl.constexpr):
    """The recursion over the four tokens of each lane, from what follows them; advantages, and the last (n, g)."""
    m0, m1, m2, m3 = split4(m, LANES)
    u0, u1, u2, u3 = split4(gamma * value, LANES)
    d0, d1, d2, d3 = split4(reward - value, LANES)
    g3 = tl.where(m3 > 0, d3 + n + decay * g, g)
    n = tl.where(m3 > 0, u3, n)
    g2 = tl.where(m2 > 0, d2 + n + decay * g3, g3)
    n = tl.where(m2 > 0, u2, n)
    g1 = tl.where(m1 > 0, d1 + n + decay * g2, g2)
    n = tl.where(m1 > 0, u1, n)
    g0 = tl.where(m0 > 0, d0 + n + decay * g1, g1)
    return join4(g0, g1, g2, g3, LANES), tl.where(m0 > 0, u0, n), g0


@triton.jit
def with_score(m, reward, score, seen, LANES: tl.constexpr):
    """The rewards, with the score at the first token from the end that counts."""
    _, m1, m2, m3 = split4(m, LANES)
    s2 = tl.maximum(seen, m3)
    s1 = tl.maximum(s2, m2)
    s0 = tl.maximum(s1, m1)
    return reward + tl.where((m > 0) & (join4(s0, s1, s2, seen, LANES) == 0), score, 0.0)


@triton.jit
def last_of(x, LANES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LANES) == LANES - 1, x, 0.0), 0)


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_kernel(
    rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, maps_ptr,
    shaped_ptr, advantages_ptr, returns_ptr, kl_ptr, moments_ptr, T, segments,
    LANES: tl.constexpr, BLOCKS: tl.constexpr, REWARDS: tl.constexpr, SCORES: tl.constexpr,
    ESTIMATOR: tl.constexpr, CRITIC: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A whole row per program, or, with SPLIT, one of `segments` pieces of BLOCKS blocks, after those that follow it.

    `maps_ptr` [rows, segments, 8] holds the maps of the segments.
    """
    BLOCK: tl.constexpr = LANES * 4
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    start = row * T
    gamma = tl.load(scalars_ptr)
    decay = gamma * tl.load(scalars_ptr + 1)
    critic_decay = gamma * tl.load(scalars_ptr + 2)
    score = 0.0
    if SCORES:
        score = tl.load(scores_ptr + row).to(tl.float32)
    next_value = score
    next_advantage = 0.0
    next_critic = 0.0
    seen = 0.0
    first = 0
    blocks = tl.cdiv(T, BLOCK)
    if SPLIT:
        first = segment * BLOCKS
        blocks = BLOCKS
        for later in range(segment):
            maps = maps_ptr + (row * segments + later) * 8
            h = tl.load(maps)
            next_advantage = tl.load(maps + 2) + tl.load(maps + 3) * next_value + tl.load(maps + 4) * next_advantage
            if CRITIC:
                next_critic = tl.load(maps + 5) + tl.load(maps + 6) * next_value + tl.load(maps + 7) * next_critic
            next_value = tl.where(h > 0, tl.load(maps + 1), next_value)
            seen = tl.maximum(seen, h)
    count = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    lane = tl.arange(0, LANES)
    for i in range(first, first + blocks):
        end = T - i * BLOCK
        if ALIGNED:
            end = tl.multiple_of(end, 4)
        time = (end - 4 - 4 * lane)[:, None] + tl.arange(0, 4)[None, :]
        # the tokens of the lane after this one; after lane 0 there are none in this block
        m, value, reward, _ = token_inputs(
            rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, start, time + 4,
            (time + 4 >= 0) & (time + 4 < end), REWARDS, ESTIMATOR, ALIGNED,
        )  # fmt: skip
        h, v, c, k, a = tl.associative_scan(lane_map(m, value, reward, gamma, decay, LANES), 0, compose)
        g = c + k * next_value + a * next_advantage
        if CRITIC:
            _, _, c, k, a = tl.associative_scan(lane_map(m, value, reward, gamma, critic_decay, LANES), 0, compose)
            critic_g = c + k * next_value + a * next_critic
        n = tl.where(h > 0, v, next_value)
        before_own = tl.maximum(h, seen)
        m, value, reward, kl = token_inputs(
            rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, start, time, time >= 0,
            REWARDS, ESTIMATOR, ALIGNED,
        )  # fmt: skip
        advantage, last_n, last_g = advantages_of(m, value, reward, gamma, decay, n, g, LANES)
        critic = advantage
        next_advantage = last_of(last_g, LANES)
        if CRITIC:
            critic, _, last_g = advantages_of(m, value, reward, gamma, critic_decay, n, critic_g, LANES)
            next_critic = last_of(last_g, LANES)
        next_value = last_of(last_n, LANES)
        if SCORES:
            reward = with_score(m, reward, score, before_own, LANES)
            seen = last_of(tl.maximum(before_own, tl.max(m, 1)), LANES)
        counts = m > 0
        advantage = tl.where(counts, advantage, 0.0)
        put(advantages_ptr, start, time, advantage, ALIGNED)
        put(returns_ptr, start, time, tl.where(counts, critic + value, 0.0), ALIGNED)
        put(shaped_ptr, start, time, reward, ALIGNED)
        put(kl_ptr, start, time, kl, ALIGNED)
        count += tl.sum(m, 1)
        exact = advantage.to(tl.float64)
        total += tl.sum(exact, 1)
        squares += tl.sum(exact * exact, 1)
    tl.store(moments_ptr + program * 3, tl.sum(count.to(tl.float64), 0))
    tl.store(moments_ptr + program * 3 + 1, tl.sum(total, 0))
    tl.store(moments_ptr + program * 3 + 2, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_segment_kernel(
    rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, maps_ptr, T, segments,
    LANES: tl.constexpr, BLOCKS: tl.constexpr, REWARDS: tl.constexpr, ESTIMATOR: tl.constexpr, CRITIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The map of one segment, without the score: h, v, then c, k, a of the policy's lambda and of the critic's."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    gamma = tl.load(scalars_ptr)
    decay = gamma * tl.load(scalars_ptr + 1)
    critic_decay = gamma * tl.load(scalars_ptr + 2)
    h0, v0, c0, k0, a0 = 0.0, 0.0, 0.0, 0.0, 1.0
    c1, k1, a1 = 0.0, 0.0, 1.0
    lane = tl.arange(0, LANES)
    for i in range(segment * BLOCKS, segment * BLOCKS + BLOCKS):
        end = T - i * LANES * 4
        if ALIGNED:
            end = tl.multiple_of(end, 4)
        time = (end - 4 - 4 * lane)[:, None] + tl.arange(0, 4)[None, :]
        m, value, reward, _ = token_inputs(
            rewards_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, row * T, time, time >= 0,
            REWARDS, ESTIMATOR, ALIGNED,
        )  # fmt: skip
        if CRITIC:
            h, v, c, k, a = tl.associative_scan(lane_map(m, value, reward, gamma, critic_decay, LANES), 0, compose)
            h, v, c, k, a = (
                last_of(h, LANES),
                last_of(v, LANES),
                last_of(c, LANES),
                last_of(k, LANES),
                last_of(a, LANES),
            )
            _, _, c1, k1, a1 = compose(h0, v0, c1, k1, a1, h, v, c, k, a)
        h, v, c, k, a = tl.associative_scan(lane_map(m, value, reward, gamma, decay, LANES), 0, compose)
        h, v, c, k, a = last_of(h, LANES), last_of(v, LANES), last_of(c, LANES), last_of(k, LANES), last_of(a, LANES)
        h0, v0, c0, k0, a0 = compose(h0, v0, c0, k0, a0, h, v, c, k, a)
    out = maps_ptr + program * 8
    tl.store(out, h0)
    tl.store(out + 1, v0)
    tl.store(out + 2, c0)
    tl.store(out + 3, k0)
    tl.store(out + 4, a0)
    tl.store(out + 5, c1)
    tl.store(out + 6, k1)
    tl.store(out + 7, a1)


def lanes_for_time(length: int) -> tuple[int, int]:
    """Lanes per scan, and warps: one lane per thread."""
    lanes = min(256, max(32, triton.next_power_of_2(triton.cdiv(length, WIDTH))))
    return lanes, lanes // 32


def in_vectors(length: int, *tensors: Tensor) -> bool:
    """Whether WIDTH neighbours from a multiple of WIDTH on lie within what one load reads, in every row of each."""
    return length % WIDTH == 0 and all(x.data_ptr() % (WIDTH * x.element_size()) == 0 for x in tensors)


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
    moments = torch.empty((batch * segments, 3), dtype=torch.float64, device=values.device)
    constants: dict[str, Any] = {
        "LANES": lanes, "BLOCKS": SEGMENT_BLOCKS, "REWARDS": rewards is not None,
        "ESTIMATOR": estimator if logprobs is not None else 0, "CRITIC": critic_lam != lam,
        "ALIGNED": in_vectors(length, reward, *tokens, *outputs), "num_warps": warps,
    }  # fmt: skip
    maps = outputs[0]
    if split:
        maps = torch.empty((batch * segments, 8), dtype=torch.float32, device=values.device)
        gae_segment_kernel[(batch * segments,)](reward, *tokens, numbers, maps, length, segments, **constants)
    gae_kernel[(batch * segments,)](
        reward, flat(scores), *tokens, numbers, maps, *outputs, moments, length, segments,
        SCORES=scores is not None, SPLIT=split, **constants,
    )  # fmt: skip
    shaped, advantages, returns, kl = outputs
    return shaped, advantages, returns, kl, moments.sum(0)


KERNELS: dict[str, Any] = {"gae": gae_kernel, "gae_segment": gae_segment_kernel}
