import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.kl import kl_estimate


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
    assert kl_estimate(difference, torch.tensor(0.0), "k3").item() == pytest.approx(0.5e-8, rel=0.02)


def test_the_estimator_must_exist():
    with pytest.raises(Exception, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
