import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from rlhf_kernels import kl_shaped_gae

from rlhf_lightning.advantages.gae import Gae
from rlhf_lightning.advantages.shaping import kl_shaped_rewards
from rlhf_lightning.core.errors import UserError


def plain_loop(rewards, values, mask, gamma, lam):
    """Backwards over the counted tokens of each row, one at a time."""
    advantages = torch.zeros_like(values)
    for b in range(values.shape[0]):
        advantage = next_value = 0.0
        for t in reversed([t for t in range(values.shape[1]) if mask[b, t]]):
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            advantage = delta + gamma * lam * advantage
            next_value = values[b, t]
            advantages[b, t] = advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def example(rows=20, time=40, holes=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.rand(2, rows, time, generator=generator)
    mask = torch.rand(rows, time, generator=generator) < (0.5 if holes else 1.1)
    return rewards, values, mask, torch.arange(rows)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_it_is_the_plain_loop(holes, gamma, lam):
    rewards, values, mask, groups = example(holes=holes)
    ours = Gae(gamma=gamma, lam=lam)(rewards, values, mask, groups)
    torch.testing.assert_close(ours, plain_loop(rewards, values, mask, gamma, lam))


def test_two_tokens_by_hand():
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = Gae(gamma=0.5, lam=0.5)(
        torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 1.0]]), mask, torch.zeros(1).long()
    )
    # t=1: 4 - 1 = 3; t=0: 1 + 0.5 * 1 - 2 + 0.25 * 3 = 0.25
    assert advantages.tolist() == [[0.25, 3]]
    assert returns.tolist() == [[2.25, 4]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 9), st.floats(0, 1))
def test_at_lam_1_it_is_return_minus_value(seed, rows, time, gamma):
    rewards, values, mask, groups = example(rows, time, holes=True, seed=seed)
    advantages, returns = Gae(gamma=gamma, lam=1.0)(rewards, values, mask, groups)
    for b in range(rows):
        to_come = 0.0
        for t in reversed([t for t in range(time) if mask[b, t]]):
            to_come = rewards[b, t].item() + gamma * to_come
            assert returns[b, t].item() == pytest.approx(to_come, abs=1e-5)
            assert advantages[b, t].item() == pytest.approx(to_come - values[b, t].item(), abs=1e-5)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _, mask, groups = example(3, 7)
    values = rewards.flip(-1).cumsum(-1).flip(-1)
    advantages, returns = Gae()(rewards, values, mask, groups)
    torch.testing.assert_close(advantages, torch.zeros(3, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, values)


def test_padding_changes_nothing_whatever_it_holds():
    rewards, values, mask, groups = example(3, 5)
    junk = torch.full((3, 2), torch.nan)
    padded = Gae()(
        torch.cat((junk, rewards, junk), 1),
        torch.cat((junk, values, junk), 1),
        torch.cat((junk == 0, mask, junk == 0), 1),
        groups,
    )
    for ours, expected in zip(padded, Gae()(rewards, values, mask, groups), strict=True):
        torch.testing.assert_close(ours[:, 2:-2], expected)
        assert (ours[:, :2] == 0).all()
        assert (ours[:, -2:] == 0).all()


def test_the_critic_may_have_a_lam_of_its_own():
    rewards, values, mask, groups = example(holes=True)
    advantages, returns = Gae(lam=0.5, critic_lam=1.0)(rewards, values, mask, groups)
    torch.testing.assert_close(advantages, Gae(lam=0.5)(rewards, values, mask, groups)[0])
    torch.testing.assert_close(returns, Gae(lam=1.0)(rewards, values, mask, groups)[1])


@pytest.mark.parametrize("critic_lam", [None, 1.0])
def test_shaping_and_credit_in_one_kernel_are_the_two_after_each_other(critic_lam):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs, values = torch.randn(3, 4, 9, generator=generator)
    scores, mask = torch.randn(4, generator=generator), torch.rand(4, 9, generator=generator) < 0.6
    rewards, kl = kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1)
    advantages, returns = Gae(critic_lam=critic_lam)(rewards, values, mask, torch.arange(4))
    fused = kl_shaped_gae(
        scores, logprobs, ref_logprobs, values, mask, kl_coef=0.1, gamma=1.0, lam=0.95, critic_lam=critic_lam
    )
    torch.testing.assert_close((rewards, kl, advantages, returns), (fused.rewards, fused.kl, *fused[1:3]))


def test_a_mask_of_one_row_is_refused():
    rewards, values, mask, groups = example(3, 5)
    with pytest.raises(TypeCheckError, match="mask"):
        Gae()(rewards, values, mask[:1], groups)


@pytest.mark.parametrize("arguments", [{"gamma": 1.5}, {"lam": -0.1}, {"critic_lam": 2.0}, {"lam": float("nan")}])
def test_impossible_settings_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        Gae(**arguments)
