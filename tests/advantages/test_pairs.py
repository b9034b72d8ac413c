import pytest
import torch

from rlhf_lightning.advantages.pairs import PairRule
from rlhf_lightning.core.errors import UserError

#                        prompt 5            prompt 2       alone  prompt 9: all alike
SCORES = torch.tensor([0.1, 0.9, 0.4, 0.7, -1.0, 2.0, 1.5, 3.0, 1.0, 1.0])
GROUPS = torch.tensor([5, 5, 5, 5, 2, 2, 2, 7, 9, 9])
LENGTHS = torch.tensor([1, 10, 1, 1, 1, 1, 9, 1, 1, 4])
LOTS = torch.tensor([0.8, 0.1, 0.3, 0.2, 0.4, 0.9, 0.5, 0.6, 0.2, 0.7])


def pairs(rule, **more):
    found = PairRule(rule, **more)(SCORES, GROUPS, lengths=LENGTHS, lots=LOTS)
    return list(zip(found.chosen.tolist(), found.rejected.tolist(), found.margins.tolist(), strict=True))


@pytest.mark.parametrize(
    ("rule", "more", "expected"),
    [
        ("max_min", {}, [(5, 4, 3.0), (1, 0, 0.8)]),
        ("max_max", {}, [(5, 6, 0.5), (1, 3, 0.2)]),
        ("max_random", {}, [(5, 6, 0.5), (1, 0, 0.8)]),
        ("random", {}, [(5, 6, 0.5), (2, 0, 0.3)]),  # 0 is drawn before 2
        # scores less a tenth of the length: 0 -.1 .3 .6 | -1.1 1.9 .6 | . | .9 .6
        ("max_min_p", {"length_penalty": 0.1}, [(5, 4, 3.0), (3, 1, 0.7), (8, 9, 0.3)]),
    ],
)
def test_rules_by_hand(rule, more, expected):
    assert [pair[:2] for pair in pairs(rule, **more)] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in pairs(rule, **more)] == pytest.approx([pair[2] for pair in expected], abs=1e-6)


@pytest.mark.parametrize("rule", ["max_min", "max_max", "max_random", "random"])
def test_ties_and_lonely_answers_give_no_pair(rule):
    scores, groups = torch.tensor([1.0, 1.0, 1.0, 4.0]), torch.tensor([0, 0, 0, 1])
    found = PairRule(rule)(scores, groups, lengths=torch.ones(4).int(), lots=torch.rand(4))
    assert found.chosen.numel() == found.rejected.numel() == found.margins.numel() == 0
    nothing = torch.zeros(0)
    assert PairRule(rule)(nothing, nothing.long(), lengths=nothing.long(), lots=nothing).chosen.numel() == 0


@pytest.mark.parametrize("rule", ["max_min", "max_max", "max_random", "random"])
def test_the_order_of_answers_makes_no_difference(rule):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    found = PairRule(rule)(SCORES[order], GROUPS[order], lengths=LENGTHS[order], lots=LOTS[order])
    assert list(zip(order[found.chosen].tolist(), order[found.rejected].tolist(), strict=True)) == [
        pair[:2] for pair in pairs(rule)
    ]


def test_any_other_answer_is_drawn_alike():
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(600):
        lots = torch.rand(4, generator=generator)
        found = PairRule("max_random")(SCORES[:4], GROUPS[:4], lengths=LENGTHS[:4], lots=lots)
        counts[found.rejected] += 1
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] - 200).abs().max() < 4 * (600 * 2 / 9) ** 0.5


@pytest.mark.parametrize(
    ("rule", "penalty", "message"), [("max_min_p", 0.0, "makes max_min_p max_min"), ("random", 1.0, "no effect")]
)
def test_a_penalty_belongs_to_its_rule(rule, penalty, message):
    with pytest.raises(UserError, match=message):
        PairRule(rule, length_penalty=penalty)
