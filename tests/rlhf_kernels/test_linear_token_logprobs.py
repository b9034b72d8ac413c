import subprocess
import sys

import pytest
import torch
from rlhf_kernels import linear_rows, linear_token_logprobs, token_logprobs
from spawned import leave_group


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    return hidden, weight, bias, torch.randint(9, (2, 4))


MASK = torch.tensor([[True, True, False, True], [False, True, True, True]])


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize(("softcap", "with_entropy"), [(None, False), (4.0, True)])
def test_gradients_to_hidden_weight_and_bias(problem, chunk_rows, softcap, with_entropy):
    hidden, weight, bias, tokens = problem

    def outputs(h, w, b):
        result = linear_token_logprobs(
            h, w, tokens, bias=b, mask=MASK, temperature=0.8, softcap=softcap, logit_scale=1.2,
            with_entropy=with_entropy, chunk_rows=chunk_rows,
        )  # fmt: skip
        return [y for y in result[:3] if y is not None]

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("blocks", [(1, 0), (1, 3 * 9 * 8), (2, 2 * 9 * 8), (1, 1 << 20)])
def test_kept_and_recomputed_logits_agree(problem, blocks, monkeypatch):
    monkeypatch.setitem(linear_rows.KEEP_BLOCKS, "cpu", blocks)
    hidden, weight, bias, tokens = problem
    result = linear_token_logprobs(hidden, weight, tokens, bias=bias, mask=MASK, with_entropy=True, chunk_rows=2)
    logits = hidden @ weight.T + bias
    expected = token_logprobs(logits, tokens, mask=MASK, with_entropy=True)
    torch.testing.assert_close(tuple(result), tuple(expected))
    ours = torch.autograd.grad((result.logprobs + result.entropy).sum(), (hidden, weight, bias), retain_graph=True)
    theirs = torch.autograd.grad((expected.logprobs + expected.entropy).sum(), (hidden, weight, bias))
    torch.testing.assert_close(ours, theirs)
    again = torch.autograd.grad((result.logprobs + result.entropy).sum(), (hidden, weight, bias))
    torch.testing.assert_close(again, ours, atol=0, rtol=0)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("kept_tiles", [0, 3])
