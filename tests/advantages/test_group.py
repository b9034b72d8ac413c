import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.advantages import (
    BatchCentred,
    BatchNormalised,
    BestOfGroup,
    Centred,
    CentredBatchNormalised,
    Gdpo,
    Gpg,
    GroupNormalised,
    LeaveOneOut,
    MaxRl,
    Opo,
    PassAtK,
    ReMax,
    RewardsToCome,
    informative_answers,
    mean_is_within,
)
from rlhf_lightning.core.errors import UserError

GROUP_CREDITS = [
    GroupNormalised(),
    GroupNormalised(std_over="batch"),
    Centred(),
    LeaveOneOut(),
    Opo(),
    Gpg(),
    Gpg(divide_by_std=True),
    MaxRl(),
    PassAtK(k=2),
    BestOfGroup(),
    BestOfGroup(divide_by_std=False),
]
ALL = [*GROUP_CREDITS, BatchCentred(), CentredBatchNormalised(), BatchNormalised(), ReMax(), RewardsToCome()]


def rollout(scores, lengths=None):
    """Rewards at the last token of rows of the given lengths, after one prompt token, and their mask."""
    lengths = torch.as_tensor(lengths if lengths is not None else [2] * len(scores))
    index = torch.arange(int(lengths.max()) + 2)
    mask = (index >= 1) & (index <= lengths.unsqueeze(-1))
    rewards = torch.where(index == lengths.unsqueeze(-1), torch.as_tensor(scores).unsqueeze(-1), torch.tensor(0.0))
    return rewards, mask


def advantages_of(credit, scores, groups, lengths=None, **more):
    """The advantage of each answer, after checking that each of its tokens has it, and no other."""
    rewards, mask = rollout(scores, lengths)
    advantages, _ = credit(rewards, torch.zeros_like(rewards), mask, torch.as_tensor(groups), **more)
    first = advantages[:, 1]
    assert torch.equal(advantages, torch.where(mask, first.unsqueeze(-1), 0.0))
    return first


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-5)


# two prompts, of three and two answers
SCORES = [1.0, 2.0, 6.0, 0.0, 4.0]
GROUPS = [7, 7, 7, 3, 3]


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (Centred(), [-2.0, -1.0, 3.0, -2.0, 2.0]),
        (BatchCentred(), [-1.6, -0.6, 3.4, -2.6, 1.4]),
        (LeaveOneOut(), [1 - 4.0, 2 - 3.5, 6 - 1.5, -4.0, 4.0]),
        # squares 4 + 1 + 9 = 14 over 2; 4 + 4 over 1
        (GroupNormalised(), [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -(0.5**0.5), 0.5**0.5]),
        (GroupNormalised(ddof=0), [-2 / (14 / 3) ** 0.5, -1 / (14 / 3) ** 0.5, 3 / (14 / 3) ** 0.5, -1.0, 1.0]),
        # all scores: mean 2.6, squares 23.2 over 4
        (GroupNormalised(std_over="batch"), [x / 5.8**0.5 for x in (-2.0, -1.0, 3.0, -2.0, 2.0)]),
        (MaxRl(), [-2 / 3, -1 / 3, 1.0, -1.0, 1.0]),
        (Gpg(), [-2.0, -1.0, 3.0, -2.0, 2.0]),
        # 4 of 5 scores are not 0
        (Gpg(informative="score_not_zero"), [x * 5 / 4 for x in (-2.0, -1.0, 3.0, -2.0, 2.0)]),
        (BestOfGroup(divide_by_std=False), [0.0, 0.0, 6 - 2.0, 0.0, 4 - 0.0]),
        (BestOfGroup(), [0.0, 0.0, 4 / 7**0.5, 0.0, 4 / 8**0.5]),
    ],
    ids=repr,
)
def test_numbers_by_hand(credit, expected):
    close(advantages_of(credit, SCORES, GROUPS), expected)


def test_opo_weighs_the_baseline_by_length():
    # (1*1 + 2*1 + 6*2) / 4 = 3.75; (0*3 + 4*1) / 4 = 1
    advantages = advantages_of(Opo(), SCORES, GROUPS, lengths=[1, 1, 2, 3, 1])
    close(advantages, [-2.75, -1.75, 2.25, -1.0, 3.0])


