import importlib
import itertools
import math

import pytest
import torch
from rlhf_kernels import PolicyLossSpec, linear_policy_loss, policy_loss, policy_terms, token_logprobs

linear_policy_loss_module = importlib.import_module("rlhf_kernels.linear_policy_loss")

SPECS = [
    PolicyLossSpec(form, 0.2, 0.3, dual_clip, kl_coef, "k3", entropy_coef, ratio)
    for (form, dual_clip), ratio, (kl_coef, entropy_coef) in itertools.product(
        (("clipped", 3.0), ("reinforce", None), ("sapo", None)), ("token", "sequence"), ((0.0, 0.0), (0.1, 0.05))
    )
]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    tokens = torch.randint(7, (3, 4))
    mask = torch.rand(3, 4) > 0.3
    mask[1] = False
    tokens[1] = -100  # padding is not an id
    old = torch.randn(3, 4, dtype=torch.float64) * 0.5 - 2
    advantages = torch.randn(3, 1, dtype=torch.float64).expand(3, 4)
    return tokens, old, advantages, {"mask": mask, "denominator": 5.0, "ref_logprobs": old + 0.2}


def head(dtype=torch.float64):
    torch.manual_seed(1)
    hidden = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(7, 5, dtype=dtype, requires_grad=True), torch.randn(7, dtype=dtype, requires_grad=True)


def test_one_token_by_hand():
    # p = 1/2 at both; ratio 1, advantage 3: loss -3, gradient -3 (1 - p, -p)
    logits = torch.zeros(1, 2, requires_grad=True)
    result = policy_loss(
        logits, torch.tensor([0]), torch.tensor([-math.log(2)]), torch.tensor([3.0]),
        mask=torch.tensor([True]), denominator=2,
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(-1.5)
    result.loss.backward()
    assert logits.grad.tolist() == [pytest.approx([-0.75, 0.75])]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.form}-{s.ratio}-{s.kl_coef}")
def test_gradients(problem, spec):
    tokens, old, advantages, options = problem
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    arguments = (tokens, old, advantages)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, *arguments, loss=spec, **options).loss, logits, fast_mode=True
    )
    for chunk_rows in (2, None):

        def loss(hidden, weight, bias, chunk_rows=chunk_rows):
            return linear_policy_loss(
                hidden, weight, *arguments, bias=bias, loss=spec, chunk_rows=chunk_rows, softcap=5.0, **options
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, head(), fast_mode=True)


