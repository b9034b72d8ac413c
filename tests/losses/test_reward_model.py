import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rlhf_lightning.core.batches import PairBatch, RankedBatch, RatedBatch, StepBatch, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardLoss
from rlhf_lightning.losses.reward_model import (
    BradleyTerry,
    PlackettLuce,
    Regression,
    StepCorrectness,
    bradley_terry,
    plackett_luce,
    regression,
    step_correctness,
)


def completions(number: int) -> TokenBatch:
    ones = torch.ones(number, 1, dtype=torch.bool)
    zeros = torch.zeros(number, 1, dtype=torch.long)
    return TokenBatch(tokens=zeros, attention_mask=ones, mask=ones, positions=zeros)


def pairs(number: int, margins: torch.Tensor | None = None) -> PairBatch:
    return PairBatch(chosen=completions(number), rejected=completions(number), margins=margins)


def ranked(groups: list[int], ranks: list[float]) -> RankedBatch:
    return RankedBatch(completions=completions(len(groups)), groups=torch.tensor(groups), ranks=torch.tensor(ranks))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Pairs


def test_equal_scores_lose_log_2():
    assert bradley_terry(torch.tensor([3.0]), torch.tensor([3.0])).item() == pytest.approx(math.log(2))


def test_pairs_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    plain = [-math.log(sigmoid(1)), -math.log(sigmoid(-1))]
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx(plain)
    margin = bradley_terry(chosen, rejected, margins=torch.tensor([1.0, 0.0]))
    assert margin.tolist() == pytest.approx([math.log(2), plain[1]])
    smooth = bradley_terry(chosen, rejected, label_smoothing=0.1)
    assert smooth.tolist() == pytest.approx([0.9 * plain[0] + 0.1 * plain[1], 0.9 * plain[1] + 0.1 * plain[0]])
    centred = bradley_terry(chosen, rejected, centring_coef=0.01)
    assert centred.tolist() == pytest.approx([plain[0] + 0.09, plain[1] + 0.01])


def test_smoothed_labels_ask_for_the_log_odds_and_no_more():
    best = math.log(0.9 / 0.1)
    difference = torch.tensor([best], requires_grad=True)
    bradley_terry(difference, torch.zeros(1), label_smoothing=0.1).sum().backward()
    assert difference.grad.item() == pytest.approx(0, abs=1e-6)


def test_extreme_scores_stay_finite():
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(scores, -scores)
    loss.sum().backward()
    assert loss.tolist() == [2e4, 0]
    assert scores.grad.isfinite().all()


def test_bradley_terry_of_a_batch():
    out = BradleyTerry()(torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 1.0], requires_grad=True), pairs(3))
    assert out.accuracy.tolist() == [1, 0, 0.5]
    assert out.margin.tolist() == [1, -1, 0]
    assert out.per_element.requires_grad
    assert not out.margin.requires_grad


def test_the_margin_column_is_used_scaled_or_ignored():
    scores, batch = torch.tensor([2.0, 1.0]), pairs(1, margins=torch.tensor([0.5]))
    losses = [BradleyTerry(margin_coef=c)(scores, batch).per_element.item() for c in (1.0, 2.0, 0.0)]
    assert losses == pytest.approx([-math.log(sigmoid(x)) for x in (0.5, 0.0, 1.0)])


# Rankings


def test_pairs_of_a_ranking_by_hand():
    # prompt 0: a (rank 1) > b (rank 2) = c (rank 2): two pairs; prompt 1: one pair
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0])
    loss = plackett_luce(scores, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]))
    assert loss.tolist() == pytest.approx([-(math.log(sigmoid(2)) + math.log(sigmoid(1))) / 2, math.log(2)])


