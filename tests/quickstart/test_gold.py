import pytest

from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.quickstart.gold import Grammatical, ReviewGold, Sentiment

GOOD = Sample(prompt="The film was", completion=" superb. I would watch it again.")
CUT = Sample(prompt="The film was", completion=" superb. I would watch it again.", finished=False)
TWICE = Sample(prompt="The film", completion=" film film")


def test_prompt_and_answer_are_read_as_one_text():
    assert Sentiment()([GOOD]) == [pytest.approx(0.8)]
    assert ReviewGold()([GOOD, TWICE]) == [pytest.approx(0.8), pytest.approx(-1.5 * 1 / 3 - 1)]
    assert ReviewGold(repetition_coef=0, ungrammaticality_coef=0)([TWICE]) == [0]


def test_only_a_finished_review_counts_as_grammatical():
    assert Grammatical()([GOOD, CUT, TWICE]) == [1, 0, 0]
