"""Options of on-policy stages that a YAML file may give in more than one form."""

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from rlhf_lightning.stages import GRPOModule
from rlhf_lightning.stages.grpo import DynamicSampling
from rlhf_lightning.stages.reward_shaping import RewardShaping


def read(kind: Any, config: dict[str, Any]) -> Any:
    """The object that a config names, after the config was written and read again."""
    parser = ArgumentParser()
    parser.add_argument("--choice", type=kind)
    again = parser.parse_string(parser.dump(parser.parse_object({"choice": config})))
    return parser.instantiate(again).choice


def test_one_end_or_both():
    assert read(RewardShaping, {"clip": 10}) == RewardShaping(clip=10.0)
    assert read(RewardShaping, {"clip": [-1, 3]}) == RewardShaping(clip=(-1.0, 3.0))
    assert read(DynamicSampling, {"mean_within": [0, 1]}) == DynamicSampling(mean_within=(0.0, 1.0))


@pytest.mark.parametrize("whitening", [True, False, "mean"])
def test_what_becomes_of_advantages(whitening, tiny_model):
    parser = ArgumentParser()
    parser.add_class_arguments(GRPOModule, "model")
    reward = {"class_path": "rlhf_lightning.rewards.text_rules.LengthReward", "init_args": {"target": 3}}
    options = {"clip_advantages": [-1, 3], "whiten_advantages": whitening, "auxiliary_reduction": "token_mean"}
    given = {"policy": {"path": str(tiny_model)}, "rewards": [{"reward": reward}], **options}
    again = parser.parse_string(parser.dump(parser.parse_object({"model": given})))
    module = parser.instantiate(again).model
    assert module.clip_advantages == (-1.0, 3.0)
    assert module.whiten_advantages is whitening or module.whiten_advantages == whitening == "mean"
    assert (module.reduction, module.auxiliary_reduction) == ("sequence_mean", "token_mean")
