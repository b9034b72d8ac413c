"""The client of a vLLM server against a small one of ours."""

import copy
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from asking_ranks import in_two_processes
from fake_vllm import TOKEN, FakeVLLM, serving
from fits import fit
from moving import moved
from one_step import records

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.data.encode import encode_prompt
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout import vllm_serve
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.rollout.vllm_server import PING_SECONDS, VLLMServer
from rlhf_lightning.stages import GRPOModule

TEXTS = ("the film", "a plot was very", "good")


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RLHF_VLLM_TOKEN", TOKEN)
    monkeypatch.delenv("RLHF_VLLM_HOSTS", raising=False)


@pytest.fixture
def policy(tiny_model):
    return load_policy(ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSpec(path=str(tiny_model)))


@pytest.fixture
def prompts(tokenizer):
    ids = [encode_prompt(tokenizer, text) for text in TEXTS]
    return collate_prompts(ids, list(TEXTS), [{} for _ in TEXTS], range(len(TEXTS)), tokenizer.pad_token_id)


def client(server, tokenizer, spec=None, **options):
    return VLLMServer(spec or GenerationSpec(max_new_tokens=6), tokenizer, url=server.url, **options)


# ---- answers and weights ---------------------------------------------------------------------------------------------


def test_answers_come_from_the_weights_that_were_given_last(policy, tokenizer, prompts):
    greedy = GenerationSpec(max_new_tokens=6, temperature=0.0)
    with serving(FakeVLLM(copy.deepcopy(policy), tokenizer)) as server:
        engine = client(server, tokenizer, greedy)
        for _ in range(2):
            engine.take_weights(policy)
            expected = HFGenerate(greedy, tokenizer).generate(policy, prompts, seed=0)
            assert torch.equal(engine.generate(policy, prompts, seed=0).tokens, expected.tokens)
            moved(policy)
        stale = engine.generate(policy, prompts, seed=0)
    assert not torch.equal(stale.tokens, HFGenerate(greedy, tokenizer).generate(policy, prompts, seed=0).tokens)


def test_answers_to_a_prompt_stand_side_by_side_with_what_the_server_said(policy, tokenizer, prompts):
    with serving(FakeVLLM(copy.deepcopy(policy), tokenizer)) as server:
        engine = client(server, tokenizer, GenerationSpec(max_new_tokens=6, num_samples=4), in_flight=2)
        engine.take_weights(policy)
        answers = engine.generate(policy, prompts, seed=1)
        again, other = (engine.generate(policy, prompts, seed=seed) for seed in (1, 2))
    assert torch.equal(answers.tokens, again.tokens)
    assert not torch.equal(answers.tokens, other.tokens)
    before = prompts.tokens.shape[1]
    assert torch.equal(answers.tokens[:, :before], prompts.tokens.repeat_interleave(4, 0))
    own = policy(answers).logprobs
    torch.testing.assert_close(answers.sampler_logprobs, own, rtol=0, atol=1e-5)


def test_an_adapter_is_added_in_and_weights_may_come_in_parts(tiny_model, policy, tokenizer, prompts):
    adapted = moved(load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=4))))
    with serving(FakeVLLM(policy, tokenizer)) as server:
        engine = client(server, tokenizer, part_mib=1)
        engine._server.limits = engine._server.limits.__class__(20, 600, 3, 128, 0)  # a part for each weight
        engine.take_weights(adapted)
        answers = engine.generate(adapted, prompts, seed=1)
        assert server.parts == len(policy.causal_lm.state_dict())
    torch.testing.assert_close(answers.sampler_logprobs, adapted(answers).logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_a_head_that_is_the_embedding_goes_over_the_wire_once(lora, tiny_model, tokenizer, prompts):
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    spec = ModelSpec(config=config | {"tie_word_embeddings": True}, tokenizer=str(tiny_model))
    policy = moved(load_policy(replace(spec, lora=lora)))
    whole = sum(weight.nbytes for weight in load_policy(spec).parameters())  # of which a tied one is one
    with serving(FakeVLLM(load_policy(spec), tokenizer)) as server:
        engine = client(server, tokenizer, adapter="merged" if lora is None else "sent")
        engine.take_weights(policy)
        answers = engine.generate(policy, prompts, seed=1)
        assert whole < server.sizes[0][0] < whole + 4096
    torch.testing.assert_close(answers.sampler_logprobs, policy(answers).logprobs, rtol=0, atol=1e-5)


def test_an_adapter_is_sent_alone_after_what_it_is_put_over(tiny_model, policy, tokenizer, prompts):
    adapted = load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=2)))
    adapter = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    with serving(FakeVLLM(policy, tokenizer)) as server:
        engine = client(server, tokenizer, adapter="sent")
        for _ in range(3):
            engine.take_weights(moved(adapted))
            answers = engine.generate(adapted, prompts, seed=1)
            torch.testing.assert_close(answers.sampler_logprobs, adapted(answers).logprobs, rtol=0, atol=1e-5)
        assert [over for _, over in server.sizes] == [False, True, True, True]
        assert all(adapter <= size < adapter + 4096 for size, over in server.sizes if over)
        # another took its place, or another run gave it weights
        server.base = None
        with pytest.raises(UserError, match=r"holds other weights than this run gave it.*another base"):
            engine.take_weights(adapted)


