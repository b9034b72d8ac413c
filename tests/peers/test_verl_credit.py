"""verl's advantage estimators, KL in the reward, its controller and its overlong penalty beside ours."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peer_packages import peer_module
from torch import Tensor
from verl_peer import LENGTHS, WIDTH, Ragged, assert_same, core_algos, ragged

from rlhf_lightning.advantages import (
    AdaptiveKL,
    BatchNormalised,
    BestOfGroup,
    Centred,
    CentredBatchNormalised,
    FixedKL,
    Gae,
    Gdpo,
    Gpg,
    GroupNormalised,
    LeaveOneOut,
    Opo,
    OptimalTokenBaseline,
    ReMax,
    informative_answers,
)
from rlhf_lightning.advantages.kl_control import KLControl
from rlhf_lightning.core.batches import Generated
from rlhf_lightning.core.masked import masked_whiten
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.rewards.combine import ScoredSamples
from rlhf_lightning.rollout.resample import Resample
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaper, RewardShaping

ray_trainer = peer_module("verl.trainer.ppo.ray_trainer")
DTYPES = [torch.float64, torch.float32]
Both = tuple[Tensor, Tensor]


def algorithm(**options: Any) -> Any:
    return ray_trainer.AlgoConfig(**options)


def data_of(tensors: dict[str, Tensor], **columns: Any) -> Any:
    return ray_trainer.DataProto.from_dict(tensors=tensors, non_tensors=columns)


def theirs(name: str, batch: Ragged, tensors: dict[str, Tensor] | None = None, **options: Any) -> Both:
    """What verl's trainer makes of a batch: `compute_advantage`, by the estimator's name in the config."""
    given = {"token_level_rewards": batch.rewards, "token_level_scores": batch.rewards}
    given |= {"response_mask": batch.response_mask, "values": batch.values, **(tensors or {})}
    names = {key: options.pop(key) for key in ("gamma", "lam", "norm_adv_by_std_in_grpo") if key in options}
    columns = options.pop("columns", {})
    config = algorithm(adv_estimator=name, **names, **options)
    data = data_of({key: value.clone() for key, value in given.items()}, uid=batch.uid, **columns)
    out = ray_trainer.compute_advantage(data, ray_trainer.AdvantageEstimator(name), config=config, **names)
    return out.batch["advantages"], out.batch["returns"]


def assert_same_credit(batch: Ragged, credit: Any, others: Both, **more: Any) -> None:
    """Advantages and, where verl's mean the same, returns, at the tokens that count."""
    values = more.pop("values", torch.zeros_like(batch.values))
    advantages, returns = credit(batch.rewards, values, batch.mask, batch.groups, **more)
    assert advantages.abs().max() > 0.1
    assert_same(advantages, torch.where(batch.mask, others[0], 0.0))
    if others[1] is not others[0]:
        assert_same(returns[batch.mask], others[1][batch.mask])


def with_rewards_on_the_way(batch: Ragged) -> Ragged:
    """As KL in the reward makes them: at every token."""
    return replace(batch, rewards=batch.rewards + 0.1 * batch.per_token)


OUTCOME = {
    "grpo": GroupNormalised(),
    "grpo_vectorized": GroupNormalised(),
    "grpo_passk": BestOfGroup(),
    "rloo": LeaveOneOut(),
    "rloo_vectorized": LeaveOneOut(),
    "opo": Opo(),
    "gpg": Gpg(informative="score_not_zero"),
    "reinforce_plus_plus_baseline": CentredBatchNormalised(ddof=1),
}
TESTED = {
    *OUTCOME,
    "gae",
    "reinforce_plus_plus",
    "remax",
    "gdpo",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
}


def test_every_estimator_that_verl_has_is_compared():
    assert set(core_algos.ADV_ESTIMATOR_REGISTRY) == TESTED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", OUTCOME)
def test_credit_of_whole_answers(name, seed, dtype):
    batch = with_rewards_on_the_way(ragged(dtype, seed=seed))
    single = name == "grpo_vectorized"  # verl computes it in float32, whatever comes in
    batch = replace(batch, rewards=batch.rewards.float(), values=batch.values.float()) if single else batch
    advantages, _ = theirs(name, batch)
    assert_same_credit(batch, OUTCOME[name], (advantages, advantages))


