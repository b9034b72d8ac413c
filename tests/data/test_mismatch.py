import numpy as np
import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.items import UnpairedItem
from rlhf_lightning.data.mismatch import with_mismatched
from rlhf_lightning.data.truncation import LengthRule

RULE = LengthRule(max_length=64)


def item(prompt, completion, desirable=True):
    return UnpairedItem(Encoded([*prompt, *completion], [*[False] * len(prompt), *[True] * len(completion)]), desirable)


def pairs(items, rule=RULE):
    """(own row, mismatched row) of every item, as tuples of ids."""
    made = with_mismatched(items, rule, 1, "train")
    return {tuple(i.encoded.ids): tuple(np.asarray(i.mismatched.ids).tolist()) for i in made}


ITEMS = [item([1, 10 + i], [20 + i, 30 + i, 2]) for i in range(6)]


def test_every_prompt_gets_a_completion_of_another_prompt_and_every_completion_serves_once():
    found = pairs(ITEMS)
    prompts = [row[:2] for row in found.values()]
    completions = [row[2:] for row in found.values()]
    assert prompts == [tuple(i.encoded.ids[:2]) for i in ITEMS]
    assert sorted(completions) == sorted(tuple(i.encoded.ids[2:]) for i in ITEMS)
    assert all(own[2:] != other[2:] for own, other in found.items())


def test_who_is_paired_with_whom_does_not_depend_on_the_order_of_the_records():
    assert pairs(ITEMS) == pairs(ITEMS[::-1]) == pairs(ITEMS[3:] + ITEMS[:3])


def test_answers_to_the_same_prompt_are_no_mismatch():
    items = [item([1, 10], [20 + i, 2]) for i in range(9)] + [item([1, 11], [40, 2])]
    found = pairs(items)
    assert all(found[1, 10, 20 + i, 2] == (1, 10, 40, 2) for i in range(9))
    assert found[1, 11, 40, 2][:2] == (1, 11)
    assert found[1, 11, 40, 2][2] in range(20, 29)


def test_the_mask_is_that_of_the_other_completion():
    two_turns = UnpairedItem(Encoded([1, 5, 6, 7, 8], [False, True, False, False, True]), True)
    made = with_mismatched([two_turns, item([1, 9, 9], [4, 2])], RULE, 1, "train")
    assert list(made[1].mismatched.ids) == [1, 9, 9, 5, 6, 7, 8]
    assert list(made[1].mismatched.mask) == [False] * 3 + [True, False, False, True]
    assert list(made[0].mismatched.ids) == [1, 4, 2]


def test_a_row_that_the_other_completion_makes_too_long_is_cut_by_the_same_rule():
    items = [item([1, 10, 11, 12], [20, 2]), item([1, 13], [30, 31, 32, 2])]
    by_default = pairs(items, LengthRule(max_length=6))
    assert by_default[1, 10, 11, 12, 20, 2] == (1, 12, 30, 31, 32, 2)  # the prompt's beginning goes, its BOS stays
    from_the_end = pairs(items, LengthRule(max_length=6, cut_first="completion"))
    assert from_the_end[1, 10, 11, 12, 20, 2] == (1, 10, 11, 12, 30, 31)


@pytest.mark.parametrize("items", [ITEMS[:1], [item([1, 10], [20 + i]) for i in range(3)]])
def test_one_prompt_has_no_mismatch(items):
    with pytest.raises(UserError, match=rf"train: its {len(items)} records share one prompt.*or a loss without a KL"):
        with_mismatched(items, RULE, 1, "train")


def test_batches_carry_the_mismatched_rows_only_where_they_are_asked_for(tiny_tokenizer, write_jsonl):
    records = [{"prompt": word, "completion": "was good", "label": True} for word in ("film", "plot", "end")]
    path = write_jsonl("labels.jsonl", records)
    load = lambda kind: RLHFDataModule(path, batch_size=3).setup_for(kind, str(tiny_tokenizer)).train_dataloader()  # noqa: E731
    [plain], [both] = list(load("unpaired")), list(load("mismatched"))
    assert plain.mismatched is None
    assert both.mismatched.tokens.shape == both.completions.tokens.shape
    assert both.counts() == {"sequences": 3.0, "desirable": 3.0}
    budget = RLHFDataModule(path, tokens_per_batch=12).setup_for("mismatched", str(tiny_tokenizer)).train_dataloader()
    assert [batch.labels.numel() for batch in budget] == [1, 1, 1]  # 5 tokens a row, two rows a record
