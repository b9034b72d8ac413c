"""The policy loss from exponentials of the logits, written by the product itself: values and every gradient."""

import math

import pytest
import torch
from rlhf_kernels import PolicyLossSpec, linear_policy_loss, linear_token_logprobs
from rlhf_kernels.rows import Transform, row_stats_reference
from rlhf_kernels.triton_exponentials import linear_exponentials_triton, room_for_exponentials
from rlhf_kernels.triton_linear import Tile, linear_stats_triton

# bfloat16 products are wrong in the interpreter: float32 and float16 operands stand for them
SMALL = Tile(16, 32, 16, 1, 1)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")


def problem(num_rows, vocab, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator) * 3 / size**0.5
    return hidden, weight, torch.randint(vocab, (num_rows,), generator=generator)


def exact_stats(hidden, weight, bias, tokens, transform=Transform(), with_entropy=False):
    logits = hidden.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    return logits, row_stats_reference(logits, tokens, transform, with_entropy=with_entropy)


TILES = [
    SMALL, SMALL._replace(parts=2), SMALL._replace(parts=4, columns=64), SMALL._replace(promote=1),
    SMALL._replace(parts=2, promote=2), SMALL._replace(piece=1),
]  # fmt: skip


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("num_rows", "vocab", "size"), [(16, 32, 16), (17, 300, 20), (5, 600, 52)], ids=str)
def test_every_way_to_run_the_product(tile, num_rows, vocab, size):
    hidden, weight, tokens = problem(num_rows, vocab, size)
    logits, expected = exact_stats(hidden, weight, None, tokens, with_entropy=True)
    old = expected.logprobs.float() + torch.linspace(-3, 3, num_rows)
    out = room_for_exponentials(num_rows, vocab, torch.float32, hidden.device)
    stats, offset = linear_exponentials_triton(
        hidden, weight, None, tokens, old, Transform(), with_entropy=True, out=out, tile=tile
    )
    alone = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=tile)
    assert all(torch.equal(x, y) for x, y in zip(stats, alone, strict=True))  # the bits of the fused scoring
    for x, y in zip(stats[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(x.double(), y, **CLOSE)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(offset.double(), chosen - old.clamp(-40, 0), **CLOSE)
    exponentials = (logits - offset[:, None]).exp().scatter(1, tokens[:, None], 0.0)
    torch.testing.assert_close(out.double(), exponentials, atol=1e-6, rtol=2e-5)


def loss_of(dtype, hidden, weight, bias, tokens, old, advantages, method, **options):
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    result = linear_policy_loss(
        leaves[0], leaves[1], tokens, old, advantages, bias=leaves[2] if bias is not None else None, method=method,
        **options,
    )  # fmt: skip
    return result, torch.autograd.grad(result.loss, leaves)


def both(monkeypatch, *inputs, dtype=torch.float32, **options):
    ours = loss_of(dtype, *inputs, "fused", **options)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    exact = loss_of(torch.float64, *inputs, "chunked", **options)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    return ours, exact


def assert_same(ours, exact):
    for x, y in zip(ours[0], exact[0], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x.double(), y.double(), **CLOSE)
    for x, y in zip(ours[1], exact[1], strict=True):
        # relative to the largest: exponentials of logits near 10 are right to 1e-6
        torch.testing.assert_close(x.double(), y, atol=1e-5 * float(y.abs().max()), rtol=1e-5)


SPECS = {
    "clipped": PolicyLossSpec("clipped", 0.2, 0.3),
    "reinforce, KL": PolicyLossSpec("reinforce", kl_coef=0.1, kl_estimator="k3"),
    "sequence": PolicyLossSpec("clipped", 3.0, 3.0, ratio="sequence"),
    "sapo": PolicyLossSpec("sapo"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(monkeypatch, spec, with_bias):
    hidden, weight, tokens = problem(14, 70, 12)
    hidden, tokens = hidden.view(2, 7, 12), tokens.view(2, 7)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(70, generator=generator) if with_bias else None
    mask = torch.rand(2, 7, generator=generator) > 0.3
    temperature = torch.rand(2, 7, generator=generator) + 0.5
    logits = torch.einsum("bth,vh->btv", hidden, weight) * 1.3 + (0 if bias is None else 1.3 * bias)
    old = (logits / temperature[..., None]).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old = old + torch.randn(2, 7, generator=generator) * 0.2
    advantages = torch.randn(2, 1, generator=generator).expand(2, 7).clone()
    advantages[0, 0] = 0.0  # forward only where ratios are of tokens
    options = {
        "mask": mask, "denominator": 5.0, "ref_logprobs": old + 0.1, "loss": spec, "temperature": temperature,
        "logit_scale": 1.3, "weights": torch.rand(2, 7, generator=generator) if spec.ratio == "token" else None,
        "with_entropy": with_bias,
    }  # fmt: skip
    assert_same(*both(monkeypatch, hidden, weight, bias, tokens, old, advantages, **options))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("chunk_rows", [5, 9])
def test_chunks(monkeypatch, ratio, chunk_rows):
    # of sequences of 6 tokens: a chunk that holds one, and chunks that do not, whose products are made twice
    hidden, weight, tokens = problem(18, 70, 12)
    hidden, tokens = hidden.view(3, 6, 12), tokens.view(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    advantages = torch.tensor([[1.0], [-0.5], [0.7]]).expand(3, 6)
    spec = PolicyLossSpec("clipped", 5.0, 5.0, ratio=ratio)
    options = {"mask": mask, "denominator": 5.0, "loss": spec, "chunk_rows": chunk_rows}
    assert_same(*both(monkeypatch, hidden, weight, None, tokens, torch.full((3, 6), -4.0), advantages, **options))


FAR_OFF = {
    "zero": 0.0, "minus 1e4": -1e4, "plus 5": 5.0, "minus infinity": -math.inf, "plus infinity": math.inf,
    "NaN": math.nan,
}  # fmt: skip


@pytest.mark.parametrize("old", FAR_OFF.values(), ids=FAR_OFF)
def test_any_old_log_probability_is_estimate_enough(monkeypatch, old):
    # REINFORCE, whose loss and gradient do not depend on it
    hidden, weight, tokens = problem(37, 70, 12)
    hidden[5], hidden[20] = hidden[5] * 40, hidden[20] * 25  # logits in the hundreds: log-probabilities below -60
    mask, spec = torch.ones(37, dtype=torch.bool), PolicyLossSpec("reinforce")
    options = {"mask": mask, "denominator": 37.0, "loss": spec}
    advantages = torch.randn(37, generator=torch.Generator().manual_seed(2))
    ours, exact = both(monkeypatch, hidden, weight, None, tokens, torch.full((37,), old), advantages, **options)
    assert exact[0].logprobs.min() < -100
    torch.testing.assert_close(ours[0].logprobs.double(), exact[0].logprobs, atol=1e-5, rtol=1e-6)
    for x, y in zip(ours[1], exact[1], strict=True):
        # logits of 300 are right to 3e-5 in float32, and so are their exponentials
        assert torch.isfinite(x).all()
        assert ((x.double() - y).norm(dim=1) / y.norm(dim=1).clamp(min=1e-3)).max() < 1e-4


def test_only_the_blocks_of_rows_that_need_it_are_written_again(monkeypatch):
    hidden, weight, tokens = problem(40, 70, 12)
    hidden[20] = hidden[20] * 40
    out = room_for_exponentials(40, 70, torch.float32, hidden.device)
    from rlhf_kernels import triton_linear

    asked = []
    launch = triton_linear.Product.launch
    monkeypatch.setattr(
        triton_linear.Product, "launch", lambda self, *how: asked.append(how[2].tolist()) or launch(self, *how)
    )
    old = torch.full((40,), -4.0)
    linear_exponentials_triton(hidden, weight, None, tokens, old, Transform(), with_entropy=False, out=out, tile=SMALL)
    assert asked == [[1, 1, 1, 1], [1, 0, 1, 0]]
    asked.clear()
    hidden[20] = hidden[0]
    linear_exponentials_triton(hidden, weight, None, tokens, old, Transform(), with_entropy=False, out=out, tile=SMALL)
    assert asked == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_token_that_cannot_be_said(monkeypatch):
    # its logit is -inf, no estimate of anything
    hidden, weight, tokens = problem(5, 70, 12)
    bias = torch.zeros(70)
    bias[int(tokens[2])] = -math.inf
    out = room_for_exponentials(5, 70, torch.float32, hidden.device)
    old = torch.full((5,), -4.0)
    _, offset = linear_exponentials_triton(
        hidden, weight, bias, tokens, old, Transform(), with_entropy=False, out=out, tile=SMALL
    )
    logits, expected = exact_stats(hidden, weight, bias, tokens)
    torch.testing.assert_close(offset[2].double(), (expected.maximum + expected.log_sum)[2], **CLOSE)
    probabilities = logits.softmax(-1).scatter(1, tokens[:, None], 0.0)
    factor = (offset.double() - expected.maximum - expected.log_sum).exp()
    torch.testing.assert_close(out.double() * factor[:, None], probabilities, atol=1e-6, rtol=2e-5)


def test_nan_and_unknown_ids_are_the_rows_own(monkeypatch):
    hidden, weight, tokens = problem(20, 70, 12)
    hidden[4, 3] = math.nan
    tokens[7], tokens[9] = 70, -1
    out = room_for_exponentials(20, 70, torch.float32, hidden.device)
    old = torch.full((20,), -4.0)
    stats, _ = linear_exponentials_triton(
        hidden, weight, None, tokens, old, Transform(), with_entropy=False, out=out, tile=SMALL
    )
    assert stats.logprobs.isnan().nonzero()[:, 0].tolist() == [4, 7, 9]
    assert out.isnan().any(1).nonzero()[:, 0].tolist() == [4]


def test_a_nearly_certain_token_keeps_the_digits_of_its_gradient(monkeypatch):
    hidden, weight, tokens = problem(6, 70, 12)
    hidden[1] = weight[int(tokens[1])] * 8  # 1 - p below 1e-7
    mask, spec = torch.ones(6, dtype=torch.bool), PolicyLossSpec("reinforce")
    inputs = (hidden[1:2], weight, None, tokens[1:2], torch.zeros(1), torch.ones(1))
    ours, exact = both(monkeypatch, *inputs, mask=mask[:1], denominator=1.0, loss=spec)
    assert 1e-30 < -exact[0].logprobs.item() < 1e-7
    for x, y in zip(ours[1], exact[1], strict=True):
        assert (x.double() - y).norm() / y.norm() < 1e-4


def test_float16(monkeypatch):
    hidden, weight, tokens = problem(20, 300, 16)
    hidden, weight = hidden.half(), weight.half()
    old = exact_stats(hidden, weight, None, tokens)[1].logprobs.float() + 0.1
    advantages = torch.randn(20, generator=torch.Generator().manual_seed(2))
    options = {"mask": torch.rand(20) > 0.2, "denominator": 20.0, "loss": PolicyLossSpec("reinforce")}
    ours, exact = both(monkeypatch, hidden, weight, None, tokens, old, advantages, dtype=torch.float16, **options)
    torch.testing.assert_close(ours[0].logprobs.double(), exact[0].logprobs, **CLOSE)
    for x, y in zip(ours[1], exact[1], strict=True):
        assert x.dtype == torch.float16
        assert (x.double() - y).norm() / y.norm() < 1e-3


@pytest.mark.parametrize("sums", ["tensor_cores", "rounded"])
def test_its_log_probabilities_have_the_bits_of_fused_scoring(sums):
    hidden, weight, tokens = problem(20, 300, 84)
    scores = linear_token_logprobs(hidden, weight, tokens, method="fused", sums=sums).logprobs
    result = linear_policy_loss(
        hidden.clone().requires_grad_(), weight, tokens, scores, torch.ones(20), mask=torch.rand(20) > 0.3,
        denominator=20, method="fused", sums=sums,
    )  # fmt: skip
    some = result.logprobs != 0
    assert torch.equal(result.logprobs[some], scores[some])
    assert result.ratio[some].eq(1).all()  # of a policy that has not moved


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"loss": PolicyLossSpec(entropy_coef=0.1)}, "entropy_coef=0.1"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"method": "fast"}, "use auto, chunked or fused"),
        ({"weight": torch.zeros(9, 12, dtype=torch.float64)}, "float64"),
        ({"weight": torch.zeros(9, 10), "hidden": torch.zeros(3, 10)}, "10 hidden units"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(change, why):
    arguments = {
        "hidden": torch.zeros(3, 12), "weight": torch.zeros(9, 12), "tokens": torch.zeros(3, dtype=torch.long),
        "old_logprobs": torch.zeros(3), "advantages": torch.zeros(3), "mask": torch.ones(3, dtype=torch.bool),
        "denominator": 3, "method": "fused",
    }  # fmt: skip
    with pytest.raises(ValueError, match=why):
        linear_policy_loss(**arguments | change)


def test_compiles_into_one_graph():
    hidden, weight, tokens = problem(3, 40, 12)
    per_token, mask = torch.full((3,), -3.0), torch.ones(3, dtype=torch.bool)

    def use(h, w):
        return linear_policy_loss(h, w, tokens, per_token, torch.ones(3), mask=mask, denominator=3, method="fused").loss

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(use(h, w), (h, w))
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(h, w), (h, w)), expected)


def test_words_that_cannot_be_said_take_nothing_of_a_row_whose_logits_are_low():
    """A tile of nothing but -inf beside logits of -200: exp(-offset) alone would be infinite."""
    hidden, weight, tokens = problem(4, 128, 16)
    bias = torch.full((128,), -200.0)
    bias[64:] = -math.inf
    tokens %= 64

    def grads(method, dtype):
        x, w = (y.to(dtype).requires_grad_() for y in (hidden, weight))
        old, every = torch.full((4,), -4.0, dtype=dtype), torch.ones(4, dtype=torch.bool)
        result = linear_policy_loss(
            x, w, tokens, old, torch.ones_like(old), mask=every, denominator=4.0, bias=bias.to(dtype), method=method
        )
        return torch.autograd.grad(result.loss, (x, w))

    for ours, exact in zip(grads("fused", torch.float32), grads("chunked", torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, **CLOSE)
