"""A step's metrics: every token alike, whatever micro-batch it came in."""

import pytest
import torch

from rlhf_lightning.stages.step_means import StepMeans


def test_a_long_micro_batch_weighs_more_than_a_short_one_and_an_empty_one_nothing():
    means = StepMeans()
    means.add({"loss": torch.tensor([[1.0, 2.0, 99.0]])}, torch.tensor([[True, True, False]]))
    means.add({"loss": torch.tensor([[9.0]])}, torch.tensor([[True]]))
    means.add({"loss": torch.tensor([[float("nan")]])}, torch.tensor([[False]]))
    assert means.take(lambda v: v)["loss"].item() == pytest.approx((1 + 2 + 9) / 3)
    assert means.take(lambda v: v) == {}


def test_sums_and_counts_are_added_over_ranks_before_they_are_divided():
    means = StepMeans()
    means.add({"loss": torch.tensor([4.0])}, torch.tensor([True]))
    other_rank = torch.tensor([10.0, 3.0])
    assert means.take(lambda vector: vector + other_rank)["loss"].item() == pytest.approx(14 / 4)
