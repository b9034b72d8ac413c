"""The reference: frozen, unregistered, and of the same vocabulary."""

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import ReferenceSync, make_reference
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
    reference = make_reference(policy, follows=True)
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
        make_reference(lab.policy("llama"), other, follows=True)


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
    ],
)
def test_a_sync_that_moves_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        ReferenceSync(**options)
