import math

import pytest
import torch
from jaxtyping import TypeCheckError

from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses.supervised import DFT, dynamic_nll, token_nll


def test_mean_nll_of_a_coin_is_log_2():
    logprobs = torch.log(torch.tensor([[0.5, 0.5, 0.001]]))
    mask = torch.tensor([[True, True, False]])
    assert reduce_tokens(token_nll(logprobs), mask, "token_mean").item() == pytest.approx(math.log(2))


def test_the_gradient_is_minus_one_per_token():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    token_nll(logprobs).sum().backward()
    assert (logprobs.grad == -1).all()


def test_dft_does_not_pull_harder_for_what_is_improbable():
    """-p log p in value; its gradient with respect to log p is -p, the probability's own, where that of NLL is -1."""
    logprobs = torch.log(torch.tensor([[0.5, 0.01]])).requires_grad_()
    loss = DFT()(logprobs)
    torch.testing.assert_close(loss, torch.tensor([[0.5 * math.log(2), 0.01 * math.log(100)]]))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5, -0.01]]))
    assert torch.equal(dynamic_nll(torch.zeros(1, 2)), torch.zeros(1, 2))  # certain of both: nothing left to learn


def test_a_row_without_its_batch_is_refused():
    with pytest.raises(TypeCheckError):
        token_nll(torch.zeros(3))
