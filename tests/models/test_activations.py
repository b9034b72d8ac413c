"""Activations in host memory until their backward pass: which ones go, and that nothing changes."""

import json

import pytest
import torch
from one_step import records, step
from torch.autograd.graph import save_on_cpu

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
    sent = []

    class Counting(save_on_cpu):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: sent.append(tensor) or pack(tensor)

    monkeypatch.setattr("rlhf_lightning.models.activations.save_on_cpu", Counting)
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


def _given(lab):
    batch = lab.padded(lab.records(9, 4))
    return batch.tokens, batch.attention_mask, batch.positions