def test_scores_of_zero_and_one():
    """Wrong answers, right ones, a group of equal scores: where estimators divide by nothing, if they do."""
    batch = ragged()
    scores = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1, 1], dtype=torch.float64)
    rewards = torch.where(batch.rewards != 0, scores[:, None], 0.0)
    batch = replace(batch, rewards=rewards)
    for name, credit in OUTCOME.items():
        if name == "grpo_vectorized":
            continue  # in float32
        advantages, _ = theirs(name, batch)
        assert_same_credit(batch, credit, (advantages, advantages))


@pytest.mark.parametrize("divide", [True, False])
def test_grpo_and_best_of_group_without_the_standard_deviation(divide):
    batch = ragged()
    grpo, _ = theirs("grpo", batch, norm_adv_by_std_in_grpo=divide)
    assert_same_credit(batch, GroupNormalised() if divide else Centred(), (grpo, grpo))
    best, _ = theirs("grpo_passk", batch, norm_adv_by_std_in_grpo=divide)
    assert_same_credit(batch, BestOfGroup(divide_by_std=divide), (best, best))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (1.0, 0.0)])
def test_gae(gamma, lam, dtype):
    """verl's is whitened within: ours by `whiten_advantages: sample`."""
    batch = with_rewards_on_the_way(ragged(dtype))
    advantages, returns = theirs("gae", batch, gamma=gamma, lam=lam)
    ours, value_targets = Gae(gamma=gamma, lam=lam)(batch.rewards, batch.values, batch.mask, batch.groups)
    assert_same(masked_whiten(ours, batch.mask, ddof=1), torch.where(batch.mask, advantages, 0.0))
    assert_same(value_targets[batch.mask], returns[batch.mask])
    assert (masked_whiten(ours, batch.mask) - torch.where(batch.mask, advantages, 0.0)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(gamma, dtype):
    batch = with_rewards_on_the_way(ragged(dtype))
    both = theirs("reinforce_plus_plus", batch, gamma=gamma)
    assert_same_credit(batch, BatchNormalised(gamma=gamma, ddof=1), both)


def test_remax():
    batch = with_rewards_on_the_way(ragged())
    greedy = torch.arange(9, dtype=torch.float64) / 7
    both = theirs("remax", batch, {"reward_baselines": greedy})
    values = torch.where(batch.mask, (greedy / batch.mask.sum(-1))[:, None], 0.0)
    assert_same_credit(batch, ReMax(), both, values=values)


@pytest.mark.parametrize("weights", [None, {"correct": 1.0, "format": 0.3}])
def test_gdpo(weights):
    """Each reward function normalised within its group, then all together over the tokens of the batch."""
    batch = ragged(torch.float32)
    parts = {"correct": torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1, 1]), "format": batch.scores.clone()}
    columns = {name: scores.numpy() for name, scores in parts.items()}
    prompts = torch.zeros(9, 2, dtype=torch.long)
    attention = torch.cat((torch.ones(9, 2, dtype=torch.long), batch.response_mask), 1)
    options = {"gdpo_reward_keys": list(parts)} | ({} if weights is None else {"gdpo_reward_weights": [1.0, 0.3]})
    advantages, _ = theirs("gdpo", batch, {"prompts": prompts, "attention_mask": attention}, columns=columns, **options)
    credit = Gdpo(weights=weights or {}, floor=1e-6, over="tokens")
    assert_same_credit(batch, credit, (advantages, advantages), breakdown=parts)
    over_answers, _ = Gdpo(weights=weights or {}, floor=1e-6)(
        batch.rewards, batch.values, batch.mask, batch.groups, breakdown=parts
    )
    assert (over_answers - advantages).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_optimal_token_baseline(name):
    """Both of verl's: on answers in one piece the one for several turns is the same."""
    batch = with_rewards_on_the_way(ragged())
    collision = batch.old.exp().square() + 0.1
    both = theirs(name, batch, {"old_log_probs": batch.old, "sum_pi_squared": collision})
    variance = 1 - 2 * batch.old.exp() + collision
    assert_same_credit(batch, OptimalTokenBaseline(uncompared="score"), both, values=variance)


