"""Reward functions as a YAML file names them."""

import json
import pickle

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from rlhf_lightning import rewards
from rlhf_lightning.core.interfaces import RewardFn, Sample
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


NEEDED = {
    "Ensemble": {"members": [{"reward": {"class_path": "LengthReward"}}]},
    "FactTable": {"path": "FILE.csv", "pattern": r"(?P<a>\w)(?P<b>\w)", "value_column": "b"},
    "Keyword": {"wanted": ["good"]},
    "ProcessRewardScore": {"path": "somewhere"},
    "PythonFunction": {"path": "os.path.join"},
    "RegexFormat": {"pattern": ".*"},
    "RewardModelScore": {"path": "somewhere"},
}
"""What a reward cannot be made without."""
CLASSES = [c.__name__ for c in vars(rewards).values() if isinstance(c, type) and issubclass(c, RewardFn)]


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


@pytest.mark.parametrize("name", CLASSES)
def test_every_reward_can_be_named_and_survives_pickling(name, parser, tmp_path):
    (tmp_path / "facts.csv").write_text("a,b\n1,2\n")
    needed = json.loads(json.dumps(NEEDED.get(name, {})).replace("FILE", str(tmp_path / "facts")))
    config = json.dumps([{"reward": {"class_path": name, "init_args": needed}}])
    (made,) = parser.instantiate(parser.parse_args([f"--rewards={config}"])).rewards
    assert type(made.reward).__name__ == name
    assert type(pickle.loads(pickle.dumps(made.reward))) is type(made.reward)
