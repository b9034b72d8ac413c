"""The rollout loader: sizes, totals, order, and going on exactly where it was stopped."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.core.batches import PromptBatch, Rollouts, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rollout.loader import RolloutLoader, UpdateSpec


def prompts(num: int) -> PromptBatch:
    ones = torch.ones(num, 1, dtype=torch.long)
    return PromptBatch(ones, ones.bool(), [""] * num, [{}] * num, torch.arange(num))


class Answers:
    """Collects rollouts whose row r of rollout n is n * 100 + r, with r + 1 answer tokens."""

    def __init__(self) -> None:
        self.collected = 0

    def collect(self, draw) -> Rollouts:
        rows = draw().tokens.shape[0]
        self.collected += 1
        scores = torch.arange(rows).float() + 100 * self.collected
        mask = torch.arange(rows)[None] <= torch.arange(rows)[:, None]
        zeros = torch.zeros(rows, rows)
        names = ("old_logprobs", "ref_logprobs", "rewards", "advantages", "values", "returns")
        return Rollouts(
            tokens=zeros.long(),
            attention_mask=mask,
            mask=mask,
            positions=zeros.long(),
            finished=scores > 0,
            scores=scores,
            groups=torch.arange(rows),
            **dict.fromkeys(names, zeros),
        )


def loader(source: Answers, sizes=(4, 4), **options) -> RolloutLoader:
    updates = UpdateSpec(inner_epochs=2, num_minibatches=2)
    return RolloutLoader([prompts(n) for n in sizes], source, updates, accumulate=2, seed=1, **options)


def test_every_rollout_is_trained_on_once_per_inner_epoch():
    batches = list(loader(Answers()))
    assert len(batches) == len(loader(Answers())) == 2 * 2 * 2 * 2
    first_epoch = torch.cat([b.scores for b in batches[:4]]).sort().values
    assert first_epoch.tolist() == [100, 101, 102, 103]


def test_unshuffled_minibatches_are_in_the_order_of_the_prompts():
    updates = UpdateSpec(inner_epochs=2, num_minibatches=2, shuffle=False)
    batches = list(RolloutLoader([prompts(5)], Answers(), updates, accumulate=1, seed=1))
    assert [batch.scores.tolist() for batch in batches] == [[100, 101, 102], [103, 104]] * 2


def test_totals_are_those_of_the_optimiser_step_not_of_the_micro_batch():
    batches = list(loader(Answers()))
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        tokens = float(one.mask.sum() + other.mask.sum())
        assert one.totals == other.totals == {"tokens": tokens, "sequences": 2.0}


def test_collects_only_when_the_rollouts_are_needed():
    source = Answers()
    iterator = iter(loader(source))
    assert source.collected == 0
    list(islice(iterator, 8))
    assert source.collected == 1
    next(iterator)
    assert source.collected == 2


def test_resumes_inside_a_buffer_with_the_batches_that_were_left():
    for stop_after in range(1, 16):
        whole = [b.scores.tolist() for b in loader(Answers())]
        broken = loader(Answers())
        begun = [b.scores.tolist() for b in islice(iter(broken), stop_after)]
        source = Answers()
        source.collected = broken.rollouts
        resumed = loader(source)
        resumed.restore(broken.progress())
        assert begun + [b.scores.tolist() for b in resumed] == whole


def test_a_state_saved_at_the_end_of_an_epoch_begins_the_next_one():
    ended = loader(Answers())
    list(islice(iter(ended), len(ended)))
    resumed = loader(Answers())
    resumed.restore(ended.progress())
    assert len(list(resumed)) == len(resumed)


CUTS = {
    "updates.inner_epochs was 2 and is 3 now": {"updates": UpdateSpec(3, 2)},
    "updates.num_minibatches was 2 and is 1 now": {"updates": UpdateSpec(2, 1)},
    "updates.shuffle was True and is False now": {"updates": UpdateSpec(2, 2, shuffle=False)},
    "trainer.accumulate_grad_batches was 2 and is 4 now": {"accumulate": 4},
    "batches of prompts per epoch was 2 and is 3 now": {"sizes": (4, 4, 4)},
    "data.batch_size was 4 and is 5 now": {"batch_size": 5},
}


def cut(updates=UpdateSpec(2, 2), accumulate=2, sizes=(4, 4), batch_size=4) -> RolloutLoader:
    class Prompts(list):
        sampler = SimpleNamespace(plan=SimpleNamespace(batch_size=batch_size))

    return RolloutLoader(Prompts(map(prompts, sizes)), Answers(), updates, accumulate=accumulate, seed=1)


@pytest.mark.parametrize("used", [3, 8], ids=["inside a rollout", "between two"])
@pytest.mark.parametrize("said", CUTS)
def test_an_epoch_that_is_cut_otherwise_is_not_resumed_in_its_middle(said, used):
    broken = cut()
    list(islice(iter(broken), used))
    with pytest.raises(UserError, match=rf"{used} of its 16 micro-batches were used\) that is cut otherwise: {said}\."):
        cut(**CUTS[said]).restore(broken.progress())
    cut().restore(broken.progress())


@pytest.mark.parametrize("said", CUTS)
def test_behind_an_epoch_the_next_one_may_be_cut_otherwise(said):
    ended = cut()
    list(islice(iter(ended), 16))
    resumed = cut(**CUTS[said])
    resumed.restore(ended.progress())
    assert len(list(resumed)) == len(resumed)
    first = resumed.drawn - len(resumed.prompts)
    assert first >= ended.drawn, "no seed is used twice"
    assert first % len(resumed.prompts) == 0, "and the data begin anew"


def test_before_the_first_batch_anything_may_change():
    for options in CUTS.values():
        resumed = cut(**options)
        resumed.restore(cut().progress())
        assert len(list(resumed)) == len(resumed)


def test_a_checkpoint_of_a_version_that_did_not_say_how_it_was_cut_is_taken_at_its_word():
    broken = cut()
    list(islice(iter(broken), 3))
    progress = broken.progress()
    del progress["cut"], progress["batches"]
    resumed = cut()
    resumed.restore(progress)
    assert len(list(resumed)) == 13


def test_an_epoch_that_was_limited_inside_a_rollout_is_over():
    ended = loader(Answers(), limit=lambda: 3)
    list(islice(iter(ended), 3))
    resumed = loader(Answers(), limit=lambda: 3)
    resumed.restore(ended.progress())
    assert len(list(resumed)) == 3, "the next epoch begins, and is limited too"


def test_fewer_sequences_than_pieces_gives_shares_in_which_nothing_counts():
    batches = list(loader(Answers(), sizes=(3,)))
    assert len(batches) == 8
    empty = [b for b in batches if not b.mask.any()]
    assert len(empty) == 2
    assert sum(float(b.mask.sum()) for b in batches[:4]) == 1 + 2 + 3


def test_the_second_source_goes_round_and_resumes_at_its_place():
    def extra() -> list[TokenBatch]:
        def batch(n: int) -> TokenBatch:
            tokens = torch.full((1, 2), n)
            return TokenBatch(tokens, tokens > -1, torch.tensor([[False, True]]), torch.tensor([[0, 1]]))

        return [batch(n) for n in range(3)]

    whole = [int(b.extra.tokens[0, 0]) for b in loader(Answers(), extra=extra())]
    assert whole == [n % 3 for n in range(16)]
    broken = loader(Answers(), extra=extra())
    list(islice(iter(broken), 7))
    resumed = loader(Answers(), extra=extra())
    resumed.restore(broken.progress())
    assert [int(b.extra.tokens[0, 0]) for b in resumed] == whole[7:]


def test_a_step_cut_short_by_the_limit_has_the_totals_of_what_is_left_of_it():
    *_, last = list(loader(Answers(), limit=lambda: 11))
    assert last.totals["tokens"] == float(last.mask.sum())
    assert len(list(loader(Answers(), limit=lambda: 11))) == 11


def test_prompts_are_drawn_in_order_round_after_round():
    class Greedy(Answers):
        """Draws two batches for each of its rollouts."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def collect(self, draw) -> Rollouts:
            drawn = [draw() for _ in range(2)]
            self.seen += [int(batch.indices[0]) for batch in drawn]
            return super().collect(lambda: drawn[0])

    def numbered() -> list[PromptBatch]:
        return [replace(prompts(2), indices=torch.tensor([n, n])) for n in range(3)]

    def run(source, **progress):
        made = RolloutLoader(numbered(), source, UpdateSpec(inner_epochs=1), seed=1)
        if progress:
            made.restore(progress)
        return made, len(list(made))

    source = Greedy()
    first, steps = run(source)
    assert steps == 3, "an epoch is as many rollouts as there are batches of prompts"
    assert source.seen == [0, 1, 2, 0, 1, 2]
    run(source, **first.progress())
    assert source.seen == [0, 1, 2, 0, 1, 2] * 2
