from dataclasses import FrozenInstanceError

import pytest
import torch
from jaxtyping import TypeCheckError

from rlhf_lightning.core.batches import (
    Batch,
    Generated,
    PairBatch,
    PairRollouts,
    PromptBatch,
    RankedBatch,
    RatedBatch,
    Rollouts,
    StepBatch,
    TokenBatch,
    UnpairedBatch,
    concatenate_rows,
)


def token_batch(mask: list[list[int]], segments: list[list[int]] | None = None) -> TokenBatch:
    counts = torch.tensor(mask, dtype=torch.bool)
    tokens = torch.arange(counts.numel()).view(counts.shape)
    return TokenBatch(
        tokens=tokens,
        attention_mask=torch.ones_like(counts),
        mask=counts,
        positions=torch.arange(counts.shape[1]).expand_as(tokens),
        segments=None if segments is None else torch.tensor(segments),
    )


def rollouts(rows: int = 3, time: int = 4, extra: TokenBatch | None = None) -> Rollouts:
    numbers = torch.arange(rows * time, dtype=torch.float32).view(rows, time)
    mask = numbers % time >= 2
    return Rollouts(
        tokens=numbers.long(),
        attention_mask=torch.ones_like(mask),
        mask=mask,
        positions=numbers.long() % time,
        finished=torch.ones(rows, dtype=torch.bool),
        scores=torch.arange(float(rows)),
        old_logprobs=-numbers,
        ref_logprobs=-numbers - 1,
        rewards=numbers + 1,
        advantages=numbers + 2,
        values=numbers + 3,
        returns=numbers + 4,
        groups=torch.arange(rows),
        extra=extra,
    )


def pair_rollouts() -> PairRollouts:
    """Three pairs, of which one only fills a place."""
    mask = torch.tensor([[[0, 1, 1], [0, 1, 0]], [[0, 0, 1], [0, 1, 1]], [[1, 1, 1], [1, 1, 1]]]).bool()
    tokens = torch.arange(18).view(3, 2, 3)
    return PairRollouts(
        tokens=tokens,
        attention_mask=torch.ones_like(mask),
        mask=mask,
        positions=tokens % 3,
        margins=torch.tensor([0.5, 2.0, 1.0]),
        own=torch.tensor([[True, False]] * 3),
        counts_in_loss=torch.tensor([True, True, False]),
    )


PAIR = token_batch([[0, 1, 1], [0, 0, 1]])
EVERY_BATCH = [
    (PAIR, {"tokens": 3, "sequences": 2}),
    (PairBatch(chosen=PAIR, rejected=PAIR, margins=torch.ones(2)), {"pairs": 2, "chosen_tokens": 3}),
    (RankedBatch(completions=PAIR, groups=torch.tensor([0, 0]), ranks=torch.tensor([1.0, 2.0])), {"prompts": 1}),
    (RatedBatch(completions=PAIR, ratings=torch.zeros(2)), {"sequences": 2}),
    (UnpairedBatch(completions=PAIR, labels=torch.tensor([True, False])), {"sequences": 2, "desirable": 1}),
    (StepBatch(completions=PAIR, step_labels=torch.zeros(2, 3)), {"steps": 3}),
    (
        PromptBatch(
            tokens=PAIR.tokens, attention_mask=PAIR.mask, texts=["a", "b"], records=[{}, {}], indices=torch.arange(2)
        ),
        {"sequences": 2},
    ),
    (
        Generated(
            tokens=PAIR.tokens,
            attention_mask=PAIR.attention_mask,
            mask=PAIR.mask,
            positions=PAIR.positions,
            finished=torch.tensor([True, False]),
        ),
        {"tokens": 3, "sequences": 2},
    ),
    (rollouts(), {"tokens": 6, "sequences": 3}),
    (pair_rollouts(), {"pairs": 2, "chosen_tokens": 3}),
    (rollouts(extra=PAIR), {"tokens": 6, "sequences": 3, "extra_tokens": 3}),
]


@pytest.mark.parametrize(("batch", "counts"), EVERY_BATCH, ids=lambda x: type(x).__name__)
def test_counts_by_hand(batch, counts):
    assert batch.counts() == counts
    assert batch.total(next(iter(counts))) == next(iter(counts.values()))


def tensors(batch: Batch) -> list[torch.Tensor]:
    found = []
    for value in vars(batch).values():
        found += [value] if isinstance(value, torch.Tensor) else tensors(value) if isinstance(value, Batch) else []
    return found


@pytest.mark.parametrize("batch", [b for b, _ in EVERY_BATCH], ids=lambda b: type(b).__name__)
def test_to_moves_every_tensor_and_keeps_the_rest(batch):
    moved = batch.with_totals({"tokens": 7.0}).to("meta")
    assert tensors(batch)
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert {t.device.type for t in tensors(batch)} == {"cpu"}
    assert moved.totals == {"tokens": 7.0}
    assert type(moved) is type(batch)


def test_the_first_token_of_a_row_is_never_counted_because_nothing_predicts_it():
    assert token_batch([[1, 1, 1]]).counts()["tokens"] == 2


