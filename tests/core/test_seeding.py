import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.core.seeding import counter_seed, pair_names, row_names, uniforms

counters = st.lists(st.integers(0, 10**6) | st.text("abcxyz", min_size=1, max_size=5), max_size=4)


@given(st.integers(0, 2**31), counters, counters)
def test_other_counters_give_another_seed(seed, first, second):
    same = [str(part) for part in first] == [str(part) for part in second]
    assert (counter_seed(seed, *first) == counter_seed(seed, *second)) == same


def test_neither_other_draws_nor_the_process_matter():
    before = counter_seed(1, "shuffle", 3)
    random.random(), torch.rand(3), counter_seed(2, "other")
    assert counter_seed(1, "shuffle", 3) == before == 5958243215497067784  # a constant: runs of today resume tomorrow


def test_a_seed_fits_every_generator():
    seeds = [counter_seed(0, i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 1000
    torch.Generator().manual_seed(max(seeds))


def test_the_same_counters_at_another_depth_differ():
    assert counter_seed(1, 2, 3) != counter_seed(1, 23) != counter_seed(12, 3)


def test_draws_of_neighbouring_counters_are_uncorrelated():
    draws = torch.stack(
        [torch.rand(256, generator=torch.Generator().manual_seed(counter_seed(0, i))) for i in range(16)]
    )
    correlation = torch.corrcoef(draws) - torch.eye(16)
    assert correlation.abs().max() < 5 / 16  # 5 standard deviations of the correlation of 256 pairs of numbers


def mixed(x):
    """SplitMix64's last three lines, in whole numbers."""
    x %= 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_a_row_is_named_by_its_real_tokens_and_their_order_alone():
    tokens = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 7, 6, 0, 0], [5, 6, 0, 0, 0], [9, 5, 6, 7, 9]])
    real = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    right, left, swapped, shorter, between = row_names(tokens, real).tolist()
    assert right == left == between == row_names(tokens[:1, :3], real[:1, :3]).item()
    assert len({right, swapped, shorter}) == 3
    by_hand = mixed(sum(mixed(token + (place << 32)) for place, token in enumerate((5, 6, 7), start=1)))
    assert right % 2**64 == by_hand == 9540040719347127697  # a constant: runs of today resume tomorrow


def test_a_pair_is_named_by_both_rows_in_order():
    a, b = torch.arange(10), torch.arange(10).flip(0)
    assert len({*pair_names(a, b).tolist(), *pair_names(a, a).tolist()}) == 20


def test_uniforms_fill_the_unit_interval_and_belong_to_their_name():
    names = torch.arange(100_000)
    u = uniforms(names, seed=3)
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    # the mean of n uniforms has a standard deviation of 1 / sqrt(12 n) = 0.0009, their mean square one of 0.0009 too
    assert u.mean().item() == pytest.approx(1 / 2, abs=0.004)
    assert u.square().mean().item() == pytest.approx(1 / 3, abs=0.004)
    assert torch.corrcoef(torch.stack((u[1:], u[:-1], uniforms(names, seed=4)[1:])))[0, 1:].abs().max() < 0.015
    assert torch.equal(uniforms(names.flip(0), seed=3).flip(0), u)
