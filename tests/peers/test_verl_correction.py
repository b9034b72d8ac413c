"""verl's rollout correction beside ours: importance weights, IcePop, rejection by every kind, bypass mode's presets."""

import math
from typing import Any

import pytest
import torch
from peer_packages import peer_module
from verl_peer import Ragged, assert_same, ragged

from rlhf_lightning.losses import SamplerCorrection, SamplerFilter

helper = peer_module("verl.trainer.ppo.rollout_corr_helper")
DTYPES = [torch.float64, torch.float32]


def theirs(batch: Ragged, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (1 without) and the mask that is left."""
    weights, mask, _ = helper.compute_rollout_correction_and_rejection_mask(
        batch.old, batch.sampler, batch.response_mask, **options
    )
    ones = torch.ones_like(batch.old)
    return (ones if weights is None else weights.batch["rollout_is_weights"]), mask.bool()


def assert_same_correction(batch: Ragged, correction: SamplerCorrection, **options: Any) -> None:
    weights, left = theirs(batch, **options)
    expected = torch.where(batch.mask & left, weights, 0.0)
    assert_same(correction(batch.old, batch.sampler, batch.mask).weights, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_weights(level, normalise, dtype):
    batch = ragged(dtype)
    options = {"rollout_is": level, "rollout_is_threshold": 1.3, "rollout_is_batch_normalize": normalise}
    weights, _ = theirs(batch, **options)
    assert 0 < (weights == weights.max()).sum() < batch.mask.sum(), "some are truncated"
    assert_same_correction(batch, SamplerCorrection(weight=level, cap=1.3, normalise=normalise), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_icepop(level, normalise, dtype):
    batch = ragged(dtype)
    options = {"rollout_is": level, "rollout_is_threshold": "0.8_1.5", "rollout_is_batch_normalize": normalise}
    within = {"keep": level, "low": 0.8, "high": 1.5}
    weights, _ = theirs(batch, **options)
    assert 0 < (weights[batch.mask] == 0).sum() < batch.mask.sum()
    assert_same_correction(batch, SamplerCorrection(weight=level, cap=None, normalise=normalise, **within), **options)


LOW, HIGH = 0.8, 1.4
INVERSE = {"low": 1 / HIGH, "high": 1 / LOW}
"""verl's k1 is log sampler/trainer: its bounds are on the inverse of our ratio."""
RADIUS = math.sqrt(2 * 0.05)
NEAR = {"low": math.exp(-RADIUS), "high": math.exp(RADIUS)}
"""k2 of at most 0.05 is a log-ratio within this."""
REJECTIONS = {
    "token_k1": ("0.8_1.4", SamplerFilter("ratio", "token", **INVERSE)),
    "token_k2": (0.05, SamplerFilter("k2", "token", high=0.05)),
    "token_k3": (0.05, SamplerFilter("k3", "token", high=0.05)),
    "seq_sum_k1": ("0.8_1.4", SamplerFilter("ratio", "sum", **INVERSE)),
    "seq_sum_k2": (0.3, SamplerFilter("k2", "sum", high=0.3)),
    "seq_sum_k3": (0.3, SamplerFilter("k3", "sum", high=0.3)),
    "seq_mean_k1": ("0.9_1.1", SamplerFilter("ratio", "mean", low=1 / 1.1, high=1 / 0.9)),
    "seq_mean_k2": (0.07, SamplerFilter("k2", "mean", high=0.07)),
    "seq_mean_k3": (0.07, SamplerFilter("k3", "mean", high=0.07)),
    "seq_max_k2": (0.2, SamplerFilter("k2", "max", high=0.2)),
    "seq_max_k3": (0.2, SamplerFilter("k3", "max", high=0.2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", REJECTIONS)
def test_rejection(kind, dtype):
    assert set(REJECTIONS) == helper.SUPPORTED_ROLLOUT_RS_OPTIONS
    threshold, condition = REJECTIONS[kind]
    options = {"rollout_rs": kind, "rollout_rs_threshold": threshold}
    for seed in range(3):
        batch = ragged(dtype, seed=seed)
        assert_same_correction(batch, SamplerCorrection(weight="none", filters=[condition]), **options)
    left = theirs(ragged(dtype), **options)[1]
    assert 0 < left.sum() < ragged().mask.sum(), "some are rejected, not all"


def test_rejections_in_a_row_and_weights():
    """All conditions have to be met; the weights are normalised before any is looked at."""
    kinds = ["token_k1", "seq_mean_k3", "seq_max_k2"]
    thresholds, filters = zip(*(REJECTIONS[kind] for kind in kinds), strict=True)
    options = {"rollout_rs": ",".join(kinds), "rollout_rs_threshold": ",".join(map(str, thresholds))}
    options |= {"rollout_is": "token", "rollout_is_threshold": 1.3, "rollout_is_batch_normalize": True}
    for seed in range(5):
        batch = ragged(seed=seed)
        correction = SamplerCorrection(cap=1.3, normalise=True, filters=list(filters))
        assert_same_correction(batch, correction, **options)


@pytest.mark.parametrize("threshold", [1.3, 2.0])
def test_one_bound_of_a_ratio_is_also_its_inverse(threshold):
    batch = ragged()
    condition = SamplerFilter("ratio", low=1 / threshold, high=threshold)
    correction = SamplerCorrection(weight="none", filters=[condition])
    assert_same_correction(batch, correction, rollout_rs="token_k1", rollout_rs_threshold=threshold)


@pytest.mark.parametrize(
    ("kind", "threshold", "kept"),
    [
        ("seq_mean_k1", "0.9_1.1", {"keep": "geometric", "low": 1 / 1.1, "high": 1 / 0.9}),
        ("seq_sum_k1", "0.8_1.4", {"keep": "sequence", **INVERSE}),
        ("token_k2", 0.05, {"keep": "token", **NEAR}),
        ("seq_max_k2", 0.05, {"keep": "every", **NEAR}),
    ],
)
def test_keep_says_the_same_as_a_filter(kind, threshold, kept):
    batch = ragged()
    options = {"rollout_rs": kind, "rollout_rs_threshold": threshold}
    assert_same_correction(batch, SamplerCorrection(weight="none", **kept), **options)


@pytest.mark.parametrize(
    ("preset", "arguments", "correction"),
    [
        ("decoupled_token_is", {}, SamplerCorrection()),
        ("decoupled_seq_is", {}, SamplerCorrection(weight="sequence")),
        ("decoupled_token_icepop", {}, SamplerCorrection(cap=None, keep="token", low=0.5, high=5.0)),
        (
            "decoupled_seq_is_rs",
            {},
            SamplerCorrection(weight="sequence", filters=[SamplerFilter("ratio", "sum", low=0.5, high=2.0)]),
        ),
        (
            "decoupled_geo_rs",
            {},
            SamplerCorrection(weight="none", filters=[SamplerFilter("ratio", "mean", low=1 / 1.001, high=1 / 0.999)]),
        ),
    ],
)
def test_presets_of_verls_configuration(preset, arguments, correction):
    config = getattr(helper.RolloutCorrectionConfig, preset)(**arguments)
    names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold", "rollout_is_batch_normalize")
    for spread in (1e-3, 0.4):
        batch = ragged(spread=spread)
        assert_same_correction(batch, correction, **{name: getattr(config, name) for name in names})


def test_log_ratios_beyond_twenty_nats():
    batch = ragged(spread=15.0)
    assert (batch.old - batch.sampler)[batch.mask].abs().max() > 20
    for level in ("token", "sequence"):
        options = {"rollout_is": level, "rollout_is_threshold": 1e12}
        assert_same_correction(batch, SamplerCorrection(weight=level, cap=None), **options)
    for kind, (threshold, condition) in REJECTIONS.items():
        options = {"rollout_rs": kind, "rollout_rs_threshold": threshold}
        assert_same_correction(batch, SamplerCorrection(weight="none", filters=[condition]), **options)


def test_weights_over_two_ranks_are_divided_by_one_mean():
    """Each rank has its own answers; the moments are added."""
    batch = ragged()
    options = {"rollout_is": "token", "rollout_is_threshold": 1.3, "rollout_is_batch_normalize": True}
    whole, _ = theirs(batch, **options)
    correction = SamplerCorrection(cap=1.3, normalise=True)
    halves = (slice(0, 4), slice(4, 9))
    seen: list[torch.Tensor] = []
    for rows in halves:
        correction(batch.old[rows], batch.sampler[rows], batch.mask[rows], add_over_ranks=lambda x: seen.append(x) or x)
    for rows in halves:
        ours = correction(
            batch.old[rows], batch.sampler[rows], batch.mask[rows], add_over_ranks=lambda _: seen[0] + seen[1]
        )
        assert_same(ours.weights, whole[rows])


# --- differences on purpose


def test_differs_a_token_that_the_sampler_said_nothing_of_counts_as_exact():
    """verl's weight of it is NaN, and so is its loss."""
    batch = ragged()
    batch.sampler[0, 2] = float("nan")
    weights, _ = theirs(batch, rollout_is="token")
    ours = SamplerCorrection()(batch.old, batch.sampler, batch.mask).weights
    assert weights[0, 2].isnan()
    assert ours[0, 2] == 1
    assert_same(ours[1:], torch.where(batch.mask, weights, 0.0)[1:])
