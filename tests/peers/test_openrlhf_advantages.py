"""Scores to advantages: OpenRLHF's experience maker beside our stages, on one ragged rollout.

Their models and their cluster are replaced by functions of a token; from there on, everything is their own code's:
penalties for length, baselines, clipping, KL, returns, whitening. Ours is what a YAML builds. Where we differ on
purpose, the test is named so and states both numbers.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf_peer import TOLERANCE, openrlhf_arguments, openrlhf_parser, ragged
from peer_packages import peer_module
from torch import Tensor

from rlhf_lightning.advantages import (
    AdaptiveKL,
    BatchCentred,
    BatchNormalised,
    Centred,
    CentredBatchNormalised,
    FixedKL,
    Gae,
    GroupNormalised,
    LeaveOneOut,
    mean_is_within,
    soft_overlong_punishment,
)
from rlhf_lightning.core.batches import Generated
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, PPOModule
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping

maker = peer_module("openrlhf.trainer.ppo_utils.experience_maker")
controllers = peer_module("openrlhf.trainer.ppo_utils.kl_controller")
penalties = peer_module("openrlhf.trainer.ppo_utils.length_penalty")
generator = peer_module("openrlhf.trainer.ppo_utils.samples_generator")
utils = peer_module("openrlhf.models.utils")
Experience = peer_module("openrlhf.trainer.ppo_utils.experience").Experience

MAX_LENGTH = 8
PROMPTS = [2, 2, 2, 4, 4, 4]
LENGTHS = [3, 8, 1, 5, 7, 8]
"""Three answers to each of two prompts; those of 8 tokens were cut off."""
SCORES = [1.0, -0.5, 2.0, 0.25, 3.0, -4.0]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
TOKENS = [
    torch.randint(3, 60, (prompt + length,), generator=torch.Generator().manual_seed(row))
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
]


def policy(tokens: Tensor) -> Tensor:
    return -0.05 * tokens


def reference(tokens: Tensor) -> Tensor:
    return -0.05 * tokens - 1.5 * torch.sin(tokens.float()) - 11.0 * (tokens % 13 == 0)  # now and then out of bounds


def critic(tokens: Tensor) -> Tensor:
    return torch.cos(3.0 * tokens)


class Group:
    """Their group of actors: a function of each action's token, [micro-batch][answer, action]."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def async_run_method_batch(self, method_name: str, **inputs: Any) -> Any:
        assert method_name == "forward"
        sequences, masks = inputs["sequences"], inputs["action_mask"]
        return [[self.function(s[:, 1:]) * m for s, m in zip(sequences, masks, strict=True)]]


def samples(scores: Any = SCORES) -> list[Any]:
    made = []
    for prompt, length, tokens, score in zip(PROMPTS, LENGTHS, TOKENS, scores, strict=True):
        actions = torch.arange(prompt + length - 1) >= prompt - 1
        made.append(
            Experience(
                sequences=tokens[None],
                attention_mask=torch.ones(1, prompt + length, dtype=torch.long),
                action_mask=actions[None].long(),
                rewards=torch.tensor([score]),
                response_length=torch.tensor([length]),
                truncated=torch.tensor([length == MAX_LENGTH]),
                total_length=torch.tensor([prompt + length]),
                info={"reward": torch.tensor([score])},
            )
        )
    return made


def their_advantages(
    monkeypatch: Any, *, scores: Any = SCORES, coef: float = 0.3, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """Advantages and returns [answer, time] as ours are laid out, and what they note beside."""
    monkeypatch.setattr(maker, "ray", SimpleNamespace(get=lambda x: x, put=lambda x: x))
    args = openrlhf_arguments(
        rollout__n_samples_per_prompt=3,
        rollout__micro_batch_size=2,
        rollout__max_new_tokens=MAX_LENGTH,
        algo__kl__init_coef=coef,
        **options,
    )
    makes_value = Group(critic) if args.algo.advantage.estimator == "gae" else None
    theirs = maker.RemoteExperienceMaker(
        Group(policy),
        makes_value,
        None,
        Group(reference),
        controllers.FixedKLController(coef),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0),
    )
    made = theirs.make_experience_batch(samples(scores))
    laid = torch.zeros(2, 6, MAX_LENGTH)
    row = 0
    for experience in made:
        for index in range(len(experience.rewards)):
            acts = experience.action_mask[index].bool()
            for out, values in zip(laid, (experience.advantages, experience.returns), strict=True):
                out[row, : LENGTHS[row]] = values[index][acts]
            row += 1
    return laid[0], laid[1], made


