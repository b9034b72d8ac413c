import math

import pytest
import torch

from rlhf_lightning.core.ratio import bounded_exp, log_ratios

OLD = torch.tensor([[-1.0, -2.0, -3.0, 7.0], [-1.0, -1.0, 7.0, 7.0]])
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize(
    ("level", "rows"),
    [
        ("token", [[0.3, 0.6, 0.9, 0.0], [-0.2, 0.4, 0.0, 0.0]]),
        ("sequence", [[0.6] * 4, [0.1] * 4]),
        ("sequence_token", [[0.6] * 4, [0.1] * 4]),
        ("sequence_sum", [[1.8] * 4, [0.2] * 4]),
    ],
)
def test_levels_by_hand(level, rows):
    logprobs = OLD + torch.tensor([[0.3, 0.6, 0.9, 50.0], [-0.2, 0.4, 50.0, 50.0]])
    torch.testing.assert_close(log_ratios(logprobs, OLD, MASK, level), torch.tensor(rows))


@pytest.mark.parametrize(
    ("level", "gradient"),
    [("token", 1.0), ("sequence", 1 / 3), ("sequence_token", 1.0), ("sequence_sum", 1.0)],
)
def test_gradient_of_a_token_of_three_alike(level, gradient):
    """The loss's mean over three tokens: a sequence ratio gives each a third of three, a sum all of it."""
    logprobs = OLD.clone().requires_grad_()
    per_token = log_ratios(logprobs, OLD, MASK, level)
    picked = per_token[0, 1] if level != "sequence" else per_token[0, 0]
    slope = torch.autograd.grad(picked, logprobs)[0]
    assert slope[0, 1].item() == pytest.approx(gradient)
    assert slope[~MASK].abs().sum() == 0


def test_far_policies_stay_finite():
    assert bounded_exp(torch.tensor([1e4, -1e4])).tolist() == pytest.approx([math.exp(20), math.exp(-20)])
