import math

import numpy as np
import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward, score_samples

SAMPLES = [
    Sample("Q: one?", "yes", tokens=(5, 6)),
    Sample("Q: two?", "no " * 100, tokens=(7,)),
    Sample("Q: three?", "maybe", tokens=()),
]


class Says(RewardFn):
    """Returns what it was made with, or calls it."""

    def __init__(self, answer, name=""):
        self.answer, self.name = answer, name

    def __call__(self, samples):
        return self.answer(samples) if callable(self.answer) else self.answer


def scored(*rewards: WeightedReward):
    return score_samples(rewards, SAMPLES)


def test_weighted_sum_and_breakdown():
    out = scored(WeightedReward(Says([1, 2, 3], "a")), WeightedReward(Says([0.5, 0.0, 1.0]), weight=-2.0, name="b"))
    assert out.total.tolist() == out.at_end.tolist() == [0, 2, 1]
    assert out.per_token is None
    assert {name: values.tolist() for name, values in out.breakdown.items()} == {"a": [1, 2, 3], "b": [0.5, 0, 1]}


def test_what_credit_is_told_is_weighted_and_without_what_is_only_logged():
    """A function of weight 0 must not be normalised into counting (GDPO normalises each by itself)."""
    rewards = [WeightedReward(Says([float(n)] * 3, n), weight) for n, weight in (("1", 2.0), ("2", 0.0), ("3", -1.0))]
    out = scored(*rewards)
    assert {name: scores.tolist() for name, scores in out.weighted.items()} == {"1": [2.0] * 3, "3": [-3.0] * 3}
    assert list(out.breakdown) == ["1", "2", "3"]


def test_batches_are_joined_even_where_a_function_scored_no_token_of_one_of_them():
    """It failed on all samples there: what it gave elsewhere stays in its place, and there it gives 0."""
    nothing = score_samples([WeightedReward(Says([math.nan] * 3, "steps"), on_error="zero")], SAMPLES)
    something = scored(WeightedReward(Says([[1.0, 2.0], [4.0], []], "steps")))
    assert nothing.per_token is None
    for batches in ([nothing, something], [something, nothing]):
        joined = ScoredSamples.joined(batches)
        assert [len(row) for row in joined.per_token] == [2, 1, 0, 2, 1, 0]
        sums = [float(row.sum()) for row in joined.per_token]
        assert (joined.at_end + torch.tensor(sums)).tolist() == joined.total.tolist()
    dropped = nothing.keeping(torch.tensor([True, False, True]))
    assert [len(row) for row in ScoredSamples.joined([dropped, something]).per_token] == [2, 0, 0, 2, 1, 0]
    assert ScoredSamples.joined([nothing, nothing]).per_token is None


def test_token_scores_are_kept_apart_and_counted_in_the_total():
    per_token = Says([[1.0, 2.0], [4.0], []], "steps")
    out = scored(WeightedReward(Says([1, 1, 1], "whole")), WeightedReward(per_token, weight=0.5))
    assert [row.tolist() for row in out.per_token] == [[0.5, 1], [2], []]
    assert out.at_end.tolist() == [1, 1, 1]
    assert out.total.tolist() == [2.5, 3, 1]
    assert out.breakdown["steps"].tolist() == [3, 4, 0]


def test_two_functions_that_score_tokens_are_added_token_by_token():
    rewards = [WeightedReward(Says([[1.0, 2.0], [4.0], []], name), weight=w) for name, w in (("a", 1.0), ("b", -1.0))]
    out = scored(*rewards)
    assert [row.tolist() for row in out.per_token] == [[0, 0], [0], []]
    assert out.total.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "returned",
    [
        (1, 2, 3),
        torch.tensor([1.0, 2.0, 3.0]),
        np.array([1, 2, 3]),
        [np.float32(1), torch.tensor(2.0), 3],
        [True, 2, 3],
    ],
    ids=["tuple", "tensor", "array", "scalars", "bool"],
)
def test_numbers_come_in_many_types(returned):
    assert scored(WeightedReward(Says(returned))).total.tolist() == [1, 2, 3]


def test_token_scores_come_in_many_types_too():
    out = scored(WeightedReward(Says([torch.tensor([1.0, 2.0]), np.array([4.0]), ()])))
    assert [row.tolist() for row in out.per_token] == [[1, 2], [4], []]


def boom_on_two(samples):
    return [1 / (len(sample.completion) - 300) for sample in samples]


def boom_on_batches(samples):
    if len(samples) > 1:
        raise RuntimeError("too many")
    return [0.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None: a list of 3 numbers"),
        (1.0, r"returned 1\.0: a list of 3 numbers"),
        ("abc", "returned 'abc': a list of 3 numbers"),
        ({"score": 1.0}, "a list of 3 numbers"),
        ([1.0, 2.0], r"2 scores for 3 samples; nothing for sample 2 \(prompt 'Q: three\?', completion 'maybe'\)"),
        ([1.0] * 4, "4 scores for 3 samples"),
        ([1.0, None, 1.0], r"returned None for sample 1 \(prompt 'Q: two\?', completion 'no no .*\.\.\.\): a finite"),
        ([math.nan, 1.0, 1.0], "returned nan for sample 0"),
        ([1.0, 1.0, -math.inf], "returned -inf for sample 2"),
        (["1.0", 1.0, 1.0], r"returned '1\.0' for sample 0"),
        (torch.tensor([1.0, math.nan, 1.0]), "returned nan for sample 1"),
        ([[1.0], [1.0], []], r"1 token scores for sample 0 .* which has 2 tokens"),
        ([[1.0, 2.0], [1.0], 0.0], r"returned 0\.0 for sample 2 .* but lists for others"),
        ([[1.0, math.nan], [1.0], []], "returned nan for sample 0"),
        ([[1.0, None], [1.0], []], "returned None for sample 0"),
        (boom_on_two, r"raised ZeroDivisionError: .*test_combine\.py, line \d+\) on sample 1 \(prompt 'Q: two\?'"),
        (boom_on_batches, "raised RuntimeError: too many .* on the whole batch, though on no sample alone"),
    ],
)
def test_bad_answers_name_the_function_and_the_sample(returned, message):
    with pytest.raises(UserError, match=f"^reward function mine .*{message}"):
        scored(WeightedReward(Says(returned), name="mine"))


def test_a_users_own_error_message_is_left_alone():
    def complain(samples):
        raise UserError("the key is missing")

    with pytest.raises(UserError, match=r"^the key is missing$"):
        scored(WeightedReward(Says(complain)))


def test_running_out_of_memory_is_not_the_functions_fault():
    def exhaust(samples):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        scored(WeightedReward(Says(exhaust)))


def test_two_functions_need_two_names():
    with pytest.raises(UserError, match="two reward functions are called 'Says'"):
        scored(WeightedReward(Says([1, 2, 3])), WeightedReward(Says([1, 2, 3])))


def test_no_function_at_all():
    with pytest.raises(UserError, match="rewards is empty"):
        scored()


def test_a_weight_is_a_finite_number():
    with pytest.raises(UserError, match=r"weight=nan of reward Says"):
        WeightedReward(Says([]), weight=math.nan)


def test_no_samples_no_scores():
    out = score_samples([WeightedReward(Says([]))], [])
    assert out.total.shape == (0,)
