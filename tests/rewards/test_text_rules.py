import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards.text_rules import Keyword, LengthReward, Repetition, repetition


def said(*texts: str) -> list[Sample]:
    return [Sample("", text, tokens=tuple(range(len(text.split()) + 1))) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d", 0),
        ("loved to loved to loved", 1 - 2 / 4),
        ("No no NO no", 1 - 1 / 3),
        ("one", 0),
        ("", 0),
    ],
)
def test_repetition_by_hand(text, expected):
    assert repetition(text) == pytest.approx(expected)
    assert Repetition()(said(text)) == [pytest.approx(-expected)]


def test_repetition_of_single_words():
    assert Repetition(ngram=1)(said("a b a b")) == [-0.5]


def test_length_by_hand():
    samples = said("", "a b", "a b c d", "a b c d e f", "a b c d e f g h i")
    assert LengthReward(target=4, unit="words")(samples) == [0, 0.5, 1, 0.5, 0]
    assert LengthReward(target=4, unit="tokens")(samples) == [0.25, 0.75, 0.75, 0.25, 0]
    assert LengthReward(target=4, unit="characters")(samples[:2]) == [0, 0.75]


def test_keywords_are_whole_words_in_any_case():
    keyword = Keyword(wanted=["good", "C++"], unwanted=["bad idea"])
    samples = said("Good C++!", "ungood goodness", "good, a BAD idea", "bad ideas", "good good good")
    assert keyword(samples) == [1, 0, -0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Repetition, {"ngram": 0}, "ngram=0"),
        (LengthReward, {"target": 0}, "target=0"),
        (LengthReward, {"unit": "pages"}, "unit='pages'"),
        (Keyword, {}, "nothing to look for"),
        (Keyword, {"wanted": ["a", " "]}, "empty word"),
    ],
)
def test_impossible_settings_are_named(make, arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)