def test_the_order_of_completions_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    scores, ranks = torch.randn(9, generator=generator), torch.tensor([3.0, 1, 2, 1, 2, 4, 2, 2, 1])
    shuffled = torch.randperm(9, generator=generator)
    for comparisons in ("pairs", "listwise"):
        expected = plackett_luce(scores, groups, ranks, comparisons=comparisons)
        again = plackett_luce(scores[shuffled], groups[shuffled], ranks[shuffled], comparisons=comparisons)
        torch.testing.assert_close(again, expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_ragged_prompts_give_what_each_gives_alone(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    ranks = torch.randint(1, 4, (sum(sizes),), generator=generator).double()
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    loss = plackett_luce(scores, groups, ranks, label_smoothing=0.1, centring_coef=0.01)
    for p in range(len(sizes)):
        own = [i for i in range(sum(sizes)) if groups[i] == p]
        contests = [(i, j) for i in own for j in own if ranks[i] < ranks[j]]
        by_hand = [
            bradley_terry(scores[i], scores[j], label_smoothing=0.1, centring_coef=0.01).item() for i, j in contests
        ]
        assert loss[p].item() == pytest.approx(sum(by_hand) / max(len(by_hand), 1))


@pytest.mark.parametrize("comparisons", ["pairs", "listwise"])
@pytest.mark.parametrize("centring_coef", [0.0, 0.01])
def test_two_answers_are_a_pair(comparisons, centring_coef):
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    scores = torch.stack((rejected, chosen), dim=1).flatten()
    groups, ranks = torch.arange(6).repeat_interleave(2), torch.tensor([2.0, 1.0]).repeat(6)
    loss = plackett_luce(scores, groups, ranks, comparisons=comparisons, centring_coef=centring_coef)
    torch.testing.assert_close(loss, bradley_terry(chosen, rejected, centring_coef=centring_coef))


def test_listwise_probabilities_of_all_orders_sum_to_one():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    total = 0.0
    for order in permutations(range(1, 5)):
        ranks = torch.tensor(order, dtype=torch.float64)
        total += math.exp(-plackett_luce(scores, torch.zeros(4).long(), ranks, comparisons="listwise").item())
    assert total == pytest.approx(1)


def test_listwise_by_hand():
    # P(2 first, then 1, then 0) of weights 1, 2, 4
    scores = torch.log(torch.tensor([1.0, 2.0, 4.0]))
    loss = plackett_luce(scores, torch.zeros(3).long(), torch.tensor([3.0, 2.0, 1.0]), comparisons="listwise")
    assert loss.item() == pytest.approx(-math.log(4 / 7 * 2 / 3))


@pytest.mark.parametrize("comparisons", ["pairs", "listwise"])
def test_ties_are_not_compared(comparisons):
    scores = torch.tensor([1.0, -1.0, 0.5], requires_grad=True)
    loss = plackett_luce(
        scores, torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 1.0]), comparisons=comparisons, centring_coef=0.1
    )
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert scores.grad.tolist() == [0, 0, 0]


def test_accuracy_and_margin_of_a_ranking():
    # prompt 0: scores 3, 1, 1 at ranks 1, 2, 3: right, right, tie; prompt 1: nothing to compare
    out = PlackettLuce()(torch.tensor([3.0, 1.0, 1.0, 7.0, 8.0]), ranked([0, 0, 0, 1, 1], [1.0, 2.0, 3.0, 1.0, 1.0]))
    assert out.accuracy.tolist() == pytest.approx([2.5 / 3, 0.5])
    assert out.margin.tolist() == pytest.approx([4 / 3, 0])
    assert out.per_element.shape == (2,)


def test_ranks_of_another_length_are_refused():
    with pytest.raises(TypeCheckError, match="ranks"):
        plackett_luce(torch.zeros(3), torch.zeros(3).long(), torch.zeros(2))


# Ratings


def test_squared_error_turns_linear_at_the_huber_bound():
    scores, ratings = torch.tensor([0.5, 1.0, 3.0, -3.0]), torch.zeros(4)
    assert regression(scores, ratings).tolist() == [0.25, 1, 9, 9]
    assert regression(scores, ratings, huber_delta=1.0).tolist() == [0.25, 1, 5, 5]


