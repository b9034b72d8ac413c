import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.kl import kl_estimate, kl_penalty


def distributions(seed: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy, reference = logits.log_softmax(-1)
    return policy, reference


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_k1_and_k3_are_unbiased(seed, vocab):
    policy, reference = distributions(seed, vocab)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        expectation = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
        torch.testing.assert_close(expectation, exact, atol=1e-12, rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.floats(-20, 5), st.floats(-20, 5))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    a, b = torch.tensor(logprob), torch.tensor(ref_logprob)
    assert kl_estimate(a, b, "k2") >= 0
    assert kl_estimate(a, b, "k3") >= 0


def test_numbers_by_hand():
    a, b = torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0])
    assert kl_estimate(a, b, "k1").tolist() == [1, -1]
    assert kl_estimate(a, b, "k2").tolist() == [0.5, 0.5]
    assert kl_estimate(a, b, "k3").tolist() == pytest.approx([0.36787944, 0.71828183])  # 1/e, e - 2


def test_k2_as_a_loss_has_the_gradient_of_the_kl():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    reference = distributions(1, 7)[1]
    policy = logits.log_softmax(-1)
    exact = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)[0]
    sampled = (policy.exp().detach() * kl_estimate(policy, reference, "k2")).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], exact)


def test_k1_as_a_loss_has_no_gradient_on_average():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(-1)
    sampled = (policy.exp().detach() * kl_estimate(policy, distributions(1, 7)[1], "k1")).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], torch.zeros(7, dtype=torch.float64))


def test_k3_of_nearly_equal_policies_keeps_its_digits():
    difference = torch.tensor(1e-4)
    assert kl_estimate(difference, torch.tensor(0.0), "k3").item() == pytest.approx(0.5e-8, rel=1e-4)


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2():
    logprobs = torch.tensor([-0.3, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.3, -1.0, -5.0], dtype=torch.float64)
    straight = kl_estimate(logprobs, reference, "k3+")
    torch.testing.assert_close(straight, kl_estimate(logprobs, reference, "k3"))
    assert torch.autograd.grad(straight.sum(), logprobs)[0].tolist() == pytest.approx([1.0, -1.0, 0.0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_importance_weights_make_the_expected_gradient_that_of_the_kl(estimator, on_policy):
    # the expectation over the policy that sampled, summed over the whole vocabulary: no noise
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    policy, (reference, another) = logits.log_softmax(-1), distributions(1, 7)
    old = policy.detach() if on_policy else another
    exact = (policy.exp() * (policy - reference)).sum()
    penalty = kl_penalty(policy, reference, old, estimator=estimator, importance_weighted=True)
    expected = (old.exp() * penalty).sum()
    if estimator != "k2":
        torch.testing.assert_close(expected, exact)
    gradient = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(expected, logits)[0], gradient)


def test_without_weights_a_stale_sample_misleads():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    policy, (reference, old) = logits.log_softmax(-1), distributions(1, 7)
    gradient = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)[0]
    for estimator in ("k1", "k2", "k3", "k3+"):
        expected = (old.exp() * kl_penalty(policy, reference, old, estimator=estimator)).sum()
        off = torch.autograd.grad(expected, logits, retain_graph=True)[0] - gradient
        assert off.abs().max() > 0.01


def test_a_weight_beyond_float32_stays_finite():
    logprobs = torch.tensor([0.0], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-1.0]), torch.tensor([-1e4]), estimator="k3", importance_weighted=True)
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_the_estimator_must_exist():
    with pytest.raises(Exception, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_bound_holds_the_value_and_stops_the_gradient(estimator):
    # of log-ratios that float32 cannot take the exponential of, too
    logprobs = torch.tensor([-100.0, -12.0, -1.0, 0.5, 12.0], requires_grad=True)
    zero = torch.zeros(5)
    free, held = (kl_estimate(logprobs, zero, estimator, bound=bound) for bound in (None, 10.0))
    assert held.abs().max() == 10
    within = free.abs() <= 10
    assert within.any()
    assert not within.all()
    torch.testing.assert_close(held[within], free[within])
    slope = torch.autograd.grad(held.sum(), logprobs, retain_graph=True)[0]
    assert (slope[~within] == 0).all()
    torch.testing.assert_close(slope[within], torch.autograd.grad(free[within].sum(), logprobs)[0][within])


def test_a_bound_holds_the_value_of_k3_plus_and_not_its_gradient():
    logprobs = torch.tensor([-12.0, 12.0], requires_grad=True)
    held = kl_estimate(logprobs, torch.zeros(2), "k3+", bound=10.0)
    assert held.tolist() == [10, 10]
    assert torch.autograd.grad(held.sum(), logprobs)[0].tolist() == [-12, 12]


def test_the_weight_of_a_penalty_may_be_capped():
    logprobs, zero = torch.tensor([3.0, 1.0], requires_grad=True), torch.zeros(2)  # ratios 20.09 and 2.72
    penalty = kl_penalty(logprobs, zero, zero, estimator="k2", importance_weighted=True, max_weight=10.0)
    assert penalty.tolist() == pytest.approx([10 * 4.5, 0.5 * 2.7182818])
    assert torch.autograd.grad(penalty.sum(), logprobs)[0].tolist() == pytest.approx([30.0, 2.7182818])


def test_absolute_values_and_straight_through_by_hand():
    """With a +: the value of what stands before it, the slope of k2, which is d."""
    for estimator, value, slope in (
        ("abs", 2.0, -1.0),
        ("abs+", 2.0, -2.0),
        ("k1+", -2.0, -2.0),
        ("k3+", math.exp(2) - 3, -2.0),
    ):
        logprob = torch.tensor(-3.0, requires_grad=True)
        estimate = kl_estimate(logprob, torch.tensor(-1.0), estimator)
        assert estimate.item() == pytest.approx(value)
        assert torch.autograd.grad(estimate, logprob)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_the_gradient_of_a_weighted_penalty_is_the_weighted_log_ratio(estimator):
    """At every token, and not only on average: w d for d^2/2 with w held, and for w (exp(-d) - 1 + d) with w moving."""
    logprobs = torch.tensor([-0.3, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
    reference, old = torch.tensor([[-1.3, -1.0, -5.5], [-0.9, -2.5, -3.0]], dtype=torch.float64)
    penalty = kl_penalty(logprobs, reference, old, estimator=estimator, importance_weighted=True)
    expected = (logprobs - old).exp() * (logprobs - reference)
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), logprobs)[0], expected.detach())