@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_optimal_token_baseline_with_weights_of_the_sampler(name):
    """The bracket is multiplied by the square of each token's weight."""
    batch = with_rewards_on_the_way(ragged())
    collision = batch.old.exp().square() + 0.1
    weights = SamplerCorrection(cap=1.5)(batch.old, batch.sampler, batch.mask).weights
    tensors = {"old_log_probs": batch.old, "sum_pi_squared": collision}
    both = theirs(name, batch, tensors | {"rollout_is_weights": weights})
    variance = (1 - 2 * batch.old.exp() + collision) * weights.square()
    assert_same_credit(batch, OptimalTokenBaseline(uncompared="score"), both, values=variance)
    assert (both[0] - theirs(name, batch, tensors)[0]).abs().max() > 1e-2


# --- which answers are trained on


def evicted(scores: list[list[float]], metric: str = "reward") -> list[bool]:
    """Whether verl's replay buffer takes each group out, by `filter_groups` with that metric."""
    module = peer_module("verl.trainer.ppo.v1.replay_buffer")
    buffer = object.__new__(module.ReplayBuffer)
    names = {f"{group}_{i}_0": score for group, of in enumerate(scores) for i, score in enumerate(of)}
    buffer.filter_groups_metric, buffer._dapo_classification_cache = metric, {"train": {}}
    buffer.partitions = {"train": dict.fromkeys(names)}
    buffer.finished_keys = {"train": {str(group) for group in range(len(scores))}}

    def kv_batch_get(keys: list[str], **_: Any) -> dict[str, list[Any]]:
        extra = [{"reward_extra_info": {metric: names[key]}} for key in keys]
        return {"rm_scores": [torch.tensor([0.0, names[key]]) for key in keys], "extra_fields": extra}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tq", SimpleNamespace(kv_batch_get=kv_batch_get))
        out, _ = buffer._dapo_filtered_keys("train")
    return [str(group) in out for group in range(len(scores))]


def kept(scores: list[list[float]]) -> list[bool]:
    """Whether `dynamic_sampling` keeps each group."""
    groups = torch.tensor([group for group, of in enumerate(scores) for _ in of])
    informative = informative_answers(torch.tensor([score for of in scores for score in of]), groups)
    return [bool(informative[groups == group].all()) for group in range(len(scores))]


def test_groups_of_equal_scores_are_filtered():
    draw = torch.Generator().manual_seed(0)
    for values in ([0.0, 1.0], [-1.0, 0.5, 2.0]):
        chosen = torch.randint(len(values), (200, 3), generator=draw).tolist()
        scores = [[values[i] for i in group] for group in chosen]
        assert kept(scores) == [not out for out in evicted(scores)]
        assert 10 < sum(kept(scores)) < 190


def test_differs_equal_scores_are_compared_and_not_their_deviation():
    """In float64, as a metric of verl's is, three times 0.1 has a deviation of 1e-17: kept, as an answer alone is."""
    scores = [[0.1, 0.1, 0.1], [0.5, 0.5, 0.5], [0.5]]
    assert kept(scores) == [False, False, False]
    assert evicted(scores, "score") == [False, True, False]


@pytest.mark.parametrize(
    ("method", "resample"),
    [("pow", Resample(power=1.5)), ("max_min", Resample("best_worst")), ("max_random", Resample("best_random"))],
)
def test_pf_ppo(method, resample):
    """The same rows, by the same generator; advantages are those of the whole batch."""
    batch = with_rewards_on_the_way(ragged(torch.float32))
    scores = batch.rewards.sum(-1)
    ours = resample.draw(scores, batch.mask.any(-1), scores.max(), scores.min(), seed=11)
    settings = {"reweight_method": method, "weight_pow": 1.5}
    names = {"gamma": 1.0, "lam": 0.9}
    whole, _ = theirs("gae", batch, **names)
    torch.manual_seed(11)
    drawn, _ = theirs("gae", batch, use_pf_ppo=True, pf_ppo=settings, **names)
    assert torch.equal(drawn, whole[ours])
    assert len(ours.unique()) < len(ours)


# --- KL in the reward


