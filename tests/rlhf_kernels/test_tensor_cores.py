"""What a GPU does with 16-bit heads, on a CPU: products of 16-bit operands into float32, under the rules of CUDA's."""

import importlib

import pytest
import torch
from rlhf_kernels import (
    PolicyLossSpec,
    linear_exact_kl,
    linear_exponentials,
    linear_policy_loss,
    linear_rows,
    linear_token_logprobs,
)
from rlhf_kernels.rows import row_stats_reference

linear_policy_loss_module = importlib.import_module("rlhf_kernels.linear_policy_loss")  # the function has its name

SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture
def products(monkeypatch):
    """Sizes of the products; each refuses what CUDA refuses."""
    mm, addmm, seen = torch.mm, torch.addmm, []

    def into_float32(total, a, b, out):
        assert a.dtype == b.dtype
        assert a.dtype in SIXTEEN
        seen.append((a.shape[0], a.shape[1], b.shape[1]))
        product = mm(a.float(), b.float())
        product = product if total is None else total + product
        return product if out is None else out.copy_(product)

    def new_mm(a, b, out_dtype=None, *, out=None):
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        assert out_dtype == torch.float32
        assert out is None or out.dtype == torch.float32
        return into_float32(None, a, b, out)

    def new_addmm(total, a, b, out_dtype=None, *, out=None):
        if out_dtype is None:
            return addmm(total, a, b)
        assert total.dtype == out.dtype == out_dtype == torch.float32
        return into_float32(total, a, b, out)

    monkeypatch.setattr(linear_rows, "has_tensor_cores", lambda weight: True)
    monkeypatch.setattr(torch, "mm", new_mm)
    monkeypatch.setattr(torch, "addmm", new_addmm)
    return seen


def problem(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 32).to(dtype), (torch.randn(300, 32) / 2).to(dtype)
    return hidden, weight, torch.randn(300).to(dtype), torch.randint(300, (40,)), torch.rand(40) > 0.2


def scores(h, w, b, tokens, mask):
    result = linear_token_logprobs(h, w, tokens, bias=b, mask=mask, with_entropy=True, chunk_rows=16)
    return result.logprobs, (result.logprobs - result.entropy + result.logsumexp).sum()


def policy(h, w, b, tokens, mask):
    old, ones = torch.full(tokens.shape, -6.0), torch.ones(tokens.shape)
    spec = PolicyLossSpec("reinforce", kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01)
    result = linear_policy_loss(
        h, w, tokens, old, ones, bias=b, mask=mask, denominator=9.0, ref_logprobs=old, loss=spec, chunk_rows=16
    )
    return result.logprobs, result.loss


def kl(h, w, b, tokens, mask):
    result = linear_exact_kl(h, w, h.detach().flip(0), w.detach(), bias=b, mask=mask, chunk_rows=16)
    return result, result.sum()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("use", [scores, policy, kl])
@pytest.mark.parametrize("kept_graph", [False, True])
def test_heads_of_sixteen_bits(products, use, dtype, kept_graph):
    hidden, weight, bias, tokens, mask = problem(dtype)
    results = []
    for kind in (dtype, torch.float64):
        inputs = [x.to(kind).requires_grad_() for x in (hidden, weight, bias)]
        numbers, total = use(*inputs, tokens, mask)
        grads = torch.autograd.grad(total, inputs, retain_graph=kept_graph)
        assert [g.dtype for g in grads] == [kind] * 3
        results.append((numbers.double(), [g.double() for g in grads]))
        if kept_graph:  # a stored gradient and kept logits are whole still
            torch.testing.assert_close(torch.autograd.grad(total, inputs), grads, atol=0, rtol=0)
    (ours, grads), (exact, exact_grads) = results
    # products of 16-bit numbers are exact in float32, and logits of about 10 are summed to 1e-6
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    for x, y in zip(grads, exact_grads, strict=True):
        # the gradient in the logits is rounded once, and each result once more: 2^-9 each at most, half of it squared
        assert (x - y).norm() / y.norm() < 3e-3
        if x.ndim == 2:
            # but for rows that hardly move
            worth = y.norm(dim=1) > 1e-2 * y.norm(dim=1).max()
            assert ((x - y).norm(dim=1) / y.norm(dim=1))[worth].max() < 1e-2
    # every product was of 16-bit operands: logits, gradient in hidden states, gradient in the weight
    assert {size[1:] for size in products} >= {(32, 300), (300, 32)}


