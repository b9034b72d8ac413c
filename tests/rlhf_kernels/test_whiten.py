import pytest
import torch
from rlhf_kernels import masked_whiten


def test_by_hand():
    x, mask = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])
    torch.testing.assert_close(masked_whiten(x, mask), torch.tensor([-1.0, 1.0, 0.0]))
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), torch.tensor([1.0, 3.0, 0.0]))


def test_a_large_mean_does_not_eat_the_variance():
    # in float32 the squares of 1e5 have no room for a variance of 1; float64 sums do
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator)
    mask = torch.ones(10_000, dtype=torch.bool)
    shifted = (x.double() + 1e5).float()
    torch.testing.assert_close(masked_whiten(shifted, mask), masked_whiten(shifted - 1e5, mask), atol=1e-4, rtol=0)


def test_moments_of_all_ranks_whiten_a_part_as_the_whole():
    x, mask = torch.arange(12.0).view(3, 4), torch.ones(3, 4, dtype=torch.bool)
    kept = x.double()
    moments = torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))
    whole = masked_whiten(x, mask)
    torch.testing.assert_close(masked_whiten(x[:1], mask[:1], moments=moments), whole[:1], atol=0, rtol=0)


@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_that_counts(count):
    x, mask = torch.tensor([5.0, 7.0]), torch.arange(2) < count
    assert masked_whiten(x, mask).eq(0).all()


def test_the_same_numbers_give_the_same_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mask = x > -1
    assert torch.equal(masked_whiten(x, mask), masked_whiten(x.clone(), mask.clone()))