MASK = ragged(LENGTHS)
ANSWERS = torch.stack(
    [torch.nn.functional.pad(t[p:], (0, MAX_LENGTH - n)) for t, p, n in zip(TOKENS, PROMPTS, LENGTHS, strict=True)]
)


def our_advantages(stage: Any, *, scores: Any = SCORES) -> tuple[Tensor, Tensor]:
    finished = torch.tensor([length < MAX_LENGTH for length in LENGTHS])
    answers = Generated(ANSWERS, MASK, MASK, MASK.long(), finished)
    total = torch.tensor(scores)
    scored = ScoredSamples(total=total, at_end=total, per_token=None, breakdown={"score": total})
    old, ref, values = (torch.where(MASK, f(ANSWERS), 0.0) for f in (policy, reference, critic))
    shaped = stage.shape_rewards(answers, scored, old, ref)
    apart = {} if shaped.kl_rewards is None else {"kl_rewards": shaped.kl_rewards}
    return stage.advantages(shaped.rewards, values, MASK, GROUPS, scored.weighted, **apart)


def stage_of(kind: type, **options: Any) -> Any:
    generation = GenerationSpec(max_new_tokens=MAX_LENGTH, num_samples=3)
    rewards = [WeightedReward(LengthReward(target=3))]
    return kind(ModelSpec(path="not built"), rewards, generation=generation, **options)


CLIP = (-1.0, 1.5)
"""Tight enough to decide for some answers under every estimator."""


def ours_like(
    estimator: str, *, coef: float = 0.3, kl: str = "k1", gamma: float = 1.0, std: bool = True, **shaping: Any
) -> Any:
    """The stage that their options stand for."""
    held = {"control": FixedKL(coef), "estimator": kl, "bound": 10.0, "loss_coef": 0.0}
    if estimator == "gae":
        return stage_of(
            PPOModule,
            credit=Gae(gamma=gamma, lam=0.9),
            kl=KLSpec(**held),
            shaping=RewardShaping(clip=CLIP, **shaping),
            whiten_advantages=True if std else "mean",
        )
    if estimator == "reinforce":
        credit = BatchNormalised(gamma=gamma, divide_by_std=std)
        return stage_of(GRPOModule, credit=credit, kl=KLSpec(**held), shaping=RewardShaping(clip=CLIP, **shaping))
    credits = {
        "rloo": LeaveOneOut(),
        "reinforce_baseline": Centred(),
        "group_norm": GroupNormalised(ddof=1, floor=1e-9),
        "dr_grpo": Centred(),
        "flash_reinforce": BatchCentred(),
    }
    whiten = (True if std else "mean") if estimator == "reinforce_baseline" else False
    return stage_of(
        GRPOModule,
        credit=credits[estimator],
        kl=KLSpec(**held, credited="to_come"),
        shaping=RewardShaping(**shaping),
        clip_advantages=CLIP,
        whiten_advantages=whiten,
    )


ESTIMATORS = ["gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce"]


