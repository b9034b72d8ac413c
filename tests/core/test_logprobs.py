import pytest
import torch
from rlhf_kernels import VocabShard

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.logprobs import LMHead, about_tokens, token_divergence, token_kl, token_scores


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, dtype=dtype)
    weight = torch.randn(11, 8, generator=generator, dtype=dtype)
    tokens = torch.randint(0, 11, (2, 5), generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    return hidden, weight, tokens, mask


def by_hand(hidden, tokens, logits_of, temperature):
    """[batch, time] log-probability of tokens[t] from hidden[t - 1], one token at a time."""
    result = torch.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            result[b, t] = (logits_of(hidden[b, t - 1]) / temperature).log_softmax(-1)[tokens[b, t]]
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_index_t_is_about_token_t(temperature):
    hidden, weight, tokens, mask = example()
    scores = token_scores(hidden, tokens, mask, LMHead(weight), temperature=temperature)
    expected = by_hand(hidden, tokens, lambda h: weight @ h, temperature)
    scored = mask.clone()
    scored[:, 0] = False
    torch.testing.assert_close(scores.logprobs, torch.where(scored, expected, 0.0))


def test_bias_scale_and_cap_of_the_family():
    hidden, weight, tokens, mask = example()
    bias = torch.linspace(-1, 1, 11)
    head = LMHead(weight, bias=bias, logit_scale=0.5, softcap=3.0)
    expected = by_hand(hidden, tokens, lambda h: 3 * torch.tanh((weight @ h + bias) * 0.5 / 3), 1.0)
    every = torch.ones_like(mask)
    torch.testing.assert_close(token_scores(hidden, tokens, every, head).logprobs[:, 1:], expected[:, 1:])


def test_the_first_token_is_never_scored_and_the_mask_is_not_touched():
    hidden, weight, tokens, mask = example()
    before = mask.clone()
    scores = token_scores(hidden, tokens, mask, LMHead(weight), with_entropy=True)
    assert (mask == before).all()
    assert (scores.logprobs[:, 0] == 0).all()
    assert (scores.entropy[:, 0] == 0).all()
    assert not scores.is_argmax[:, 0].any()


def test_entropy_and_argmax_by_hand():
    hidden, weight, _, mask = example()
    logprobs = (hidden @ weight.T).log_softmax(-1)
    best = torch.cat((torch.zeros(2, 1, dtype=torch.long), logprobs.argmax(-1)[:, :-1]), dim=1)
    scores = token_scores(hidden, best, mask, LMHead(weight), with_entropy=True)
    scored = mask & (torch.arange(5) > 0)
    assert (scores.is_argmax == scored).all()
    entropy = about_tokens(-(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(scores.entropy, torch.where(scored, entropy, 0.0))


def test_only_hidden_states_before_a_scored_token_get_a_gradient():
    hidden, weight, tokens, mask = example()
    hidden.requires_grad_()
    token_scores(hidden, tokens, mask, LMHead(weight)).logprobs.sum().backward()
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = mask[:, 1:]
    assert ((hidden.grad != 0).any(-1) == predicts).all()


def test_about_tokens_moves_by_one():
    assert about_tokens(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0, 1, 2]]


def test_a_batch_one_token_wide_has_nothing_to_score_and_a_gradient_of_zero():
    hidden = torch.randn(2, 1, 4, requires_grad=True)
    ones = torch.ones(2, 1, dtype=torch.bool)
    scores = token_scores(hidden, ones.long(), ones, LMHead(torch.randn(7, 4)), with_entropy=True)
    assert not scores.logprobs.any()
    assert not scores.is_argmax.any()
    (gradient,) = torch.autograd.grad(scores.logprobs.sum(), hidden)
    assert not gradient.any()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_at_token_t_is_of_what_was_expected_there(direction):
    hidden, weight, _, mask = example(torch.float64)
    ref_hidden, ref_weight = example(torch.float64)[0].flip(0) + 0.1, weight.flip(1)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64)
    heads = LMHead(weight, bias=bias, logit_scale=0.5), LMHead(ref_weight, logit_scale=2.0)
    hidden.requires_grad_()
    kl = token_kl(hidden, ref_hidden, mask, *heads, direction=direction)
    p = ((hidden @ weight.T + bias) * 0.5).log_softmax(-1)
    q = (ref_hidden @ ref_weight.T * 2.0).log_softmax(-1)
    by_hand = (p.exp() * (p - q)).sum(-1) if direction == "reverse" else (q.exp() * (q - p)).sum(-1)
    expected = torch.where(mask & (torch.arange(5) > 0), about_tokens(by_hand), 0.0)
    torch.testing.assert_close(kl, expected)
    gradients = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (kl, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_heads_of_different_heights_are_compared_where_both_have_rows(mixture):
    hidden, weight, _, mask = example(torch.float64)
    hidden.requires_grad_()
    ref_hidden, ref_weight = hidden.detach().flip(0), torch.cat((weight, weight[:3] + 9.0))
    bias = torch.linspace(-1, 1, 14, dtype=torch.float64)
    options = {"mixture": mixture, "temperature": 0.7}
    apart = token_divergence(hidden, ref_hidden, mask, LMHead(weight), LMHead(ref_weight, bias=bias), **options)
    p, q = (hidden @ weight.T / 0.7).softmax(-1), ((ref_hidden @ ref_weight.T + bias)[..., :11] / 0.7).softmax(-1)
    m = mixture * q + (1 - mixture) * p
    to_mixture = [(x * (x / m).log()).sum(-1) for x in (q, p)]
    ends = {0.0: (q * (q / p).log()).sum(-1), 1.0: (p * (p / q).log()).sum(-1)}
    by_hand = ends.get(mixture, mixture * to_mixture[0] + (1 - mixture) * to_mixture[1])
    expected = torch.where(mask & (torch.arange(5) > 0), about_tokens(by_hand), 0.0)
    torch.testing.assert_close(apart, expected)
    gradients = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (apart, expected)]
    torch.testing.assert_close(*gradients)
    # turned round, it is the student that has more rows
    back = token_divergence(hidden, hidden.detach(), mask, LMHead(ref_weight), LMHead(weight), **options)
    assert back.abs().max() < 1e-12


def test_the_kl_of_a_batch_one_token_wide_is_0():
    hidden = torch.randn(2, 1, 8, requires_grad=True)
    head = LMHead(torch.randn(11, 8))
    kl = token_kl(hidden, hidden.detach(), torch.ones(2, 1, dtype=torch.bool), head, head)
    assert not kl.any()
    assert not torch.autograd.grad(kl.sum(), hidden)[0].any()


def test_a_head_that_caps_its_logits_has_no_exact_kl():
    hidden, weight, _, mask = example()
    with pytest.raises(UserError, match=r"cap their logits \(final_logit_softcapping=30.0\): use another loss"):
        token_kl(hidden, hidden, mask, LMHead(weight, softcap=30.0), LMHead(weight))


def test_one_token_a_row_leaves_a_head_in_parts_a_gradient_that_others_wait_for():
    weight = torch.randn(3, 4, requires_grad=True)
    head = LMHead(weight, shard=VocabShard(first=0, vocab=6, widest=3, group="unused"))
    tokens = torch.zeros(2, 1, dtype=torch.long)
    scores = token_scores(torch.randn(2, 1, 4), tokens, torch.ones_like(tokens, dtype=torch.bool), head)
    scores.logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4))
