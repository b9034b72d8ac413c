import random

import pytest

from rlhf_lightning.quickstart.grammar import Grammar

TOY = Grammar.from_text(
    """
    Sentence -> "it was" Judgement | "it was" Judgement "and" Judgement :mean   # two shapes
    Judgement -> 3 Adjective | Degree Adjective :boost |
                 "not" Adjective :flip
    Degree -> "very" | "so very"
    Adjective -> good=0.5 | awful=-1 | long=0
    """
)


@pytest.mark.parametrize(
    ("sentence", "value"),
    [
        ("it was good", 0.5),
        ("it was very good", 0.7),  # 1.4 * 0.5
        ("it was so very awful", -1.0),  # clipped
        ("it was not awful", 0.75),
        ("it was good and awful", -0.25),
        ("it was good and long", 0.5),  # what says nothing is not averaged in
        ("it was not very good", None),
        ("it was", None),
        ("it was good good", None),
        ("was it good", None),
        ("", None),
    ],
)
def test_a_sentence_means_what_its_rules_compose(sentence, value):
    assert TOY.parse("Sentence", sentence.split()) == (None if value is None else pytest.approx(value))


def test_what_is_drawn_is_read_back_with_the_same_meaning():
    rng = random.Random(1)
    for _ in range(200):
        words, value = TOY.sample("Sentence", rng)
        assert TOY.parse("Sentence", words) == pytest.approx(value)


def test_weights_are_weights():
    rng = random.Random(1)
    plain = sum(len(TOY.sample("Judgement", rng)[0]) == 1 for _ in range(2000))
    assert plain / 2000 == pytest.approx(3 / 5, abs=0.05)


def test_words_are_the_leaves():
    assert TOY.words == {"it", "was", "and", "not", "very", "so", "good", "awful", "long"}