@pytest.mark.parametrize("use", [scores, policy, kl])
def test_a_float32_head_under_autocast_reaches_tensor_cores(products, use):
    hidden, weight, bias, tokens, mask = (x.float() if x.is_floating_point() else x for x in problem(torch.float32))
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        numbers, total = use(*inputs, tokens, mask)
    grads = torch.autograd.grad(total, inputs)
    assert [g.dtype for g in grads] == [torch.float32] * 3  # of the float32 parameters
    assert len(products) > 2
    assert numbers.dtype == torch.float32
    # the operands are rounded, as the head itself would round them; the logits are not
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in inputs[:2]]
    exact, exact_total = use(*rounded, bias.detach().double(), tokens, mask)
    torch.testing.assert_close(numbers.double(), exact, atol=1e-5, rtol=1e-5)
    for x, y in zip(grads, torch.autograd.grad(exact_total, rounded), strict=False):
        assert (x.double() - y).norm() / y.norm() < 3e-3


def test_autocast_casts_nothing_where_there_are_no_tensor_cores():
    hidden, weight, _, tokens, _ = problem(torch.float32)
    expected = linear_token_logprobs(hidden, weight, tokens).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(linear_token_logprobs(hidden, weight, tokens).logprobs, expected, atol=0, rtol=0)


def test_gradients_in_logits_are_rounded_once_and_not_copied(products, monkeypatch):
    made = []
    room = linear_rows.Head.room_for_grads
    monkeypatch.setattr(linear_rows.Head, "room_for_grads", lambda self, x: made.append(room(self, x)) or made[-1])
    hidden, weight, _, tokens, mask = problem(torch.bfloat16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    scores(h, w, None, tokens, mask)[1].backward()
    assert {x.dtype for x in made} == {torch.bfloat16}
    made.clear()
    scores(h.detach().float().requires_grad_(), w.detach().float(), None, tokens, mask)[1].backward()
    assert {x.dtype for x in made} == {torch.float32}


def test_chunks_on_a_gpu_are_whole_tiles_of_a_product():
    cuda = torch.device("cuda")
    assert linear_rows.chunk_rows_for(128256, cuda, None) == 2048  # 2093 rows would fit, and fill 17 tiles of 128
    assert linear_rows.chunk_rows_for(128256, cuda, 2093) == 2093  # as asked
    assert linear_rows.chunk_rows_for(10**8, cuda, None) == 2
    assert linear_rows.chunk_rows_for(128256, torch.device("cpu"), None) == (256 << 20) // (128256 * 4)


def test_one_chunk_where_it_takes_no_more_than_the_sum_it_does_without():
    cuda, sizes = torch.device("cuda"), {"chunk_rows": None, "element_size": 4}
    rows = linear_rows.chunk_rows_for_gradients
    # 2048 rows more, 6 bytes a word, against 4 bytes for each of 4096 weights a word
    assert rows(4096, 128256, 4096, cuda, **sizes, mixed=True) == 4096
    assert rows(4096, 128256, 2048, cuda, **sizes, mixed=True) == 2048
    assert rows(4096, 128256, 4096, cuda, **sizes, mixed=False) == 2048  # a float32 weight's gradient is that sum
    assert rows(4096, 128256, 4096, cuda, chunk_rows=512, element_size=4, mixed=True) == 512  # as asked
    assert rows(100, 128256, 4096, cuda, **sizes, mixed=True) == 2048


@pytest.mark.parametrize("use", [scores, policy])
def test_the_gradient_of_a_large_weight_is_one_product_where_there_is_one_chunk(products, use, monkeypatch):
    hidden, weight, bias, tokens, mask = problem(torch.bfloat16)
    results = []
    for smallest in (0, 1 << 24):
        monkeypatch.setattr(linear_rows, "LARGE_WEIGHT", smallest)
        products.clear()
        inputs = [x.requires_grad_() for x in (hidden[:16].clone(), weight.clone(), bias.clone())]
        grads = torch.autograd.grad(use(*inputs, tokens[:16], mask[:16])[1], inputs)
        results.append((grads, [size for size in products if size[0] == 300]))
    (whole, none), (summed, sums) = results
    assert not none  # no product of it goes into a float32 sum
    assert len(sums) == 1
    for x, y in zip(whole, summed, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=2**-7)  # the same sum, rounded once; in another order


def test_logits_are_kept_whole_where_that_takes_no_more_than_the_sum_it_does_without(products, monkeypatch):
    hidden, weight, _, tokens, _ = problem(torch.bfloat16)
    monkeypatch.setattr(linear_rows, "LARGE_WEIGHT", 0)
    monkeypatch.setitem(linear_rows.CHUNK_BYTES, "cpu", 8 * 300 * 4)  # eight rows of logits
    monkeypatch.setitem(linear_rows.KEEP_BLOCKS, "cpu", (1, 8 * 300 * 4))
    results = {}
    for rows, chunk_rows in ((16, None), (16, 8), (40, None)):
        products.clear()
        inputs = [x.requires_grad_() for x in (hidden[:rows].clone(), weight.clone())]
        scores = linear_token_logprobs(*inputs, tokens[:rows], chunk_rows=chunk_rows)
        results[rows, chunk_rows] = torch.autograd.grad(scores.logprobs.sum(), inputs), list(products)
    (whole, once), (parts, twice), (_, many) = results.values()
    logits = [(size[0], size[2]) for size in once if size[1:] == (32, 300)]
    assert logits == [(16, 300)]  # 8 rows more, 6 bytes a word, against 4 for each of 32 weights a word: computed once
    assert sum(size[1:] == (32, 300) for size in twice) == 3  # as asked: two chunks, one of which is kept
    assert sum(size[1:] == (32, 300) for size in many) > 1  # 32 rows more would take more
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=2**-6)


