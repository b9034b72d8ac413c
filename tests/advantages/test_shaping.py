import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rlhf_lightning.advantages.shaping import (
    RunningMoments,
    clip_scores,
    kl_shaped_rewards,
    missing_eos_penalty,
    overlong_mask,
    scale_scores,
    soft_overlong_punishment,
)
from rlhf_lightning.core.errors import UserError

#                       prompt        response            padding
MASK = torch.tensor([[False, False, True, True, True, False], [False, False, True, False, False, False]])
LOGPROBS = torch.tensor([[0.0, 0.0, -1.0, -2.0, -3.0, math.nan], [0.0, 0.0, -0.5, math.nan, 0.0, 0.0]])
REF_LOGPROBS = torch.tensor([[9.0, 9.0, -2.0, -2.0, -2.0, 9.0], [9.0, 9.0, -1.0, 9.0, 9.0, 9.0]])
SCORES = torch.tensor([10.0, 20.0])


def test_numbers_by_hand():
    rewards, kl = kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1)
    assert kl.tolist() == [[0, 0, 1, 0, -1, 0], [0, 0, 0.5, 0, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor([[0, 0, -0.1, 0, 10.1, 0], [0, 0, 19.95, 0, 0, 0]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_the_score_lands_on_the_last_real_token(rows, time, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=generator) < 0.5
    scores = torch.rand(rows, generator=generator) + 1
    zeros = torch.zeros(rows, time)
    rewards, _ = kl_shaped_rewards(scores, zeros, zeros, mask, kl_coef=0.1)
    for b in range(rows):
        counted = mask[b].nonzero().flatten().tolist()
        assert rewards[b].nonzero().flatten().tolist() == counted[-1:]
        assert rewards[b].sum().item() == (pytest.approx(scores[b].item()) if counted else 0)


def test_rewards_of_a_sequence_add_up_to_score_minus_kl():
    rewards, kl = kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.3)
    torch.testing.assert_close(rewards.sum(-1), SCORES - 0.3 * kl.sum(-1))


def test_token_rewards_are_added_where_they_count():
    tokens = torch.tensor([[7.0, 7.0, 1.0, 2.0, 3.0, math.nan], [7.0, 7.0, 4.0, 7.0, 7.0, 7.0]])
    with_tokens, _ = kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1, token_rewards=tokens)
    without, _ = kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1)
    expected = torch.tensor([[0.0, 0, 1, 2, 3, 0], [0, 0, 4, 0, 0, 0]])
    torch.testing.assert_close(with_tokens - without, expected)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimators_are_passed_on(estimator):
    _, kl = kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1, estimator=estimator)
    expected = {"k2": 0.5, "k3": math.exp(-1)}[estimator]
    assert kl[0, 2].item() == pytest.approx(expected)
    assert (kl[~MASK] == 0).all()


def test_a_mask_of_one_row_is_refused():
    with pytest.raises(TypeCheckError, match="mask"):
        kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK[:1], kl_coef=0.1)


def test_unfinished_answers_lose_or_are_replaced():
    finished = torch.tensor([True, False])
    assert missing_eos_penalty(SCORES, finished, subtract=3.0).tolist() == [10, 17]
    assert missing_eos_penalty(SCORES, finished, replace_by=-1.0).tolist() == [10, -1]
    assert missing_eos_penalty(SCORES, finished).tolist() == [10, 20]
    assert missing_eos_penalty(SCORES, finished, factor=0.25).tolist() == [10, 5]
    assert missing_eos_penalty(SCORES, finished, factor=0.25, subtract=1.0).tolist() == [10, 4]


def test_scores_are_clipped_on_both_sides():
    assert clip_scores(torch.tensor([-9.0, 0.5, 9.0]), 2.0).tolist() == [-2, 0.5, 2]
    assert clip_scores(torch.tensor([-9.0, 0.5, 9.0]), (0.0, 3.0)).tolist() == [0, 0.5, 3]
    with pytest.raises(UserError, match=r"limit=0\.0"):
        clip_scores(SCORES, 0.0)


numbers = st.lists(st.floats(-1e3, 1e3, width=32), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(numbers, max_size=5))
def test_running_moments_are_those_of_everything_at_once(chunks):
    running = RunningMoments()
    for chunk in chunks:
        running = running.update(torch.tensor(chunk, dtype=torch.float32))
    seen = torch.tensor([x for chunk in chunks for x in chunk], dtype=torch.float64)
    assert running.count == len(seen)
    if len(seen):
        assert running.mean == pytest.approx(seen.mean().item(), abs=1e-6)
        assert running.var == pytest.approx(seen.var(correction=0).item(), abs=1e-6)


def test_moments_survive_a_large_offset():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + 1e9
    assert RunningMoments().update(x[:1]).update(x[1:]).var == pytest.approx(2 / 3, rel=1e-6)


def test_an_update_leaves_the_old_object_alone():
    old = RunningMoments()
    old.update(SCORES)
    assert old == RunningMoments()


def test_moments_of_ranks_merge_in_any_order():
    a, b = RunningMoments.of(torch.tensor([1.0, 2.0])), RunningMoments.of(torch.tensor([5.0]))
    assert a.merge(b).to_dict() == pytest.approx(b.merge(a).to_dict())
    assert a.merge(RunningMoments()) == RunningMoments().merge(a) == a


def test_moments_go_through_json_unchanged():
    moments = RunningMoments.of(torch.tensor([1.0, 2.5, 7.1]))
    assert RunningMoments.from_dict(json.loads(json.dumps(moments.to_dict()))) == moments


def test_scaling_divides_by_the_spread_and_shifts_on_request():
    moments = RunningMoments.of(SCORES)  # mean 15, standard deviation 5
    assert scale_scores(SCORES, moments).tolist() == [2, 4]
    assert scale_scores(SCORES, moments, shift_mean=True).tolist() == [-1, 1]


def test_scores_that_are_all_the_same_keep_their_scale():
    assert scale_scores(SCORES, RunningMoments.of(torch.tensor([3.0, 3.0]))).tolist() == [10, 20]


def test_soft_overlong_punishment_by_hand():
    lengths = torch.tensor([0, 80, 81, 90, 100, 101, 500])
    punishment = soft_overlong_punishment(lengths, max_length=100, cache=20)
    assert punishment.tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1, -1])


@pytest.mark.parametrize("cache", [0, 101])
def test_a_punishment_needs_a_stretch_to_grow_on(cache):
    with pytest.raises(UserError, match=f"cache={cache}"):
        soft_overlong_punishment(torch.tensor([1]), max_length=100, cache=cache)


def test_overlong_mask_drops_answers_that_were_cut_off():
    kept = overlong_mask(MASK, torch.tensor([False, True]))
    assert kept.tolist() == [[False] * 6, MASK[1].tolist()]
