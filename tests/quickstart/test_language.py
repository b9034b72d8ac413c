import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.quickstart.language import (
    GRAMMAR,
    TOPICS,
    gold_score,
    is_grammatical,
    repetition,
    sample_review,
    sentiment,
    split_review,
    ungrammaticality,
)

seeds = st.integers(0, 2**63)


@given(seeds)
def test_every_review_drawn_is_grammatical_and_short(seed):
    review = sample_review(random.Random(seed))
    assert is_grammatical(review)
    assert ungrammaticality(review) == 0 == repetition(review)
    assert 8 <= len(review.split()) <= 30
    assert 2 <= review.count(".") <= 3
    assert -1 <= sentiment(review) <= 1
    assert gold_score(review) == sentiment(review)


@given(seeds)
def test_a_prompt_is_the_neutral_beginning_of_its_review(seed):
    rng = random.Random(seed)
    review = sample_review(rng)
    prompt, rest = split_review(review, rng)
    assert prompt + rest == review
    assert rest[0] in " .,"
    assert 2 <= len(prompt.split()) <= 5
    assert sentiment(prompt) == 0


@given(seeds)
def test_damaged_reviews_are_rejected(seed):
    rng = random.Random(seed)
    review = sample_review(rng)
    words = review.split()
    shuffled = rng.sample(words, len(words))
    if shuffled != words:
        assert not is_grammatical(" ".join(shuffled))
    at = rng.randrange(len(words))
    assert not is_grammatical(" ".join([*words[:at], words[at], *words[at:]]))  # a word twice
    assert not is_grammatical(review + " " + review)  # everything twice
    assert not is_grammatical(review[:-1])  # unfinished
    assert not is_grammatical(review.replace(" ", "  ", 1))  # bad spacing
    assert not is_grammatical(review[0].lower() + review[1:]) or review.startswith("I ")


def test_the_kind_of_thing_is_kept_to():
    assert is_grammatical("The film was good. The plot was good. I would watch it again.")
    assert not is_grammatical("The film was good. The battery was good. I would watch it again.")
    assert not is_grammatical("The film was good. The plot was good. I would buy it again.")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The film was good.", 0.5),
        ("The film was very good.", 0.7),
        ("The film was not very good.", -0.375),  # -0.75 * 0.5: no worse than "not good"
        ("The film was a little dull.", -0.25),
        ("The film was good and wonderful.", 0.7),  # mean of 0.5 and 0.9
        ("The film was good, while the plot was dull.", 0.0),
        ("My sister did not hate the film.", 0.675),
        ("The film was superb. It lasted about two hours.", 0.45),  # the mean over sentences
        ("The film was superb. In the end I hated it.", 0.0),
        # no sentences of the language: loaded words, with a "not" before them
        ("film good good dull", 0.5 / 3),
        ("was not the good film", -0.5),
        ("purple monkey", 0.0),
        ("", 0.0),
    ],
)
def test_sentiment_by_hand(text, value):
    assert sentiment(text) == pytest.approx(value)


def test_gold_takes_off_repetition_and_bad_grammar():
    # 5 pairs ("loved to" thrice, "to loved" twice), 2 of them new
    assert repetition("loved to loved to loved to") == pytest.approx(3 / 5)
    assert ungrammaticality("loved to loved to loved to") == 1
    assert gold_score("loved to loved to loved to") == pytest.approx(0.9 - 1.5 * 0.6 - 1)
    # two right sentences that make no review: half the penalty
    assert gold_score("I would watch it again. I would buy it again.") == pytest.approx(0.7 - 1.5 * 2 / 8 - 0.5)


def test_praise_and_blame_are_balanced_and_lively():
    rng = random.Random(3)
    scores = [gold_score(sample_review(rng)) for _ in range(1500)]
    mean = sum(scores) / len(scores)
    deviation = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    assert abs(mean) < 0.08
    assert 0.4 < deviation < 0.6


def test_size_of_the_language():
    assert 150 <= len(GRAMMAR.words) <= 300
    assert all(f"{topic}Review" in GRAMMAR.productions for topic in TOPICS)