def test_a_server_without_room_for_the_adapter_is_named(tiny_model, policy, tokenizer):
    adapted = load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=17)))
    with serving(FakeVLLM(policy, tokenizer)) as server:
        message = "takes adapters up to rank 16, and lora.r=17: start it with --enable-lora --max-lora-rank 32"
        with pytest.raises(UserError, match=message):
            client(server, tokenizer, adapter="sent").take_weights(adapted)
        assert server.parts == 0
        client(server, tokenizer).take_weights(adapted)  # merged


def test_a_stage_trains_through_a_server(tiny_model, policy, tokenizer, write_jsonl, tmp_path):
    prompts = write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:8]])
    with serving(FakeVLLM(policy, tokenizer)) as server:
        module = GRPOModule(
            ModelSpec(path=str(tiny_model)),
            [WeightedReward(LengthReward(target=3), name="reward")],
            generation=GenerationSpec(max_new_tokens=5, num_samples=4),
            engine=partial(VLLMServer, url=server.url),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            seed=1,
        )
        metrics = fit(module, tmp_path, data={"train": prompts, "batch_size": 4}).callback_metrics
        assert server.asked.count("/rlhf/weights") == 2
        assert server.asked.count("/v1/completions") == 8
    assert metrics["rollout/logprob_gap"] < 1e-5
    assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-5)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_failure_that_passes_is_tried_again(policy, tokenizer, prompts):
    failures = {"/v1/completions": [503, 500], "/rlhf/weights": [503]}
    with serving(FakeVLLM(policy, tokenizer, failures)) as server:
        engine = client(server, tokenizer)
        engine.take_weights(policy)
        assert engine.generate(policy, prompts, seed=1).mask.any(-1).all()
        assert server.asked.count("/v1/completions") == 5


def test_a_failure_that_stays_is_an_error(policy, tokenizer, prompts):
    with serving(FakeVLLM(policy, tokenizer, {"/v1/completions": [503] * 99})) as server:
        engine = client(server, tokenizer, retries=1)
        engine.take_weights(policy)
        with pytest.raises(UserError, match=r"2 tries: status 503.*on purpose.*make vllm-server"):
            engine.generate(policy, prompts, seed=1)


def test_every_try_has_a_name_of_its_own_and_looks_at_the_model(policy, tokenizer):
    # or the end of one that was not heard would be taken for the next
    with serving(FakeVLLM(policy, tokenizer, {"/rlhf/weights": [0, 422, 0]})) as server:
        engine, names = client(server, tokenizer), []
        for refused in (False, True, False):
            with pytest.raises(UserError, match="on purpose") if refused else nullcontext():
                engine.take_weights(policy)
            names.append(server.weights.rpartition("-")[2])
        assert names == ["1", "1", "3"]
        server.changes = {"hidden_size": 32}  # another server took its place
        with pytest.raises(UserError, match="serves a model whose hidden_size is 32"):
            engine.take_weights(policy)


def test_nobody_there_is_an_error_at_once(policy, tokenizer):
    with serving(FakeVLLM(policy, tokenizer)) as server:
        engine = client(server, tokenizer)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"no vLLM server answers at {server.url} \(4 tries: ConnectionRefusedError"):
        engine.take_weights(policy)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("path", ["/rlhf/model", "/rlhf/weights", "/v1/completions"])
def test_a_server_that_hangs_is_an_error_after_the_patience(path, policy, tokenizer, prompts):
    with serving(FakeVLLM(policy, tokenizer)) as server:
        engine = client(server, tokenizer, patience_s=1.0)
        if path == "/v1/completions":
            engine.take_weights(policy)
        server.hangs = (path, "/health")
        started = time.monotonic()
        with pytest.raises(UserError, match=f"no vLLM server answers at {server.url}"):
            engine.take_weights(policy) if path != "/v1/completions" else engine.generate(policy, prompts, seed=1)
        assert time.monotonic() - started < 10


def test_a_dead_server_is_an_error_within_30_seconds_by_default(tokenizer, policy):
    limits = VLLMServer(GenerationSpec(), tokenizer)._server.limits
    # silence counts from when the last sign of life was asked for, and is looked at twice a second
    assert limits.patience_s + 0.5 < 30
    # a server that is gone is noticed by the tries: 0.5 + 1 + 2 seconds between them
    assert limits.retries == 3
    assert limits.patience_s > PING_SECONDS


def test_one_answer_that_takes_too_long_is_named(policy, tokenizer, prompts):
    with serving(FakeVLLM(policy, tokenizer)) as server:
        engine = client(server, tokenizer, answer_timeout_s=1.0)
        engine.take_weights(policy)
        server.hangs = ("/v1/completions",)
        with pytest.raises(UserError, match=r"engine.answer_timeout_s=1.0: raise it"):
            engine.generate(policy, prompts, seed=1)