def test_gpg_makes_good_for_unanimous_groups():
    # 2 of 6 answers are in a group whose scores differ: alpha = 3
    advantages = advantages_of(Gpg(), [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2])
    close(advantages, [1.5, -1.5, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("successes", range(6))
def test_pass_at_k_is_the_mean_over_all_subsets(k, successes):
    scores = [1.0] * successes + [0.0] * (5 - successes)
    subsets = list(itertools.combinations(range(5), k))
    passes = {subset: max(scores[i] for i in subset) for subset in subsets}
    mean = sum(passes.values()) / len(subsets)
    std = math.sqrt(mean * (1 - mean))
    expected = [0.0] * 5
    if std > 0:
        for i in range(5):
            own = [passes[subset] - mean for subset in subsets if i in subset]
            expected[i] = sum(own) / len(own) / std
    close(advantages_of(PassAtK(k=k), scores, [0] * 5), expected)


def test_pass_at_1_is_group_normalisation():
    scores, groups = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 0, 0, 1, 1, 1]
    normalised = advantages_of(GroupNormalised(ddof=0, floor=1e-12), scores, groups)
    torch.testing.assert_close(advantages_of(PassAtK(k=1), scores, groups), normalised)


def test_pass_at_k_of_groups_that_are_too_small():
    # a group that lost answers is judged as pass@2; no group of k at all is a mistake
    small = advantages_of(PassAtK(k=3), [1.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 0, 1, 1])
    close(small[3:], [0.0, 0.0])  # pass@2 of two answers is always 1
    with pytest.raises(UserError, match=r"k=4.*largest group has 3.*num_samples to 4"):
        advantages_of(PassAtK(k=4), [1.0, 0.0, 0.0], [0, 0, 0])


def test_the_best_of_a_group_is_credited_with_what_it_adds():
    """max of all minus max of all others, as it is defined; two that are best add nothing."""
    scores = [0.3, 2.0, -1.0, 2.0, -4.0, -0.5, -3.0, 7.0]
    groups = [0, 0, 0, 0, 1, 1, 1, 2]
    expected = []
    for i, (score, group) in enumerate(zip(scores, groups, strict=True)):
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and j != i]
        expected.append(max(score, *others) - max(others) if others else 0.0)
    close(advantages_of(BestOfGroup(divide_by_std=False), scores, groups), expected)
    assert expected == [0, 0, 0, 0, 0, 2.5, 0, 0]


def test_gdpo_over_tokens_counts_an_answer_as_often_as_it_is_long():
    scores, lengths = [1.0, 0.0, 3.0, 2.0], [3, 1, 1, 1]
    credit = Gdpo(over="tokens", floor=1e-9, ddof=1)
    advantages = advantages_of(credit, scores, [0, 0, 1, 1], lengths, breakdown={"only": torch.tensor(scores)})
    once = torch.tensor([1.0, -1.0, 1.0, -1.0]) / 2**0.5
    tokens = once.repeat_interleave(torch.tensor(lengths))
    close(advantages, ((once - tokens.mean()) / tokens.std()).tolist())
    close(advantages.repeat_interleave(torch.tensor(lengths)).mean(), 0.0)


def test_gdpo_hears_the_quiet_reward():
    # a reward in the hundreds and one in tenths: equal voices, then the batch is normalised
    loud, quiet = torch.tensor([100.0, 300.0, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.2, 0.0])
    credit = Gdpo(floor=1e-9)
    advantages = advantages_of(credit, (loud + quiet).tolist(), [0, 0, 1, 1], breakdown={"a": loud, "b": quiet})
    # per group and reward +-sqrt(1/2): sums 0, 0, +, -; their std is sqrt(1 / 3)
    close(advantages, [0.0, 0.0, 0.5**0.5 * 3**0.5, -(0.5**0.5) * 3**0.5])
    only_a = Gdpo(weights={"b": 0.0}, floor=1e-9)
    advantages = advantages_of(only_a, [0.0] * 4, [0, 0, 1, 1], breakdown={"a": loud, "b": quiet})
    close(advantages, [-(1.5**0.5), 1.5**0.5, 0.0, 0.0])


