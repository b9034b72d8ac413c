# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""Generalised advantage estimation as an associative scan, fused with the KL-shaped rewards, returns and moments.

Token t maps what is known after it, the next value n and the next advantage g, to (n, g) before it:

    mask True:  n' = V_t    g' = (r_t - V_t) + gamma n + gamma lam g        mask False: unchanged

Maps of the form n' = h v + (1 - h) n, g' = c + k n + a g with h in {0, 1} are closed under composition, so rows of them
are scanned. Time is reversed by addresses (the last token first), not by `reverse=True`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device, scalars
from rlhf_kernels.triton_policy import kl_term

SEGMENT_BLOCKS = 4
_POINTERS = ["rewards_ptr", "scores_ptr", "logprobs_ptr", "ref_ptr", "values_ptr", "mask_ptr", "scalars_ptr"]
"""Rows of any length begin anywhere, so nothing is gained by knowing where the first one does."""


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
def last_that_counts(mask_ptr, row, T, BLOCK: tl.constexpr, SCORES: tl.constexpr):
    """Time of the row's last token with mask True, -1 if there is none; read from the end until it is found."""
    last = -1
    if SCORES:
        end = T
        while (last < 0) & (end > 0):
            time = end - 1 - tl.arange(0, BLOCK)
            mask = tl.load(mask_ptr + row * T + time, mask=time >= 0, other=0)
            last = tl.max(tl.where(mask != 0, time, -1), 0)
            end -= BLOCK
    return last