def test_accuracy_of_ratings_compares_within_the_batch():
    batch = RatedBatch(completions=completions(4), ratings=torch.tensor([1.0, 2.0, 3.0, 3.0]))
    out = Regression()(torch.tensor([0.0, 5.0, 4.0, 5.0]), batch)
    # of answer 0: 3 right; 1: > 0 right, < 2 wrong, = 3 tie; 2: > 0 right, > 1 wrong; 3: > 0 right, = 1 tie
    assert out.accuracy.tolist() == pytest.approx([1, 1.5 / 3, 0.5, 0.75])
    assert out.margin.tolist() == pytest.approx([14 / 3, (5 - 1 + 0) / 3, (4 - 1) / 2, (5 + 0) / 2])
    assert out.per_element.tolist() == [1, 9, 1, 4]


def test_a_single_rating_has_nothing_to_be_compared_with():
    out = Regression()(torch.tensor([1.0]), RatedBatch(completions=completions(1), ratings=torch.tensor([1.0])))
    assert (out.accuracy.item(), out.margin.item()) == (0.5, 0)


# All


@pytest.mark.parametrize(
    ("loss", "batch", "elements"),
    [
        (BradleyTerry(), pairs(3), 3),
        (PlackettLuce(), ranked([0, 0, 0, 0, 1, 1], [1.0, 2, 3, 4, 1, 2]), 2),
        (PlackettLuce(comparisons="listwise"), ranked([0, 0, 0, 0, 1, 1], [1.0, 2, 3, 4, 1, 2]), 2),
        (Regression(), RatedBatch(completions=completions(6), ratings=torch.arange(6.0)), 6),
    ],
    ids=str,
)
def test_the_denominator_is_the_number_of_elements(loss: RewardLoss, batch, elements):
    scores = torch.zeros(6, requires_grad=True)
    out = loss(scores, batch)
    assert batch.total(loss.denominator) == elements == out.per_element.numel()
    assert out.accuracy.shape == out.margin.shape == out.per_element.shape
    out.per_element.sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (BradleyTerry, {"label_smoothing": 0.5}),
        (BradleyTerry, {"label_smoothing": -0.1}),
        (BradleyTerry, {"centring_coef": -1.0}),
        (BradleyTerry, {"margin_coef": -1.0}),
        (PlackettLuce, {"comparisons": "triples"}),
        (PlackettLuce, {"label_smoothing": 0.1, "comparisons": "listwise"}),
        (Regression, {"huber_delta": 0.0}),
    ],
)
def test_impossible_settings_are_named(make, arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises((UserError, TypeCheckError), match=f"{name}.*{value}"):
        make(**arguments)


# Steps


def test_steps_by_hand():
    scores, labels = torch.tensor([0.0, 2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 0.25])
    right, wrong = -math.log(sigmoid(2)), -math.log(sigmoid(-2))
    expected = [math.log(2), right, wrong, 0.25 * right + 0.75 * wrong]
    assert step_correctness(scores, labels).tolist() == pytest.approx(expected)
    expected = [math.log(2), right, 3 * wrong, 0.25 * right + 2.25 * wrong]
    assert step_correctness(scores, labels, wrong_weight=3.0).tolist() == pytest.approx(expected)


def test_steps_are_the_cross_entropy_of_two_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 2, dtype=torch.float64), torch.randint(2, (50,))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(step_correctness(logits[:, 1] - logits[:, 0], labels.double()), expected)


def test_a_step_counts_at_its_last_token_alone():
    ends = torch.tensor([[False, True, True], [False, False, True]])
    labels = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    scores = torch.tensor([[9.0, 2.0, 2.0], [9.0, torch.nan, 2.0]])
    batch = StepBatch(
        TokenBatch(tokens=labels.long(), attention_mask=torch.ones_like(ends), mask=ends, positions=labels.long()),
        labels,
    )
    output = StepCorrectness()(scores, batch)
    assert batch.total(StepCorrectness.denominator) == 3
    assert output.margin.tolist() == [[0, 2, -2], [0, 0, 0]]
    assert output.accuracy.tolist() == [[0, 1, 0], [0, 0, 0.5]]
    assert (output.per_element > 0).tolist() == ends.tolist()


def test_a_weight_that_teaches_nothing_is_refused():
    with pytest.raises(UserError, match=r"wrong_weight=0.0 would not teach what is wrong: give a positive number"):
        StepCorrectness(wrong_weight=0.0)
