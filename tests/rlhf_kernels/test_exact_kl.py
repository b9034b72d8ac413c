import math

import pytest
import torch
from rlhf_kernels import exact_kl, linear_exact_kl
from torch.distributions import Categorical, kl_divergence

MASK = torch.tensor([[True, False, True], [True, True, True]])


def naive(logits, ref_logits, direction):
    p, q = Categorical(logits=logits), Categorical(logits=ref_logits)
    return kl_divergence(p, q) if direction == "reverse" else kl_divergence(q, p)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 9, dtype=torch.float64)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_matches_torch_and_its_gradient(logits, direction):
    x, ref = logits
    torch.testing.assert_close(exact_kl(x, ref, direction=direction), naive(x, ref, direction))
    weights = torch.rand(2, 3, dtype=torch.float64)

    def loss(y):
        return exact_kl(y, ref, mask=MASK, temperature=0.7, direction=direction, weights=weights)

    assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_from_hidden_states(direction, chunk_rows):
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    options = {"mask": MASK, "temperature": 0.7, "direction": direction}

    def kl(h, w, b):
        return linear_exact_kl(h, w, ref_hidden, ref_weight, bias=b, chunk_rows=chunk_rows, **options)

    expected = exact_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T, **options)
    torch.testing.assert_close(kl(hidden, weight, bias), expected)
    assert torch.autograd.gradcheck(kl, (hidden, weight, bias))


def test_the_same_distribution_is_at_distance_zero(logits):
    x, _ = logits
    kl = exact_kl(x, x.detach())
    assert kl.abs().max() < 1e-15
    assert torch.autograd.grad(kl.sum(), x)[0].abs().max() < 1e-15


def test_a_token_that_the_policy_cannot_say_costs_nothing():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    kl = exact_kl(logits, torch.zeros(1, 3))
    assert kl.item() == pytest.approx(math.log(3 / 2))
    kl.sum().backward()
    assert logits.grad.isfinite().all()


def test_nan_stays_in_its_row_and_masked_rows_are_not_read():
    logits = torch.randn(3, 5)
    logits[1, 0] = float("nan")
    ref = torch.randn(3, 5)
    assert exact_kl(logits, ref).isnan().tolist() == [False, True, False]
    assert exact_kl(logits, ref, mask=torch.tensor([True, False, True])).isfinite().all()


def test_one_row_alone(logits):
    x, ref = logits
    torch.testing.assert_close(exact_kl(x[0, 1], ref[0, 1]), exact_kl(x, ref)[0, 1])
    (grad,) = torch.autograd.grad(exact_kl(x[0, 1], ref[0, 1]), x)
    torch.testing.assert_close(grad[0, 1], torch.autograd.grad(exact_kl(x, ref)[0, 1], x)[0][0, 1])


def test_views(logits):
    x, ref = logits
    turned = exact_kl(x.transpose(0, 1), ref.transpose(0, 1))
    torch.testing.assert_close(turned, exact_kl(x, ref).T)
    torch.testing.assert_close(exact_kl(x[:, 1:], ref[:, :-1]), exact_kl(x[:, 1:].clone(), ref[:, :-1].clone()))
