import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.entropy import top_entropy_mask


def test_by_hand():
    entropy = torch.tensor([[0.1, 2.0, 0.5, 99.0], [3.0, 0.0, 1.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]] * 2)
    kept = top_entropy_mask(entropy, mask, 0.4)  # of 6, the entropies from the 3rd (from 0) on: 1, 2, 3
    assert entropy[kept].tolist() == [2.0, 3.0, 1.0]
    assert torch.equal(top_entropy_mask(entropy, mask, 1.0), mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31))
def test_it_is_the_quantile(tokens, percent, seed):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(1, tokens, generator=generator) * 10
    mask = torch.rand(1, tokens, generator=generator) < 0.8
    expected = torch.zeros_like(mask)
    if mask.any():
        threshold = torch.quantile(entropy[mask].double(), 1 - percent / 100)
        expected = mask & (entropy.double() >= threshold - 1e-9)
    assert torch.equal(top_entropy_mask(entropy, mask, percent / 100), expected)


def test_equal_entropies_are_kept_together():
    entropy = torch.tensor([[0.0, -0.0, 1.0, 1.0]])
    every = torch.ones(1, 4, dtype=torch.bool)
    assert top_entropy_mask(entropy, every, 0.1).tolist() == [[False, False, True, True]]
    assert top_entropy_mask(torch.zeros(1, 4), every, 0.1).all()
    assert top_entropy_mask(torch.tensor([[0.0, -0.0, -0.0, 0.0]]), every, 0.1).all()


def test_a_share_that_has_no_exact_float():
    # (1 - .7) * 10 is a little more than 3
    entropy, every = torch.arange(11.0)[None], torch.ones(1, 11, dtype=torch.bool)
    assert int(top_entropy_mask(entropy, every, 0.7).sum()) == 8


def test_ranks_share_one_threshold():
    entropy = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.7
    barrier, said = threading.Barrier(2, timeout=30), [torch.zeros(0), torch.zeros(0)]

    def run(rank):
        def add(x):
            said[rank] = x
            barrier.wait()
            total = said[0] + said[1]
            barrier.wait()
            return total

        rows = (slice(0, 1), slice(1, 4))[rank]
        return top_entropy_mask(entropy[rows], mask[rows], 0.3, add_over_ranks=add)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run, range(2)))
    assert torch.equal(torch.cat(parts), top_entropy_mask(entropy, mask, 0.3))


@pytest.mark.parametrize("top_frac", [0.0, 1.5])
def test_a_share_must_be_a_share(top_frac):
    with pytest.raises(UserError, match=f"top_frac={top_frac}"):
        top_entropy_mask(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), top_frac)
