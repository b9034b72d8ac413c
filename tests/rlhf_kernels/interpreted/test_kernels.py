"""Every kernel, forward and every gradient, against the reference in float64."""

import math

import pytest
import torch
from rlhf_kernels import (
    PolicyLossSpec,
    backend_report,
    exact_kl,
    gae,
    kl_shaped_gae,
    linear_exact_kl,
    linear_policy_loss,
    linear_token_logprobs,
    masked_whiten,
    policy_loss,
    token_logprobs,
)

# float32 has 24 bits: a few roundings of numbers below 30 are a few 1e-6
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def same(ours, exact, **tolerance):
    for x, y in zip(ours, exact, strict=True):
        if x is not None:
            torch.testing.assert_close(x.double(), y.double(), **(tolerance or CLOSE), equal_nan=True)


def rows(num_rows, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=generator) * 3
    tokens = torch.randint(vocab, (num_rows,), generator=generator)
    mask = torch.rand(num_rows, generator=generator) > 0.3
    return logits, tokens, mask, torch.randn(num_rows, generator=generator), torch.rand(num_rows, generator=generator)


@pytest.mark.parametrize(("num_rows", "vocab"), [(3, 1), (63, 7), (4, 257), (1, 257), (2, 32000)])
@pytest.mark.parametrize(
    "options", [{}, {"with_entropy": True, "softcap": 5.0, "logit_scale": 1.3}], ids=["plain", "all"]
)
def test_token_logprobs(both, num_rows, vocab, options):
    logits, tokens, mask, factor, temperature = rows(num_rows, vocab)
    if options:
        options = {**options, "temperature": temperature + 0.5}

    def use(dtype):
        x = logits.to(dtype).requires_grad_()
        result = token_logprobs(x, tokens, mask=mask, **options)
        total = (result.logprobs * factor + result.logsumexp).sum()
        if result.entropy is not None:
            total = total + (result.entropy * factor).sum()
        return *result, torch.autograd.grad(total, x)[0]

    same(*both(use))
    assert backend_report()["token_logprobs"].backend == "reference"  # the latest call; the first was the kernels'


def test_views_in_place_and_certain_tokens(both):
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 3] = 40.0
    tokens = torch.full((2, 3), 3)

    def use(dtype):
        x = logits.to(dtype).requires_grad_()
        result = token_logprobs(x[:, :-1], tokens, with_entropy=True)
        grad = torch.autograd.grad(result.logprobs.sum(), x)[0]
        y = logits.clone().to(dtype)[:, :-1].transpose(0, 1).requires_grad_()  # overwritten below
        again = token_logprobs(y, tokens.T, inplace_backward=True).logprobs.sum()
        return *result, grad, torch.autograd.grad(again, y)[0]

    same(*both(use), atol=1e-5, rtol=1e-5)
    ours, exact = both(use)
    # 1 - p = 3e-17: its digits survive
    torch.testing.assert_close(ours[4][0, 0, 3].double(), exact[4][0, 0, 3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "a view"])
def test_rows_that_begin_anywhere_in_a_vector(both, apart):
    # 9001 is 9 more than a multiple of 16, so 17 rows begin at every place; and it is several blocks
    logits, _, mask, factor, _ = rows(17, 9001)
    mask[:3] = True
    # in the first block, the last, and between
    tokens = torch.tensor([0, 9000, 5, *range(14, 9000, 640)])[:17]

    def use(dtype):
        whole = torch.zeros(17, 9002 if apart else 9001, dtype=dtype)
        whole[:, :9001] = logits
        x = whole[:, :9001].requires_grad_()
        scores = token_logprobs(x, tokens, mask=mask, with_entropy=True)
        total = ((scores.logprobs + scores.entropy) * factor).sum()
        old = scores.logprobs.detach() - 0.1
        loss = policy_loss(x, tokens, old, factor, mask=mask, denominator=5.0)
        kl = exact_kl(x, x.detach().flip(0), mask=mask)
        grads = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in (total, loss.loss, (kl * factor).sum())]
        return *scores, loss.loss, kl, *grads

    same(*both(use))


