import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rollout.resample import Resample

SCORES = torch.tensor([-3.0, 0.0, 1.0, 2.0])
ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("resample", "expected"),
    [
        (Resample(), [9.0, 0.0, 1.0, 4.0]),
        (Resample(power=1.0), [3.0, 0.0, 1.0, 2.0]),
        (Resample("best_worst"), [1.0, 0.0, 0.0, 1.0]),
        (Resample("best_random"), [0.1, 0.1, 0.1, 0.4]),
    ],
)
def test_answers_are_drawn_as_often_as_their_weights_say(resample, expected):
    weights = resample.weights(SCORES, SCORES.max(), SCORES.min())
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)
    scores = SCORES.repeat(5000)
    rows = resample.draw(scores, ALL.repeat(5000), scores.max(), scores.min(), seed=0)
    drawn = torch.bincount(rows % 4, minlength=4) / len(rows)
    torch.testing.assert_close(drawn, torch.tensor(expected) / sum(expected), atol=0.02, rtol=0)


def test_the_best_may_be_on_another_rank():
    weights = Resample("best_worst").weights(SCORES, torch.tensor(7.0), SCORES.min())
    assert weights.gt(0.5).tolist() == [True, False, False, False]


def test_a_dropped_answer_is_never_drawn():
    counts = torch.tensor([True, False, True, False])
    scores = torch.tensor([-3.0, float("nan"), 1.0, 2.0])
    drawn = [Resample().draw(scores, counts, scores[2], scores[0], seed=seed) for seed in range(20)]
    assert set(torch.cat(drawn).tolist()) == {0, 2}
    assert Resample().draw(scores, ~ALL, scores[2], scores[0], seed=0).tolist() == [0, 1, 2, 3]


def test_the_seed_names_the_draw():
    first, again, other = (Resample().draw(SCORES, ALL, SCORES[3], SCORES[0], seed=seed) for seed in (1, 1, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scores_of_zero_are_drawn_alike():
    rows = Resample().draw(torch.zeros(4), ALL, torch.tensor(0.0), torch.tensor(0.0), seed=0)
    assert rows.shape == (4,)


def test_a_power_that_turns_the_weights_round_is_refused():
    with pytest.raises(UserError, match=r"resample\.power=0\.0 would prefer"):
        Resample(power=0.0)


def test_weights_that_no_number_holds_are_refused():
    scores, counts = torch.tensor([1e5, 2.0]), torch.tensor([True, True])
    with pytest.raises(UserError, match=r"resample\.power=10 of a score of 100000 is too large a weight"):
        Resample(power=10.0).draw(scores, counts, scores.max(), scores.min(), seed=1)