def test_every_estimator_is_compared():
    offered = {action.dest: action.choices for action in openrlhf_parser("train_ppo_ray")._actions}
    assert offered["algo.advantage.estimator"] == ESTIMATORS


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_and_returns(estimator, kl, std, monkeypatch):
    options = {"algo__advantage__estimator": estimator, "algo__kl__estimator": kl, "reward__clip_range": CLIP}
    gamma = 0.9 if estimator in ("gae", "reinforce") else 1.0
    options |= {"algo__advantage__lambd": 0.9, "algo__advantage__gamma": gamma, "algo__advantage__no_std_norm": not std}
    theirs, their_returns, _ = their_advantages(monkeypatch, **options)
    ours, our_returns = our_advantages(ours_like(estimator, kl=kl, gamma=gamma, std=std))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    if estimator in ("gae", "reinforce"):  # of the others they are nobody's target, and ours are of scores
        torch.testing.assert_close(our_returns, their_returns, **TOLERANCE)
    free, _, _ = their_advantages(monkeypatch, **options | {"reward__clip_range": (-1e6, 1e6)})
    assert (free - theirs).abs().max() > 1e-2, "the clip is to decide somewhere"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_with_kl_in_the_loss(estimator, monkeypatch):
    """algo.kl.use_loss: no KL in the reward."""
    options = {"algo__advantage__estimator": estimator, "algo__kl__use_loss": True, "reward__clip_range": CLIP}
    theirs, _, _ = their_advantages(monkeypatch, **options, algo__advantage__lambd=0.9)
    ours, _ = our_advantages(ours_like(estimator, coef=0.0))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("stop", [None, 0.5, 0.0, -0.75])
@pytest.mark.parametrize("overlong", [None, 4])
@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_penalties_for_length(estimator, overlong, stop, monkeypatch):
    """Overlong first, then what is said of answers that did not end: a factor, or a score of their own below 0."""
    options = {"reward__overlong_buffer_len": overlong, "reward__overlong_penalty_factor": 1.5}
    options |= {"reward__stop_properly_penalty_coef": stop, "reward__clip_range": CLIP}
    theirs, _, made = their_advantages(
        monkeypatch, algo__advantage__estimator=estimator, algo__advantage__lambd=0.9, **options
    )
    shaping = {} if overlong is None else {"overlong_cache": overlong, "overlong_factor": 1.5}
    if stop is not None:
        shaping |= {"missing_eos_score": stop} if stop < 0 else {"missing_eos_factor": stop}
    ours, _ = our_advantages(ours_like(estimator, **shaping))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    noted = torch.cat([experience.info["reward"] for experience in made])
    assert torch.equal(noted, torch.tensor(SCORES)) == (overlong is None and stop is None)


def test_the_overlong_penalty_by_every_length():
    experiences = [
        SimpleNamespace(rewards=torch.zeros(1), response_length=torch.tensor([n]), info={}) for n in range(1, 12)
    ]
    penalties.apply_overlong_penalty(experiences, 10, 4.0, 2.0)
    theirs = torch.cat([experience.rewards for experience in experiences])
    ours = 2.0 * soft_overlong_punishment(torch.arange(1, 12), max_length=10, cache=4)
    torch.testing.assert_close(ours, theirs)
    assert theirs.min() == -2


# --- the price of KL


@pytest.mark.parametrize("observed", [0.01, 0.2, 0.21, 0.6, -0.3])
def test_the_adaptive_controller(observed):
    theirs, ours = controllers.AdaptiveKLController(0.01, 0.2, 10000), AdaptiveKL(0.01, 0.2, 10000.0, per="token")
    coef = ours.initial_coef
    for _ in range(3):
        theirs.update(observed, 1024)
        coef = ours.next_coef(coef, observed, 1024)
    assert coef == pytest.approx(float(theirs.value))


