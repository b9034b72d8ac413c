"""Compiled layers: the numbers of plain ones, a few graphs for all lengths, none for sampling."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.compiled import compile_layers, is_compiled, not_compiled
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.reference import make_reference
from rlhf_lightning.models.spec import ModelSpec

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def counted():
    """No graphs before and after; those that were made are counted."""
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 8


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced, differentiated and run as they are: no C++ compiler is waited for."""
    monkeypatch.setattr(compile_layers, "__kwdefaults__", {"backend": "aot_eager"})


def assert_same(policy, compiled, batch):
    expected, scores = policy(batch).logprobs, compiled(batch).logprobs
    torch.testing.assert_close(scores, expected, **EXACT)
    want = torch.autograd.grad(expected.sum(), [p for p in policy.parameters() if p.requires_grad])
    got = torch.autograd.grad(scores.sum(), [p for p in compiled.parameters() if p.requires_grad])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_have_the_numbers_of_plain_ones(lab):
    policy = lab.policy("llama")
    compiled = lab.policy("llama", compile="layers", gradient_checkpointing=True, activation_offload=True)
    assert_same(policy, compiled, lab.padded(lab.records(9, 4, 6)))


def test_one_graph_serves_all_layers_batches_and_lengths(lab, traced, counted):
    policy = lab.policy("llama")
    compiled = lab.policy("llama", compile="layers", padding_free=True)
    for rows in [(9, 4, 1, 6), (7, 3), (12, 2, 5, 1, 8, 3), (10, 10, 2)]:
        assert_same(policy, compiled, lab.padded(lab.records(*rows)))
    assert counted["unique_graphs"] == 1
    assert not counters["graph_break"]
    with torch.no_grad():
        for rows in [(9, 4, 1, 6), (7, 3)]:
            compiled.eval()(lab.padded(lab.records(*rows)))
    assert counted["unique_graphs"] == 2  # without a gradient it is another


def test_sampling_compiles_nothing(lab, traced, counted):
    compiled = lab.policy("llama", compile="layers").eval()
    prompt = torch.stack(lab.records(4, 4))
    drawn = compiled.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(drawn, lab.policy("llama").eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False))
    compiled.next_logits(input_ids=prompt)
    assert counted["unique_graphs"] == 0
    assert is_compiled(compiled)  # again


def test_every_kind_of_model_takes_the_option(lab, traced, tiny_model):
    policy = lab.policy("llama", compile="layers")
    assert is_compiled(make_reference(policy).policy)
    assert is_compiled(load_scalar_model(ModelSpec(path=str(tiny_model), compile="layers")))
    assert not is_compiled(lab.policy("llama"))
    with not_compiled(policy):
        assert not is_compiled(policy)
    assert policy.state_dict().keys() == lab.policy("llama").state_dict().keys()


def test_a_model_without_named_layers_is_refused(lab, monkeypatch):
    policy = lab.policy("llama")
    monkeypatch.setattr(policy.causal_lm, "_no_split_modules", None, raising=False)
    with pytest.raises(
        UserError, match=r"'llama' do not say what their layers are \(_no_split_modules\): leave compile"
    ):
        compile_layers(policy.causal_lm)
