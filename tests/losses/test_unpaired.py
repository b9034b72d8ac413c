import math

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.unpaired import BCO, KTO, APOZeroUnpaired, apo_zero_unpaired, bco, kto

RATIOS = torch.tensor([2.0, -1.0, 0.0])
LABELS = torch.tensor([True, False, False])
ZERO = torch.tensor(0.0)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def test_kto_by_hand():
    # beta 0.5, KL 1: desirable 1 - sigma(0.5 (2 - 1)), undesirable 1 - sigma(0.5 (1 - r))
    loss = kto(RATIOS, LABELS, torch.tensor(1.0), beta=0.5)
    assert loss.tolist() == pytest.approx([1 - sigmoid(0.5), 1 - sigmoid(1.0), 1 - sigmoid(0.5)])


def test_apo_zero_by_hand():
    loss = apo_zero_unpaired(RATIOS, LABELS, beta=0.5)
    assert loss.tolist() == pytest.approx([1 - sigmoid(1.0), sigmoid(-0.5), 0.5])


def test_bco_by_hand():
    # rewards 1, -0.5 and 0, shift 0.25
    loss = bco(RATIOS, LABELS, torch.tensor(0.25), beta=0.5)
    expected = [-math.log(sigmoid(0.75)), -math.log(sigmoid(0.75)), -math.log(sigmoid(0.25))]
    assert loss.tolist() == pytest.approx(expected)


def test_kto_without_a_kl_is_apo_zero():
    assert torch.equal(
        KTO(beta=0.3)(RATIOS, LABELS, ZERO), APOZeroUnpaired(beta=0.3)(RATIOS, LABELS, torch.tensor(9.0))
    )


def test_at_the_reference_every_loss_is_known():
    same = torch.zeros(3)
    assert KTO()(same, LABELS, ZERO).tolist() == [0.5] * 3
    assert BCO()(same, LABELS, ZERO).tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("loss", [KTO, APOZeroUnpaired, BCO])
def test_weights_multiply_the_loss_of_their_kind(loss):
    plain = loss()(RATIOS, LABELS, ZERO)
    weighted = loss(desirable_weight=2.0, undesirable_weight=0.5)(RATIOS, LABELS, ZERO)
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 0.5, 0.5]))


@pytest.mark.parametrize("loss", [KTO(), APOZeroUnpaired(), BCO()])
def test_gradients_push_the_two_kinds_apart_and_never_overflow(loss):
    ratios = torch.tensor([1.0, 1.0, -1e5, 1e5], requires_grad=True)
    per_completion = loss(ratios, torch.tensor([True, False, True, False]), ZERO)
    assert per_completion.isfinite().all()
    gradient = torch.autograd.grad(per_completion.sum(), ratios)[0]
    assert gradient.isfinite().all()
    assert gradient[0] < 0 < gradient[1]


@pytest.mark.parametrize("loss", [KTO, APOZeroUnpaired, BCO])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0 leaves nothing to learn: give a positive number, such as 0.1"),
        ({"desirable_weight": -1.0}, r"desirable_weight=-1.0 would train towards the opposite: give 0 or more"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, r"are both 0: nothing would be trained"),
    ],
)
def test_numbers_that_make_no_sense(loss, options, message):
    with pytest.raises(UserError, match=message):
        loss(**options)
