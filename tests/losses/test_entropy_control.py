import math

import pytest

from rlhf_lightning.losses import AdaptiveEntropy
from rlhf_lightning.losses.entropy_control import EntropyBonus


def test_it_weighs_more_while_entropy_is_low_and_nothing_while_it_is_high():
    """From 0.1 by 0.05 a step, target 1: entropies 0.5, 0.5, 2, 1, 0.5 and then 0.1 for long."""
    bonus = EntropyBonus(0.1, AdaptiveEntropy(target=1.0, delta=0.05, min_coef=0.05, max_coef=0.3))
    assert bonus.enabled
    assert bonus.weight == 0  # nothing was measured
    seen = []
    for entropy in (0.5, 0.5, 2.0, 1.0, 0.5):
        bonus.observe(entropy)
        seen.append((round(bonus.coef, 6), round(bonus.weight, 6)))
    assert seen == [(0.15, 0.15), (0.2, 0.2), (0.15, 0.0), (0.2, 0.2), (0.25, 0.25)]
    for _ in range(9):
        bonus.observe(0.1)
    assert bonus.coef == 0.3
    for _ in range(9):
        bonus.observe(3.0)
    assert (bonus.coef, bonus.weight) == (0.05, 0)


def test_a_step_that_broke_moves_nothing():
    bonus = EntropyBonus(0.1, AdaptiveEntropy())
    bonus.observe(0.1)
    before = bonus.state_dict()
    bonus.observe(math.nan)
    assert bonus.state_dict() == before


def test_without_control_the_weight_stays():
    bonus = EntropyBonus(0.1, None)
    bonus.observe(0.0)
    assert (bonus.enabled, bonus.weight) == (True, 0.1)
    assert not EntropyBonus(0.0, None).enabled
    assert EntropyBonus(0.0, AdaptiveEntropy()).enabled


def test_it_goes_on_from_its_state():
    first, second = (EntropyBonus(0.1, AdaptiveEntropy()) for _ in range(2))
    first.observe(0.1)
    second.load_state_dict(first.state_dict())
    assert (second.coef, second.weight) == (first.coef, first.weight) == pytest.approx((0.105, 0.105))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, r"entropy_control\.target=0\.0 steers nothing: give a positive number"),
        ({"delta": math.nan}, r"entropy_control\.delta=nan steers nothing"),
        (
            {"min_coef": 0.5, "max_coef": 0.5},
            r"max_coef=0\.5 leave no room.*0 <= min_coef < max_coef",
        ),
    ],
)
def test_bounds_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveEntropy(**options)


def test_a_beginning_outside_the_bounds_is_refused():
    with pytest.raises(ValueError, match=r"entropy_coef=2\.0 is where entropy_control begins.*give 0\.0 to 1\.0"):
        EntropyBonus(2.0, AdaptiveEntropy())