def shaped(batch: Ragged, kl: KLSpec, shaping: RewardShaping = RewardShaping()) -> tuple[Tensor, RewardShaper]:
    """Our rewards, and what chooses the next coefficient."""
    shaper = RewardShaper(shaping, kl, lambda x: x, max_length=WIDTH)
    rows = len(batch.mask)
    answers = Generated(
        tokens=torch.ones(rows, WIDTH, dtype=torch.long),
        attention_mask=batch.mask,
        mask=batch.mask,
        positions=torch.arange(WIDTH).expand(rows, WIDTH),
        finished=torch.ones(rows, dtype=torch.bool),
    )
    scored = ScoredSamples(total=batch.scores, at_end=batch.scores, per_token=None, breakdown={})
    old, ref = (torch.where(batch.mask, x, 0.0) for x in (batch.old, batch.ref))
    return shaper(answers, scored, old, ref).rewards, shaper


@pytest.mark.parametrize(
    ("name", "estimator", "bound"),
    [("kl", "k1", None), ("abs", "abs", None), ("mse", "k2", None), ("low_var_kl", "k3", 10.0), ("k3+", "k3", 10.0)],
)
@pytest.mark.parametrize("control", ["fixed", "adaptive"])
def test_kl_in_the_reward(control, name, estimator, bound):
    """`apply_kl_penalty`: rewards, and the coefficient of the next batch."""
    batch = ragged(spread=2.0)
    tensors = {"response_mask": batch.response_mask, "token_level_scores": batch.rewards}
    data = data_of({**tensors, "old_log_probs": batch.old, "ref_log_prob": batch.ref})
    settings = SimpleNamespace(type=control, kl_coef=0.3, target_kl=0.05, horizon=100)
    controller = core_algos.get_kl_controller(settings)
    data, metrics = ray_trainer.apply_kl_penalty(data, controller, kl_penalty=name)
    ours: KLControl = FixedKL(0.3) if control == "fixed" else AdaptiveKL(0.3, 0.05, 100.0, per="token")
    rewards, shaper = shaped(batch, KLSpec(control=ours, estimator=estimator, bound=bound))
    assert_same(rewards, torch.where(batch.mask, data.batch["token_level_rewards"], 0.0))
    assert shaper.kl_coef == pytest.approx(controller.value, rel=1e-6)
    assert (shaper.kl_coef != 0.3) == (control == "adaptive")
    assert abs(metrics["actor/reward_kl_penalty"]) > 0.05


def test_the_adaptive_controller_over_many_batches():
    controller, ours = core_algos.AdaptiveKLController(0.2, 6.0, 1000), AdaptiveKL(0.2, 6.0, 1000.0)
    coef = ours.initial_coef
    for kl in (1.0, 5.9, 6.3, 40.0, 0.0, 7.0):
        controller.update(kl, 64)
        coef = ours.next_coef(coef, kl, 64)
        assert coef == pytest.approx(controller.value, rel=1e-12)


def test_differs_the_target_is_of_an_answer_by_default():
    """Ziegler et al. steer by the KL of a whole answer, verl by the mean over its tokens."""
    batch = ragged(spread=2.0)
    kl = torch.where(batch.mask, batch.old - batch.ref, 0.0)
    of_answers, of_tokens = kl.sum(-1).mean().item(), (kl.sum(-1) / batch.mask.sum(-1)).mean().item()
    target = 1.1 * abs(of_tokens)
    for per, observed in (("sequence", of_answers), ("token", of_tokens)):
        control = AdaptiveKL(0.3, target, 100.0, per=per)
        _, shaper = shaped(batch, KLSpec(control=control))
        assert shaper.kl_coef == pytest.approx(control.next_coef(0.3, observed, 9))
    assert of_answers != pytest.approx(of_tokens)


