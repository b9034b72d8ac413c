"""The reference: frozen, unregistered, and of the same vocabulary."""

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import BEMA, ReferenceSync, make_reference
from rlhf_lightning.models.spec import LoraSpec, ModelSpec


def moved(policy):
    """The policy after a step: every trainable weight a little off."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    return policy


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_it_stays_where_the_policy_was(lab, lora):
    policy, batch = lab.policy("llama", lora=lora), lab.padded(lab.records(6, 4))
    reference = make_reference(policy)
    before = policy(batch, temperature=0.5).logprobs.detach()
    moved(policy)
    scores = reference(batch, temperature=0.5)
    assert not scores.logprobs.requires_grad
    torch.testing.assert_close(scores.logprobs, before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(policy(batch, temperature=0.5).logprobs, before, atol=1e-3)
    assert policy.training
    assert any(p.requires_grad for p in policy.parameters())


def test_an_adapters_reference_holds_no_weights_of_its_own(lab):
    policy = lab.policy("llama", lora=LoraSpec(r=2))
    reference = make_reference(policy)
    assert reference.shared
    assert reference.policy is policy
    reference.to("meta")  # not its to move
    assert not any(p.is_meta for p in policy.parameters())


def test_it_is_in_no_state_dict_and_no_parameter_list(lab):
    class Stage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = lab.policy("llama")
            self.reference = make_reference(self.policy)

    stage = Stage()
    assert all(name.startswith("policy.") for name in stage.state_dict())
    assert len(list(stage.parameters())) == len(list(stage.policy.parameters()))
    assert not any(p.requires_grad for p in stage.reference.policy.parameters())
    stage.reference.to(torch.float64)
    assert {p.dtype for p in stage.reference.policy.parameters()} == {torch.float64}
    assert {p.dtype for p in stage.parameters()} == {torch.float32}


def test_dropout_is_off_in_the_reference_even_if_the_policy_has_some(lab):
    policy, batch = lab.policy("gpt2", disable_dropout=False), lab.padded(lab.records(6))
    reference = make_reference(policy)
    assert torch.equal(reference(batch).logprobs, reference(batch).logprobs)
    assert policy.training


def test_another_model_can_be_the_reference_if_it_knows_the_same_tokens(lab, tiny_model):
    policy, batch = lab.policy("llama"), lab.padded(lab.records(6))
    other = ModelSpec(config={"model_type": "gpt2", **lab.configs["gpt2"]})
    scores = make_reference(policy, other)(batch)
    torch.testing.assert_close(scores.logprobs, load_policy(other)(batch).logprobs, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"tiny' knows 21 tokens and the policy 37: a KL needs one vocabulary"):
        make_reference(policy, ModelSpec(path=str(tiny_model)))


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_a_reference_that_follows_mixes_weight_by_weight(lab, lora):
    policy = lab.policy("llama", lora=lora)
    reference = make_reference(policy, sync=ReferenceSync())
    assert not reference.shared
    start = [p.clone() for p in reference.policy.parameters()]
    moved(policy)
    reference.follow(policy, 0.25)
    for mine, before, theirs in zip(reference.policy.parameters(), start, policy.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.25 * theirs.detach() + 0.75 * before)
    reference.follow(policy, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(reference.policy.parameters(), policy.parameters(), strict=True))
    assert not any(p.requires_grad for p in reference.policy.parameters())


def test_only_a_model_of_the_same_shape_can_follow(lab):
    other = ModelSpec(config={"model_type": "gpt2", **lab.configs["gpt2"]})
    with pytest.raises(UserError, match=r"is to follow the policy, whose weights have other names or shapes"):
        make_reference(lab.policy("llama"), other, sync=ReferenceSync())


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_hidden_states_are_those_behind_its_scores(lab, lora):
    policy, batch = lab.policy("llama", lora=lora), lab.padded(lab.records(6, 4))
    reference = make_reference(policy)
    moved(policy)
    hidden = reference.hidden_states(batch)
    assert not hidden.requires_grad
    scores = reference.policy.scores(hidden, batch.tokens, batch.mask).logprobs
    torch.testing.assert_close(scores, reference(batch).logprobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every=0: the reference follows every 1 or more optimiser steps"),
        ({"share": 0.0}, r"share=0.0 is the policy's share in the new reference: give above 0, to 1"),
        ({"share": 1.5}, r"share=1.5 is the policy's share"),
        ({"share": 0.5, "bema": BEMA()}, r"share=0.5 has no effect with bema, which has shares of its own"),
        ({"every": 600, "bema": BEMA()}, r"every=600 falls between two updates of the average, bema.every=400"),
    ],
)
def test_a_sync_that_moves_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        ReferenceSync(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"bema.every=0: the average is updated every 1 or more"),
        ({"after": -1}, r"bema.after=-1 is a number of optimiser steps"),
        ({"ema_power": -0.5}, r"bema.ema_power=-0.5: shares fall with the steps taken"),
        ({"bias_power": -1.0}, r"bema.bias_power=-1.0: shares fall"),
        (
            {"every": 1, "lag": 0.0, "multiplier": 0.5},
            r"bema.lag=0.0 with multiplier=0.5 would give .* a share above 1",
        ),
        ({"min_share": 1.5}, r"bema.min_share=1.5 is a share of the policy"),
    ],
)
def test_an_average_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        BEMA(**options)


FOLLOWED = ReferenceSync(every=4, bema=BEMA(every=2, ema_power=0.5, bias_power=0.25, lag=2, multiplier=3.0, after=1))


def walked(policy, reference, steps) -> list:
    """A weight of the policy after each step; the reference is told of each."""
    seen = []
    for step in steps:
        moved(policy)
        seen.append(policy.head().weight.detach().clone())
        FOLLOWED.after_step(step, reference, policy)
    return seen


def test_a_reference_that_follows_a_corrected_average_by_hand(lab):
    policy = lab.policy("llama")
    reference = make_reference(policy, sync=FOLLOWED)
    before = policy.head().weight.detach().clone()
    start, _, third, _ = walked(policy, reference, range(1, 5))
    assert torch.equal(reference.policy.head().weight, before)
    (fifth,) = walked(policy, reference, [5])  # 4 steps after the first
    average = start + 11**-0.5 * (third - start)  # at step 3: age 2 + 3 * 3
    average = average + 17**-0.5 * (fifth - average)
    torch.testing.assert_close(reference.policy.head().weight, average + 17**-0.25 * (fifth - start))
    assert len({id(model) for model in reference.own_models()}) == 3
    assert not any(p.requires_grad for model in reference.own_models() for p in model.parameters())


def test_what_the_average_remembers_is_in_the_state(lab):
    policy = lab.policy("llama")
    reference, again = (make_reference(policy, sync=FOLLOWED) for _ in range(2))
    walked(policy, reference, range(1, 8))
    again.load_state_dict(reference.state_dict())
    walked(policy, reference, [8])
    FOLLOWED.after_step(8, again, policy)
    FOLLOWED.after_step(9, again, policy)
    FOLLOWED.after_step(9, reference, policy)
    for one, other in zip(reference.own_models(), again.own_models(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    plain = make_reference(policy, sync=ReferenceSync())
    with pytest.raises(UserError, match=r"checkpoint did not follow the policy by reference_sync.bema, and this one"):
        again.load_state_dict(plain.state_dict())
    with pytest.raises(
        UserError, match=r"checkpoint followed the policy by reference_sync.bema, and this one does not"
    ):
        plain.load_state_dict(again.state_dict())
