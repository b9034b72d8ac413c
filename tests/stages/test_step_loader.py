"""Batches grouped into steps: totals, limits, and going on exactly where it was stopped."""

from itertools import islice

import pytest
import torch

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.stages.step_loader import StepLoader


def batch(tokens: int) -> TokenBatch:
    """One row with so many trained tokens."""
    row = torch.full((1, tokens + 1), tokens)
    mask = torch.ones_like(row, dtype=torch.bool)
    mask[:, 0] = False
    return TokenBatch(row, torch.ones_like(mask), mask, torch.arange(tokens + 1)[None])


def ids(batches):
    return [int(b.tokens[0, 0]) for b in batches]


def totals(batches):
    return [b.totals["tokens"] for b in batches]


SIZES = [3, 1, 4, 1, 5, 9, 2]


def test_each_batch_knows_the_tokens_of_its_whole_step():
    assert totals(StepLoader([batch(n) for n in SIZES], accumulate=3)) == [8, 8, 8, 15, 15, 15, 2]


def test_a_limited_epoch_ends_in_a_short_step():
    limited = StepLoader([batch(n) for n in SIZES], accumulate=3, limit=lambda: 4)
    assert totals(limited) == [8, 8, 8, 1]


def test_totals_are_added_over_ranks():
    doubled = StepLoader([batch(2)], add_over_ranks=lambda vector: 2 * vector)
    assert next(iter(doubled)).totals == {"sequences": 2.0, "tokens": 4.0}


class Stateful(list):
    """A loader that can say and be told where it stands, and counts what it read."""

    position = 0
    reads = 0

    def __iter__(self):
        while self.position < len(self):
            self.position += 1
            self.reads += 1
            yield self[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("kind", [list, Stateful])
@pytest.mark.parametrize("stop_after", range(1, 8))
def test_resumes_with_the_batches_and_totals_that_were_left(kind, stop_after):
    whole = list(StepLoader(kind(batch(n) for n in SIZES), accumulate=3))
    broken = StepLoader(kind(batch(n) for n in SIZES), accumulate=3)
    list(islice(iter(broken), stop_after))
    inner = kind(batch(n) for n in SIZES)
    resumed = StepLoader(inner, accumulate=3)
    resumed.restore(broken.progress())
    left = list(resumed)
    if stop_after == len(SIZES):  # the epoch was over: the next one begins
        assert ids(left) == SIZES
        return
    assert ids(left) == SIZES[stop_after:]
    assert totals(left) == totals(whole)[stop_after:]
    if kind is Stateful and stop_after >= 3:
        assert inner.reads < len(SIZES), "a loader with a state need not read again what was done"


@pytest.mark.parametrize("kind", [list, Stateful])
@pytest.mark.parametrize("sizes", [SIZES[:2], SIZES + SIZES])
def test_an_epoch_that_is_cut_otherwise_is_not_resumed_in_its_middle(kind, sizes):
    broken = StepLoader(kind(batch(n) for n in SIZES), accumulate=3)
    list(islice(iter(broken), 4))
    other = StepLoader(kind(batch(n) for n in sizes), accumulate=3)
    with pytest.raises(UserError, match=rf"it had {len(SIZES)} batches \(of which 4 were used\) and has {len(sizes)}"):
        other.restore(broken.progress())
    whole = StepLoader(kind(batch(n) for n in SIZES))
    list(whole)
    other.restore(whole.progress())  # at its end nothing of it is left
    assert ids(other) == sizes
