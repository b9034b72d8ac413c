import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rlhf_lightning.core.masked import (
    explained_variance,
    masked_centre,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    masked_whiten,
    reduce_tokens,
)

NINE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
EVERY = torch.ones(3, 3, dtype=torch.bool)


def test_whitening_gives_the_published_numbers():
    # a reference vector of the 2019 implementation; mean 1.6, population standard deviation 0.2582
    expected = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]])
    torch.testing.assert_close(masked_whiten(NINE, EVERY, shift_mean=False), expected, atol=5e-5, rtol=0)


def test_shift_mean_takes_the_mean_off():
    whitened = masked_whiten(NINE, EVERY, shift_mean=True)
    torch.testing.assert_close(whitened, masked_whiten(NINE, EVERY, shift_mean=False) - 1.6)
    assert masked_mean(whitened, EVERY).item() == pytest.approx(0, abs=1e-6)
    assert masked_var(whitened, EVERY).item() == pytest.approx(1, abs=1e-5)


def test_whitening_ignores_padding_whatever_it_holds():
    padded = torch.cat((NINE, torch.tensor([[math.nan], [math.inf], [1e30]])), dim=1)
    mask = torch.cat((EVERY, torch.zeros(3, 1, dtype=torch.bool)), dim=1)
    whitened = masked_whiten(padded, mask)
    torch.testing.assert_close(whitened[:, :3], masked_whiten(NINE, EVERY))
    assert (whitened[:, 3] == 0).all()


def test_whitening_with_moments_added_over_two_halves_is_whitening_the_whole():
    moments = masked_moments(NINE[:1], EVERY[:1]) + masked_moments(NINE[1:], EVERY[1:])
    parts = [masked_whiten(NINE[rows], EVERY[rows], moments=moments) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat(parts), masked_whiten(NINE, EVERY))


def test_sum_mean_and_variance_by_hand():
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, math.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(x, mask).item() == 9
    assert masked_mean(x, mask).item() == 3
    assert masked_var(torch.nan_to_num(x, posinf=0.0), mask).item() == pytest.approx((4 + 1 + 9) / 3)


def test_nothing_counted_gives_zero_not_nan():
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert masked_mean(NINE, nothing).item() == 0
    assert reduce_tokens(NINE, nothing, "token_mean").item() == 0
    assert reduce_tokens(NINE, nothing, "sequence_mean").item() == 0


def test_the_gradient_of_a_masked_nan_is_zero():
    x = torch.tensor([[1.0, math.nan]], requires_grad=True)
    masked_mean(x, torch.tensor([[True, False]])).backward()
    assert x.grad.tolist() == [[1.0, 0.0]]


def test_low_precision_is_summed_in_float32():
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    total = masked_sum(ones, torch.ones_like(ones, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == 4096


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(TypeCheckError, match="mask"):
        masked_mean(NINE, EVERY[:1])
    with pytest.raises(TypeCheckError, match="mask"):
        reduce_tokens(NINE, EVERY[:1], "token_mean")


LOSS = torch.tensor([[1.0, 2.0, 3.0], [5.0, math.nan, math.nan]])
COUNTS = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token_mean", 11 / 4),
        ("sequence_mean", (2 + 5) / 2),
        ("fixed_length", 11 / (2 * 10)),
        ("length_weighted", 11 / 2),
        ("token_sum", 11.0),
    ],
)
def test_reductions_by_hand(how, expected):
    assert reduce_tokens(LOSS, COUNTS, how, max_length=10).item() == pytest.approx(expected)


def test_length_weighted_is_the_mean_of_length_times_token_mean():
    lengths = COUNTS.sum(-1)
    means = torch.where(COUNTS, LOSS, 0.0).sum(-1) / lengths
    assert reduce_tokens(LOSS, COUNTS, "length_weighted").item() == pytest.approx((means * lengths).mean().item())


def test_fixed_length_asks_for_its_length():
    with pytest.raises(ValueError, match="max_length"):
        reduce_tokens(LOSS, COUNTS, "fixed_length")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.sampled_from(("token_mean", "sequence_mean", "length_weighted", "token_sum")),
    st.data(),
)
def test_a_loss_does_not_depend_on_how_its_batch_was_cut(rows, time, seed, how, data):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(rows, time, generator=generator)
    mask = torch.rand(rows, time, generator=generator) < 0.6
    cut = data.draw(st.integers(0, rows))
    denominator = float(mask.sum() if how == "token_mean" else mask.any(-1).sum())
    whole = reduce_tokens(loss, mask, how)
    parts = sum(reduce_tokens(loss[s], mask[s], how, denominator) for s in (slice(0, cut), slice(cut, rows)))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_whitening_by_the_sample_variance():
    """0, 2, 4: squares 8, over 3 or over 2; the same from moments that others have added."""
    x, mask = torch.tensor([[0.0, 2.0], [4.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    for ddof, std in ((0, (8 / 3) ** 0.5), (1, 2.0)):
        for moments in (None, masked_moments(x, mask)):
            whitened = masked_whiten(x, mask, moments=moments, ddof=ddof)
            torch.testing.assert_close(whitened, torch.tensor([[-2 / std, 0.0], [2 / std, 0.0]]))
    kept = masked_whiten(x, mask, shift_mean=False, ddof=1)
    torch.testing.assert_close(kept, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    alone = masked_whiten(x, torch.tensor([[True, False], [False, False]]), ddof=1)
    assert (alone == 0).all()


def test_explained_variance_by_hand():
    returns = torch.tensor([[0.0, 2.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full((1, 3), 7.0), returns, mask).item() == 0
    assert explained_variance(torch.tensor([[0.0, 1.0, -5.0]]), returns, mask).item() == pytest.approx(1 - 0.25)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(1 - 4)


def test_explained_variance_of_constant_returns_is_zero():
    assert explained_variance(NINE, torch.ones(3, 3), EVERY).item() == 0


def test_the_mean_is_taken_off_what_counts():
    x, mask = torch.tensor([1.0, 5.0, float("nan")]), torch.tensor([True, True, False])
    assert masked_centre(x, mask).tolist() == [-2, 2, 0]
    assert masked_centre(x, mask, moments=torch.tensor([4.0, 4.0, 9.0], dtype=torch.float64)).tolist() == [0, 4, 0]
    assert masked_centre(x, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