@pytest.fixture
def exponentials(monkeypatch):
    """The kernel of `method="fused"` as its formula, rounded as it rounds: the interpreter cannot multiply bfloat16."""
    kernels = pytest.importorskip("rlhf_kernels.triton_exponentials")

    def formula(hidden, weight, bias, tokens, old, transform, *, with_entropy, out, rounded):
        logits = hidden.float() @ weight.float().T + (0 if bias is None else bias.float())
        stats = row_stats_reference(logits, tokens, transform, with_entropy=with_entropy)
        x = logits * transform.logit_scale / transform.temperature
        offset = x.gather(1, tokens[:, None])[:, 0] - old.float().clamp(min=-40)
        out.copy_((x - offset[:, None]).exp().scatter(1, tokens[:, None], 0.0))
        return stats, offset

    monkeypatch.setattr(kernels, "linear_exponentials_triton", formula)
    monkeypatch.setattr(linear_policy_loss_module, "why_not_exponentials", lambda *a, **k: None)


@pytest.mark.parametrize("off", [0.0, 0.3, -5.0, 30.0, -30.0])
@pytest.mark.parametrize("certain", [False, True])
def test_gradients_from_exponentials_are_rounded_no_more_than_twice(products, exponentials, off, certain, monkeypatch):
    # off: nats between the log-probability that is given as old and the policy's own
    monkeypatch.setattr(linear_rows, "LARGE_WEIGHT", 0)
    hidden, weight, bias, tokens, mask = problem(torch.bfloat16)
    if certain:
        hidden = (hidden * 4).bfloat16()
    advantages = torch.randn(40, generator=torch.Generator().manual_seed(7))
    logits = hidden.double() @ weight.double().T + bias.double()
    old = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0].float() + off
    results = {}
    for dtype, method in ((torch.bfloat16, "fused"), (torch.bfloat16, "chunked"), (torch.float64, "chunked")):
        products.clear()
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        result = linear_policy_loss(
            inputs[0], inputs[1], tokens, old, advantages, bias=inputs[2], mask=mask, denominator=1e4,
            temperature=0.7, loss=PolicyLossSpec("reinforce"), method=method,
        )  # fmt: skip
        grads = [g.double() for g in torch.autograd.grad(result.loss, inputs)]
        results[method, dtype] = result.logprobs.double(), grads, sorted(products)
    (logprobs, grads, made), (_, others, _), (exact, exact_grads, _) = results.values()
    torch.testing.assert_close(logprobs, exact, atol=1e-5, rtol=1e-5)
    for x, by_logits, y in zip(grads, others, exact_grads, strict=True):
        error, usual = float((x - y).norm() / y.norm()), float((by_logits - y).norm() / y.norm())
        # exponential and factor are each rounded by 2^-9 at most; the gradient in the logits is once
        assert error < min(2 * 2**-9, 1.6 * usual)
    counted = int(mask.sum())
    # gradient in hidden states, and in the bias, the factor in parts; that in the weight is one product, in bfloat16
    assert made == [(counted, 300, 32), (300, counted, 8)]


def test_the_factor_of_a_row_undoes_the_rounding_of_its_token(exponentials, products, monkeypatch):
    monkeypatch.setattr(linear_rows, "LARGE_WEIGHT", 0)
    hidden, weight, _, tokens, mask = problem(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    advantages, off = torch.randn(40, generator=generator), 0.1 * torch.randn(40, generator=generator)
    logits = hidden.double() @ weight.double().T
    old = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].float() + off

    def errors(dtype=torch.bfloat16, method="fused", exact=None):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        result = linear_policy_loss(
            *inputs, tokens, old, advantages, mask=mask, denominator=40, loss=PolicyLossSpec("reinforce"), method=method
        )
        grads = [g.double() for g in torch.autograd.grad(result.loss, inputs)]
        return grads if exact is None else [float((x - y).norm() / y.norm()) for x, y in zip(grads, exact, strict=True)]

    exact = errors(torch.float64, "chunked")
    ours, usual = errors(exact=exact), errors(method="chunked", exact=exact)
    monkeypatch.setattr(linear_exponentials, "_undone", lambda exact, rounded: torch.ones_like(exact))
    without = errors(exact=exact)
    for error, by_logits, plain in zip(ours, usual, without, strict=True):
        assert error < 0.95 * plain
        assert error < 1.15 * by_logits  # in spite of one rounding more
