"""Activations in host memory until their backward pass: which ones go, and that nothing changes."""

import json

import pytest
import torch
from one_step import records, step

from rlhf_lightning.models import activations
from rlhf_lightning.models.spec import LoraSpec

SAME_BITS = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "without padding": {"padding_free": True},
    "adapters": {"lora": LoraSpec(r=2)},
}


@pytest.mark.parametrize("how", SAME_BITS)
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_gradients_keep_their_bits(stage, how, tiny_model, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    runs = [
        step(stage, str(tiny_model), str(path), spec={"activation_offload": wanted, **SAME_BITS[how]})
        for wanted in (False, True)
    ]
    (metrics, gradients), (same_metrics, same_gradients) = runs
    timings = {name for name in metrics if name.startswith("time/")}
    assert {k: v for k, v in metrics.items() if k not in timings} == {
        k: v for k, v in same_metrics.items() if k not in timings
    }
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())


@pytest.fixture
def gone(monkeypatch):
    """Tensors that are sent to the host."""
    sent, send_away = [], activations.send_away
    monkeypatch.setattr(activations, "send_away", lambda tensor: sent.append(tensor) or send_away(tensor))
    return sent


def test_activations_go_and_weights_stay(lab, gone):
    policy = lab.policy("llama", activation_offload=True)
    batch = lab.padded(lab.records(9, 4))
    gone.clear()
    policy(batch).logprobs.sum().backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    assert gone
    assert not {tensor.untyped_storage().data_ptr() for tensor in gone} & weights
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_of_checkpointed_layers_only_their_inputs_go(lab, gone):
    floats = {}
    for checkpointed in (False, True):
        policy = lab.policy("llama", activation_offload=True, gradient_checkpointing=checkpointed)
        gone.clear()
        policy.hidden_states(*_given(lab))
        floats[checkpointed] = [tuple(t.shape) for t in gone if t.is_floating_point() and t.dim() == 3]
    assert floats[True].count((2, 9, 32)) >= 2  # one per layer
    assert len(floats[True]) < len(floats[False]) / 4


def test_nothing_goes_without_gradient(lab, gone):
    policy = lab.policy("llama", activation_offload=True)
    gone.clear()
    with torch.no_grad():
        policy.hidden_states(*_given(lab))
    assert not gone


def padded_mask():
    """As sdpa on a GPU keeps it: rows of 11 padded to 16, one mask for all heads."""
    return torch.zeros(4, 1, 11, 16)[..., :11].expand(4, 3, 11, 11)


LAYOUTS = {
    "whole": (lambda: torch.zeros(2, 3, 5), (15, 5, 1)),
    "transposed": (lambda: torch.zeros(2, 3, 4, 8).transpose(1, 2), (96, 8, 32, 1)),
    "a third of the columns": (lambda: torch.zeros(2, 5, 96)[..., 32:64], (160, 32, 1)),
    "padded rows": (lambda: padded_mask()[:, :1], (176, 16, 16, 1)),
    "a number": (lambda: torch.zeros(()), ()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_as_aligned_as_what_it_copies_and_no_larger_than_that_needs(name):
    made, strides = LAYOUTS[name]
    assert tuple(activations.aligned_strides(made())) == strides


def test_what_is_expanded_travels_once_and_comes_back_as_it_was():
    mask = padded_mask()
    once = mask[:, :1]
    host = torch.empty_strided(once.shape, activations.aligned_strides(once)).copy_(once)
    assert host.untyped_storage().nbytes() <= once.untyped_storage().nbytes()
    assert host.expand(mask.shape).stride() == mask.stride()


def _given(lab):
    batch = lab.padded(lab.records(9, 4))
    return batch.tokens, batch.attention_mask, batch.positions
