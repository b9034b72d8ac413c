import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.divergence import AlphaDivergence, ChiSquaredKL, ForwardKL, JensenShannon, ReverseKL

# f of each, as in E_ref[f(u)] with u = pi / pi_ref
GENERATORS = {
    ReverseKL(): lambda u: u * u.log(),
    ForwardKL(): lambda u: -u.log(),
    JensenShannon(): lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    AlphaDivergence(0.5): lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5),
    AlphaDivergence(0.2): lambda u: (u**0.2 - 0.2 * u - 0.8) / (0.2 * -0.8),
    ChiSquaredKL(): lambda u: 0.5 * u.square() - u + u * u.log(),
}


@pytest.mark.parametrize(("divergence", "f"), GENERATORS.items(), ids=[str(d) for d in GENERATORS])
def test_the_score_is_the_derivative_of_f_up_to_a_constant(divergence, f):
    u = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64, requires_grad=True)
    derivative = torch.autograd.grad(f(u).sum(), u)[0]
    score = divergence(u.detach().log())
    assert (score - derivative).std().item() == pytest.approx(0, abs=1e-12)
    assert score[2].item() == pytest.approx(0, abs=1e-12)  # nothing is owed where policy and reference agree


@given(st.floats(-3, 3))
def test_alpha_joins_forward_and_reverse_kl(log_ratio):
    x = torch.tensor([log_ratio], dtype=torch.float64)
    assert AlphaDivergence(0.0)(x).item() == pytest.approx(ForwardKL()(x).item())
    assert AlphaDivergence(1.0)(x).item() == ReverseKL()(x).item()
    assert AlphaDivergence(1 + 1e-6)(x).item() == pytest.approx(x.item(), abs=1e-5)


@pytest.mark.parametrize("divergence", GENERATORS, ids=str)
def test_scores_and_gradients_stay_finite_far_from_the_reference(divergence):
    x = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    divergence(x).sum().backward()
    assert divergence(x).isfinite().all()
    assert x.grad.isfinite().all()


def test_an_alpha_that_is_no_number_is_refused():
    with pytest.raises(UserError, match=r"alpha=nan is not a number"):
        AlphaDivergence(math.nan)