def test_packed_rows_hold_several_sequences():
    packed = token_batch([[0, 1, 0, 1, 1], [0, 1, 1, 1, 0]], segments=[[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
    assert packed.num_sequences == 3
    assert packed.counts() == {"tokens": 6, "sequences": 3}


def test_totals_of_the_step_replace_the_batchs_own():
    assert PAIR.with_totals({"tokens": 12.0}).total("tokens") == 12
    assert PAIR.total("tokens") == 3


def test_a_denominator_is_never_zero():
    assert token_batch([[0, 0, 0]]).total("tokens") == 1


def test_select_picks_rows_of_every_tensor_and_keeps_the_extra_batch_whole():
    picked = rollouts(extra=PAIR).select(torch.tensor([2, 0]))
    assert picked.scores.tolist() == [2, 0]
    assert picked.tokens.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert picked.returns.tolist() == [[12, 13, 14, 15], [4, 5, 6, 7]]
    assert picked.extra is PAIR
    assert all(t.shape[0] == 2 for t in tensors(picked))


def test_batches_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        PAIR.tokens = PAIR.tokens


def test_a_field_of_another_shape_is_refused():
    with pytest.raises(TypeCheckError):
        TokenBatch(tokens=PAIR.tokens, attention_mask=PAIR.mask, mask=PAIR.mask[:1], positions=PAIR.positions)


def test_rows_of_several_widths_are_joined_behind_padding():
    def answers(width, kept=None):
        ids = torch.full((2, width), width)
        return Generated(ids, ids > 0, ids > 0, ids, torch.tensor([True, False]), kept=kept)

    joined = concatenate_rows([answers(2), answers(3)], pad_id=9)
    assert joined.tokens.tolist() == [[2, 2, 9], [2, 2, 9], [3, 3, 3], [3, 3, 3]]
    assert joined.mask.sum(-1).tolist() == [2, 2, 3, 3]
    assert joined.finished.tolist() == [True, False, True, False]
    assert joined.kept is None
    assert joined.select(torch.tensor([2])).tokens.tolist() == [[3, 3, 3]]
    with pytest.raises(ValueError, match="kept is given in some of the parts and missing in others"):
        concatenate_rows([answers(2), answers(3, torch.zeros(2, 3, 1, dtype=torch.uint8))], pad_id=9)


def test_pairs_of_answers_are_cut_whole():
    pairs = pair_rollouts().select(torch.tensor([1]))
    assert pairs.counts() == {"pairs": 1, "chosen_tokens": 1}
    records = pairs.with_totals({"pairs": 5.0}).as_pairs()
    assert records.chosen.tokens.tolist() == [[6, 7, 8]]
    assert records.rejected.mask.tolist() == [[False, True, True]]
    assert (records.margins.tolist(), records.totals) == ([2.0], {"pairs": 5.0})
    nothing = pairs.without_loss()
    assert nothing.counts() == {"pairs": 0, "chosen_tokens": 0}
    assert torch.equal(nothing.mask, pairs.mask), "its loss stays finite"


@pytest.mark.parametrize("batch", [b for b, _ in EVERY_BATCH if b.num_units > 1], ids=lambda b: type(b).__name__)
def test_halves_add_up_to_the_whole(batch):
    first, second = batch.with_totals({"sequences": 9.0}).halves()
    assert first.totals == second.totals == {"sequences": 9.0}
    assert first.num_units == (batch.num_units + 1) // 2
    assert first.num_units + second.num_units == batch.num_units
    counts = {name: first.counts()[name] + value for name, value in second.counts().items()}
    assert counts == batch.counts()
    assert sorted(first.lengths + second.lengths) == sorted(batch.lengths)
    assert first.num_cells + second.num_cells == batch.num_cells


def test_rankings_are_parted_by_prompt():
    completions = token_batch([[0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 1]])
    batch = RankedBatch(completions, torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0]))
    first, second = batch.halves()
    assert first.groups.tolist() == [0, 0, 1, 1]
    assert second.groups.tolist() == [0]
    assert second.completions.tokens.tolist() == completions.tokens[4:].tolist()
    assert second.ranks.tolist() == [1.0]


def test_a_second_source_is_shared_out_with_the_rollouts():
    extra = token_batch([[0, 1, 1]])
    first, second = rollouts(rows=2, extra=extra).halves()
    # one of the two gets the row, the other one in which nothing counts: a step needs something to run on
    assert sorted(part.extra.counts()["tokens"] for part in (first, second)) == [0, 2]
    alone = rollouts(rows=1, extra=token_batch([[0, 1, 1], [0, 0, 1], [0, 1, 0]]))
    parts = [alone.part(i, i + 1) for i in range(3)]
    assert alone.num_units == 3
    assert sum(part.counts()["sequences"] for part in parts) == 1
    assert [part.extra.tokens.tolist() for part in parts] == [[row] for row in alone.extra.tokens.tolist()]


def test_prompts_are_parted_with_their_texts_and_records():
    prompts = PromptBatch(
        PAIR.tokens, PAIR.mask, texts=["a", "b"], records=[{"n": 0}, {"n": 1}], indices=torch.arange(2)
    )
    second = prompts.part(1, 2)
    assert (second.texts, second.records, second.indices.tolist()) == (["b"], [{"n": 1}], [1])
