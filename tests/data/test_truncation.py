import pytest

from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.truncation import LengthRule, cut_prompt, prompt_length_of

# BOS 0, prompt 1 2 3, completion 10 11 12
RECORD = Encoded([0, 1, 2, 3, 10, 11, 12], [False] * 4 + [True] * 3)


@pytest.mark.parametrize(
    ("rule", "ids"),
    [
        (LengthRule(7), [0, 1, 2, 3, 10, 11, 12]),
        (LengthRule(5), [0, 3, 10, 11, 12]),  # the prompt's beginning goes, BOS stays
        (LengthRule(4), [0, 10, 11, 12]),
        (LengthRule(3), [0, 10, 11]),  # then the completion's end
        (LengthRule(5, cut_first="completion"), [0, 1, 2, 3, 10]),
        (LengthRule(7, max_prompt_length=2), [0, 3, 10, 11, 12]),
        (LengthRule(4, max_prompt_length=3), [0, 10, 11, 12]),
        (LengthRule(4, max_prompt_length=3, cut_first="completion"), [0, 2, 3, 10]),
    ],
)
def test_what_is_cut_first(rule, ids):
    (cut,) = rule.cut([RECORD], prompt_length_of(RECORD), bos_length=1)
    assert cut.ids == ids
    assert cut.mask == [i >= 10 for i in ids]


def test_without_bos_one_prompt_token_stays():
    (cut,) = LengthRule(2).cut([RECORD], 4, bos_length=0)
    assert cut.ids == [3, 10]


def test_both_answers_lose_the_same_part_of_the_prompt():
    short = Encoded([0, 1, 2, 3, 20], [False] * 4 + [True])
    long, short = LengthRule(5).cut([RECORD, short], 4, bos_length=1)
    assert (long.ids, short.ids) == ([0, 3, 10, 11, 12], [0, 3, 20])


def test_a_text_is_cut_at_its_end_or_split():
    text = Encoded([0, 1, 2, 3, 4], [True] * 5)
    assert LengthRule(3).cut([text], 0, bos_length=1)[0].ids == [0, 1, 2]
    assert [piece.ids for piece in LengthRule(2).split(text)] == [[0, 1], [2, 3], [4]]


def test_a_prompt_keeps_its_end():
    assert cut_prompt([0, 1, 2, 3], limit=3, bos_length=1) == [0, 2, 3]
    assert cut_prompt([0, 1, 2, 3], limit=4, bos_length=1) == [0, 1, 2, 3]
