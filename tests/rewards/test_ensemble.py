import math

import pytest
from jsonargparse import ArgumentParser

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.rewards import Ensemble, WeightedReward, score_samples

SAMPLES = [Sample(f"Q{i}", f"A{i}") for i in range(3)]


class Says(RewardFn):
    def __init__(self, *scores):
        self.scores = scores
        self.device = None

    def __call__(self, samples):
        return [self.scores[int(sample.completion[1])] for sample in samples]

    def to(self, device):
        self.device = device


def members(*rows, **options):
    return [WeightedReward(Says(*row), name=f"m{i}", **options) for i, row in enumerate(rows)]


ROWS = ((1.0, 2.0, 0.0), (3.0, 2.0, 6.0))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sum", [4, 4, 6]),
        ("mean", [2, 2, 3]),
        ("worst_case", [1, 2, 0]),
        # population variances 1, 0, 9
        ("uncertainty_penalised", [2 - 0.5, 2, 3 - 4.5]),
    ],
)
def test_modes_by_hand(mode, expected):
    out = Ensemble(members(*ROWS), mode=mode)(SAMPLES)
    assert out.scores == pytest.approx(expected)
    assert out.parts == {"m0": [1, 2, 0], "m1": [3, 2, 6]}


def test_lambda_0_is_the_mean_and_one_member_is_itself():
    assert Ensemble(members(*ROWS), mode="uncertainty_penalised", variance_coef=0.0)(SAMPLES).scores == [2, 2, 3]
    for mode in ("sum", "mean", "worst_case", "uncertainty_penalised"):
        assert Ensemble(members(ROWS[1]), mode=mode)(SAMPLES).scores == [3, 2, 6]


def test_weights_scale_and_weight_0_only_logs():
    weighted = [WeightedReward(Says(*ROWS[0]), weight=2.0, name="a"), WeightedReward(Says(*ROWS[1]), 0.0, "b")]
    out = Ensemble(weighted, mode="worst_case")(SAMPLES)
    assert out.scores == [2, 4, 0]
    assert out.parts == {"a": [1, 2, 0], "b": [3, 2, 6]}


def test_a_gate_lets_through_what_passes():
    gated = [*members(*ROWS), WeightedReward(Says(1.0, 0.0, 1.0), name="format")]
    out = Ensemble(gated, mode="gated", gate="format", gated_score=-1.0)(SAMPLES)
    assert out.scores == [4, -1, 6]
    assert out.parts["format"] == [1, 0, 1]


def test_scales_are_brought_together():
    rows = ((0.0, 5.0, 10.0), (100.0, 100.0, 400.0))
    assert Ensemble(members(*rows), mode="mean", normalise="min_max")(SAMPLES).scores == pytest.approx([0, 0.25, 1])
    z = Ensemble(members(*rows), mode="sum", normalise="z")(SAMPLES).scores
    assert z == pytest.approx([-math.sqrt(1.5) - math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(1.5) + math.sqrt(2)])


@pytest.mark.parametrize("normalise", ["min_max", "z"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -1e-30])
def test_a_member_that_tells_nothing_apart_says_0(normalise, value):
    assert Ensemble(members([value] * 3), mode="sum", normalise=normalise)(SAMPLES).scores == [0, 0, 0]


def test_what_a_member_drops_is_dropped_and_moves_no_scale():
    rows = ((0.0, math.nan, 10.0), (0.0, 1e9, 10.0))
    out = score_samples(
        [WeightedReward(Ensemble(members(*rows, on_error="drop"), mode="mean", normalise="min_max"), name="both")],
        SAMPLES,
    )
    assert out.valid.tolist() == [True, False, True]
    assert out.total.tolist() == [0, 0, 1]
    assert out.parts["both/m1"].tolist() == [0, 0, 10]


def test_a_member_that_fails_stops_the_run_by_its_name():
    with pytest.raises(UserError, match="reward function m1 returned nan for sample 1"):
        score_samples([WeightedReward(Ensemble(members((0.0, 1.0, 2.0), (0.0, math.nan, 1.0))))], SAMPLES)


def test_ensembles_nest_and_move():
    inner = Ensemble(members(*ROWS), mode="worst_case")
    outer = Ensemble([WeightedReward(inner, name="inner"), WeightedReward(Says(1.0, 1.0, 1.0), name="one")], mode="sum")
    out = outer(SAMPLES)
    assert out.scores == [2, 3, 1]
    assert set(out.parts) == {"inner", "inner/m0", "inner/m1", "one"}
    outer.to("meta")
    assert inner.members[0].reward.device == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "mode='median'"),
        ({"normalise": "softmax"}, "normalise='softmax'"),
        ({"variance_coef": -1.0}, r"variance_coef=-1\.0 would reward disagreement"),
        ({"mode": "gated"}, "mode='gated' with gate=None"),
        ({"mode": "mean", "gate": "m0"}, "mode='mean' with gate='m0'"),
        ({"mode": "gated", "gate": "form"}, "gate='form' is none of the members: m0, m1"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Ensemble(members(*ROWS), **options)


def test_members_that_all_weigh_nothing():
    with pytest.raises(UserError, match="no member of this Ensemble counts"):
        Ensemble(members(*ROWS, weight=0.0))
    with pytest.raises(UserError, match="rewards is empty"):
        Ensemble([])


def test_from_yaml(tmp_path):
    file = tmp_path / "rewards.yaml"
    file.write_text("""
rewards:
  - reward:
      class_path: Ensemble
      init_args:
        mode: gated
        gate: format
        members:
          - {reward: {class_path: Keyword, init_args: {wanted: [sure]}}, name: format}
          - {reward: {class_path: LengthReward, init_args: {target: 2, unit: words}}, on_error: drop}
    name: both
""")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--rewards", type=list[WeightedReward])
    rewards = parser.instantiate(parser.parse_args([f"--config={file}"])).rewards
    out = score_samples(rewards, [Sample("", "sure sure"), Sample("", "no no"), Sample("", "sure")])
    assert out.total.tolist() == [1, 0, 0.5]
    assert set(out.parts) == {"both/format", "both/LengthReward"}