@triton.jit
def token_inputs(
    rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, row, time, last, T,
    REWARDS: tl.constexpr, SCORES: tl.constexpr, ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """Mask as 0 and 1, value, reward and KL of the tokens at `time`; those before 0 do not count."""
    inside = time >= 0
    at = row * T + time
    mask = tl.load(mask_ptr + at, mask=inside, other=0)
    counts = mask != 0
    value = tl.load(values_ptr + at, mask=counts, other=0.0).to(tl.float32)
    reward = value * 0.0
    kl = value * 0.0
    if ESTIMATOR:
        logprob = tl.load(logprobs_ptr + at, mask=counts, other=0.0).to(tl.float32)
        kl, _ = kl_term(logprob - tl.load(ref_ptr + at, mask=counts, other=0.0).to(tl.float32), ESTIMATOR)
        reward = -tl.load(scalars_ptr + 3) * kl
    if REWARDS:
        reward += tl.load(rewards_ptr + at, mask=counts, other=0.0).to(tl.float32)
    if SCORES:
        score = tl.load(scores_ptr + row).to(tl.float32)
        reward += tl.where(time == last, score, 0.0)
    return mask.to(tl.float32), value, reward, kl


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_kernel(
    rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, carry_ptr,
    shaped_ptr, advantages_ptr, returns_ptr, kl_ptr, moments_ptr, T, segments,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, REWARDS: tl.constexpr, SCORES: tl.constexpr,
    ESTIMATOR: tl.constexpr, CRITIC: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """A whole row per program, or, with CARRY, one of `segments` pieces of BLOCKS blocks that knows what follows it."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    gamma = tl.load(scalars_ptr)
    decay = gamma * tl.load(scalars_ptr + 1)
    critic_decay = gamma * tl.load(scalars_ptr + 2)
    next_value = 0.0
    next_advantage = 0.0
    next_critic = 0.0
    first = 0
    blocks = tl.cdiv(T, BLOCK)
    if CARRY:
        first = segment * BLOCKS
        blocks = BLOCKS
        next_value = tl.load(carry_ptr + program * 3)
        next_advantage = tl.load(carry_ptr + program * 3 + 1)
        next_critic = tl.load(carry_ptr + program * 3 + 2)
    count = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    at_end = tl.arange(0, BLOCK) == BLOCK - 1
    last = last_that_counts(mask_ptr, row, T, BLOCK, SCORES)
    for i in range(first, first + blocks):
        time = T - 1 - i * BLOCK - tl.arange(0, BLOCK)
        m, value, reward, kl = token_inputs(
            rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, row, time, last, T,
            REWARDS, SCORES, ESTIMATOR,
        )  # fmt: skip
        delta = m * (reward - value)
        h, v, c, k, a = tl.associative_scan((m, value, delta, m * gamma, m * decay + (1 - m)), 0, compose)
        advantage = c + k * next_value + a * next_advantage
        critic = advantage
        if CRITIC:
            _, _, c, k, a = tl.associative_scan((m, value, delta, m * gamma, m * critic_decay + (1 - m)), 0, compose)
            critic = c + k * next_value + a * next_critic
        counts = m > 0
        at = row * T + time
        tl.store(advantages_ptr + at, tl.where(counts, advantage, 0.0), mask=time >= 0)
        tl.store(returns_ptr + at, tl.where(counts, critic + value, 0.0), mask=time >= 0)
        tl.store(shaped_ptr + at, tl.where(counts, reward, 0.0), mask=time >= 0)
        tl.store(kl_ptr + at, kl, mask=time >= 0)
        exact = tl.where(counts, advantage, 0.0).to(tl.float64)
        count += tl.sum(m.to(tl.float64), 0)
        total += tl.sum(exact, 0)
        squares += tl.sum(exact * exact, 0)
        next_advantage = tl.sum(tl.where(at_end, advantage, 0.0), 0)
        if CRITIC:
            next_critic = tl.sum(tl.where(at_end, critic, 0.0), 0)
        next_value = tl.sum(tl.where(at_end, tl.where(h > 0.5, v, next_value), 0.0), 0)
    tl.store(moments_ptr + program * 3, count)
    tl.store(moments_ptr + program * 3 + 1, total)
    tl.store(moments_ptr + program * 3 + 2, squares)


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=_POINTERS)
def gae_segment_kernel(
    rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, maps_ptr, T, segments,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, REWARDS: tl.constexpr, SCORES: tl.constexpr,
    ESTIMATOR: tl.constexpr, CRITIC: tl.constexpr,
):  # fmt: skip
    """The map of one segment: h, v, then c, k, a of the policy's lambda and of the critic's."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    gamma = tl.load(scalars_ptr)
    decay = gamma * tl.load(scalars_ptr + 1)
    critic_decay = gamma * tl.load(scalars_ptr + 2)
    h0, v0, c0, k0, a0 = 0.0, 0.0, 0.0, 0.0, 1.0
    c1, k1, a1 = 0.0, 0.0, 1.0
    at_end = tl.arange(0, BLOCK) == BLOCK - 1
    last = last_that_counts(mask_ptr, row, T, BLOCK, SCORES)
    for i in range(segment * BLOCKS, segment * BLOCKS + BLOCKS):
        time = T - 1 - i * BLOCK - tl.arange(0, BLOCK)
        m, value, reward, _ = token_inputs(
            rewards_ptr, scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, scalars_ptr, row, time, last, T,
            REWARDS, SCORES, ESTIMATOR,
        )  # fmt: skip
        delta = m * (reward - value)
        if CRITIC:
            h, v, c, k, a = tl.associative_scan((m, value, delta, m * gamma, m * critic_decay + (1 - m)), 0, compose)
            c, k, a = last_of(c, at_end), last_of(k, at_end), last_of(a, at_end)
            _, _, c1, k1, a1 = compose(h0, v0, c1, k1, a1, last_of(h, at_end), last_of(v, at_end), c, k, a)
        h, v, c, k, a = tl.associative_scan((m, value, delta, m * gamma, m * decay + (1 - m)), 0, compose)
        h, v, c = last_of(h, at_end), last_of(v, at_end), last_of(c, at_end)
        h0, v0, c0, k0, a0 = compose(h0, v0, c0, k0, a0, h, v, c, last_of(k, at_end), last_of(a, at_end))
    out = maps_ptr + program * 8
    tl.store(out, h0)
    tl.store(out + 1, v0)
    tl.store(out + 2, c0)
    tl.store(out + 3, k0)
    tl.store(out + 4, a0)
    tl.store(out + 5, c1)
    tl.store(out + 6, k1)
    tl.store(out + 7, a1)


@triton.jit
def last_of(x, at_end):
    return tl.sum(tl.where(at_end, x, 0.0), 0)


@triton.jit(do_not_specialize=["segments"])
def gae_carry_kernel(maps_ptr, carry_ptr, segments, CRITIC: tl.constexpr):
    """What follows each segment of a row: next value and next advantages; a few dozen steps."""
    row = tl.program_id(0).to(tl.int64)
    value = 0.0
    advantage = 0.0
    critic = 0.0
    for segment in range(segments):
        carry = carry_ptr + (row * segments + segment) * 3
        tl.store(carry, value)
        tl.store(carry + 1, advantage)
        tl.store(carry + 2, critic)
        maps = maps_ptr + (row * segments + segment) * 8
        h = tl.load(maps)
        advantage = tl.load(maps + 2) + tl.load(maps + 3) * value + tl.load(maps + 4) * advantage
        if CRITIC:
            critic = tl.load(maps + 5) + tl.load(maps + 6) * value + tl.load(maps + 7) * critic
        value = h * tl.load(maps + 1) + (1 - h) * value


def block_for_time(length: int) -> tuple[int, int]:
    """Tokens per scan, and warps: 8 tokens per thread, without spilling."""
    block = min(1024, max(16, triton.next_power_of_2(length)))
    return block, max(1, block // 256)


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
    """`gae.gae_reference` in one launch; few long rows are split over programs, in three launches."""
    batch, length = values.shape
    block, warps = block_for_time(length)
    per_segment = block * SEGMENT_BLOCKS
    if split is None:
        split = batch < 128 and length >= 4 * per_segment
    segments = triton.cdiv(length, per_segment) if split else 1

    def flat(x: Tensor | None) -> Tensor:
        return values if x is None else x.contiguous()

    inputs = (
        flat(rewards), flat(scores), flat(logprobs), flat(ref_logprobs), flat(values),
        mask.contiguous().view(torch.uint8), scalars(values.device, gamma, lam, critic_lam, kl_coef),
    )  # fmt: skip
    outputs = [torch.empty(values.shape, dtype=torch.float32, device=values.device) for _ in range(4)]
    moments = torch.empty((batch * segments, 3), dtype=torch.float64, device=values.device)
    constants: dict[str, Any] = {
        "BLOCK": block, "BLOCKS": SEGMENT_BLOCKS, "REWARDS": rewards is not None, "SCORES": scores is not None,
        "ESTIMATOR": estimator if logprobs is not None else 0, "CRITIC": critic_lam != lam, "num_warps": warps,
    }  # fmt: skip
    carry = outputs[0]
    if split:
        maps = torch.empty((batch * segments, 8), dtype=torch.float32, device=values.device)
        carry = torch.empty((batch * segments, 3), dtype=torch.float32, device=values.device)
        gae_segment_kernel[(batch * segments,)](*inputs, maps, length, segments, **constants)
        gae_carry_kernel[(batch,)](maps, carry, segments, CRITIC=critic_lam != lam, num_warps=1)
    gae_kernel[(batch * segments,)](*inputs, carry, *outputs, moments, length, segments, **constants, CARRY=split)
    shaped, advantages, returns, kl = outputs
    return shaped, advantages, returns, kl, moments.sum(0)


KERNELS: dict[str, Any] = {"gae": gae_kernel, "gae_segment": gae_segment_kernel, "gae_carry": gae_carry_kernel}
