import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.core.seeding import counter_seed

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
