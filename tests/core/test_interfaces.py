import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import (
    AnyPreferenceLoss,
    Credit,
    PolicyLoss,
    PreferenceLoss,
    RankedPreferenceLoss,
    RewardFn,
    RewardLoss,
    Sample,
    ValueLoss,
)
from rlhf_lightning.losses import SupervisedLoss, TeacherLoss, TokenLoss


@pytest.mark.parametrize(
    "interface",
    [
        PolicyLoss,
        AnyPreferenceLoss,
        PreferenceLoss,
        RankedPreferenceLoss,
        ValueLoss,
        Credit,
        RewardLoss,
        RewardFn,
        TokenLoss,
        SupervisedLoss,
        TeacherLoss,
    ],
)
def test_interfaces_are_abstract(interface):
    with pytest.raises(TypeError, match="abstract"):
        interface()


def test_a_reward_function_needs_only_a_call():
    class Shout(RewardFn):
        def __call__(self, samples):
            return [float(sample.completion.isupper()) for sample in samples]

    shout = Shout()
    shout.to("cpu")
    assert shout([Sample("say it", "LOUD"), Sample("say it", "low")]) == [1, 0]


def test_a_users_mistake_is_a_value_error():
    assert issubclass(UserError, ValueError)
