"""Reward functions as a YAML file names them."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards import WeightedReward, score_samples

CONFIG = """
rewards:
  - reward:
      class_path: VaderSentiment
      init_args: {repetition_penalty: 1.5}
  - reward:
      class_path: LengthReward
      init_args: {target: 4, unit: words}
    weight: 0.5
    name: short
  - reward: {class_path: rlhf_lightning.rewards.text_rules.Repetition}
  - reward:
      class_path: Keyword
      init_args: {wanted: [good]}
  - reward:
      class_path: PythonFunction
      init_args: {path: "FILE:bonus", kwargs: {size: 2.0}}
  - reward:
      class_path: RewardModelScore
      init_args: {path: somewhere, batch_size: 4}
    weight: 0.0
"""


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--rewards", type=list[WeightedReward])
    return parser


@pytest.fixture
def config(tmp_path):
    (tmp_path / "mine.py").write_text("def bonus(prompts, size):\n    return [size for _ in prompts]\n")
    file = tmp_path / "rewards.yaml"
    file.write_text(CONFIG.replace("FILE", str(tmp_path / "mine.py")))
    return file


def test_every_reward_is_found_by_its_short_name(parser, config):
    rewards = parser.instantiate(parser.parse_args([f"--config={config}"])).rewards
    assert [r.label for r in rewards] == [
        "VaderSentiment",
        "short",
        "Repetition",
        "Keyword",
        "bonus",
        "RewardModelScore",
    ]
    assert [r.weight for r in rewards] == [1, 0.5, 1, 1, 1, 0]
    out = score_samples(rewards[1:5], [Sample("", "good good good good")])
    assert out.total.item() == pytest.approx(0.5 - 2 / 3 + 1 + 2)


def test_what_is_printed_can_be_read_again(parser, config, tmp_path):
    first = parser.parse_args([f"--config={config}"])
    (tmp_path / "again.yaml").write_text(parser.dump(first))
    again = parser.parse_args([f"--config={tmp_path / 'again.yaml'}"])
    assert parser.dump(again) == parser.dump(first)


def test_a_misspelt_key_is_an_error(parser, config):
    config.write_text(config.read_text().replace("repetition_penalty", "repetition_penalti"))
    with pytest.raises(ArgumentError, match="repetition_penalti"):
        parser.parse_args([f"--config={config}"])
