"""Adapters sent as adapters, to vLLM in process and as a server: the policy's answers, an adapter's bytes."""

import importlib.util
import itertools
import signal

import pytest
import torch
from moving import gap, moved
from vllm_process import start_server

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.rollout import VLLMEngine, VLLMServer
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec

GREEDY = GenerationSpec(max_new_tokens=16, temperature=0.0)
RANK = 4


@pytest.fixture(scope="module")
def url(token, llama, tmp_path_factory):
    server = start_server(llama, tmp_path_factory.mktemp("server"), "--enable-lora", "--max-lora-rank", "8")
    yield server.url
    server.signal(signal.SIGKILL)


@pytest.fixture(scope="module", params=["VLLMEngine", "VLLMServer"])
def engine(request, tokenizer):
    if request.param == "VLLMServer":
        made = VLLMServer(GREEDY, tokenizer, adapter="sent", url=request.getfixturevalue("url"))
    else:
        made = VLLMEngine(GREEDY, tokenizer, adapter="sent")
    yield made
    made.close()


def adapted(llama, **lora):
    return moved(load_policy(ModelSpec(path=str(llama), lora=LoraSpec(**({"r": RANK} | lora)))))


def agree(engine, policy, tokenizer, prompts):
    """Greedy tokens of the engine, once they are found to be the policy's, and its log-probabilities too."""
    engine.take_weights(policy)
    answers = engine.with_spec(GREEDY).generate(policy, prompts, seed=0)
    assert torch.equal(answers.tokens, HFGenerate(GREEDY, tokenizer).generate(policy, prompts, seed=0).tokens)
    drawn = engine.with_spec(GenerationSpec(max_new_tokens=16, num_samples=8)).generate(policy, prompts, seed=1)
    assert gap(policy, drawn) < 1e-3
    with policy.adapter_disabled():
        assert gap(policy, drawn) > 0.1
    return answers.tokens


@pytest.fixture
def handed_over(engine, llama, monkeypatch):
    """Bytes of every hand-over, as they come."""
    sizes = []
    if isinstance(engine, VLLMServer):
        request = engine._server._request

        def noted(method, path, body=None):
            if path.startswith("/rlhf/weights"):
                sizes.append(len(body))
            return request(method, path, body)

        monkeypatch.setattr(engine._server, "_request", noted)
        return sizes
    if engine._running.llm is None:
        engine.take_weights(adapted(llama))
    call = engine._running.llm.collective_rpc

    def counted(weights):
        for name, weight in weights:
            sizes[-1] += weight.nbytes
            yield name, weight

    def rpc(method, *args, **kwargs):
        if method == "reload_weights":
            sizes.append(0)
            kwargs["kwargs"] = {"weights_iterator": counted(kwargs["kwargs"]["weights_iterator"])}
        else:
            sizes.append(sum(tensor.nbytes for tensor in kwargs["args"][1].values()))
        return call(method, *args, **kwargs)

    monkeypatch.setattr(engine._running.llm, "collective_rpc", rpc)
    return sizes


def test_answers_are_the_new_adapters_after_every_update(engine, llama, tokenizer, prompts):
    policy, seen = adapted(llama), []
    for seed in range(3):
        seen.append(agree(engine, policy, tokenizer, prompts))
        moved(policy, seed)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    # the same prompts, known from before: without the hand-over they are answered as they were
    again = engine.with_spec(GREEDY).generate(policy, prompts, seed=0).tokens
    assert torch.equal(again, seen[-1])


def test_the_base_comes_once_and_then_an_adapters_bytes(engine, llama, tokenizer, prompts, handed_over):
    policy = adapted(llama)
    adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in policy.parameters() if not p.requires_grad)
    for seed in range(3):
        engine.take_weights(moved(policy, seed))
    whole, *updates = handed_over
    assert base <= whole < 1.1 * base
    assert len(updates) == 3
    assert all(adapter <= update < adapter + 4096 for update in updates)  # of a server with safetensors' header
    with torch.no_grad():
        policy.head().weight.mul_(1.5)  # whoever writes to what was frozen
    agree(engine, policy, tokenizer, prompts)
    assert [size >= base for size in handed_over[4:]] == [True, False]


def test_layers_without_an_adapter_stay_as_they_are(engine, llama, tokenizer, prompts):
    agree(engine, adapted(llama), tokenizer, prompts)
    agree(engine, adapted(llama, target_modules=["q_proj", "down_proj"]), tokenizer, prompts)
    agree(engine, adapted(llama, r=8, alpha=3), tokenizer, prompts)


def test_a_rank_that_there_is_no_room_for_is_named(engine, llama, tokenizer, prompts):
    agree(engine, adapted(llama), tokenizer, prompts)
    with pytest.raises(UserError, match=r"up to rank 8.*--enable-lora --max-lora-rank 16|up to rank 8: start it anew"):
        engine.take_weights(adapted(llama, r=9))
    agree(engine, adapted(llama), tokenizer, prompts)


def test_layers_that_vllm_does_not_have_are_named(engine, llama, monkeypatch):
    module = "rlhf_lightning.rollout.vllm_server" if isinstance(engine, VLLMServer) else engine.__module__
    stranger = {"model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(1, 64)}
    stranger["model.layers.9.mlp.up_proj.lora_B.weight"] = torch.ones(64, 1)
    monkeypatch.setattr(f"{module}.adapter_weights", lambda policy: stranger)
    with pytest.raises(UserError, match=r"no place for an adapter of model.layers.9.mlp.up_proj: leave it out of lora"):
        engine.take_weights(adapted(llama))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed here")
@pytest.mark.parametrize("adapter", ["merged", "sent"])
def test_four_bits_are_put_back_for_the_engine(adapter, llama, tokenizer, prompts):
    quantization = QuantizationSpec(compute_dtype="float32")
    policy = moved(load_policy(ModelSpec(path=str(llama), lora=LoraSpec(r=4), quantization=quantization)))
    engine = VLLMEngine(GREEDY, tokenizer, adapter=adapter)
    try:
        for seed in range(2):
            agree(engine, policy, tokenizer, prompts)
            moved(policy, seed)
    finally:
        engine.close()


def test_a_server_that_takes_no_adapters_is_named(server, llama, tokenizer):
    engine = VLLMServer(GREEDY, tokenizer, adapter="sent", url=server.url)
    with pytest.raises(UserError, match=r"adapters up to rank 0, and lora.r=4: start it with --enable-lora"):
        engine.take_weights(adapted(llama))
