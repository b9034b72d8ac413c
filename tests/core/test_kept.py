"""Log-probabilities over what a sampler kept: by hand, by finite differences, and whole when everything is kept."""

import math

import pytest
import torch
from spawned import leave_group

from rlhf_lightning.core import kept as module
from rlhf_lightning.core.kept import kept_logprobs, pack_kept, unpack_kept
from rlhf_lightning.core.logprobs import LMHead, token_scores


@pytest.mark.parametrize("vocab", [1, 8, 13, 64])
def test_packing_is_undone(vocab):
    torch.manual_seed(vocab)
    kept = torch.rand(3, 5, vocab) < 0.4
    packed = pack_kept(kept)
    assert packed.shape == (3, 5, math.ceil(vocab / 8))
    assert torch.equal(unpack_kept(packed, vocab), kept)


def test_two_of_three_tokens_by_hand():
    # logits log 1, log 2, log 5: of the kept {1, 5} the last has 5/6; the set held (1 + 5) / 8 of all
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[math.log(1)], [math.log(2)], [math.log(5)]])
    kept = pack_kept(torch.tensor([[True, False, True]]))
    logprobs, entropy, mass, is_argmax = kept_logprobs(hidden, weight, torch.tensor([2]), kept)
    assert logprobs.item() == pytest.approx(math.log(5 / 6), abs=1e-6)
    assert entropy.item() == pytest.approx(-(5 / 6) * math.log(5 / 6) - (1 / 6) * math.log(1 / 6), abs=1e-6)
    assert mass.item() == pytest.approx(6 / 8, abs=1e-6)
    assert is_argmax.item()


def random_rows(vocab=11, rows=7):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, 4), torch.randn(vocab, 4), torch.randn(vocab)
    tokens = torch.arange(rows) % vocab
    kept = torch.rand(rows, vocab) < 0.5
    kept[torch.arange(rows), tokens] = True
    return hidden, weight, bias, tokens, kept


def test_value_and_gradient_are_those_of_a_masked_softmax(monkeypatch):
    hidden, weight, bias, tokens, kept = random_rows()
    options = {"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.3}

    def plain(hidden, weight, bias):
        logits = 3.0 * torch.tanh(1.3 * (hidden @ weight.T + bias) / 3.0) / 0.7
        return logits.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def ours(hidden, weight, bias):
        return kept_logprobs(hidden, weight, tokens, pack_kept(kept), bias=bias, **options)[0]

    gradients = []
    for function in (plain, ours):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        value = function(*leaves)
        (value * torch.arange(1.0, 8.0)).sum().backward()
        gradients.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 22)  # two rows at a time
    torch.testing.assert_close(ours(hidden, weight, bias), gradients[0][0], rtol=1e-5, atol=1e-6)


def test_keeping_everything_changes_nothing():
    torch.manual_seed(1)
    hidden, head = torch.randn(2, 6, 4), LMHead(torch.randn(9, 4))
    tokens = torch.randint(9, (2, 6))
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])
    everything = pack_kept(torch.ones(2, 6, 9, dtype=torch.bool))
    want = token_scores(hidden, tokens, mask, head, temperature=0.6, with_entropy=True)
    found = token_scores(hidden, tokens, mask, head, temperature=0.6, with_entropy=True, kept=everything)
    torch.testing.assert_close(found.logprobs, want.logprobs)
    torch.testing.assert_close(found.entropy, want.entropy)
    assert torch.equal(found.is_argmax, want.is_argmax)
    torch.testing.assert_close(found.kept_mass[found.logprobs != 0], torch.ones(int((want.logprobs != 0).sum())))


def test_nothing_scored_keeps_the_graph():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    kept = pack_kept(torch.zeros(1, 3, 9, dtype=torch.bool))
    scores = token_scores(
        hidden, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3).bool(), LMHead(torch.randn(9, 4)), kept=kept
    )
    scores.logprobs.sum().backward()
    assert not scores.logprobs.any()
    assert not hidden.grad.any()


def one_of_two_ranks(rank, store):
    import torch.distributed as distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    hidden, weight, bias, tokens, kept = random_rows(rows=8)
    rows = slice(4 * rank, 4 * rank + 4)

    def total(weight, bias, rows):
        return kept_logprobs(hidden[rows], weight, tokens[rows], pack_kept(kept[rows]), bias=bias)[0].sum()

    whole = [x.clone().requires_grad_() for x in (weight, bias)]
    sharded = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)]
    expected = torch.autograd.grad(total(*whole, slice(None)), whole)
    for found, want in zip(torch.autograd.grad(total(*sharded, rows), sharded), expected, strict=True):
        assert found.placements == (Shard(0),)
        torch.testing.assert_close(found.full_tensor(), want, rtol=1e-5, atol=1e-6)
    leave_group()


def test_a_sharded_head_gets_the_sum_of_its_ranks_gradients(tmp_path):
    torch.multiprocessing.spawn(one_of_two_ranks, (tmp_path / "store",), nprocs=2)
