"""Online DPO: pairs of the policy's own answers, by their effect."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from fits import fit
from one_step import another, records

from rlhf_lightning.advantages.pairs import PairRule
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.losses import DPO, IPO, TPO, XPO, BetaDPO, NashMD, SimPO, WeightedLoss, WeightedLosses
from rlhf_lightning.losses.preference_free import ChosenNLL
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import DPOModule, OnlineDPOModule
from rlhf_lightning.stages.online_dpo import Opponent

SIMPO = SimPO(beta=2.0, gamma=0.5)


class FirstToken(RewardFn):
    """1 for answers that begin with one of these tokens, else 0."""

    def __init__(self, *wanted: int) -> None:
        self.wanted = wanted

    def __call__(self, samples):
        return [float(bool(sample.tokens) and sample.tokens[0] in self.wanted) for sample in samples]


class Constant(RewardFn):
    def __call__(self, samples):
        return [1.0] * len(samples)


class Ids(RewardFn):
    """A score that tells any two answers apart."""

    def __call__(self, samples):
        return [sum(token * 0.37**i for i, token in enumerate(sample.tokens)) for sample in samples]


def online(model, reward=None, **options) -> OnlineDPOModule:
    defaults = {
        "generation": GenerationSpec(max_new_tokens=5, num_samples=4),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "seed": 1,
    }
    spec = options.pop("policy", ModelSpec(path=str(model)))
    return OnlineDPOModule(spec, [WeightedReward(reward or Ids(), name="reward")], **(defaults | options))


def prompts(write_jsonl, count: int = 12) -> str:
    return write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:count]])


class Keep:
    """Answers and pairs of a run."""

    def __init__(self, module: OnlineDPOModule) -> None:
        self.answered, self.rollouts, prepare = [], [], module.prepare

        def keeping(answered, phase):
            rollouts, metrics = prepare(answered, phase)
            self.answered.append(answered)
            self.rollouts.append(rollouts)
            return rollouts, metrics

        module.prepare = keeping


def answer_of(tokens, mask) -> tuple[int, ...]:
    return tuple(tokens[mask].tolist())


def largest_change(before, module) -> float:
    return max(float((p.detach() - before[name]).abs().max()) for name, p in module.named_parameters())


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_the_best_answer_of_each_prompt_is_compared_with_the_worst(tiny_model, write_jsonl, tmp_path):
    module = online(tiny_model)
    keep = Keep(module)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    [answered], [pairs] = keep.answered, keep.rollouts
    answers, scores = answered.answers, answered.scored.total
    expected, margins = [], []
    for group in range(12):
        rows = range(4 * group, 4 * group + 4)
        best, worst = max(rows, key=lambda i: scores[i]), min(rows, key=lambda i: scores[i])
        if scores[best] > scores[worst]:
            expected.append(tuple(answer_of(answers.tokens[i], answers.mask[i]) for i in (best, worst)))
            margins.append(float(scores[best] - scores[worst]))
    found = [tuple(answer_of(pairs.tokens[i, j], pairs.mask[i, j]) for j in (0, 1)) for i in range(len(pairs.tokens))]
    assert found == expected
    assert pairs.margins.tolist() == pytest.approx(margins, rel=1e-5)
    assert metrics["pairs/trained"].item() == len(expected)
    assert metrics["pairs/found_frac"].item() == pytest.approx(len(expected) / 12)
    assert metrics["pairs/margin"].item() == pytest.approx(sum(margins) / len(margins), rel=1e-5)
    assert metrics["rollout/score"].item() == pytest.approx(float(scores.mean()), rel=1e-5)
    assert metrics["rollout/sequences"].item() == 48


def test_the_first_loss_is_log_2_and_the_gradient_that_of_dpo_on_the_same_records(tiny_model, write_jsonl, tmp_path):
    """The pairs written to a file and given to DPOModule: one step, the same weights."""
    sgd = lambda params: torch.optim.SGD(params, lr=0.5)  # noqa: E731
    loss = WeightedLosses([WeightedLoss(DPO(beta=0.5)), WeightedLoss(ChosenNLL(), 0.3), WeightedLoss(BetaDPO())])
    module = online(tiny_model, loss=loss, optimizer=sgd, reference=another(str(tiny_model)))
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [pairs] = keep.rollouts
    offline = DPOModule(
        ModelSpec(path=str(tiny_model)), loss, reference=another(str(tiny_model)), optimizer=sgd, seed=1
    )
    offline.configure_model()
    offline._trainer = None
    records_of = pairs.as_pairs()
    scores, _ = offline._pairs(records_of)
    output = offline.pair_loss(records_of, scores)
    offline.objective.share(output, records_of).backward()
    with torch.no_grad():
        for parameter in offline.parameters():
            parameter -= 0.5 * parameter.grad
    ours = dict(module.named_parameters())
    start = online_start(tiny_model)
    assert max(float((p.detach() - start[name]).abs().max()) for name, p in ours.items()) > 1e-3
    for name, parameter in offline.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-6)


def online_start(model):
    module = online(model)
    module.configure_model()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def test_the_loss_starts_at_log_2(tiny_model, write_jsonl, tmp_path):
    metrics = fit(online(tiny_model), tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    assert metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["displacement/chosen"].item() == pytest.approx(0, abs=1e-5)


def test_random_pairs_are_drawn_anew_for_every_rollout_and_the_same_in_every_run(tiny_model, write_jsonl, tmp_path):
    runs = []
    for _ in range(2):
        module = online(tiny_model, pairs=PairRule("random"), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        keep = Keep(module)
        fit(module, tmp_path, data={"train": prompts(write_jsonl, 6), "batch_size": 6}, max_epochs=2)
        runs.append(keep.rollouts)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(*runs, strict=True))
    best = online(tiny_model, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    keep = Keep(best)
    fit(best, tmp_path, data={"train": prompts(write_jsonl, 6), "batch_size": 6})
    assert not torch.equal(keep.rollouts[0].tokens, runs[0][0].tokens)


def test_cut_off_answers_lose_points(tiny_model, write_jsonl, tmp_path):
    class HalfEnds(OnlineDPOModule):
        def sample(self, prompts):
            answers = super().sample(prompts)
            return replace(answers, finished=torch.arange(len(answers.tokens)) % 4 == 2)

    module = HalfEnds(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(Constant())],
        missing_eos_penalty=0.5,
        generation=GenerationSpec(max_new_tokens=5, num_samples=4),
    )
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [answered], [pairs] = keep.answered, keep.rollouts
    assert pairs.margins.tolist() == [0.5] * 12
    assert torch.equal(pairs.tokens[:, 0], answered.answers.tokens[2::4])


# ---- nothing to learn from -------------------------------------------------------------------------------------------


def test_a_rollout_of_ties_changes_no_parameter(tiny_model, write_jsonl, tmp_path):
    module = online(
        tiny_model,
        Constant(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
        reference_sync=ReferenceSync(every=1),
    )
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = {"train": prompts(write_jsonl), "batch_size": 4}
    trainer = fit(module, tmp_path, data=data, max_epochs=2, accumulate_grad_batches=2)
    assert largest_change(before, module) == 0.0
    assert trainer.callback_metrics["pairs/trained"].item() == 0
    assert "train/loss" not in trainer.callback_metrics


def test_fewer_pairs_than_pieces_leave_some_of_them_empty(tiny_model, write_jsonl, tmp_path):
    """Two prompts in four micro-batches have the gradient that they have in one; no loss is NaN."""
    gradients = []
    for accumulate in (1, 4):
        module = online(tiny_model, loss=SIMPO, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        seen = {}
        module.on_before_optimizer_step = lambda optimizer, m=module, seen=seen: seen.update(
            {n: p.grad.clone() for n, p in m.named_parameters()}
        )
        data = {"train": prompts(write_jsonl, 2), "batch_size": 2}
        fit(module, tmp_path, data=data, accumulate_grad_batches=accumulate)
        gradients.append(seen)
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_dropped_answer_is_in_no_pair(tiny_model, write_jsonl, tmp_path):
    class Some(RewardFn):
        def __call__(self, samples):
            return [100.0 if i % 4 == 0 else math.nan if i % 4 == 1 else float(i % 4) for i in range(len(samples))]

    module = online(tiny_model)
    module.rewards = [WeightedReward(Some(), on_error="drop")]
    keep = Keep(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [answered], [pairs] = keep.answered, keep.rollouts
    assert torch.equal(pairs.tokens[:, 0], answered.answers.tokens[0::4])
    assert torch.equal(pairs.tokens[:, 1], answered.answers.tokens[2::4])
    assert pairs.mask.any(-1).all()
    assert trainer.callback_metrics["rollout/valid_frac"].item() == 0.75


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": SIMPO, "updates": UpdateSpec(inner_epochs=2, num_minibatches=2)},
        {"loss": XPO(alpha=1e-3), "opponent": Opponent()},
        {"loss": NashMD(kl_coef=0.02), "opponent": Opponent(reference_share=0.25)},
    ],
    ids=["dpo", "simpo, four steps a rollout", "xpo", "nash-md"],
)
def test_it_learns_what_is_rewarded(options, tiny_model, write_jsonl, tmp_path):
    module = online(tiny_model, FirstToken(4, 5, 6, 7), **options)
    scores = []
    prepare = module.prepare

    def noting(answered, phase):
        rollouts, metrics = prepare(answered, phase)
        scores.append(metrics["rollout/score"])
        return rollouts, metrics

    module.prepare = noting
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}, max_epochs=14)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.2, scores


def test_the_reference_follows_and_is_in_the_checkpoint(tiny_model, write_jsonl, tmp_path):
    module = online(tiny_model, reference_sync=ReferenceSync(every=3))
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 4})
    assert trainer.global_step == 3
    ours, reference = module.policy.state_dict(), module.reference.policy.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in reference.items())
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert all(torch.equal(ours[name], value) for name, value in checkpoint["reference"].items())


def test_validation_asks_the_policy_alone(tiny_model, write_jsonl, tmp_path):
    path = prompts(write_jsonl)
    module = online(tiny_model, loss=XPO(), opponent=Opponent(), reference=another(str(tiny_model)))
    metrics = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 12}).callback_metrics
    assert metrics["val/kl"].item() > 0
    assert {"val/score", "val/length", "val/finished_frac", "val/reward_reward"} <= metrics.keys()


# ---- opponents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_every_answer_of_the_policy_meets_one_of_the_reference(lora, tiny_model, write_jsonl, tmp_path):
    module = online(
        tiny_model,
        policy=ModelSpec(path=str(tiny_model), lora=lora),
        reference=None if lora else another(str(tiny_model)),
        opponent=Opponent(),
        loss=IPO(),
    )
    keep = Keep(module)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    [answered], [pairs] = keep.answered, keep.rollouts
    answers, scores = answered.answers, answered.scored.total
    assert len(answers.tokens) == 48
    own, other = scores.view(12, 2, 2).unbind(1)
    told_apart = own != other
    assert len(pairs.tokens) == int(told_apart.sum()) <= 24
    assert pairs.own.sum(-1).tolist() == [1] * len(pairs.own)
    assert pairs.own[:, 0].tolist() == (own > other)[told_apart].tolist()
    assert metrics["rollout/score"].item() == pytest.approx(float(own.mean()), rel=1e-5)
    assert metrics["pairs/opponent_score"].item() == pytest.approx(float(other.mean()), rel=1e-5)
    assert metrics["pairs/own_wins_frac"].item() == pytest.approx(float((own > other)[told_apart].float().mean()))
    assert metrics["rollout/sequences"].item() == 24


def test_the_opponents_answers_are_drawn_from_the_reference(tiny_model, write_jsonl, tmp_path):
    """Sampled as good as greedily the two halves are what the two models find most probable."""
    generation = GenerationSpec(max_new_tokens=4, num_samples=2, temperature=1e-4)
    module = online(tiny_model, opponent=Opponent(), reference=another(str(tiny_model)), generation=generation)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    answers = keep.answered[0].answers
    from rlhf_lightning.models.loading import load_policy

    for half, spec in ((0, ModelSpec(path=str(tiny_model))), (1, another(str(tiny_model)))):
        rows = answers.select(torch.arange(half, 24, 2))
        most_probable = load_policy(spec)(rows).is_argmax
        assert most_probable[rows.mask].float().mean() > 0.95


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": GenerationSpec()}, r"generation.num_samples=1 leaves nothing to compare"),
        ({"missing_eos_penalty": -1.0}, r"missing_eos_penalty=-1.0 would pay for not ending"),
        (
            {"generation": GenerationSpec(num_samples=3), "opponent": Opponent()},
            r"generation.num_samples=3 cannot be shared between the policy and its opponent.*give an even number",
        ),
        ({"loss": TPO()}, r"TPO reads a gold answer to each prompt, and sampled pairs have none: use DPOModule"),
        ({"loss": XPO()}, r"XPO compares the policy's answers with another model's.*set opponent"),
        ({"loss": NashMD()}, r"NashMD compares the policy's answers with another model's.*set opponent"),
    ],
)
def test_wrong_options(options, message, tiny_model):
    with pytest.raises(UserError, match=message):
        online(tiny_model, **options)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none(share):
    with pytest.raises(UserError, match=rf"opponent.reference_share={share} is the reference's share"):
        Opponent(reference_share=share)


def test_dpo_of_records_has_no_opponent(tiny_model):
    with pytest.raises(UserError, match=r"XPO asks which answer of a pair the policy drew itself.*use OnlineDPOModule"):
        DPOModule(ModelSpec(path=str(tiny_model)), XPO())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"loss": SIMPO, "reference_sync": ReferenceSync()}, "reference_sync"),
        ({"loss": SIMPO, "reference": ModelSpec(path="x")}, "reference"),
        ({"opponent": Opponent(), "pairs": PairRule("random")}, "pairs"),
    ],
)
def test_options_without_effect(options, key, tiny_model):
    assert [name for name, _ in online(tiny_model, LengthReward(target=3), **options).inert_options()] == [key]


def test_without_need_of_a_reference_there_is_none(tiny_model):
    module = online(tiny_model, loss=SIMPO)
    module.configure_model()
    assert module.reference is None


def test_a_loss_that_is_exchanged_is_the_one_that_is_trained(tiny_model):
    for module in (online(tiny_model), DPOModule(ModelSpec(path=str(tiny_model)))):
        module.loss = SIMPO
        assert module.loss is module.objective.loss is SIMPO
