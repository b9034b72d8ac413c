"""Process reward models as rewards: every step judged behind those before it, the answer by its steps."""

import json
import math
import shutil

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.models.export import export_scalar_model
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards import ProcessRewardScore, RewardModelScore, WeightedReward, score_samples

SAMPLES = [
    Sample("the film", "was good\nvery very good\nend"),
    Sample("the long plot was", "not bad\n\n  \nthe end\n"),
    Sample("the actors", "good"),
    Sample("the actors", "\n"),
]
STEPS = [["was good", "very very good", "end"], ["not bad", "the end"], ["good"], []]


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A random process reward model, and the same weights as a model of whole answers."""
    made = {}
    for pooling in ("steps", "last"):
        spec = ModelSpec(path=str(tiny_model))
        model = load_scalar_model(spec, pooling=pooling, seed=5)
        with torch.no_grad():
            model.head.weight *= 4  # so that probabilities lie on both sides of 1/2
        made[pooling] = str(export_scalar_model(model, load_tokenizer(spec), tmp_path_factory.mktemp(pooling) / "hf"))
    return made


@pytest.fixture(scope="module")
def judge(folders):
    """Probability that each step is right: sigma of the score of prompt and steps up to it, read as one text alone."""
    spec = ModelSpec(path=folders["steps"])
    model, tokenizer = load_scalar_model(spec).eval(), load_tokenizer(spec)

    def judge(prompt, steps):
        right = []
        for end in range(1, len(steps) + 1):
            ids = torch.tensor([tokenizer(" ".join([prompt, *steps[:end]]))["input_ids"]])
            with torch.no_grad():
                said = model.token_values(ids, torch.ones_like(ids).bool(), torch.arange(ids.shape[1])[None])
            right.append(torch.sigmoid(said[0, -1]).item())
        return right

    return judge


@pytest.fixture(scope="module")
def by_prefix(judge):
    return [judge(sample.prompt, steps) for sample, steps in zip(SAMPLES, STEPS, strict=True)]


@pytest.mark.parametrize(
    ("combine", "how"),
    [("min", min), ("product", math.prod), ("mean", lambda p: sum(p) / len(p)), ("last", lambda p: p[-1])],
)
def test_an_answer_is_scored_by_its_steps(combine, how, folders, by_prefix):
    expected = [how(p) if p else 0.0 for p in by_prefix]
    for batch_size in (1, 2, 32):
        scored = ProcessRewardScore(folders["steps"], combine=combine, batch_size=batch_size)(SAMPLES)
        assert scored.scores == pytest.approx(expected, abs=1e-6)


def test_what_is_behind_a_score_is_told(folders, by_prefix):
    out = score_samples([WeightedReward(ProcessRewardScore(folders["steps"]), name="process")], SAMPLES)
    assert out.parts["process/steps"].tolist() == [3, 2, 1, 0]
    wrong = [[p < 0.5 for p in right] for right in by_prefix]
    assert {flag for flags in wrong for flag in flags} == {True, False}
    expected = [flags.index(True) / len(flags) if True in flags else float(bool(flags)) for flags in wrong]
    assert out.parts["process/first_wrong"].tolist() == pytest.approx(expected)


def test_a_step_is_judged_behind_its_separator_as_in_training(folders, judge):
    sample = Sample("the actors", "good not very bad")
    scored = ProcessRewardScore(folders["steps"], separator=" not ", combine="product")([sample])
    assert scored.scores == pytest.approx([math.prod(judge("the actors", ["good not", "very bad not"]))], abs=1e-6)


def test_models_of_steps_and_of_answers_are_told_apart(folders):
    with pytest.raises(UserError, match=r"is a process reward model, which scores steps .*: use ProcessRewardScore"):
        RewardModelScore(folders["steps"])(SAMPLES)
    with pytest.raises(UserError, match=r"scores whole answers \(pooling last\), not steps: use RewardModelScore, or"):
        ProcessRewardScore(folders["last"])(SAMPLES)


def test_a_prompt_too_long_loses_its_beginning_and_no_step(folders):
    long = Sample("the film was good but dull and", "very long\nvery bad")
    short = Sample("and", "very long\nvery bad")
    cut = ProcessRewardScore(folders["steps"], max_length=6)([long]).scores  # <bos> and 4 words of answer, 1 of prompt
    assert cut == pytest.approx(ProcessRewardScore(folders["steps"])([short]).scores, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "max"}, r"combine='max' of 'x': use min, product, mean or last"),
        ({"separator": ""}, r"separator='' of 'x' ends no step: give what stood between steps in training"),
        ({"batch_size": 0}, r"batch_size=0 of reward model 'x': give at least 1"),
    ],
)
def test_impossible_settings_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        ProcessRewardScore("x", **arguments)


def test_a_pooling_that_does_not_exist_is_named(folders, tmp_path):
    shutil.copytree(folders["last"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"pooling": "max"}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"pooling='max' of .*hf.* is unknown: use last, mean, steps"):
        RewardModelScore(str(tmp_path / "hf"))(SAMPLES)
