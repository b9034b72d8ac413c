"""DPO on rankings: numbers by hand, and pairs as the special case."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from pairs import completions, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_ranked import ListwiseDPO


def ranked(totals, ref):
    return completions([[total] for total in totals], [[total] for total in ref])


@pytest.mark.parametrize("comparisons", ["listwise", "pairs"])
def test_two_answers_are_dpo(comparisons):
    loss = ListwiseDPO(beta=0.5, comparisons=comparisons)
    out = loss(ranked([-4.0, -10.0], [-5.0, -8.0]), torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    dpo = DPO(0.5)(pairs([-4.0], [-10.0], [-5.0], [-8.0]))
    assert out.per_prompt.tolist() == pytest.approx(dpo.per_pair.tolist())
    assert out.rewards.tolist() == pytest.approx([0.5, -1.0])
    assert (out.accuracy.item(), out.margin.item()) == pytest.approx((1.0, 1.5))
    assert not out.margin.requires_grad


def test_three_answers_by_hand():
    # rewards 1, 0, 2 with ranks 1, 2, 3: the best of all, then the best of the rest
    out = ListwiseDPO(beta=1.0)(
        ranked([1.0, 0.0, 2.0], [0.0, 0.0, 0.0]), torch.tensor([0, 0, 0]), torch.tensor([1.0, 2.0, 3.0])
    )
    e = math.e
    assert out.per_prompt.item() == pytest.approx(-math.log(e / (e + 1 + e**2)) - math.log(1 / (1 + e**2)))
    assert out.accuracy.item() == pytest.approx(1 / 3)
    assert out.margin.item() == pytest.approx((1 - 1 - 2) / 3)


def test_a_policy_that_is_its_reference_loses_log_k_factorial():
    same = [-3.0, -5.0, -1.0, -2.0]
    out = ListwiseDPO()(ranked(same, same), torch.zeros(4).long(), torch.tensor([3.0, 1.0, 2.0, 4.0]))
    assert out.per_prompt.item() == pytest.approx(math.log(24))


def test_bad_options_are_refused():
    with pytest.raises(UserError, match=r"beta=0.0 would not prefer"):
        ListwiseDPO(beta=0.0)
    with pytest.raises((UserError, TypeCheckError), match="comparisons"):
        ListwiseDPO(comparisons="best")
