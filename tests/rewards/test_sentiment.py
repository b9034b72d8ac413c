import sys

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards import sentiment
from rlhf_lightning.rewards.sentiment import VaderSentiment

SAMPLES = [Sample("", text) for text in ("I love it, great fun!", "I hate it, awful.", "It is a table.")]


def test_the_sign_is_that_of_the_text():
    pytest.importorskip("vaderSentiment")
    good, bad, neutral = VaderSentiment()(SAMPLES)
    assert -1 <= bad < -0.5 < neutral == 0 < 0.5 < good <= 1


def test_repetition_is_taken_off():
    pytest.importorskip("vaderSentiment")
    loop = [Sample("", "good good good good good")]  # 4 bigrams, 1 distinct
    (plain,) = VaderSentiment()(loop)
    assert VaderSentiment(repetition_penalty=1.5)(loop) == [pytest.approx(plain - 1.5 * 0.75)]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    sentiment._analyzer.cache_clear()
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        VaderSentiment()(SAMPLES)


def test_a_negative_penalty_is_refused():
    with pytest.raises(UserError, match=r"repetition_penalty=-1\.0"):
        VaderSentiment(repetition_penalty=-1.0)