HOSTILE = torch.tensor(
    [[0.0, -math.inf, 1.0], [1e4, -1e4, 1e4 - 1], [math.nan, 0.0, 0.0], [0.0, 1.0, 2.0], [-1e4, -1e4, -1e4]]
)


@pytest.mark.parametrize("softcap", [50.0, 1000.0])
def test_a_wide_cap_keeps_the_digits_of_small_logits(both, softcap):
    logits, tokens, _, factor, _ = rows(6, 257)
    logits[0], logits[1] = logits[0] * 100, 0  # near the cap, and in the middle

    def use(dtype):
        x = logits.to(dtype).requires_grad_()
        result = token_logprobs(x, tokens, softcap=softcap, with_entropy=True)
        total = (result.logprobs * factor + result.entropy).sum()
        return *result, torch.autograd.grad(total, x)[0]

    # logits of 300 are right to 2e-5 in float32, and so is what is made of them
    same(*both(use), atol=3e-5, rtol=1e-6)
    ours, exact = both(use)
    assert (ours[0].double() - exact[0])[1:].abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_logits(monkeypatch, dtype):
    logits, tokens, mask, factor, _ = (x.to(dtype) if x.is_floating_point() else x for x in rows(4, 300))
    old, ref = torch.full((4,), -6.0), logits.flip(0)

    def use(x):
        scores = token_logprobs(x, tokens, mask=mask, with_entropy=True)
        loss = policy_loss(
            x, tokens, old, factor, mask=mask, denominator=3.0, loss=PolicyLossSpec("reinforce", entropy_coef=0.1)
        )
        kl = exact_kl(x, ref.to(x.dtype), mask=mask)
        totals = ((scores.logprobs + scores.entropy).sum(), loss.loss, kl.sum())
        numbers = (scores.logprobs, scores.entropy, loss.logprobs, kl)
        return numbers, [torch.autograd.grad(total, x)[0] for total in totals]

    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    numbers, grads = use(logits.clone().requires_grad_())
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    exact, exact_grads = use(logits.double().requires_grad_())
    same(numbers, exact)  # 16-bit inputs are exact in float32
    for x, y in zip(grads, exact_grads, strict=True):
        assert x.dtype == dtype
        # one rounding to 11 or 8 bits; the interpreter cuts bfloat16 off instead of rounding it, twice as far
        assert (x.double() - y).norm() / y.norm() < {torch.float16: 5e-4, torch.bfloat16: 6e-3}[dtype]


