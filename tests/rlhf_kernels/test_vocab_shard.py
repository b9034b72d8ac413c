"""A vocabulary cut over processes: what each returns is what one process returns of the whole, in float64."""

import importlib.util
import os

import pytest
import torch
from rlhf_kernels import PolicyLossSpec, VocabShard, linear_policy_loss, linear_rows, linear_token_logprobs
from spawned import leave_group

MASK = torch.tensor([[True, True, False, True, True], [False, True, True, True, True]])
PER_ROW = torch.linspace(0.5, 2.0, 10).view(2, 5)
CASES = [
    {"temperature": 0.7},
    {"temperature": PER_ROW, "with_entropy": True, "mask": MASK},
    {"softcap": 4.0, "logit_scale": 1.3, "with_entropy": True, "chunk_rows": 3},
    {"softcap": 4.0, "temperature": 1.5, "mask": MASK, "chunk_rows": 2},
    {"mask": torch.zeros_like(MASK), "with_entropy": True},
]
LOSSES = [
    PolicyLossSpec(kl_coef=0.1, entropy_coef=0.05),
    PolicyLossSpec(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    PolicyLossSpec(form="cispo"),
]


def problem(vocab, dtype=torch.float64):
    torch.manual_seed(vocab)
    hidden = torch.randn(2, 5, 6, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(vocab, 6, dtype=torch.float64).to(dtype), torch.randn(vocab).to(dtype)
    bias[0] = -torch.inf  # a token that cannot be said
    return hidden, weight, bias, torch.randint(1, vocab, (2, 5))


def logprobs_and_grads(hidden, weight, bias, tokens, **options):
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    result = linear_token_logprobs(*inputs[:2], tokens, bias=inputs[2], **options)
    total = result.logprobs.square().sum() + 0.5 * result.logsumexp.sum()
    total = total if result.entropy is None else total + result.entropy.square().sum()
    return [y for y in result if y is not None], torch.autograd.grad(total, inputs)


def loss_and_grads(hidden, weight, bias, tokens, spec, **options):
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    torch.manual_seed(1)
    old, ref, advantages = (torch.randn(2, 5).to(hidden.dtype) for _ in range(3))
    advantages = advantages[:, :1].expand(2, 5) if spec.ratio == "sequence" else advantages
    result = linear_policy_loss(
        *inputs[:2], tokens, old - 3, advantages, mask=MASK, denominator=7.0, ref_logprobs=ref - 3, loss=spec,
        bias=inputs[2], **options,
    )  # fmt: skip
    return [y for y in result if y is not None], torch.autograd.grad(result.loss, inputs)


def assert_share(ours, whole, rows, **tolerance):
    """Results alike; gradients of hidden states alike, of weight and bias this process's rows."""
    torch.testing.assert_close(ours[0], whole[0], **tolerance)
    hidden, weight, bias = whole[1]
    torch.testing.assert_close(ours[1], (hidden, weight[rows], bias[rows]), **tolerance)


def one_process(rank, size, store, vocab, dtype):
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    shard = VocabShard.of(vocab, distributed.group.WORLD)
    rows = slice(shard.first, shard.first + shard.width)
    hidden, weight, bias, tokens = problem(vocab, dtype)
    part = (hidden, weight[rows], bias[rows], tokens)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    few = dtype != torch.float64  # the interpreter takes its time
    for options in CASES[1:3] if few else CASES:
        for blocks in ((1, 0), (1, 1 << 20)):  # logits computed twice, and kept
            linear_rows.KEEP_BLOCKS["cpu"] = blocks
            assert_share(
                logprobs_and_grads(*part, shard=shard, **options),
                logprobs_and_grads(hidden, weight, bias, tokens, **options),
                rows,
                **tolerance,
            )
    for spec in LOSSES[:1] if few else LOSSES:
        for chunk in (2, None):
            assert_share(
                loss_and_grads(*part, spec, shard=shard, chunk_rows=chunk),
                loss_and_grads(hidden, weight, bias, tokens, spec, chunk_rows=chunk),
                rows,
                **tolerance,
            )
    own, everywhere = logprobs_and_grads(*part, shard=shard, **CASES[2]), [None] * size
    distributed.all_gather_object(everywhere, [own[0], own[1][0]])
    for other in everywhere:  # or processes that sample together part ways
        torch.testing.assert_close(other, [own[0], own[1][0]], rtol=0, atol=0)
    leave_group()


@pytest.mark.parametrize(("vocab", "size"), [(9, 2), (7, 3)])
def test_parts_that_are_not_alike_give_the_whole(vocab, size, tmp_path):
    torch.multiprocessing.spawn(one_process, (size, tmp_path / "store", vocab, torch.float64), nprocs=size)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_parts_read_by_the_kernels_give_the_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "RLHF_KERNELS_BACKEND", "triton")
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    torch.multiprocessing.spawn(one_process, (2, tmp_path / "store", 9, torch.float32), nprocs=2)


class Group:
    """A process group without processes."""

    group_name = "none"

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_the_parts_are_those_of_chunk():
    for vocab, size in [(9, 2), (7, 3), (50257, 8), (8, 4)]:
        parts = [VocabShard.of(vocab, Group(rank, size)) for rank in range(size)]
        assert [part.width for part in parts] == [len(x) for x in torch.arange(vocab).chunk(size)]
        assert [part.first for part in parts] == [int(x[0]) for x in torch.arange(vocab).chunk(size)]


def test_what_cannot_be_cut_is_said():
    with pytest.raises(ValueError, match="9 tokens cut over 4 processes, 3 to each, leaves nothing for the last"):
        VocabShard.of(9, Group(0, 4))
    hidden, weight, _, tokens = problem(9)
    shard = VocabShard.of(9, Group(1, 2))
    with pytest.raises(ValueError, match="weight has 9 rows but the shard that begins at token 5 of 9 has 4"):
        linear_token_logprobs(hidden, weight, tokens, shard=shard)
    with pytest.raises(ValueError, match="method='fused' reads the whole vocabulary"):
        linear_token_logprobs(hidden, weight[5:], tokens, shard=shard, method="fused")
