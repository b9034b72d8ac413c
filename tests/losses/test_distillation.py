import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses import Distillation


def test_what_is_measured_by_trls_beta():
    assert [Distillation(name).mixture for name in ("forward_kl", "jsd", "reverse_kl")] == [0.0, 0.5, 1.0]
    assert Distillation("jsd", beta=0.2).mixture == 0.2


def test_the_likelihood_is_added_where_it_is_asked_for():
    apart, logprobs = torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, -3.0]])
    assert not Distillation().reads_logprobs
    assert torch.equal(Distillation()(apart, None), apart)
    mixed = Distillation(nll_coef=0.5)
    assert mixed.reads_logprobs
    assert mixed(apart, logprobs).tolist() == [[1.0, 3.5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.3}, "beta=0.3 is of divergence jsd and has no effect with forward_kl: leave it out"),
        ({"divergence": "jsd", "beta": 1.0}, "beta=1.0 is the teacher's share.*TRL's beta 0 is divergence: forward_kl"),
        (
            {"divergence": "jsd", "beta": -0.1},
            "beta=-0.1 is the teacher's share in a mixture: give above 0 and below 1",
        ),
        ({"temperature": 0.0}, "temperature=0.0 divides logits: give a positive number"),
        ({"temperature": float("nan")}, "temperature=nan divides logits"),
        ({"nll_coef": -1.0}, "nll_coef=-1.0 would train towards the opposite: give 0 or more"),
    ],
)
def test_what_cannot_be_meant_is_said(options, message):
    with pytest.raises(UserError, match=message):
        Distillation(**options)


def test_an_unknown_divergence_is_not_taken_for_another():
    loss = Distillation()
    object.__setattr__(loss, "divergence", "kl")  # the checker of types under the tests lets no one write it
    with pytest.raises(UserError, match="divergence='kl': use forward_kl, reverse_kl or jsd"):
        loss.__post_init__()
