import math

import pytest
import torch
from rlhf_kernels import linear_exact_kl, linear_jsd
from torch.distributions import Categorical, kl_divergence

MASK = torch.tensor([[True, False, True], [True, True, True]])


def two_heads():
    """Hidden states and heads of a policy (with gradient) and of a wider reference."""
    torch.manual_seed(0)
    policy = (torch.randn(2, 3, 4), torch.randn(9, 4), torch.randn(9))
    reference = torch.randn(2, 3, 5).double(), torch.randn(9, 5).double()
    return [x.double().requires_grad_() for x in policy], reference


def naive(hidden, weight, bias, ref_hidden, ref_weight, beta, temperature):
    p = Categorical(logits=(hidden @ weight.T + bias) / temperature)
    q = Categorical(logits=ref_hidden @ ref_weight.T / temperature)
    mixture = Categorical(probs=beta * q.probs + (1 - beta) * p.probs)
    return beta * kl_divergence(q, mixture) + (1 - beta) * kl_divergence(p, mixture)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_is_its_definition_and_so_is_its_gradient(beta, chunk_rows):
    (hidden, weight, bias), reference = two_heads()

    def jsd(h, w, b):
        options = {"bias": b, "mask": MASK, "temperature": 0.7, "beta": beta, "chunk_rows": chunk_rows}
        return linear_jsd(h, w, *reference, **options)

    expected = naive(hidden, weight, bias, *reference, beta, 0.7) * MASK
    torch.testing.assert_close(jsd(hidden, weight, bias), expected)
    assert torch.autograd.gradcheck(jsd, (hidden, weight, bias))
    ours = torch.autograd.grad(jsd(hidden, weight, bias).sum(), (hidden, weight, bias))
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), (hidden, weight, bias)))


def test_numbers_by_hand():
    """p = (3/4, 1/4), q = (1/4, 3/4): m is even, and the divergence log 2 less the entropy of a 1 in 4 chance."""
    logits = torch.tensor([[math.log(3.0), 0.0]])
    swapped = logits.flip(-1)
    even = linear_jsd(logits, torch.eye(2), swapped, torch.eye(2))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert even.item() == pytest.approx(math.log(2) - entropy)


def test_its_ends_are_the_two_kl_divergences():
    (hidden, weight, bias), reference = two_heads()
    small = 1e-6
    low, high = (linear_jsd(hidden, weight, *reference, bias=bias, beta=beta) for beta in (small, 1 - small))
    forward, reverse = (
        linear_exact_kl(hidden, weight, *reference, bias=bias, direction=way) for way in ("forward", "reverse")
    )
    torch.testing.assert_close(low / small, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(high / small, reverse, rtol=1e-4, atol=0)


def test_distributions_that_share_nothing_are_log_two_apart_and_finite():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    jsd = linear_jsd(logits, torch.eye(2), -logits.detach(), torch.eye(2))
    assert jsd.item() == pytest.approx(math.log(2))
    jsd.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_same_distribution_is_at_distance_zero():
    (hidden, weight, bias), _ = two_heads()
    jsd = linear_jsd(hidden, weight, hidden.detach(), weight.detach(), bias=bias, ref_bias=bias.detach(), beta=0.3)
    assert jsd.abs().max() < 1e-15
    assert torch.autograd.grad(jsd.sum(), hidden)[0].abs().max() < 1e-15
