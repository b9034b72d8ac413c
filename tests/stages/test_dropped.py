"""An answer that no reward function could score teaches nothing: as if it had never been asked for."""

import json
import math
from dataclasses import replace

import one_step
import pytest
import torch
from fits import fit

from rlhf_lightning.advantages import ReMax
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards import Ensemble, LengthReward, WeightedReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, PPOModule

BROKEN = (0, 5, 11)
"""Rows whose score is no number; the others' is their own."""


class Sometimes(RewardFn):
    def __call__(self, samples):
        own = LengthReward(target=4)(samples)
        broken = [s.record.get("row") in BROKEN for s in samples]
        return [math.nan if bad else score for bad, score in zip(broken, own, strict=True)]


def written(folder, rows):
    path = folder / f"{len(rows)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_with_dropped_answers_is_the_step_without_them(accumulate, tiny_model, tmp_path):
    rows = one_step.records("ppo")
    kept = [row for row in rows if row["row"] not in BROKEN]
    drops = {"rewards": [WeightedReward(Sometimes(), name="length", on_error="drop")]}
    plain = {"rewards": [WeightedReward(LengthReward(target=4), name="length")]}
    metrics, gradients = one_step.step(
        "ppo", str(tiny_model), written(tmp_path, rows), accumulate=accumulate, attributes=drops
    )
    expected, without = one_step.step(
        "ppo", str(tiny_model), written(tmp_path, kept), batch_size=len(kept), attributes=plain
    )
    assert without
    for name, gradient in without.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert metrics["rollout/valid_frac"] == pytest.approx(9 / 12)
    for name in expected:
        if not name.startswith("time/") and name != "rollout/valid_frac":
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_a_rollout_of_which_nothing_is_left_moves_no_weight(tiny_model, write_jsonl, tmp_path):
    class Never(RewardFn):
        def __call__(self, samples):
            return [None] * len(samples)

    module = PPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(Ensemble([WeightedReward(Never(), on_error="drop")]))],
        generation=GenerationSpec(max_new_tokens=3),
        updates=UpdateSpec(inner_epochs=2),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        seed=1,
    )
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    path = write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "a plot"}])
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 2})
    assert trainer.global_step == 2
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    assert trainer.callback_metrics["rollout/valid_frac"] == 0


GROUPS = [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9, 10, 11)]
"""Rows of the canned records that answer the same prompt."""


class InGroups(one_step.CannedGRPO):
    """Canned answers, compared within `GROUPS`."""

    def answer(self, draw, phase):
        answered = super().answer(draw, phase)
        rows = [record["row"] for record in answered.prompts.records]
        group = torch.tensor([next(i for i, g in enumerate(GROUPS) if row in g) for row in rows])
        alone = len(GROUPS) + torch.arange(len(rows))  # what was dropped stays by itself
        return replace(answered, groups=torch.where(answered.answers.mask.any(-1), group, alone))


@pytest.mark.parametrize("ensemble", [False, True], ids=["alone", "in an ensemble"])
def test_a_group_is_compared_without_what_was_dropped(ensemble, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(one_step, "CannedGRPO", InGroups)
    rows = one_step.records("grpo")
    kept = [row for row in rows if row["row"] not in BROKEN]
    drops = WeightedReward(Sometimes(), name="length", on_error="drop")
    if ensemble:
        drops = WeightedReward(Ensemble([drops, WeightedReward(LengthReward(target=4))], mode="worst_case"))
    single = {"generation": GenerationSpec(max_new_tokens=10, temperature=0.7)}
    _, gradients = one_step.step(
        "grpo", str(tiny_model), written(tmp_path, rows), attributes={"rewards": [drops], **single}
    )
    plain = {"rewards": [WeightedReward(LengthReward(target=4), name="length")], **single}
    _, without = one_step.step("grpo", str(tiny_model), written(tmp_path, kept), batch_size=len(kept), attributes=plain)
    assert any(gradient.abs().max() > 1e-4 for gradient in without.values())
    for name, gradient in without.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_answers_whose_greedy_rival_cannot_be_scored_are_dropped(tiny_model, tmp_path):
    """ReMax compares with one answer per prompt: where that is no number, there is nothing to compare with."""
    calls = []

    class Second(RewardFn):
        """Scores the first call, the sampled answers; of the second, the greedy ones, all but row 1."""

        def __call__(self, samples):
            calls.append(len(samples))
            scores = [float(len(sample.tokens)) for sample in samples]
            greedy = len(samples) != 6
            return [
                math.nan if greedy and sample.record["row"] == 1 else score
                for sample, score in zip(samples, scores, strict=True)
            ]

    module = GRPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(Second(), on_error="drop")],
        credit=ReMax(),
        generation=GenerationSpec(max_new_tokens=4, num_samples=2),
        updates=UpdateSpec(inner_epochs=1),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        seed=1,
    )
    seen = []
    module.choose, choose = lambda rollouts, *rest: seen.append(rollouts) or choose(rollouts, *rest), module.choose
    fit(
        module,
        tmp_path,
        data={"train": written(tmp_path, one_step.records("grpo")[:3]), "batch_size": 3, "shuffle": False},
    )
    assert calls[:2] == [6, 3]
    (rollouts,) = seen
    assert rollouts.mask.any(-1).tolist() == [True, True, False, False, True, True]
    assert not rollouts.advantages[2:4].any()
