"""The learning rate over a run, at points that can be worked out by hand."""

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.stages.schedule import Schedule


def test_warms_up_linearly_then_falls_to_the_final_share():
    linear = Schedule("linear", warmup_frac=0.2, final_frac=0.1)
    # 100 steps, 20 of warm-up: step 9 is (9 + 1) / 21; step 60 is half of the way from 1 to 0.1
    assert linear.factor(9, 100) == pytest.approx(10 / 21)
    assert linear.factor(60, 100) == pytest.approx(0.55)
    assert linear.factor(100, 100) == pytest.approx(0.1)


def test_cosine_is_half_way_at_half_time_and_constant_stays():
    assert Schedule("cosine").factor(50, 100) == pytest.approx(0.5)
    assert Schedule("constant").factor(99, 100) == 1.0


def test_the_first_step_moves_and_a_run_of_one_step_works():
    assert Schedule("cosine", warmup_frac=0.5).factor(0, 10) > 0
    assert Schedule("linear").factor(0, 1) == 1.0


def test_shares_outside_the_run_are_refused():
    with pytest.raises(UserError, match=r"warmup_frac=1.5: use a share"):
        Schedule(warmup_frac=1.5)
    with pytest.raises(UserError, match=r"final_frac=-1.0: use a share"):
        Schedule(final_frac=-1.0)