def test_a_server_with_another_token_or_model_or_weights_is_named(policy, tokenizer, prompts, monkeypatch):
    with serving(FakeVLLM(policy, tokenizer)) as server:
        monkeypatch.setenv("RLHF_VLLM_TOKEN", "another-token-of-some-length")
        with pytest.raises(UserError, match="was started with another RLHF_VLLM_TOKEN than this run's"):
            client(server, tokenizer).take_weights(policy)
        monkeypatch.setenv("RLHF_VLLM_TOKEN", TOKEN)
        for what, told in (("hidden_size", 32), ("architecture", "MistralForCausalLM")):
            server.changes = {what: told}
            with pytest.raises(UserError, match=f"serves a model whose {what} is {told}, and the policy's is"):
                client(server, tokenizer).take_weights(policy)
        server.changes = {}
        engine = client(server, tokenizer)
        engine.take_weights(policy)
        server.weights = None  # it was started anew
        with pytest.raises(UserError, match="holds other weights than this run gave it"):
            engine.generate(policy, prompts, seed=1)
        assert server.asked.count("/v1/completions") <= len(TEXTS)  # such an error is not tried again


def test_a_server_that_is_not_ours_is_named(policy, tokenizer):
    message = "does not know /rlhf/model: start it with make vllm-server"
    with serving(FakeVLLM(policy, tokenizer, {"/rlhf/model": [404]})) as s, pytest.raises(UserError, match=message):
        client(s, tokenizer).take_weights(policy)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "is no server's address: give http://"),
        ("http://127.0.0.1:8000/v1", "is no server's address"),
        ("ftp://127.0.0.1", "is no server's address"),
        ("http://10.0.0.7:8000", "is not this machine.*export RLHF_VLLM_HOSTS=10.0.0.7 if it is yours"),
        ("http://127.0.0.1.evil.org", "is not this machine"),
        ("http://127.0.0.1@evil.org", "is not this machine"),
    ],
)
def test_a_config_does_not_decide_where_weights_go(url, message, tokenizer, monkeypatch):
    with pytest.raises(UserError, match=message):
        VLLMServer(GenerationSpec(), tokenizer, url=url)
    monkeypatch.setenv("RLHF_VLLM_HOSTS", "other, 10.0.0.7")
    VLLMServer(GenerationSpec(), tokenizer, url="https://10.0.0.7:8000")


@pytest.mark.parametrize(("given", "what"), [(None, "is not set"), ("short", "has fewer than 16 characters")])
def test_without_a_token_nobody_is_asked_and_nobody_listens(given, what, policy, tokenizer, monkeypatch, capsys):
    monkeypatch.delenv("RLHF_VLLM_TOKEN")
    if given:
        monkeypatch.setenv("RLHF_VLLM_TOKEN", given)
    with pytest.raises(UserError, match=f"RLHF_VLLM_TOKEN {what}"):
        VLLMServer(GenerationSpec(), tokenizer).take_weights(policy)
    assert vllm_serve.main(["--model", "x"]) == 2
    assert f"error: the environment variable RLHF_VLLM_TOKEN {what}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["patience_s", "answer_timeout_s", "in_flight", "part_mib"])
def test_limits_are_positive(option, tokenizer):
    with pytest.raises(UserError, match=f"engine.{option}=0: give a positive number"):
        VLLMServer(GenerationSpec(), tokenizer, **{option: 0})


def test_a_server_that_dies_while_it_answers_is_an_error(policy, tokenizer, prompts):
    server = FakeVLLM(policy, tokenizer)
    with serving(server):
        engine = client(server, tokenizer, patience_s=2.0, retries=1)
        engine.take_weights(policy)
        server.hangs = ("/v1/completions",)
        threading.Timer(0.3, lambda: (server.ended.set(), server.shutdown(), server.socket.close())).start()
        with pytest.raises(UserError, match=f"no vLLM server answers at {server.url}"):
            engine.generate(policy, prompts, seed=1)


def test_two_processes_share_a_server_and_hear_the_same_of_its_failure(tiny_model, policy, tokenizer, tmp_path):
    other = moved(copy.deepcopy(policy))
    with serving(FakeVLLM(other, tokenizer, {"/rlhf/weights": [0, 0, 422]})) as server:
        told = in_two_processes(server.url, str(tiny_model), tmp_path)
        assert server.parts == 2  # the first process alone gives weights, and each time
    for rank in range(2):
        prompts = collate_prompts([[1, 4 + rank]], [""], [{}], range(1), tokenizer.pad_token_id)
        greedy = HFGenerate(GenerationSpec(max_new_tokens=4, temperature=0.0), tokenizer)
        assert told[rank]["answered"] == 2 * [greedy.generate(policy, prompts, seed=0).tokens[0].tolist()]
        # the second one does not wait for weights that never come
        assert "refuses /rlhf/weights (status 422)" in told[rank]["error"]