def test_hostile_logits(both):
    logits = HOSTILE
    tokens = torch.tensor([0, 2, 1, 2, 0])

    def use(dtype):
        x = logits.to(dtype).requires_grad_()
        result = token_logprobs(x, tokens, with_entropy=True)
        grad = torch.autograd.grad((result.logprobs + result.entropy)[[0, 1, 3, 4]].sum(), x)[0][[0, 1, 3, 4]]
        return *result[:3], grad

    same(*both(use), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_hostile_logits_in_losses(both, direction):
    tokens, mask = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([True, True, False, True, True])
    ref = torch.tensor([[0.0, -math.inf, 0.5]]).repeat(5, 1)
    ref[1:] = torch.tensor([1.0, 0.0, -1.0])

    def use(dtype):
        x = HOSTILE.to(dtype).requires_grad_()
        kl = exact_kl(x, ref.to(dtype), mask=mask, direction=direction)
        old, spec = torch.full((5,), -1.0), PolicyLossSpec("clipped", kl_coef=0.1, entropy_coef=0.01)
        loss = policy_loss(
            x, tokens, old, torch.tensor([1.0, -1.0, 1.0, 2.0, -2.0]), mask=mask, denominator=4.0, ref_logprobs=old,
            loss=spec,
        )  # fmt: skip
        return kl, *loss, *torch.autograd.grad(kl.sum() + loss.loss, x)

    # differences of logits of 1e4 are exact here; a KL of 2e4 keeps 24 bits
    same(*both(use), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [1, 7, 257, 32000])
def test_losses_of_every_width(both, vocab):
    num_rows = 63 if vocab == 7 else 2
    logits, tokens, mask, factor, weights = rows(num_rows, vocab)
    mask[0], ref = True, rows(num_rows, vocab, seed=1)[0]

    def use(dtype):
        x = logits.to(dtype).requires_grad_()
        kl = exact_kl(x, ref.to(dtype), mask=mask)
        spec = PolicyLossSpec("clipped", dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01)
        old = torch.full((num_rows,), -math.log(vocab) - 1)
        options = {"mask": mask, "denominator": 9.0, "ref_logprobs": old + 0.3, "weights": weights, "loss": spec}
        loss = policy_loss(x, tokens, old, factor, **options)
        return kl, *loss, *torch.autograd.grad(kl.sum() + loss.loss, x)

    same(*both(use), atol=2e-5, rtol=2e-5)


def test_losses_of_views_and_of_nothing_that_counts(both):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 5, 40, generator=generator)
    tokens, old = torch.randint(40, (3, 4), generator=generator), torch.full((3, 4), -4.0)
    advantages = torch.randn(3, 1, generator=generator).expand(3, 4)
    ref = torch.randn(5, 3, 40, generator=generator).transpose(0, 1)[:, 1:]

    def use(dtype):
        results = []
        for mask in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)):
            x = whole.to(dtype).requires_grad_()
            for view in (x[:, :-1], x[:, 1:]):
                loss = policy_loss(view, tokens.to(torch.int32), old, advantages, mask=mask, denominator=6.0)
                kl = exact_kl(view, ref.to(dtype), mask=mask)
                results += [*loss, kl, *torch.autograd.grad(loss.loss * 3 + kl.sum(), x)]
        return results

    ours, exact = both(use)
    same(ours, exact)
    assert all(x.eq(0).all() for x in ours[len(ours) // 2 :] if x is not None)


def test_losses_of_no_rows():
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_kl import kl_rows_triton
    from rlhf_kernels.triton_policy import policy_loss_triton

    logits, empty, tokens = torch.empty(0, 5), torch.empty(0), torch.empty(0, dtype=torch.long)
    assert kl_rows_triton(logits, logits, None, None, 1.0, True, torch.empty(0, 5)).shape == (0,)
    total, logprobs, *_ = policy_loss_triton(
        logits, tokens, empty, empty, None, None, empty > 0, Transform(), torch.tensor(1.0), PolicyLossSpec(), False,
        logits,
    )  # fmt: skip
    assert total == 0
    assert logprobs.shape == (0,)


@pytest.fixture
def far_apart():
    """Three rows; the offset of the last does not fit in 32 bits. The memory in between is never touched."""
    storage = torch.UntypedStorage(4 * (2**31 + 64))
    whole = torch.tensor([], dtype=torch.float32).set_(storage)
    logits = whole.as_strided((3, 16), (2**30 + 16, 1))  # the stride fits in 32 bits, twice the stride does not
    logits[0], logits[1], logits[2] = torch.arange(16.0), torch.arange(16.0), torch.arange(16.0).flip(0)
    return logits


def test_rows_more_than_two_thousand_million_elements_apart(far_apart):
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_rows import row_grads_triton, row_stats_triton

    tokens, one = torch.tensor([15, 15, 0]), torch.ones(3)
    p = far_apart[0].softmax(-1)
    stats = row_stats_triton(far_apart, tokens, Transform(), with_entropy=False)
    assert stats.logprobs.tolist() == pytest.approx([p[15].log().item()] * 3)
    out = row_grads_triton(far_apart, tokens, stats, one, 0 * one, None, Transform(), out=torch.empty(3, 16))
    expected = torch.eye(16)[15] - p
    torch.testing.assert_close(out, torch.stack((expected, expected, expected.flip(0))), **CLOSE)
    row_grads_triton(far_apart, tokens, stats, one, 0 * one, None, Transform(), out=far_apart)
    torch.testing.assert_close(far_apart.clone(), out, atol=0, rtol=0)


def test_losses_of_rows_that_far_apart(far_apart, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    logits, tokens, one = far_apart.detach().requires_grad_(), torch.tensor([15, 15, 0]), torch.ones(3)
    near = logits.detach().clone().requires_grad_()
    for x in (logits, near):
        kl = exact_kl(x, x.detach().flip(-1)).sum()
        loss = policy_loss(x, tokens, -one, one, mask=one.bool(), denominator=3.0, loss=PolicyLossSpec("reinforce"))
        (kl + loss.loss).backward()
    torch.testing.assert_close(logits.grad.clone(), near.grad, atol=0, rtol=0)


def test_an_id_out_of_range_reads_nothing_and_makes_its_row_nan():
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_rows import row_stats_triton

    tokens = torch.tensor([1, 5, -1])
    stats = row_stats_triton(torch.zeros(3, 5), tokens, Transform(), with_entropy=True)
    assert stats.logprobs.isnan().tolist() == [False, True, True]


def test_an_id_beyond_32_bits_reads_nothing_and_its_row_is_written_whole():
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_policy import policy_lanes_for, policy_loss_triton

    vocab, zeros = 16384, torch.zeros(3)
    lanes, width, _ = policy_lanes_for(vocab, 4, True)
    # what is left of them in 32 bits is before the row, within it, and far before it
    tokens = torch.tensor([2**32 - 2 * lanes * width, 2**32 + 5, 2**31])
    grads = torch.full((3, vocab), 7.0)
    per_token = (tokens, zeros - 9, zeros + 1, None, None, zeros == 0)
    loss = PolicyLossSpec("reinforce")
    result = policy_loss_triton(torch.zeros(3, vocab), *per_token, Transform(), torch.ones(()), loss, False, grads)
    assert result[1].isnan().all()
    assert grads.isnan().all()


@pytest.mark.parametrize("row", [[-math.inf] * 48, [math.inf] + [0.0] * 47], ids=["-inf", "inf"])
def test_a_row_without_a_distribution_is_no_certain_one(row):
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_rows import row_stats_triton

    stats = row_stats_triton(torch.tensor([row, [0.0] * 48]), torch.tensor([0, 0]), Transform(), with_entropy=True)
    assert stats.logprobs.isnan().tolist() == [True, False]
    assert stats.entropy.isnan().tolist() == [True, False]
    assert stats.is_argmax.tolist() == [False, True]


def test_no_rows_and_no_row_that_counts():
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_rows import row_grads_triton, row_stats_triton

    none = row_stats_triton(torch.empty(0, 5), torch.empty(0, dtype=torch.long), Transform(), with_entropy=True)
    assert none.logprobs.shape == (0,)
    logits, tokens = torch.full((2, 5), math.nan), torch.zeros(2, dtype=torch.long)
    mask = torch.zeros(2, dtype=torch.bool)
    stats = row_stats_triton(logits, tokens, Transform(), with_entropy=True, mask=mask)
    assert all(field.eq(0).all() for field in stats)
    one = torch.ones(2)
    out = torch.empty(2, 5)
    assert row_grads_triton(logits, tokens, stats, one, one, one, Transform(), out=out, mask=mask).eq(0).all()


SPECS = [
    PolicyLossSpec("clipped", 0.2, 0.3, 2.0, kl_coef=0.1),
    PolicyLossSpec("reinforce", kl_coef=0.1, kl_estimator="k1", entropy_coef=0.1),
    PolicyLossSpec("cispo", entropy_coef=0.01),
    PolicyLossSpec("sapo", kl_coef=0.1, kl_estimator="k2"),
    PolicyLossSpec("clipped", ratio="sequence"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.form}-{s.ratio}")
@pytest.mark.parametrize("linear", [False, True])
def test_policy_loss(both, spec, linear):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(67, 8)
    tokens, mask = torch.randint(67, (2, 5)), torch.rand(2, 5) > 0.3
    old = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0] + 0.3 * torch.randn(2, 5)
    advantages, weights = torch.randn(2, 1).expand(2, 5), torch.rand(2, 5)

    def use(dtype):
        options = {
            "mask": mask, "denominator": 7.0, "ref_logprobs": old + 0.2, "weights": weights, "loss": spec,
            "with_entropy": True, "temperature": 0.9, "softcap": 20.0,
        }  # fmt: skip
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if linear:
            result = linear_policy_loss(h, w, tokens, old, advantages, chunk_rows=5, **options)
        else:
            result = policy_loss(h @ w.T, tokens, old, advantages, **options)
        return *result, *torch.autograd.grad(result.loss * 2, (h, w))

    # a ratio and its KL are exponentials of log-probabilities that are right to 1e-6
    same(*both(use), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("vocab", [1, 257, 5000])
def test_exact_kl(both, direction, vocab):
    logits, _, mask, factor, weights = rows(3, vocab)
    ref = rows(3, vocab, seed=1)[0]

    def use(dtype):
        x = logits.to(dtype).requires_grad_()
        kl = exact_kl(x, ref.to(dtype), mask=mask, temperature=0.8, direction=direction, weights=weights.to(dtype))
        return kl, torch.autograd.grad((kl * factor).sum(), x)[0]

    same(*both(use))


def test_linear_ops(both):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 4, 16), torch.randn(63, 16) / 2, torch.randn(63)
    tokens, mask = torch.randint(63, (2, 4)), torch.rand(2, 4) > 0.3

    def use(dtype):
        h, w, b = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
        result = linear_token_logprobs(h, w, tokens, bias=b, mask=mask, with_entropy=True, chunk_rows=3)
        kl = linear_exact_kl(h, w, h.roll(1, 1), w.roll(1, 0), bias=b, mask=mask, chunk_rows=3)
        total = (2 * result.logprobs + result.entropy + result.logsumexp + kl).sum()
        return *result, kl, *torch.autograd.grad(total, (h, w, b))

    same(*both(use))


@pytest.mark.parametrize("length", [1, 2, 40, 1000])
def test_gae(both, length):
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(2, length), torch.randn(2, length), torch.rand(2, length) > 0.3
    mask[1, length // 3 : length // 2 + 1] = False
    lam = 0.95 if length < 100 else 1.0
    ours, exact = both(lambda dtype: gae(rewards.to(dtype), values.to(dtype), mask, gamma=0.99, lam=lam))
    for x, y in zip(ours, exact, strict=True):
        assert (x.double() - y).abs().max() <= 2e-6 * y.abs().max().clamp(min=1)


@pytest.fixture
def segments(monkeypatch):
    """Rows in segments of 64 tokens: what a GPU does with rows above 1024."""
    from rlhf_kernels import triton_gae

    monkeypatch.setattr(triton_gae, "lanes_for_time", lambda span: (16, 1))


def scan_inputs(length, dtype=torch.float32):
    """Scores, log-probabilities, those of the reference, values and mask of three rows; nothing counts in the last."""
    generator = torch.Generator().manual_seed(0)
    logprobs, values, noise = (torch.randn(3, length, generator=generator) for _ in range(3))
    mask = torch.rand(3, length, generator=generator) > 0.3
    mask[0, -length // 3 :] = False  # the last token that counts is in an earlier segment
    mask[1, 44:172] = False  # nothing counts in a whole segment between others
    mask[2] = False
    scores = torch.randn(3, generator=generator)
    return *(x.to(dtype) for x in (scores, logprobs, logprobs + 0.3 * noise, values)), mask


@pytest.mark.parametrize("length", [50, 51, 1030])  # of one segment, and of two
@pytest.mark.parametrize("critic_lam", [None, 1.0])
def test_kl_shaped_gae(both, length, critic_lam):
    options = {"kl_coef": 0.1, "kl_estimator": "k3", "gamma": 0.99, "lam": 0.95, "critic_lam": critic_lam}
    same(*both(lambda dtype: kl_shaped_gae(*scan_inputs(length, dtype), **options)))


# 300 to 302 tokens: rows begin at every place within a lane; 319: five segments would hold them, but not those of the
# second row, which begins within a lane; 2113: more segments than maps are read at once
@pytest.mark.parametrize("length", [300, 301, 302, 319, 2113])
@pytest.mark.parametrize("critic_lam", [None, 1.0])
def test_kl_shaped_gae_of_rows_in_segments(both, segments, length, critic_lam):
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95, "critic_lam": critic_lam}
    same(*both(lambda dtype: kl_shaped_gae(*scan_inputs(length, dtype), **options)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_gae_of_rows_in_segments(both, segments, gamma, lam):
    """Maps W -> c + W and W -> c, and of zeros W -> 0: all of them are told from the 0 of what is not there yet."""
    _, rewards, _, values, mask = scan_inputs(200)
    zeros = torch.zeros_like(values)

    def use(dtype):
        some = gae(rewards.to(dtype), values.to(dtype), mask, gamma=gamma, lam=lam)
        return *some, *gae(zeros.to(dtype), zeros.to(dtype), mask, gamma=gamma, lam=lam)

    same(*both(use), atol=2e-5, rtol=1e-5)  # sums of 140 numbers


def test_a_sequence_is_not_touched_by_its_neighbours_in_memory(both, segments):
    """Lanes at either end of a row of 301 tokens lie half in another one."""

    def use(dtype):
        scores, logprobs, ref, values, mask = scan_inputs(301, dtype)
        mask[1:] = True
        mask[0, 150:] = True
        values[0], values[2], scores[0] = math.nan, math.nan, math.nan
        return kl_shaped_gae(scores, logprobs, ref, values, mask, kl_coef=0.1, gamma=0.99, lam=0.95)[:4]

    ours, exact = both(use)
    same([x[1] for x in ours], [x[1] for x in exact])
    assert ours[1][1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_lanes_begin_where_vectors_do(dtype):
    """One sequence of a batch of odd length is contiguous, and is copied to where four numbers are read at once."""
    from rlhf_kernels.triton_gae import _in_lanes

    x = torch.arange(102).reshape(2, 51).to(dtype)
    assert _in_lanes(x) is x
    assert _in_lanes(x[1:]).data_ptr() % (4 * x.element_size()) == 0
    assert torch.equal(_in_lanes(x[1:]), x[1:])


def test_the_score_reaches_the_last_token_that_counts_at_any_discount(both):
    values, zeros, mask = torch.tensor([[1.0, 2.0, 5.0]]), torch.zeros(1, 3), torch.tensor([[True, True, False]])

    def use(dtype):
        inputs = (torch.tensor([3.0]), zeros, zeros, values, mask)
        return kl_shaped_gae(*(x if x.dtype == torch.bool else x.to(dtype) for x in inputs), kl_coef=0.1, gamma=0.0,
                             lam=1.0)  # fmt: skip

    ours, exact = both(use)
    same(ours, exact)
    assert ours.rewards.tolist() == [[0, 3, 0]]
    assert ours.advantages.tolist() == [[-1, 1, 0]]  # 0 - V, and score - V


@pytest.mark.parametrize("critic_lam", [None, 1.0])
@pytest.mark.parametrize("lanes", [32, 16])  # one segment of 20 tokens, and of 120 one or two
def test_what_calls_of_a_stream_share_is_zero_again_after_each(both, monkeypatch, critic_lam, lanes):
    from rlhf_kernels import triton_gae

    words = torch.zeros(1000, dtype=torch.int64)
    sizes = []
    monkeypatch.setattr(triton_gae, "lanes_for_time", lambda span: (lanes, 1))
    monkeypatch.setattr(triton_gae, "_words", lambda device, size: sizes.append(size) or words[:size])
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95, "critic_lam": critic_lam}

    def use(dtype):
        return [kl_shaped_gae(*scan_inputs(length, dtype), **options).moments for length in (120, 20, 120, 120)]

    same(*both(use))
    assert len(sizes) == 4
    assert words.eq(0).all()


@pytest.mark.parametrize("size", [1, 1700])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten(both, size, shift_mean):
    x, mask = torch.randn(3, size) + 1e3, torch.rand(3, size) > 0.3
    moments = torch.tensor([10.0, 30.0, 200.0])

    def use(dtype):
        y = x.to(dtype)
        return masked_whiten(y, mask, shift_mean=shift_mean), masked_whiten(y, mask, moments=moments)

    # the float32 inputs near 1e3 are exact in float64, and so are the sums; outputs of about 1e3 keep 24 bits
    same(*both(use), atol=1e-5, rtol=1e-6)


def test_a_factor_of_one_leaves_the_stored_gradient_alone():
    from rlhf_kernels.triton_rows import scale_rows_triton

    grads = torch.ones(3, 5)
    scale_rows_triton(grads, torch.tensor([1.0, 2.0, 0.0]))
    assert grads[:, 0].tolist() == [1.0, 2.0, 0.0]
    scale_rows_triton(grads, torch.tensor(3.0))
    assert grads[:, 4].tolist() == [3.0, 6.0, 0.0]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("key", ["logits", "ref"])
def test_nan_in_one_row_of_a_kl(direction, key, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    inputs = {"logits": rows(3, 300)[0], "ref": rows(3, 300, seed=1)[0]}
    inputs[key][1, 7] = math.nan
    x = inputs["logits"].requires_grad_()
    kl = exact_kl(x, inputs["ref"], direction=direction)
    grad = torch.autograd.grad(kl.sum(), x)[0]
    assert kl.isnan().tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()
    assert grad[1].isnan().any()


@pytest.mark.parametrize("key", ["logits", "old", "advantages", "ref", "weights"])
def test_nan_in_one_row_of_a_loss(key, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    logits, tokens, _, advantages, weights = rows(3, 300)
    inputs = {
        "logits": logits, "old": torch.zeros(3) - 5, "advantages": advantages, "ref": torch.zeros(3) - 5,
        "weights": weights,
    }  # fmt: skip
    inputs[key] = inputs[key].clone()
    inputs[key][1] = math.nan
    x = inputs["logits"].requires_grad_()
    spec = PolicyLossSpec(kl_coef=0.1, entropy_coef=0.1)
    per_token = (tokens, inputs["old"], inputs["advantages"])
    options = {"ref_logprobs": inputs["ref"], "weights": inputs["weights"], "denominator": 3.0, "loss": spec}
    result = policy_loss(x, *per_token, mask=torch.ones(3, dtype=torch.bool), **options)
    fields = (result.logprobs, result.entropy, result.ratio, result.kl)
    assert all(field[[0, 2]].isfinite().all() for field in fields)
    assert result.logprobs[1].isnan() == (key == "logits")
    grad = torch.autograd.grad(result.loss, x)[0]
    assert grad[[0, 2]].isfinite().all()
    assert grad[1].isnan().all()
    seen = policy_loss(x, *per_token, mask=torch.tensor([True, False, True]), **options)
    assert seen.loss.isfinite()
    assert torch.autograd.grad(seen.loss, x)[0].isfinite().all()


def test_launches_happen_on_the_device_of_the_tensors(monkeypatch):
    # triton launches on the current device, whatever the tensors are on
    entered = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x.shape) or guard(x))
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    logits, tokens, mask, factor, _ = rows(3, 40)
    x = logits.requires_grad_()
    one = torch.ones(3)
    calls = {
        "statistics and gradient": lambda: token_logprobs(x, tokens).logprobs.sum().backward(),
        "kl": lambda: exact_kl(x, x.detach()),
        "loss": lambda: policy_loss(x, tokens, one, one, mask=mask, denominator=1.0),
        "fused": lambda: linear_token_logprobs(x.detach(), torch.eye(40), tokens, method="fused"),
        "scan": lambda: gae(logits.detach(), logits.detach(), logits > 0, gamma=1.0, lam=1.0),
        "whiten": lambda: masked_whiten(factor, mask),
    }
    for name, run in calls.items():
        entered.clear()
        run()
        assert len(entered) == (2 if name == "statistics and gradient" else 1), name
