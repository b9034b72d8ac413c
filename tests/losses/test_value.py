import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.value import ClippedValue, clipped_value


def at(value: float, old: float, ret: float, clip: float | None) -> tuple[float, float, bool]:
    values = torch.tensor([[value]], requires_grad=True)
    loss, clipped = clipped_value(values, torch.tensor([[old]]), torch.tensor([[ret]]), clip=clip)
    return loss.item(), torch.autograd.grad(loss.sum(), values)[0].item(), clipped.item()


@pytest.mark.parametrize(
    ("value", "old", "ret", "loss", "gradient", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.5 * 0.81, -0.9, False),  # within reach of the old value
        (0.5, 0.0, 1.0, 0.5 * 0.64, 0.0, True),  # moved enough for one step: held at 0.2
        (-0.5, 0.0, 1.0, 0.5 * 2.25, -1.5, False),  # moved the wrong way: pulled back
        (1.0, 1.0, 1.0, 0.0, 0.0, False),
    ],
)
def test_numbers_by_hand(value, old, ret, loss, gradient, clipped):
    assert at(value, old, ret, 0.2) == (pytest.approx(loss), pytest.approx(gradient), clipped)


def test_without_a_clip_it_is_half_the_squared_error():
    assert at(0.5, 0.0, 1.0, None) == (0.125, -0.5, False)
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 2, 5, generator=generator)
    loss, clipped = ClippedValue(clip=None)(values, old, returns)
    torch.testing.assert_close(loss, 0.5 * (values - returns) ** 2)
    assert not clipped.any()


def test_clipping_never_lowers_the_loss():
    values, old, returns = torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(1))
    held, clipped = clipped_value(values, old, returns, clip=0.2)
    plain, _ = clipped_value(values, old, returns, clip=None)
    assert (held >= plain).all()
    assert ((held > plain) == clipped).all()
    assert 0 < clipped.float().mean() < 1


@pytest.mark.parametrize("clip", [0.0, -0.2])
def test_a_frozen_critic_is_refused(clip):
    with pytest.raises(UserError, match=f"clip={clip}"):
        ClippedValue(clip=clip)
