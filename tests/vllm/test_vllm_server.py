"""The real server: who may ask, whose weights it answers from, and what a trainer hears when it is gone."""

import signal
import time
import urllib.error
import urllib.request
from functools import partial

import pytest
import torch
from fits import fit
from one_step import records
from vllm_process import start_server

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout import GenerationSpec, VLLMServer
from rlhf_lightning.stages import GRPOModule


def status(url: str, token: str | None = None, body: bytes | None = None) -> int:
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_but_its_health_is_told_without_the_token(server, token):
    assert status(f"{server.url}/health") == 200
    paths = ("/v1/models", "/v1/completions", "/rlhf/model", "/rlhf/weights", "/metrics", "/docs", "/ping", "/tokenize")
    for path in paths:
        assert status(f"{server.url}{path}") == 401, path
        assert status(f"{server.url}{path}", token[:-1]) == 401, path
        assert status(f"{server.url}{path}", body=b"{}") == 401, path
    assert status(f"{server.url}/v1/models", token) == 200
    assert server.url.startswith("http://127.0.0.1")


def test_what_is_no_safetensors_is_refused_and_the_server_lives_on(server, token):
    import pickle

    path = f"{server.url}/rlhf/weights?name=x&part=0&last=1"
    for body in (pickle.dumps({"weight": 1}), b"", b"\xff" * 100):
        assert status(path, token, body) == 422
    assert status(f"{server.url}/health") == 200


def test_another_runs_weights_are_noticed(server, llama, tokenizer):
    policy = load_policy(ModelSpec(path=str(llama)))
    prompts = collate_prompts([[1, 4]], ["the"], [{}], range(1), tokenizer.pad_token_id)
    ours, theirs = (VLLMServer(GenerationSpec(max_new_tokens=4), tokenizer, url=server.url) for _ in range(2))
    ours.take_weights(policy)
    theirs.take_weights(policy)
    with pytest.raises(UserError, match="holds other weights than this run gave it"):
        ours.generate(policy, prompts, seed=1)


def test_grpo_trains_through_it(server, llama, write_jsonl, tmp_path):
    module = GRPOModule(
        ModelSpec(path=str(llama)),
        [WeightedReward(LengthReward(target=3), name="reward")],
        generation=GenerationSpec(max_new_tokens=5, num_samples=4),
        engine=partial(VLLMServer, url=server.url),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        seed=1,
    )
    prompts = write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:12]])
    metrics = fit(module, tmp_path, data={"train": prompts, "val": prompts, "batch_size": 4}).callback_metrics
    assert metrics["rollout/logprob_gap"] < 1e-3
    assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-5)


def test_a_server_that_hangs_and_one_that_dies_are_errors_within_30_seconds(token, llama, tokenizer, tmp_path):
    server = start_server(llama, tmp_path)
    policy = load_policy(ModelSpec(path=str(llama)))
    prompts = collate_prompts([[1, 4]], ["the"], [{}], range(1), tokenizer.pad_token_id)
    engine = VLLMServer(GenerationSpec(max_new_tokens=4), tokenizer, url=server.url)
    engine.take_weights(policy)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        server.signal(number)
        started = time.monotonic()
        with pytest.raises(UserError, match=f"no vLLM server answers at {server.url}"):
            engine.generate(policy, prompts, seed=1)
        assert time.monotonic() - started < 30
    server.process.wait(10)
    assert token not in server.log.read_text()
