import math

import pytest
import torch
from rlhf_kernels import gae, kl_shaped_gae, masked_whiten


def loop(rewards, values, mask, gamma, lam):
    """The recursion as it is written, in float64."""
    advantage = torch.zeros(len(values), dtype=torch.float64)
    next_value = torch.zeros_like(advantage)
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t].double() + gamma * next_value - values[:, t].double()
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t].double(), next_value)
        columns.append(torch.where(mask[:, t], advantage, 0.0))
    return torch.stack(columns[::-1], dim=1)


def problem(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(batch, length, generator=generator) for _ in range(2))
    mask = torch.rand(batch, length, generator=generator) > 0.3
    mask[0] = True
    return rewards * 0.1, values, mask


def test_by_hand():
    # deltas: 1 + 0.5 * 2 - 1 = 1 and 3 - 2 = 1; advantages 1 + 0.5 * 0.5 * 1 and 1
    rewards, values = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 2.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 1.0]]
    assert returns.tolist() == [[2.25, 3.0]]


@pytest.mark.parametrize("length", [1, 2, 37, 4096])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (1.0, 1.0), (1.0, 0.0)])
def test_matches_the_recursion(length, gamma, lam):
    rewards, values, mask = problem(3, length)
    mask[1] = False
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = loop(rewards, values, mask, gamma, lam)
    # summed in float64 and rounded once: 2^-24 = 6e-8 of the number, far inside 2e-6 of the scale
    scale = expected.abs().max()
    assert (advantages.double() - expected).abs().max() <= 2e-7 * scale
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0).float(), atol=1e-5, rtol=1e-6)


def test_masked_tokens_are_skipped_as_if_they_were_not_there():
    rewards, values, mask = problem(1, 40)
    mask[0, 7:20] = False
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    kept = mask[0]
    alone, _ = gae(
        rewards[:, kept], values[:, kept], torch.ones(1, int(kept.sum()), dtype=torch.bool), gamma=0.9, lam=0.8
    )
    torch.testing.assert_close(advantages[:, kept], alone)
    assert advantages[:, ~kept].eq(0).all()


def test_masked_positions_may_hold_anything():
    rewards, values, mask = problem(2, 10)
    clean = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    dirty = gae(rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan), mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(dirty, clean, atol=0, rtol=0)


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_shaped_rewards_by_hand(estimator, kl):
    mask = torch.tensor([[True, True, False]])
    logprobs, ref = torch.zeros(1, 3), torch.full((1, 3), -0.5)
    result = kl_shaped_gae(
        torch.tensor([2.0]), logprobs, ref, torch.zeros(1, 3), mask, kl_coef=0.1, kl_estimator=estimator, gamma=1.0,
        lam=1.0,
    )  # fmt: skip
    assert result.rewards.tolist() == [pytest.approx([-0.1 * kl, 2 - 0.1 * kl, 0.0])]
    assert result.advantages.tolist() == [pytest.approx([2 - 0.2 * kl, 2 - 0.1 * kl, 0.0])]
    assert result.kl.tolist() == [pytest.approx([kl, kl, 0.0])]


def test_sixteen_bits_are_subtracted_in_full():
    # 10 - 0.0304 is 9.97, and 10 in bfloat16
    logprobs, ref = torch.tensor([[10.0]]).bfloat16(), torch.tensor([[0.0304]]).bfloat16()
    values, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    result = kl_shaped_gae(torch.zeros(1), logprobs, ref, values, mask, kl_coef=1.0, gamma=1.0, lam=1.0)
    torch.testing.assert_close(result.kl, (logprobs.double() - ref.double()).float())


def test_shaped_gae_is_gae_of_the_shaped_rewards_and_its_moments_whiten():
    rewards, values, mask = problem(4, 30)
    result = kl_shaped_gae(
        torch.randn(4), rewards, rewards.roll(1, 1), values, mask, kl_coef=0.2, gamma=0.99, lam=0.95, critic_lam=1.0
    )
    advantages, _ = gae(result.rewards, values, mask, gamma=0.99, lam=0.95)
    _, returns = gae(result.rewards, values, mask, gamma=0.99, lam=1.0)
    torch.testing.assert_close((result.advantages, result.returns), (advantages, returns), atol=1e-6, rtol=1e-6)
    assert result.moments[0] == mask.sum()
    whitened = masked_whiten(result.advantages, mask, moments=result.moments)
    torch.testing.assert_close(whitened, masked_whiten(result.advantages, mask))


def test_scores_per_token_are_rewards():
    rewards, values, mask = problem(2, 9)
    result = kl_shaped_gae(rewards, values, values, values, mask, kl_coef=0.5, gamma=1.0, lam=0.9)
    torch.testing.assert_close(result.advantages, gae(rewards, values, mask, gamma=1.0, lam=0.9)[0])


def test_a_row_where_nothing_counts_has_no_score():
    mask = torch.tensor([[False, False], [True, False]])
    zeros = torch.zeros(2, 2)
    result = kl_shaped_gae(torch.ones(2), zeros, zeros, zeros, mask, kl_coef=0.0, gamma=1.0, lam=1.0)
    assert result.advantages.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_targets_carry_no_gradient():
    rewards, values, mask = problem(1, 4)
    advantages, returns = gae(rewards, values.requires_grad_(), mask, gamma=1.0, lam=1.0)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_float64_stays_float64():
    """gamma lam as float32 would be 0.95 + 1e-8."""
    rewards, values, mask = problem(3, 40)
    advantages, returns = gae(rewards.double(), values.double(), mask, gamma=1.0, lam=0.95)
    expected = loop(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, expected, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(returns, torch.where(mask, expected + values.double(), 0.0), atol=1e-13, rtol=1e-13)