def test_gdpo_with_one_reward_is_group_normalisation_of_every_group_that_varies():
    scores, groups = torch.tensor(SCORES), GROUPS
    once = advantages_of(GroupNormalised(floor=1e-12), SCORES, groups)
    twice = advantages_of(Gdpo(floor=1e-12), SCORES, groups, breakdown={"only": scores})
    torch.testing.assert_close(twice, once / once.std())  # its mean is 0 already


class OnTheCPU(torch.Tensor):
    """Scores as reward functions give them, beside answers on a GPU: no index from there works before they move."""

    def to(self, device):
        return self.as_subclass(torch.Tensor)

    def __getitem__(self, index):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


def test_scores_of_reward_functions_are_taken_to_where_the_answers_are():
    scores = torch.tensor(SCORES)
    groups = [0] * len(SCORES)
    expected = advantages_of(Gdpo(), SCORES, groups, breakdown={"only": scores})
    moved = advantages_of(Gdpo(), SCORES, groups, breakdown={"only": scores.as_subclass(OnTheCPU)})
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize(
    ("credit", "breakdown", "message"),
    [
        (Gdpo(), {}, "no breakdown"),
        (Gdpo(weights={"speed": 2.0}), {"style": torch.zeros(2)}, r"names 'speed'.*style"),
    ],
)
def test_gdpo_says_what_it_lacks(credit, breakdown, message):
    with pytest.raises(UserError, match=message):
        advantages_of(credit, [0.0, 1.0], [0, 0], breakdown=breakdown)


group_lists = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(group_lists, st.integers(0, 2**31))
def test_leave_one_out_is_a_scaled_centred(groups, seed):
    scores = torch.randn(len(groups), generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([groups.count(group) for group in groups])
    expected = advantages_of(Centred(), scores, groups) * sizes / (sizes - 1).clamp(min=1)
    torch.testing.assert_close(advantages_of(LeaveOneOut(), scores, groups), expected)
    for i, group in enumerate(groups):
        others = [scores[j] for j in range(len(groups)) if groups[j] == group and j != i]
        if others:
            expected_i = scores[i] - torch.stack(others).mean()
            torch.testing.assert_close(advantages_of(LeaveOneOut(), scores, groups)[i], expected_i)


@pytest.mark.parametrize("credit", GROUP_CREDITS, ids=repr)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3, 1e6])
def test_a_group_of_equal_scores_gets_exactly_zero(credit, value):
    advantages = advantages_of(credit, [value] * 7 + [0.0, 1.0], [0] * 7 + [1, 1], lengths=[1, 5, 2, 7, 3, 1, 4, 2, 2])
    assert (advantages[:7] == 0).all()
    assert (advantages[7:] != 0).any() or isinstance(credit, PassAtK)


@pytest.mark.parametrize("credit", [c for c in GROUP_CREDITS if not isinstance(c, PassAtK)], ids=repr)
def test_an_answer_without_company_gets_zero(credit):
    assert advantages_of(credit, [0.7, 0.0, 1.0], [5, 1, 1])[0] == 0


@pytest.mark.parametrize(
    "credit", [GroupNormalised(), Centred(), LeaveOneOut(), Opo(), MaxRl(), PassAtK(k=2)], ids=repr
)
def test_dropping_unanimous_groups_changes_nothing_else(credit):
    scores, groups = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0, 0, 0, 1, 1, 1, 2, 2, 2]
    whole = advantages_of(credit, scores, groups)
    kept = informative_answers(torch.tensor(scores), torch.tensor(groups))
    assert kept.tolist() == [True] * 3 + [False] * 6
    assert torch.equal(advantages_of(credit, scores[:3], groups[:3]), whole[kept])
    assert (whole[~kept] == 0).all()


@pytest.mark.parametrize("credit", ALL, ids=repr)
def test_the_order_of_answers_makes_no_difference(credit):
    generator = torch.Generator().manual_seed(0)
    rewards, mask = rollout(torch.rand(8, generator=generator).round(), lengths=[1, 4, 2, 2, 3, 1, 5, 2])
    values = torch.rand(rewards.shape, generator=generator)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    order = torch.randperm(8, generator=generator)
    advantages, returns = credit(rewards, values, mask, groups)
    permuted = credit(rewards[order], values[order], mask[order], 10 - groups[order])
    torch.testing.assert_close(permuted[0], advantages[order])
    torch.testing.assert_close(permuted[1], returns[order])


