import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlhf_kernels import PolicyLossSpec, policy_terms
from rlhf_kernels.arithmetic import torch_kl_term

# away from the corners of clip and dual clip, where a loss has no one slope
NUMBERS = st.floats(-2, 2, allow_nan=False)


def slope_by_autograd(logprob, old, advantage, spec, ref):
    x = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    tensors = [torch.tensor([y], dtype=torch.float64) for y in (old, advantage, ref)]
    terms = policy_terms(x, *tensors[:2], torch.tensor([True]), spec, ref_logprobs=tensors[2])
    return terms, torch.autograd.grad(terms.loss.sum(), x)[0]


@pytest.mark.parametrize("form", ["clipped", "reinforce", "sapo"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(logprob=NUMBERS, old=NUMBERS, advantage=NUMBERS, ref=NUMBERS, dual=st.sampled_from([None, 3.0]))
@settings(max_examples=40, deadline=None)
def test_the_written_slope_is_the_derivative(form, estimator, logprob, old, advantage, ref, dual):
    spec = PolicyLossSpec(form, 0.2, 0.28, dual, kl_coef=0.1, kl_estimator=estimator)
    terms, slope = slope_by_autograd(logprob, old, advantage, spec, ref)
    torch.testing.assert_close(terms.logprob_slope, slope, rtol=1e-9, atol=1e-12)


def test_cispo_has_no_gradient_through_its_ratio():
    spec = PolicyLossSpec("cispo", 0.2, 0.2)
    old = torch.tensor([math.log(0.5)])
    terms = policy_terms(torch.zeros(1), old, torch.tensor([3.0]), torch.tensor([True]), spec)
    assert terms.ratio.item() == pytest.approx(2.0)
    assert terms.clipped.item()
    assert terms.logprob_slope.item() == pytest.approx(-1.2 * 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 1.0, -1.2, 0.0),  # above the bound, wanting higher: stopped
        (1.5, -1.0, 1.5, 1.5),  # above the bound, wanting lower: not stopped
        (0.5, -1.0, 0.8, 0.0),  # below the bound, wanting lower: stopped
        (4.0, -1.0, 3.0, 0.0),  # dual clip at 3
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    spec = PolicyLossSpec("clipped", 0.2, 0.2, dual_clip=3.0)
    old = torch.tensor([-math.log(ratio)])
    terms = policy_terms(torch.zeros(1), old, torch.tensor([advantage]), torch.tensor([True]), spec)
    assert terms.loss.item() == pytest.approx(loss)
    assert terms.logprob_slope.item() == pytest.approx(slope)


@pytest.mark.parametrize("difference", [0.0, 1e-6, 1e-3, 0.099, 0.101, -0.3, 2.0])
def test_k3_keeps_its_digits_near_zero(difference):
    value, slope = torch_kl_term(torch.tensor([difference], dtype=torch.float32), 3)
    d = float(torch.tensor(difference))
    assert value.item() == pytest.approx(math.expm1(-d) + d if abs(d) > 0.05 else d * d / 2 - d**3 / 6, rel=1e-4)
    assert slope.item() == pytest.approx(-math.expm1(-d), rel=1e-5)


def test_a_far_ratio_is_held_and_teaches_nothing():
    spec = PolicyLossSpec("clipped")
    terms = policy_terms(torch.zeros(1), torch.tensor([-90.0]), torch.tensor([-1.0]), torch.tensor([True]), spec)
    assert terms.loss.isfinite().all()
    assert terms.logprob_slope.item() == 0


def test_a_sequence_has_one_ratio():
    spec = PolicyLossSpec("clipped", 0.2, 0.2, ratio="sequence")
    old = torch.tensor([[-0.1, -0.3, 5.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    terms = policy_terms(torch.zeros(2, 3), old, torch.ones(2, 3), mask, spec)
    assert terms.ratio[0, :2].tolist() == pytest.approx([math.exp(0.2)] * 2)
    assert terms.ratio[0, 2] == 0
    assert terms.loss[1].eq(0).all()


def test_the_eager_loss_of_the_trainer_is_the_same_arithmetic():
    clipped_surrogate = pytest.importorskip("rlhf_lightning.losses.policy").clipped_surrogate
    torch.manual_seed(0)
    logprobs, old, advantages = (torch.randn(4, 50) for _ in range(3))
    theirs = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    spec = PolicyLossSpec("clipped", 0.2, 0.28, 3.0)
    ours = policy_terms(logprobs, old, advantages, torch.ones(4, 50, dtype=torch.bool), spec)
    torch.testing.assert_close(theirs.per_token, ours.loss)
    assert torch.equal(theirs.clipped, ours.clipped)