def test_what_steers_is_the_mean_kl_per_token_of_each_answer(monkeypatch):
    *_, made = their_advantages(monkeypatch, algo__advantage__estimator="rloo")
    observed = torch.cat([experience.info["kl"] for experience in made]).mean().item()
    old, ref = (torch.where(MASK, f(ANSWERS), 0.0) for f in (policy, reference))
    unheld = (old - ref).sum(-1) / MASK.sum(-1)
    held = torch.where(MASK, utils.compute_approx_kl(old, ref), 0.0).sum(-1) / MASK.sum(-1)
    assert observed == pytest.approx(held.mean().item(), rel=1e-5)
    assert unheld.mean().item() > observed
    control = AdaptiveKL(0.1, observed / 1.1, 1000.0, per="token")
    for bound, steers in ((10.0, observed), (None, unheld.mean().item())):
        stage = stage_of(GRPOModule, kl=KLSpec(control, bound=bound))
        our_advantages(stage)
        assert stage.shaper.kl_coef == pytest.approx(control.next_coef(0.1, steers, 6))


def test_differs_a_short_horizon_makes_their_coefficient_negative():
    theirs = controllers.AdaptiveKLController(0.01, 0.2, 100)
    theirs.update(0.0, 1024)
    assert theirs.value < 0
    with pytest.raises(ValueError, match=r"horizon=100 is too short for rollouts of 1024"):
        AdaptiveKL(0.01, 0.2, 100.0).next_coef(0.01, 0.0, 1024)


# --- differences on purpose


def test_differs_a_group_of_equal_scores_under_a_floor_of_1e_9(monkeypatch):
    """Their sums in float32 leave a rounding error that the floor blows up; ours, in float64, leave exactly 0."""
    scores = [0.9] * 3 + [1.0, 2.0, 3.0]
    theirs, _, _ = their_advantages(
        monkeypatch, scores=scores, coef=0.0, algo__advantage__estimator="group_norm", algo__kl__use_loss=True
    )
    ours, _ = our_advantages(ours_like("group_norm", coef=0.0), scores=scores)
    assert theirs[:3][MASK[:3]].abs().min() > 0.5  # 60, held at 10; 0.8 where the deviation has the same error
    assert (ours[:3] == 0).all()


def test_differs_whitening_what_does_not_vary(monkeypatch):
    """Both bound the variance by 1e-8, theirs by the larger of the two, ours by adding it: a factor of 1.4 at 1e-8."""
    scores = [1e-4, -1e-4] * 3  # returns of REINFORCE, without KL: a variance of 1e-8 less the mean's square
    options = {"algo__advantage__estimator": "reinforce", "algo__kl__use_loss": True}
    theirs, _, _ = their_advantages(monkeypatch, scores=scores, coef=0.0, **options)
    ours, _ = our_advantages(ours_like("reinforce", coef=0.0), scores=scores)
    ratio = (theirs[MASK] / ours[MASK]).unique()
    variance = torch.tensor(scores)[:, None].expand_as(MASK)[MASK].double().var(correction=0).item()
    expected = ((variance + 1e-8) / max(variance, 1e-8)) ** 0.5
    torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=1e-4, atol=0)
    assert expected > 1.3


def test_differs_kl_is_part_of_the_score_by_default(monkeypatch):
    """An answer's score less its KL is compared with the others' scores less theirs, as in TRL's RLOO."""
    theirs, _, _ = their_advantages(monkeypatch, algo__advantage__estimator="dr_grpo", reward__clip_range=(-1e6, 1e6))
    kl = torch.where(MASK, utils.compute_approx_kl(policy(ANSWERS), reference(ANSWERS)), 0.0)
    to_come = kl.flip(-1).cumsum(-1).flip(-1)
    scores = torch.tensor(SCORES)
    mean = scores.view(2, 3).mean(-1).repeat_interleave(3)
    torch.testing.assert_close(theirs, torch.where(MASK, (scores - mean)[:, None] - 0.3 * to_come, 0.0), **TOLERANCE)
    paid = scores - 0.3 * kl.sum(-1)
    ours, _ = our_advantages(stage_of(GRPOModule, credit=Centred(), kl=KLSpec(FixedKL(0.3), bound=10.0)))
    mean = paid.view(2, 3).mean(-1).repeat_interleave(3)
    torch.testing.assert_close(ours, torch.where(MASK, (paid - mean)[:, None], 0.0), **TOLERANCE)
    assert (ours - theirs).abs().max() > 0.1


