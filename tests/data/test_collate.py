from dataclasses import replace

import numpy as np
import torch

from rlhf_lightning.data.collate import collate_packed, collate_prompts, collate_tokens
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.items import (
    Collator,
    PairItem,
    RankedItem,
    ScoredItem,
    StepItem,
    UnpairedItem,
    compact,
    with_reference,
)

A = Encoded([11, 12, 13], [False, True, True])
B = Encoded([21, 22], [True, True])


def test_padding_on_either_side():
    right, left = (collate_tokens([A, B], pad_id=0, padding_side=side) for side in ("right", "left"))
    assert right.tokens.tolist() == [[11, 12, 13], [21, 22, 0]]
    assert right.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert right.mask.tolist() == [[False, True, True], [False, True, False]]
    assert left.tokens.tolist() == [[11, 12, 13], [0, 21, 22]]
    assert left.positions.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert left.mask.tolist() == [[False, True, True], [False, False, True]]
    # real tokens in reading order have the same ids, positions and masks on both sides
    for name in ("tokens", "positions", "mask"):
        assert torch.equal(getattr(right, name)[right.attention_mask], getattr(left, name)[left.attention_mask])


def test_what_the_reference_said_stands_at_its_tokens():
    measured = [replace(A, ref_logprobs=np.float32([-1, -2])), replace(B, ref_logprobs=np.float32([-3]))]
    right, left = (collate_tokens(measured, pad_id=0, padding_side=side).ref_logprobs for side in ("right", "left"))
    assert right.tolist() == [[0, -1, -2], [0, -3, 0]]
    assert left.tolist() == [[0, -1, -2], [0, 0, -3]]
    assert collate_tokens([measured[0], B], pad_id=0).ref_logprobs is None
    pair = with_reference(PairItem(A, B, 0.5), [measured[0].ref_logprobs, measured[1].ref_logprobs])
    batch = Collator("pairs", pad_id=0)([pair])
    assert (batch.chosen.ref_logprobs.tolist(), batch.rejected.ref_logprobs.tolist()) == ([[0, -1, -2]], [[0, -3]])
    ranking = with_reference(RankedItem([A, B], [2, 1]), [measured[0].ref_logprobs, measured[1].ref_logprobs])
    assert [row.ref_logprobs.tolist() for row in ranking.rows()] == [[-1, -2], [-3]]


def test_padding_is_not_recognised_by_its_id():
    batch = collate_tokens([Encoded([0, 5, 0], [False, True, True]), Encoded([0], [True])], pad_id=0)
    assert batch.attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.mask.tolist() == [[False, True, True], [False, False, False]]


def test_rows_are_rounded_up():
    assert collate_tokens([A], 0, multiple_of=8).tokens.shape == (1, 8)


def test_packed_rows_number_their_records_and_count_positions_anew():
    batch = collate_packed([[A, B], [B]], pad_id=0)
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22], [21, 22, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, True, True, False, True], [False, True, False, False, False]]
    assert batch.attention_mask.tolist() == (batch.segments > 0).tolist()
    assert batch.num_sequences == 3


def test_prompts_end_at_the_same_index():
    batch = collate_prompts([[1, 2, 3], [4]], ["abc", "d"], [{"k": 1}, {"k": 2}], [7, 9], pad_id=0)
    assert batch.tokens.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch.attention_mask.tolist() == [[True, True, True], [False, False, True]]
    assert (batch.indices.tolist(), batch.records[1]) == ([7, 9], {"k": 2})


def test_pairs_keep_their_rows_and_margins():
    items = [PairItem(compact(A), compact(B), None), PairItem(compact(B), compact(A), 0.5)]
    batch = Collator("pairs", pad_id=0)(items)
    assert batch.chosen.tokens.tolist() == [[11, 12, 13], [21, 22, 0]]
    assert batch.rejected.tokens.tolist() == [[21, 22, 0], [11, 12, 13]]
    assert batch.margins.tolist() == [0.0, 0.5]
    assert Collator("pairs", pad_id=0)(items[:1]).margins is None


def test_ranked_rated_unpaired():
    ranked = Collator("ranked", 0)([RankedItem([A, B], [2, 1]), RankedItem([B, A, A], [1, 2, 2])])
    assert ranked.groups.tolist() == [0, 0, 1, 1, 1]
    assert ranked.ranks.tolist() == [2, 1, 1, 2, 2]
    assert ranked.completions.tokens[:, 0].tolist() == [11, 21, 21, 11, 11]
    rated = Collator("rated", 0)([ScoredItem(A, 3.5), ScoredItem(B, -1.0)])
    assert rated.ratings.tolist() == [3.5, -1.0]
    unpaired = Collator("unpaired", 0)([UnpairedItem(A, True), UnpairedItem(B, False)])
    assert unpaired.labels.tolist() == [True, False]


def test_step_labels_stand_at_the_last_token_of_their_steps():
    items = [
        StepItem(Encoded([1, 2, 3, 4], [False, True, False, True]), [1.0, 0.0]),
        StepItem(Encoded([1, 2], [False, True]), [0.5]),
    ]
    for side, expected in (
        ("right", [[0, 1.0, 0, 0.0], [0, 0.5, 0, 0]]),
        ("left", [[0, 1.0, 0, 0.0], [0, 0, 0, 0.5]]),
    ):
        batch = Collator("steps", 0, padding_side=side)(items)
        assert batch.step_labels.tolist() == expected
        assert batch.counts() == {"steps": 3.0}
