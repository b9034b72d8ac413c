"""Verifiers inside a stage: it refuses to start without what they need, and trains with it."""

import json

import pytest
import torch
from fits import fit

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards import CodeTests, Ensemble, ExactMatch, RegexFormat, WeightedReward
from rlhf_lightning.rewards import sandbox as sandbox_module
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, PPOModule


class Started(AssertionError):
    """An answer was sampled."""


def stage(cls, model, reward, **options):
    return cls(
        ModelSpec(path=str(model)),
        [WeightedReward(reward, name="check")],
        generation=GenerationSpec(max_new_tokens=4, **options),
        updates=UpdateSpec(inner_epochs=1),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        seed=1,
    )


def prompts(folder, *records):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"train": str(path), "batch_size": len(records)}


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in an ensemble"])
def test_a_stage_without_a_sandbox_stops_before_the_first_answer(wrapped, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_module._working_command.cache_clear()
    reward = CodeTests()
    module = stage(PPOModule, tiny_model, Ensemble([WeightedReward(reward)]) if wrapped else reward)

    def generate(*arguments, **options):
        raise Started

    monkeypatch.setattr(module, "generate", generate)
    with pytest.raises(UserError, match="there is no bwrap on PATH"):
        fit(module, tmp_path, data=prompts(tmp_path, {"prompt": "the film", "tests": "assert True"}))
    sandbox_module._working_command.cache_clear()


def test_prompts_without_the_verifiers_column_are_named_by_it(tiny_model, tmp_path):
    module = stage(PPOModule, tiny_model, ExactMatch(answer_column="key"))
    with pytest.raises(
        UserError, match=r"ExactMatch needs the column 'key'.*its columns: answer, prompt\..*answer_column"
    ):
        fit(module, tmp_path, data=prompts(tmp_path, {"prompt": "the film", "answer": "good"}))


@pytest.mark.parametrize("cls", [PPOModule, GRPOModule])
def test_a_gated_ensemble_trains_and_logs_its_members(cls, tiny_model, tmp_path):
    words = RegexFormat(pattern=r"\s*\w+( \w+)*\s*")
    key = ExactMatch(pattern=r"(\w+)\s*$")
    members = [WeightedReward(words, name="form"), WeightedReward(key, name="key", weight=2.0)]
    module = stage(cls, tiny_model, Ensemble(members, mode="gated", gate="form", gated_score=-1.0), num_samples=4)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    records = [{"prompt": f"the {word}", "answer": ["good", "film", "was"]} for word in ("film", "plot", "end")]
    trainer = fit(module, tmp_path, data=prompts(tmp_path, *records))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["rollout/score"] == pytest.approx(metrics["reward/check"])
    assert {"reward/check/form", "reward/check/key"} <= set(metrics)
    form, right = metrics["reward/check/form"], metrics["reward/check/key"]
    assert metrics["reward/check"] == pytest.approx(2 * right - (1 - form), abs=1e-5)
    assert any(not torch.equal(before[name], p) for name, p in module.policy.named_parameters())