@pytest.mark.parametrize("form", ["clipped", "reinforce", "cispo", "sapo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
def test_hidden_states_and_logits_give_the_same(problem, form, ratio, chunk_rows):
    tokens, old, advantages, options = problem
    spec = PolicyLossSpec(form, ratio=ratio, kl_coef=0.1, entropy_coef=0.01)
    weights = torch.rand(3, 4, dtype=torch.float64)
    hidden, weight, _ = head()
    logits = (hidden @ weight.T).detach().requires_grad_()
    options = {**options, "loss": spec, "weights": weights, "temperature": 0.9}
    a = policy_loss(logits, tokens, old, advantages, **options)
    b = linear_policy_loss(hidden, weight, tokens, old, advantages, chunk_rows=chunk_rows, **options)
    torch.testing.assert_close(tuple(a), tuple(b))
    (dlogits,) = torch.autograd.grad(a.loss * 2, logits)
    grads = torch.autograd.grad(b.loss * 2, (hidden, weight))
    torch.testing.assert_close(grads, (dlogits @ weight, torch.einsum("btv,bth->vh", dlogits, hidden)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.form}-{s.ratio}-{s.kl_coef}")
def test_the_fused_loss_is_the_eager_loss(problem, spec):
    tokens, old, advantages, options = problem
    logits = torch.randn(3, 4, 7, dtype=torch.float64)
    scores = token_logprobs(logits, tokens, mask=options["mask"], with_entropy=True)
    terms = policy_terms(
        scores.logprobs, old, advantages, options["mask"], spec, ref_logprobs=options["ref_logprobs"],
        entropy=scores.entropy,
    )  # fmt: skip
    fused = policy_loss(logits, tokens, old, advantages, loss=spec, **options)
    torch.testing.assert_close(fused.loss, terms.loss.sum() / 5)
    torch.testing.assert_close(fused.ratio, terms.ratio)
    assert torch.equal(fused.clipped, terms.clipped)


def test_rows_without_advantage_have_log_probabilities_and_no_gradient(problem):
    tokens, old, advantages, options = problem
    advantages = advantages.clone()
    advantages[0] = 0
    hidden, weight, _ = head()
    result = linear_policy_loss(hidden, weight, tokens, old, advantages, chunk_rows=2, **options)
    expected = token_logprobs(hidden @ weight.T, tokens, mask=options["mask"]).logprobs
    torch.testing.assert_close(result.logprobs, expected.detach())
    (grad,) = torch.autograd.grad(result.loss, hidden)
    assert grad[0].eq(0).all()
    assert grad[2].ne(0).any()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("chunk_rows", [None, 5, 3])
def test_rows_that_all_count_are_taken_as_they_lie(problem, ratio, chunk_rows, monkeypatch):
    tokens, old, advantages, options = problem
    tokens, options = tokens.clamp(min=0), options | {"mask": torch.ones(3, 4, dtype=torch.bool)}
    asked, stats = [], linear_policy_loss_module._Logits.stats
    monkeypatch.setattr(
        linear_policy_loss_module._Logits, "stats", lambda *a, **k: asked.append(a[1]) or stats(*a, **k)
    )
    states, weight, bias = head()
    # a ratio far above its bound has no gradient, so that some rows of a chunk are left out
    old = old.clone()
    old[0], old[2, :2] = -9.0, -9.0
    spec = PolicyLossSpec(ratio=ratio)
    result = linear_policy_loss(
        states, weight, tokens, old, advantages.abs(), bias=bias, chunk_rows=chunk_rows, loss=spec, **options
    )
    logits = states @ weight.T + bias
    expected = policy_loss(logits, tokens, old, advantages.abs(), loss=spec, **options)
    assert all(isinstance(rows, slice) for rows in asked)
    assert [n for rows in asked for n in range(rows.start, rows.stop)] == list(range(12))
    for x, y in zip(result, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)
    inputs = (states, weight, bias)
    grads, exact = (torch.autograd.grad(x.loss, inputs) for x in (result, expected))
    torch.testing.assert_close(grads, exact)
    assert exact[0].abs().sum(-1).eq(0).any()
    assert exact[0].abs().sum(-1).gt(0).any()


def test_backward_after_a_kept_graph_gives_the_same_again(problem):
    tokens, old, advantages, options = problem
    hidden, weight, _ = head()
    loss = linear_policy_loss(hidden, weight, tokens, old, advantages, **options).loss
    first = torch.autograd.grad(loss * 3, hidden, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss * 3, hidden)[0], first, atol=0, rtol=0)


def test_micro_batches_add_up_to_the_step(problem):
    tokens, old, advantages, options = problem
    hidden, weight, _ = head()
    whole = linear_policy_loss(hidden, weight, tokens, old, advantages, **options).loss
    parts = [
        linear_policy_loss(
            hidden[i : i + 1], weight, tokens[i : i + 1], old[i : i + 1], advantages[i : i + 1],
            mask=options["mask"][i : i + 1], denominator=torch.tensor(5.0),
        ).loss
        for i in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


def test_bfloat16_gradient_is_that_of_float64_up_to_bfloat16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(96, 32).bfloat16(), (torch.randn(200, 32) / 4).bfloat16()
    tokens, advantages = torch.randint(200, (96,)), torch.randn(96)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        old = token_logprobs(hidden.double() @ weight.double().T, tokens).logprobs.to(torch.float64)
        result = linear_policy_loss(
            h, w, tokens, old, advantages, mask=torch.ones(96, dtype=torch.bool), denominator=96, chunk_rows=40,
            loss=PolicyLossSpec("reinforce"),
        )  # fmt: skip
        grads.append([g.double() for g in torch.autograd.grad(result.loss, (h, w))])
    for ours, exact in zip(*grads, strict=True):
        # one rounding to 8 bits is 2^-9 = 2e-3 at most
        assert (ours - exact).norm() / exact.norm() < 3e-3
