import math

import pytest
import torch
from rlhf_kernels import token_logprobs

# float32 has 24 bits: one rounding of numbers below 100 is 4e-6, and a log-probability is a difference of two
FLOAT32 = 1e-5


def naive(logits, tokens, temperature=1.0, softcap=None, logit_scale=1.0):
    x = logits.double() * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return (x / temperature).log_softmax(-1)


def test_two_equal_logits_share_the_probability():
    result = token_logprobs(torch.zeros(1, 2), torch.tensor([1]), with_entropy=True)
    assert result.logprobs.item() == pytest.approx(-math.log(2))
    assert result.entropy.item() == pytest.approx(math.log(2))
    assert result.logsumexp.item() == pytest.approx(math.log(2))
    assert result.is_argmax.item()  # a tie counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64_of_the_same_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 999, generator=generator) * 4).to(dtype)
    tokens = torch.randint(999, (6,), generator=generator)
    result = token_logprobs(logits, tokens, with_entropy=True)
    logp = naive(logits, tokens)
    # 16-bit inputs are exact in float32, so they lose nothing more
    torch.testing.assert_close(result.logprobs.double(), logp.gather(-1, tokens[:, None])[:, 0], atol=FLOAT32, rtol=0)
    torch.testing.assert_close(result.entropy.double(), -(logp.exp() * logp).sum(-1), atol=FLOAT32, rtol=0)
    assert torch.equal(result.is_argmax, logits.gather(-1, tokens[:, None])[:, 0] == logits.amax(-1))


@pytest.mark.parametrize(("softcap", "with_entropy"), [(None, False), (None, True), (3.0, True)])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradient_of_every_output(softcap, with_entropy, per_row):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (2, 3))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    temperature = torch.rand(2, 3) + 0.5 if per_row else 0.7

    def outputs(x):
        result = token_logprobs(
            x, tokens, mask=mask, temperature=temperature, softcap=softcap, logit_scale=1.3, with_entropy=with_entropy
        )
        return [y for y in result[:3] if y is not None]

    assert torch.autograd.gradcheck(outputs, logits)


def test_gradient_of_a_certain_token_keeps_its_digits():
    # 1 - p is 5e-9 here, below the resolution of float32 near 1; the gradient must be it, not 0
    logits = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    token_logprobs(logits, torch.tensor([0])).logprobs.sum().backward()
    expected = 2 * math.exp(-20) / (1 + 2 * math.exp(-20))
    assert logits.grad[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad[0, 1].item() == pytest.approx(-expected / 2, rel=1e-5)


def test_masked_rows_are_zero_and_may_hold_anything():
    logits = torch.randn(2, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    result = token_logprobs(logits, torch.tensor([3, -100]), mask=torch.tensor([True, False]), with_entropy=True)
    assert result.logprobs[1] == 0
    assert result.entropy[1] == 0
    assert not result.is_argmax[1]
    result.logprobs.sum().backward()
    assert logits.grad[1].eq(0).all()
    assert logits.grad[0].isfinite().all()


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 5)
    logits[1, 2] = float("nan")
    result = token_logprobs(logits, torch.tensor([0, 1, 2]), with_entropy=True)
    assert result.logprobs.isnan().tolist() == [False, True, False]
    assert result.entropy.isnan().tolist() == [False, True, False]


def test_impossible_tokens_and_huge_logits():
    logits = torch.tensor([[0.0, -math.inf, 0.0], [1e4, -1e4, 1e4 - 1]], requires_grad=True)
    result = token_logprobs(logits, torch.tensor([0, 2]), with_entropy=True)
    assert result.logprobs[0].item() == pytest.approx(-math.log(2))
    assert result.logprobs[1].item() == pytest.approx(-1 - math.log1p(math.exp(-1)), rel=1e-6)
    assert result.entropy[0].item() == pytest.approx(math.log(2))
    (result.logprobs + result.entropy).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0


def test_views_need_no_copy_and_no_order():
    torch.manual_seed(0)
    whole = torch.randn(3, 5, 11, requires_grad=True)
    tokens = torch.randint(11, (3, 5))
    view = token_logprobs(whole[:, :-1], tokens[:, 1:], with_entropy=True)
    copy = token_logprobs(whole[:, :-1].contiguous(), tokens[:, 1:].contiguous(), with_entropy=True)
    torch.testing.assert_close(view, copy, atol=0, rtol=0)
    transposed = token_logprobs(whole.transpose(0, 1), tokens.T)
    torch.testing.assert_close(transposed.logprobs, token_logprobs(whole, tokens).logprobs.T, atol=0, rtol=0)


def test_inplace_backward_overwrites_the_logits_with_their_gradient():
    torch.manual_seed(0)
    leaf = torch.randn(4, 9, requires_grad=True)
    tokens = torch.tensor([0, 3, 8, 8])
    expected = torch.autograd.grad(token_logprobs(leaf, tokens).logprobs.sum(), leaf)[0]
    logits = leaf * 1.0
    (grad,) = torch.autograd.grad(token_logprobs(logits, tokens, inplace_backward=True).logprobs.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(grad, expected, atol=0, rtol=0)


def test_an_id_that_nobody_looked_at_makes_its_row_nan():
    # on a GPU reading the ids would make the host wait, so the reference answers as the kernels do
    from rlhf_kernels.rows import Transform, row_stats

    stats = row_stats("test", torch.zeros(3, 5), torch.tensor([1, 5, -1]), Transform(), with_entropy=True)
    for field in (stats.logprobs, stats.log_sum, stats.entropy):
        assert field.isnan().tolist() == [False, True, True]


def test_rows_in_blocks_are_the_rows_alone():
    # more elements than the reference works on at a time
    torch.manual_seed(0)
    logits = torch.randn(5, 500_000)
    tokens = torch.randint(500_000, (5,))
    together = token_logprobs(logits, tokens, with_entropy=True)
    alone = [token_logprobs(logits[i], tokens[i], with_entropy=True) for i in range(5)]
    torch.testing.assert_close(together.logprobs, torch.stack([x.logprobs for x in alone]), atol=FLOAT32, rtol=0)
    torch.testing.assert_close(together.entropy, torch.stack([x.entropy for x in alone]), atol=FLOAT32, rtol=0)
