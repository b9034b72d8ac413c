import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.advantages.kl_control import AdaptiveKL, FixedKL, KLControl
from rlhf_lightning.core.errors import UserError


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (6.0, 0.15),  # at the target
        (6.6, 0.15 * (1 + 0.1 * 512 / 10_000)),  # 10 % over
        (60.0, 0.15 * (1 + 0.2 * 512 / 10_000)),  # far over: 20 % at most
        (-3.0, 0.15 * (1 - 0.2 * 512 / 10_000)),  # a negative estimate is far under
    ],
)
def test_one_step_by_hand(observed, expected):
    control = AdaptiveKL(init_coef=0.15, target=6.0, horizon=10_000.0)
    assert control.next_coef(control.initial_coef, observed, 512) == pytest.approx(expected)


def test_what_the_target_is_of():
    assert FixedKL().observes == AdaptiveKL().observes == "sequence"
    assert AdaptiveKL(target=0.1, per="token").observes == "token"


def test_it_settles_where_the_kl_meets_the_target():
    control, coef = AdaptiveKL(init_coef=1.0, target=6.0, horizon=1000.0), 1.0
    for _ in range(500):
        coef = control.next_coef(coef, 1.2 / coef, 100)  # a policy whose KL is 1.2 / coef
    assert coef == pytest.approx(0.2, rel=1e-3)


@given(st.floats(1e-3, 10), st.floats(-100, 100), st.integers(1, 4999))
def test_the_coefficient_stays_positive(coef, observed, num_samples):
    assert AdaptiveKL(horizon=1000.0).next_coef(coef, observed, num_samples) > 0


def test_a_horizon_shorter_than_the_rollout_is_refused():
    with pytest.raises(UserError, match=r"horizon=100 .* 512 sequences"):
        AdaptiveKL(horizon=100.0).next_coef(0.1, 0.0, 512)


def test_fixed_is_fixed():
    control: KLControl = FixedKL(0.3)
    assert control.initial_coef == control.next_coef(0.3, 1e6, 512) == 0.3
    assert FixedKL(0.0).initial_coef == 0


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (FixedKL, {"coef": -0.1}),
        (AdaptiveKL, {"init_coef": 0.0}),
        (AdaptiveKL, {"target": -6.0}),
        (AdaptiveKL, {"horizon": 0.0}),
    ],
)
def test_impossible_settings_are_named(make, arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        make(**arguments)
