import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_lightning.core.logprobs import LMHead, token_divergence, token_scores
from rlhf_lightning.planning.trace import MemoryTrace


@pytest.fixture
def trace():
    with FakeTensorMode(), MemoryTrace() as trace:
        yield trace


def test_what_lives_at_once_is_added_and_what_is_gone_is_not(trace):
    start = trace.now()
    a = torch.empty(1000)  # 4000 bytes
    b = a + 1
    del a
    c = b[:10].clone()  # a view is no memory, its copy is
    assert trace.peak(start, trace.now()).total == 8000
    after = trace.now()
    d = torch.empty(100, dtype=torch.float64)
    assert trace.peak(after, trace.now()).total == 4000 + 40 + 800
    assert (len(b), len(c), len(d)) == (1000, 10, 100)


def test_a_graph_holds_what_its_backward_pass_needs(trace):
    x = torch.empty(1000, requires_grad=True)
    y = x.exp().sum()  # exp keeps its result: 4000 bytes beside x's
    assert trace.peak(trace.now(), trace.now()).total == 8004
    del y
    assert trace.peak(trace.now(), trace.now()).total == 4000


def test_parts_are_named_and_may_lie_elsewhere(trace):
    weights = torch.empty(1000)
    trace.label([weights], "weights")
    noise = torch.empty(500)
    trace.hold(100, "scratch")
    trace.label([noise, None], "noise")
    peak = trace.peak(0, trace.now())
    assert peak.total == 6100
    assert peak.parts == {"weights": 4000, "noise": 2000, "scratch": 100}
    assert trace.size("weights") == 4000
    halved = trace.peak(0, trace.now(), lambda name: 0.5 if name == "weights" else 1.0)
    assert (halved.total, halved.parts["weights"]) == (4100, 2000)


def test_kept_logits_are_named_and_their_tile_is_counted(trace):
    hidden, weight = torch.empty(2, 9, 4, requires_grad=True), torch.empty(50, 4, requires_grad=True)
    tokens, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool)
    scores = token_scores(hidden, tokens, mask, LMHead(weight))
    assert trace.size("logits") == 2 * 8 * 50 * 4
    scores.logprobs.sum().backward()
    del scores
    assert trace.size("logits") == 0
    assert weight.grad.shape == weight.shape
    with torch.no_grad():
        start = trace.now()
        token_scores(hidden, tokens, mask, LMHead(weight))
    # nothing is kept: one tile of all rows and columns
    assert trace.peak(start, trace.now()).parts["scratch"] == 2 * 8 * 50 * 4
    assert trace.kernel_calls == 2


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_of_a_divergence_the_logits_of_both_models_are_counted(trace, mixture):
    hidden, weight = torch.empty(2, 9, 4, requires_grad=True), torch.empty(50, 4, requires_grad=True)
    ref, mask = torch.empty(2, 9, 6), torch.ones(2, 9, dtype=torch.bool)
    apart = token_divergence(hidden, ref, mask, LMHead(weight), LMHead(torch.empty(50, 6)), mixture=mixture)
    both = 2 * (2 * 8) * 50 * 4
    assert trace.peak(0, trace.now()).parts["scratch"] == both
    start = trace.now()
    apart.sum().backward()
    assert trace.peak(start, trace.now()).parts["scratch"] == both


@pytest.mark.parametrize("trained", [True, False])
def test_the_head_casts_under_autocast_on_a_gpu(trained):
    hidden, weight = torch.empty(2, 9, 4, requires_grad=True), torch.empty(50, 4, requires_grad=trained)
    tokens, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool)
    casts, tile = 2 * (2 * 8 * 4 + 50 * 4), 2 * 8 * 50 * 4
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTrace("cuda", autocast=True) as trace:
        scores = token_scores(hidden, tokens, mask, LMHead(weight))
        assert trace.peak(0, trace.now()).parts["scratch"] == casts  # all logits are kept
        start = trace.now()
        scores.logprobs.sum().backward()
        # sums of 16 rows, the tile in 16 bits and the weight's gradient in 32
        expected = casts + 16 * 4 * 4 + tile // 2 + (50 * 4 * 4 if trained else 0)
        assert trace.peak(start, trace.now()).parts["scratch"] == expected
        with torch.no_grad():
            start = trace.now()
            token_scores(hidden, tokens, mask, LMHead(weight))
        assert trace.peak(start, trace.now()).parts["scratch"] == casts + tile
