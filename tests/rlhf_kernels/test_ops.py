"""The ops as torch sees them: schema, fake tensors, autograd, and compilation without a graph break."""

import pytest
import torch
from rlhf_kernels import (
    PolicyLossSpec,
    exact_kl,
    gae,
    kl_shaped_gae,
    linear_exact_kl,
    linear_jsd,
    linear_policy_loss,
    linear_token_logprobs,
    masked_whiten,
    policy_loss,
    token_logprobs,
)
from torch._dynamo.testing import CompileCounterWithBackend

B, T, V, H = 2, 3, 7, 5


def tensors():
    torch.manual_seed(0)
    return {
        "logits": torch.randn(B, T, V, requires_grad=True),
        "hidden": torch.randn(B, T, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "tokens": torch.randint(V, (B, T)),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
        "a": torch.randn(B, T),
        "b": torch.randn(B, T),
    }


SPEC = PolicyLossSpec(kl_coef=0.1, entropy_coef=0.01)
USES = {
    "token_logprobs": lambda t: sum(
        x.sum() for x in token_logprobs(t["logits"], t["tokens"], mask=t["mask"], with_entropy=True)[:3]
    ),
    "linear_token_logprobs": lambda t: sum(
        x.sum()
        for x in linear_token_logprobs(t["hidden"], t["weight"], t["tokens"], mask=t["mask"], with_entropy=True)[:3]
    ),
    "exact_kl": lambda t: exact_kl(t["logits"], t["logits"].roll(1, 0), mask=t["mask"]).sum(),
    "linear_exact_kl": lambda t: linear_exact_kl(
        t["hidden"], t["weight"], t["hidden"].roll(1, 0), t["weight"], mask=t["mask"]
    ).sum(),
    "linear_jsd": lambda t: linear_jsd(
        t["hidden"], t["weight"], t["hidden"].roll(1, 0), t["weight"], mask=t["mask"], beta=0.3
    ).sum(),
    "policy_loss": lambda t: policy_loss(
        t["logits"], t["tokens"], t["a"] - 2, t["b"], mask=t["mask"], denominator=5.0, ref_logprobs=t["a"], loss=SPEC
    ).loss,
    "linear_policy_loss": lambda t: linear_policy_loss(
        t["hidden"], t["weight"], t["tokens"], t["a"] - 2, t["b"], mask=t["mask"], denominator=5.0,
        ref_logprobs=t["a"], loss=SPEC,
    ).loss,
    "gae": lambda t: sum(gae(t["a"], t["b"], t["mask"], gamma=1.0, lam=0.95)).sum(),
    "kl_shaped_gae": lambda t: kl_shaped_gae(
        t["a"][:, 0], t["a"], t["b"], t["b"], t["mask"], kl_coef=0.1, gamma=1.0, lam=0.95
    ).returns.sum(),
    "masked_whiten": lambda t: masked_whiten(t["a"], t["mask"])[0].sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_compiles_into_one_graph_and_gives_the_same(name):
    use = USES[name]
    eager, traced = tensors(), tensors()
    expected = use(eager)
    # the graph that Inductor would get, forward and backward, without waiting for a C++ compiler
    result = torch.compile(use, fullgraph=True, backend="aot_eager")(traced)
    torch.testing.assert_close(result, expected)
    if expected.requires_grad:
        expected.backward()
        result.backward()
        for key in ("logits", "hidden", "weight"):
            torch.testing.assert_close(traced[key].grad, eager[key].grad)


def test_a_new_length_does_not_compile_again():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def use(hidden, weight, tokens):
        return linear_token_logprobs(hidden, weight, tokens).logprobs.sum()

    compiled = torch.compile(use, fullgraph=True, backend=graphs, dynamic=True)

    def call(length):
        compiled(torch.randn(2, length, H), torch.randn(V, H), torch.randint(V, (2, length)))

    call(3)
    first = graphs.frame_count
    for length in (4, 9, 17):
        call(length)
    assert graphs.frame_count == first


TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def samples():
    t = tensors()
    logits, tokens, mask, a, b = (t[key] for key in ("logits", "tokens", "mask", "a", "b"))
    head = (t["hidden"], t["weight"], torch.randn(V, requires_grad=True))
    numbers = [1.0, 0.0, 1.0, *SPEC.numbers()]
    options = (numbers, "clipped", "k3", "token", False, True)
    one = torch.tensor(5.0)
    return {
        "token_logprobs": (logits, tokens, mask, None, 1.0, 0.0, 1.0, True, False),
        "linear_token_logprobs": (
            *head,
            tokens,
            mask,
            None,
            1.0,
            0.0,
            1.0,
            True,
            2,
            [4 * V],
            False,
            False,
            False,
            V,
            0,
            "",
        ),
        "policy_loss": (logits, tokens, a, b, a, None, mask, None, one, *options, True),
        "linear_policy_loss": (
            *head,
            tokens,
            a,
            b,
            a,
            None,
            mask,
            None,
            one,
            *options[:-1],
            False,
            False,
            True,
            2,
            [True, True, True],
            V,
            0,
            "",
        ),
        "exact_kl": (logits, logits.detach().roll(1, 0), mask, a, 1.0, 1.0, True),
        "linear_exact_kl": (*head, *(x.detach() for x in head), mask, 1.0, 0.0, 2),
        "kl_shaped_gae": (None, a[:, 0].clone(), a, b, b, mask, 0.1, 3, 1.0, 0.95, 1.0),
        "masked_whiten": (a, mask, True, None),
    }


def gradient_samples():
    t = {key: x.detach() for key, x in tensors().items()}
    logits, hidden, weight, tokens, mask, a = (t[key] for key in ("logits", "hidden", "weight", "tokens", "mask", "a"))
    stats = [a.clone() for _ in range(5)]
    slopes = (a.clone(), None, a.clone())
    head = (hidden, weight, torch.randn(V))
    return {
        "token_logprobs_grad": (logits, tokens, mask, None, stats, *slopes, [1.0, 0.0, 1.0]),
        "token_logprobs_grad_": (logits.clone(), tokens, mask, None, stats, *slopes, [1.0, 0.0, 1.0]),
        "linear_token_logprobs_grad": (
            *head, tokens, mask, None, stats, [torch.zeros(0)], torch.tensor([4, V]), *slopes, [1.0, 0.0, 1.0],
            [True, False, True], False, 0, "",
        ),
        "linear_exact_kl_grad": (*head, *head, mask, a, 1.0, 0.0, 2, [True, True, False]),
        "scale_rows_": (logits.clone(), a.clone()),
    }  # fmt: skip


@pytest.mark.parametrize("name", gradient_samples())
def test_opcheck_of_the_gradients(name):
    op = getattr(torch.ops.rlhf_kernels, name).default
    torch.library.opcheck(op, gradient_samples()[name], test_utils=TESTS)


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.rlhf_kernels, name).default, samples()[name], test_utils=TESTS)