def test_reinforce_baseline_without_kl_is_our_credit_of_that_name(monkeypatch):
    options = {"algo__advantage__estimator": "reinforce_baseline", "algo__kl__use_loss": True}
    theirs, _, _ = their_advantages(monkeypatch, **options)
    ours, _ = our_advantages(stage_of(GRPOModule, credit=CentredBatchNormalised(), kl=KLSpec(FixedKL(0.0))))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_differs_tokens_of_others_within_an_answer(lam):
    """Where a tool's words stand within an answer, theirs count as states worth 0 and pass credit through them, ours
    are stepped over: the same at lambda 1 and gamma 1."""
    mask = torch.tensor([[True, False, False, True, True]])
    rewards, values = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 9.0, 0.25, 0.75]])
    theirs, _ = maker.RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, mask, 1.0, lam)
    ours, _ = Gae(lam=lam)(rewards, values, mask, torch.tensor([0]))
    if lam == 1:
        torch.testing.assert_close(ours[mask], theirs[mask])
        return
    last, middle = 1 - 0.75, 0.75 - 0.25 + lam * (1 - 0.75)
    assert ours[0].tolist() == pytest.approx([0.25 - 0.5 + lam * middle, 0, 0, middle, last])
    assert theirs[0, 0].item() == pytest.approx(0 - 0.5 + lam * (0 - 0 + lam * (0.25 - 0 + lam * middle)))


# --- filtering of groups


class Engine:
    """Their engine, which answers a prompt with the scores that are its text."""

    class get_num_unfinished_requests:
        remote = staticmethod(lambda: 0)

    class generate_responses:
        @staticmethod
        def remote(prompt: str, num_samples: int, **_: Any) -> Any:
            scores = [float(score) for score in prompt.split()]
            assert len(scores) == num_samples
            return [
                {
                    "prompt": prompt,
                    "label": "",
                    "observation_tokens": [5, 6, 7],
                    "action_ranges": [(1, 3)],
                    "rollout_log_probs": None,
                    "reward": 2.0 * score,  # what is filtered are `scores`, and not rewards
                    "scores": score,
                }
                for score in scores
            ]


@pytest.mark.parametrize("within", [(0.0, 1.0), (0.3, 0.6)])
def test_groups_are_filtered_by_their_mean_score(within, monkeypatch):
    def wait(pending: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return pending[:1], pending[1:]

    monkeypatch.setattr(generator, "ray", SimpleNamespace(get=lambda x: x, wait=wait))
    monkeypatch.setattr(
        generator, "tqdm", lambda *_, **__: SimpleNamespace(set_postfix=lambda *_: None, update=lambda: None)
    )
    prompts = [
        "1 1 1 1",
        "0 0 0 0",
        "1 0 0 0",
        "1 1 0 0",
        "0.5 0.5 0.5 0.5",
        "3 -1 0 0",
        "0.25 0.25 0.3 0.4",
        "2 2 0 0",
    ]
    args = openrlhf_arguments(
        rollout__n_samples_per_prompt=4, algo__dynamic_filtering_enable=True, algo__dynamic_filtering_range=within
    )
    theirs = generator.SamplesGenerator(SimpleNamespace(args=args), None, None, None, [Engine()])
    rows = iter([(None, [prompt], [""], [None]) for prompt in prompts])
    kept, consumed, _ = theirs._generate_vllm(rows, len(prompts), dynamic_filtering=True)
    assert consumed == len(prompts)
    kept = [experience.prompts[0] for experience in kept][::4]
    scores = torch.tensor([[float(score) for score in prompt.split()] for prompt in prompts])
    groups = torch.arange(len(prompts)).repeat_interleave(4)
    ours = mean_is_within(scores.flatten(), groups, *within).view(-1, 4)
    assert (ours == ours[:, :1]).all()
    assert [prompt for prompt, keep in zip(prompts, ours[:, 0], strict=True) if keep] == kept
    assert 0 < len(kept) < len(prompts)
