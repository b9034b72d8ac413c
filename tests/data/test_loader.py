"""Order, shards and resumption of the loader; items are numbers here, and a batch is the list of them."""

from itertools import chain, islice

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.loader import EpochSampler, Plan, ResumableLoader


def as_list(batch):
    return batch


def flat(batches):
    return list(chain.from_iterable(batches))


def make_loader(counts=(10,), weights=(1.0,), batch_size=3, ranks=1, rank=0, num_workers=0, **plan):
    items = list(range(sum(counts)))
    plan = Plan(counts=tuple(counts), weights=tuple(weights), batch_size=batch_size, **plan)
    return ResumableLoader(items, EpochSampler(plan, ranks, rank), as_list, num_workers=num_workers)


def resumed(loader, **options):
    fresh = make_loader(**options)
    fresh.load_state_dict(loader.state_dict())
    return fresh


def test_an_epoch_has_every_item_once_and_its_own_order():
    loader = make_loader()
    first, second = list(loader), list(loader)  # a finished epoch leads to the next
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(10))
    assert first != second
    loader.set_epoch(0)
    assert list(loader) == first, "the order is a function of seed and epoch"
    assert list(make_loader(seed=1)) != first
    assert next(iter(make_loader(shuffle=False))) == [0, 1, 2]


def test_drop_last():
    assert [len(batch) for batch in make_loader(drop_last=True)] == [3, 3, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("used", [0, 1, 3])
def test_resume_gives_exactly_the_remaining_batches(used, num_workers):
    whole = make_loader()
    whole.set_epoch(4)
    expected = list(whole)
    loader = make_loader(num_workers=num_workers)
    loader.set_epoch(4)
    batches = iter(loader)
    taken = list(islice(batches, used))
    fresh = resumed(loader, num_workers=num_workers)
    fresh.set_epoch(4)  # as the trainer does before it iterates
    assert len(fresh) == 4
    assert taken + list(fresh) == expected
    fresh.set_epoch(4)
    assert list(fresh) == expected, "the next pass over the same epoch is whole"


def test_an_iterator_that_nobody_uses_changes_nothing():
    loader = make_loader()
    next(iter(loader))
    fresh = resumed(loader)
    iter(fresh)
    assert fresh.state_dict() == loader.state_dict()
    assert len(list(fresh)) == 3


def test_a_restored_position_holds_for_one_pass():
    loader = make_loader()
    next(iter(loader))
    fresh = resumed(loader)
    assert len(list(islice(fresh, 2))) == 2
    assert list(fresh) == list(make_loader())


def test_saved_behind_the_last_batch_means_the_next_epoch():
    loader = make_loader()
    batches = iter(loader)
    list(islice(batches, 4))  # not exhausted: a trainer stops at the length
    fresh = resumed(loader)
    assert fresh.state_dict() == {"epoch": 1, "batches": 0, "length": 4}
    whole = make_loader()
    whole.set_epoch(1)
    assert list(fresh) == list(whole)


def test_a_second_resume_in_the_same_epoch():
    expected = list(make_loader())
    first = make_loader()
    next(iter(first))
    second = resumed(first)
    next(iter(second))
    assert list(resumed(second)) == expected[2:]


def test_another_length_in_the_middle_of_an_epoch_is_refused():
    loader = make_loader()
    next(iter(loader))
    with pytest.raises(UserError, match="had 4 batches \\(of which 1 were used\\) and has 5 now"):
        resumed(loader, batch_size=2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_an_epoch_without_overlap(ranks):
    loaders = [make_loader(counts=(12,), batch_size=6 // ranks, ranks=ranks, rank=rank) for rank in range(ranks)]
    steps = [sorted(flat(parts)) for parts in zip(*loaders, strict=True)]
    alone = [sorted(batch) for batch in make_loader(counts=(12,), batch_size=6)]
    assert steps == alone, "a step sees the same records however many ranks share it"


def test_ranks_get_equally_many_batches():
    parts = [list(make_loader(counts=(5,), batch_size=2, ranks=4, rank=rank)) for rank in range(4)]
    assert {len(part) for part in parts} == {1}
    assert sorted({i for part in parts for batch in part for i in batch}) == list(range(5))


def test_weights_repeat_and_draw():
    loader = make_loader(counts=(4, 6), weights=(2.0, 0.5), batch_size=1)
    first, second = (sorted(flat(loader)) for _ in range(2))
    for epoch in (first, second):
        assert [epoch.count(i) for i in range(4)] == [2] * 4
        assert len([i for i in epoch if i >= 4]) == 3
    assert len(loader) == 11


def test_packed_rows_stay_together():
    widths = (4, 7, 2, 6, 3)
    loader = make_loader(counts=(5,), batch_size=2, widths=widths, rows=(1,) * 5, pack_length=10)
    assert sorted(row for batch in loader for row in batch) == [[1, 4], [2], [3, 0]]
    assert len(loader) == 2


def test_token_budget():
    widths = (10, 9, 3, 3, 2)
    loader = make_loader(counts=(5,), batch_size=1, widths=widths, rows=(1,) * 5, tokens_per_batch=20)
    for _ in range(3):
        assert sorted(sorted(batch) for batch in loader) == [[0, 1], [2, 3, 4]]