def on_two_ranks(run):
    """Results of `run(rank, add_over_ranks)` on two threads that add up each other's tensors."""
    barrier, said = threading.Barrier(2, timeout=30), [torch.zeros(0), torch.zeros(0)]

    def add(rank, x):
        said[rank] = x
        barrier.wait()
        total = said[0] + said[1]
        barrier.wait()
        return total

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: run(rank, partial(add, rank)), range(2)))


OVER_THE_BATCH = [Gdpo(), Gdpo(over="tokens"), Gpg(informative="score_not_zero"), CentredBatchNormalised(ddof=1)]


@pytest.mark.parametrize("credit", [*ALL, *OVER_THE_BATCH], ids=repr)
def test_whole_groups_on_two_ranks_are_one_batch(credit):
    generator = torch.Generator().manual_seed(1)
    rewards, mask = rollout(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0]), lengths=[1, 4, 2, 2, 3, 1])
    values = torch.rand(rewards.shape, generator=generator)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    breakdown = {"a": torch.rand(6, generator=generator), "b": rewards.sum(-1)}
    whole, _ = credit(rewards, values, mask, groups, breakdown=breakdown)

    def run(rank, add):
        part = (slice(0, 2), slice(2, 6))[rank]
        mine = {name: scores[part] for name, scores in breakdown.items()}
        return credit(rewards[part], values[part], mask[part], groups[part], breakdown=mine, add_over_ranks=add)[0]

    torch.testing.assert_close(torch.cat(on_two_ranks(run)), whole)


@pytest.mark.parametrize("credit", [*ALL, Gdpo()], ids=repr)
def test_padding_decides_nothing(credit):
    rewards, mask = rollout([0.0, 1.0, 1.0], lengths=[1, 4, 2])
    breakdown = {"only": torch.tensor([0.0, 1.0, 1.0])}
    groups, values = torch.tensor([0, 0, 0]), torch.ones_like(rewards)
    clean = credit(rewards, values, mask, groups, breakdown=breakdown)
    dirty = credit(rewards.masked_fill(~mask, math.nan), values, mask, groups, breakdown=breakdown)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()


def test_informative_answers_are_daposs_condition():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.3, 0.4])
    groups = torch.tensor([2, 2, 9, 9, 4, 4, 1, 1])
    kept = informative_answers(scores, groups)
    assert kept.tolist() == [True, True, False, False, False, False, True, True]
    assert informative_answers(scores, groups, at_least=0.5).tolist() == [True, True] + [False] * 6


def test_groups_are_kept_by_their_mean():
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5, 3.0, -1.0])
    groups = torch.tensor([2, 2, 9, 9, 4, 4, 1, 1, 0, 0])  # means 1, 0.5, 0, 0.5, 1
    expected = [False, False, True, True, False, False, True, True, False, False]
    assert mean_is_within(scores, groups, 0.0, 1.0).tolist() == expected
    assert mean_is_within(scores, groups, 0.9, 1.1).tolist() == [True] * 2 + [False] * 6 + [True] * 2
    binary = scores[:6]  # of scores 0 and 1, both conditions are DAPO's
    assert torch.equal(mean_is_within(binary, groups[:6], 0.0, 1.0), informative_answers(binary, groups[:6]))


def test_who_needs_groups():
    assert all(credit.needs_groups for credit in [*GROUP_CREDITS, CentredBatchNormalised(), Gdpo()])
    assert not BatchNormalised.needs_groups
    assert not BatchCentred.needs_groups
    assert not ReMax.needs_groups


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GroupNormalised(ddof=2), "ddof=2"),
        (lambda: GroupNormalised(floor=0.0), "floor=0.0"),
        (lambda: Gdpo(weights={"a": -1.0}), r"weights\.a=-1\.0"),
        (lambda: PassAtK(k=0), "k=0"),
        (lambda: BatchNormalised(gamma=1.5), "gamma=1.5"),
        (lambda: BatchNormalised(ddof=2), "ddof=2"),
        (lambda: RewardsToCome(gamma=-0.1), "gamma=-0.1"),
        (lambda: CentredBatchNormalised(ddof=-1), "ddof=-1"),
        (lambda: BestOfGroup(floor=0.0), "floor=0.0"),
    ],
)
def test_impossible_options_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