def test_the_overlong_penalty_of_dapo():
    """verl's reward manager: less and less over the last tokens before the limit, `penalty_factor` at it."""
    manager = peer_module("verl.workers.reward_manager.dapo").DAPORewardManager(
        tokenizer=SimpleNamespace(decode=lambda *_, **__: "text", eos_token="<eos>"),
        num_examine=0,
        compute_score=lambda extra_info, **_: extra_info["score"],
        max_resp_len=WIDTH,
        overlong_buffer_cfg=SimpleNamespace(enable=True, len=4, penalty_factor=0.7, log=False),
    )
    batch = ragged(torch.float32)
    prompts = torch.ones(9, 2, dtype=torch.long)
    attention = torch.cat((prompts, batch.response_mask), 1)
    columns = {
        "reward_model": np.array([{"ground_truth": ""}] * 9, dtype=object),
        "data_source": np.array(["any"] * 9, dtype=object),
        "extra_info": np.array([{"score": score} for score in batch.scores.tolist()], dtype=object),
    }
    tensors = {"prompts": prompts, "responses": torch.ones(9, WIDTH, dtype=torch.long), "attention_mask": attention}
    rewards, _ = shaped(batch, KLSpec(control=FixedKL(0.0)), RewardShaping(overlong_cache=4, overlong_factor=0.7))
    assert_same(rewards, manager(data_of(tensors, **columns)))
    assert not torch.equal(rewards, batch.rewards)


# --- differences on purpose


@pytest.mark.parametrize(
    ("name", "credit"),
    [
        ("grpo", GroupNormalised()),
        ("grpo_vectorized", GroupNormalised()),
        ("rloo", LeaveOneOut()),
        ("opo", Opo()),
        ("gpg", Gpg(informative="score_not_zero")),
        ("optimal_token_baseline", OptimalTokenBaseline(uncompared="score")),
    ],
)
def test_differs_an_answer_that_is_alone_has_nothing_to_be_compared_with(name, credit):
    """verl gives it its raw score for an advantage, we nothing; its own vectorised RLOO agrees with us."""
    batch = ragged(torch.float32)
    batch = replace(batch, groups=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3]))
    tensors = {"old_log_probs": batch.old, "sum_pi_squared": batch.old.exp().square()}
    other, _ = theirs(name, batch, tensors)
    ours, _ = credit(batch.rewards, torch.ones_like(batch.values), batch.mask, batch.groups)
    assert (ours[8] == 0).all()
    assert_same(other[8, : LENGTHS[8]], batch.scores[8].expand(LENGTHS[8]))
    vectorised, _ = theirs("rloo_vectorized", batch)
    assert (vectorised[8] == 0).all()
    if name != "optimal_token_baseline":  # what the others are compared by is no collision here
        assert_same(ours[:8], other[:8])


def test_differs_the_best_of_one_is_refused_by_verl():
    batch = replace(ragged(), groups=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3]))
    with pytest.raises(ValueError, match="at least 2 samples"):
        theirs("grpo_passk", batch)
    ours, _ = BestOfGroup()(batch.rewards, batch.values, batch.mask, batch.groups)
    assert (ours[8] == 0).all()


def test_differs_the_paper_counts_groups_that_differ():
    """GPG's alpha: of nine answers six are in groups that differ, and five have a score that is not 0."""
    batch = ragged()
    scores = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 1], dtype=torch.float64)
    batch = replace(batch, rewards=torch.where(batch.rewards != 0, scores[:, None], 0.0))
    other, _ = theirs("gpg", batch)
    ours, _ = Gpg()(batch.rewards, batch.values, batch.mask, batch.groups)
    assert_same(ours * (9 / 5) / (9 / 6), other)
    assert ours[0, 0].item() == pytest.approx(9 / 6 * 2 / 3)


def test_differs_rejected_tokens_keep_their_rewards():
    """verl rejects before it credits: a reward at a token that is rejected is lost to all tokens before it."""
    batch = ragged()
    mask = batch.mask.clone()
    last = mask.sum(-1) - 1
    mask[0, last[0]] = False  # the token that has the score
    other, returns = theirs("reinforce_plus_plus", replace(batch, mask=mask))
    assert (returns[0] == 0).all()
    ours, to_come = BatchNormalised(ddof=1)(batch.rewards, batch.values, batch.mask, batch.groups)
    assert_same(to_come[0, : LENGTHS[0]], batch.scores[0].expand(LENGTHS[0]))
    assert not math.isclose(float(ours[0, 0]), float(other[0, 0]), abs_tol=1e-3)