def test_some_columns_at_a_time_give_the_whole_rows(with_entropy, kept_tiles, monkeypatch):
    monkeypatch.setattr(linear_rows, "TILE_BYTES", 6 * 64 * 8)  # 64 columns of six rows: four tiles, the last of 8
    monkeypatch.setitem(linear_rows.KEEP_BLOCKS, "cpu", (2, kept_tiles * 3 * 64 * 8))
    torch.manual_seed(0)
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(200, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(200, dtype=torch.float64)
    bias[64:128] = -torch.inf  # a whole tile that cannot be said
    bias.requires_grad_()
    tokens = torch.tensor([0, 63, 128, 199, 5, 130])
    options = {"temperature": torch.rand(6) + 0.5, "with_entropy": with_entropy}
    ours = linear_token_logprobs(hidden, weight, tokens, bias=bias, **options)
    exact = token_logprobs(hidden @ weight.T + bias, tokens, **options)
    torch.testing.assert_close(tuple(ours), tuple(exact))

    def grads(result, **keep):
        total = result.logprobs.sum() + 2 * result.logsumexp.sum()
        total = total + result.entropy.square().sum() if with_entropy else total
        return torch.autograd.grad(total, (hidden, weight, bias), **keep)

    expected = grads(exact)
    torch.testing.assert_close(grads(ours, retain_graph=True), expected)
    torch.testing.assert_close(grads(ours), expected)


def test_logits_that_were_kept_are_given_back_while_the_gradient_of_the_weight_grows(problem):
    hidden, weight, _, tokens = problem
    result = linear_token_logprobs(hidden, weight, tokens)
    kept = [x for x in result.logprobs.grad_fn.saved_tensors if x is not None and x.numel() == tokens.numel() * 9]
    assert len(kept) == 1
    torch.autograd.grad(result.logprobs.sum(), weight, retain_graph=True)
    assert kept[0].untyped_storage().size() > 0  # a kept graph may come again
    torch.autograd.grad(result.logprobs.sum(), weight)
    assert kept[0].untyped_storage().size() == 0


def test_logits_are_never_rounded_to_sixteen_bits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 64).bfloat16(), (torch.randn(300, 64) / 2).bfloat16()
    tokens = torch.randint(300, (8,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    # products of bfloat16 are exact in float32; 64 additions of numbers below 10 lose about 1e-6 each way
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_token_logprobs(hidden, weight, tokens)
    torch.testing.assert_close(result.logprobs.double(), exact, atol=1e-5, rtol=0)
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (rounded.double() - exact).abs().max() > 1e-3


def test_gradients_of_bfloat16_are_those_of_float64_up_to_bfloat16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(200, 32).bfloat16()
    tokens, factor = torch.randint(200, (64,)), torch.randn(64)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = (linear_token_logprobs(h, w, tokens, chunk_rows=16).logprobs * factor.to(dtype)).sum()
        grads.append([g.double() for g in torch.autograd.grad(loss, (h, w))])
    for ours, exact in zip(*grads, strict=True):
        # bfloat16 keeps 8 bits: one rounding of each element is 2^-9 = 2e-3 of it at most
        assert (ours - exact).norm() / exact.norm() < 3e-3
        assert ((ours - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-9)).max() < 1e-2


def test_gradients_of_float32():
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(64, 32), torch.randn(200, 32), torch.randint(200, (64,))
    grads = []
    for dtype in (torch.float32, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = linear_token_logprobs(h, w, tokens, chunk_rows=16, with_entropy=True)
        grads.append([g.double() for g in torch.autograd.grad((loss.logprobs - loss.entropy).sum(), (h, w))])
    for ours, exact in zip(*grads, strict=True):
        assert (ours - exact).norm() / exact.norm() < 1e-5


def test_rows_that_do_not_count_are_not_computed(problem):
    hidden, weight, _, tokens = problem
    poisoned = hidden.detach().clone()
    poisoned[~MASK] = float("nan")
    poisoned.requires_grad_()
    result = linear_token_logprobs(poisoned, weight, tokens.masked_fill(~MASK, -100), mask=MASK)
    grads = torch.autograd.grad(result.logprobs.sum(), (poisoned, weight))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][~MASK].eq(0).all()


def test_no_row_counts(problem):
    hidden, weight, _, tokens = problem
    result = linear_token_logprobs(hidden, weight, tokens, mask=torch.zeros_like(MASK), with_entropy=True)
    assert result.logprobs.eq(0).all()
    assert result.entropy.eq(0).all()
    grads = torch.autograd.grad(result.logprobs.sum(), (hidden, weight))
    assert all(g.eq(0).all() for g in grads)


def test_frozen_head_and_frozen_body(problem):
    hidden, weight, _, tokens = problem
    both = torch.autograd.grad(linear_token_logprobs(hidden, weight, tokens).logprobs.sum(), (hidden, weight))
    body = torch.autograd.grad(linear_token_logprobs(hidden, weight.detach(), tokens).logprobs.sum(), hidden)[0]
    head = torch.autograd.grad(linear_token_logprobs(hidden.detach(), weight, tokens).logprobs.sum(), weight)[0]
    torch.testing.assert_close((body, head), both, atol=0, rtol=0)


def test_a_sharded_head_is_gathered(problem, tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    hidden, weight, _, tokens = problem
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
        result = linear_token_logprobs(hidden, sharded, tokens).logprobs
        (grad,) = torch.autograd.grad(result.sum(), sharded)
        assert isinstance(grad, DTensor)
        expected = torch.autograd.grad(linear_token_logprobs(hidden, weight, tokens).logprobs.sum(), weight)[0]
        torch.testing.assert_close(grad.full_tensor(), expected)
    finally:
        distributed.destroy_process_group()


def _one_of_two_ranks(rank, store):
    import torch.distributed as distributed
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=torch.float64)
    hidden, tokens = torch.randn(2, 4, 5, dtype=torch.float64), torch.randint(9, (2, 4))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    result = linear_token_logprobs(hidden[rank], sharded, tokens[rank]).logprobs
    (grad,) = torch.autograd.grad(result.sum(), sharded)
    assert isinstance(grad, DTensor)
    assert grad.placements == (Shard(0),)
    assert len(grad.to_local()) < 9
    whole = weight.clone().requires_grad_()
    expected = linear_token_logprobs(hidden, whole, tokens).logprobs
    torch.testing.assert_close(result, expected[rank])
    (expected_grad,) = torch.autograd.grad(expected.sum(), whole)
    torch.testing.assert_close(grad.full_tensor(), expected_grad)
    leave_group()


def test_a_head_on_two_ranks_gets_the_sum_of_their_gradients_in_shards(tmp_path):
    torch.multiprocessing.spawn(_one_of_two_ranks, (tmp_path / "store",), nprocs=2)


TURN_ON = {
    "set_float32_matmul_precision": "torch.set_float32_matmul_precision('high')",
    "fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}
WITHOUT_TF32 = """
import torch
from rlhf_kernels.linear_rows import float32_products
def state():
    try:
        old = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        old = "unreadable"
    return torch.backends.cuda.matmul.fp32_precision, old
{turn_on}
before = state()
with float32_products():
    assert state() == ("ieee", False), state()  # both switches: products and profilers read one each
assert state() == before, (before, state())
assert before[0] == "tf32"
"""


def test_products_of_float32_are_not_rounded_by_any_of_the_switches():
    # each in a process of its own: torch does not forget which of them was used
    runs = [
        subprocess.Popen([sys.executable, "-c", WITHOUT_TF32.format(turn_on=line)], stderr=subprocess.PIPE, text=True)
        for line in TURN_ON.values()
    ]
    for name, run in zip(TURN_ON, runs, strict=True):
        assert run.wait() == 0, f"{name}: {run.stderr.read()[-500:]}"
