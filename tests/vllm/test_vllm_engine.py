"""vLLM, in process and as a server, against transformers: the same tokens and log-probabilities, also after updates."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from moving import gap, moved

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rollout import VLLMEngine, VLLMServer
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec


@pytest.fixture(scope="module", params=["VLLMEngine", "VLLMServer"])
def engine(request, tokenizer):
    spec = GenerationSpec(max_new_tokens=16)
    if request.param == "VLLMServer":
        made = VLLMServer(spec, tokenizer, url=request.getfixturevalue("server").url)
    else:
        made = VLLMEngine(spec, tokenizer)
    yield made
    made.close()


@pytest.fixture
def policy(llama):
    return load_policy(ModelSpec(path=str(llama)))


def answered(engine, policy, prompts, seed=1, **spec):
    engine.take_weights(policy)
    return engine.with_spec(GenerationSpec(**({"max_new_tokens": 16} | spec))).generate(policy, prompts, seed=seed)


def test_greedy_answers_equal_transformers_before_and_after_an_update(engine, policy, tokenizer, prompts):
    greedy = GenerationSpec(max_new_tokens=16, temperature=0.0)
    first = None
    for _ in range(2):
        expected = HFGenerate(greedy, tokenizer).generate(policy, prompts, seed=0)
        answers = answered(engine, policy, prompts, temperature=0.0)
        for name in ("tokens", "attention_mask", "mask", "positions", "finished"):
            assert torch.equal(getattr(answers, name), getattr(expected, name)), name
        assert first is None or not torch.equal(first, answers.tokens)
        first = answers.tokens
        moved(policy)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_policys_at_the_sampling_temperature(engine, policy, prompts, temperature):
    answers = answered(engine, policy, prompts, num_samples=16, temperature=temperature)
    assert gap(policy, answers, temperature) < 1e-3
    answers = answered(engine, moved(policy), prompts, num_samples=16, temperature=temperature)
    assert gap(policy, answers, temperature) < 1e-3
    assert gap(moved(policy, seed=4), answers, temperature) > 0.1
    assert answers.finished.any()
    assert not answers.finished.all()


def test_a_seed_names_the_answers_and_leaves_every_global_generator_alone(engine, policy, prompts):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    untouched = torch.rand(3).tolist(), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    first = answered(engine, policy, prompts, seed=5, num_samples=4)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == untouched
    again = answered(engine, policy, prompts, seed=5, num_samples=4)
    other = answered(engine, policy, prompts, seed=6, num_samples=4)
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)


def test_sampled_tokens_follow_the_policy(engine, policy, prompts):
    one = prompts_of(prompts, 0)
    answers = answered(engine, policy, one, temperature=0.6, max_new_tokens=1, num_samples=3000)
    drawn = torch.bincount(answers.tokens[:, -1], minlength=21) / 3000
    logits = policy.causal_lm(input_ids=one.tokens).logits[0, -1]
    # the deviation of a share p of n draws is sqrt(p (1 - p) / n) <= 0.0092; four of them
    assert (drawn - (logits / 0.6).softmax(-1)).abs().max() < 0.037


def prompts_of(prompts, row):
    tokens = prompts.tokens[row][prompts.attention_mask[row]][None]
    return replace(
        prompts,
        tokens=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        texts=prompts.texts[row : row + 1],
        records=prompts.records[row : row + 1],
        indices=prompts.indices[row : row + 1],
    )


def test_a_minimum_length_comes_with_what_it_left_to_draw_from(engine, policy, prompts):
    answers = answered(engine, policy, prompts, num_samples=32, min_new_tokens=4, max_new_tokens=8)
    assert answers.mask.sum(-1).min() >= 4
    assert answers.finished.any()
    assert gap(policy, answers) < 1e-3
    # without the sets the end token's share is missing
    assert gap(policy, replace(answers, kept=None)) > 1e-2


def test_truncated_draws_are_what_transformers_would_allow(engine, policy, prompts):
    answers = answered(engine, policy, prompts, num_samples=64, top_k=2, max_new_tokens=4)
    logits = policy.causal_lm(
        input_ids=answers.tokens, attention_mask=answers.attention_mask, position_ids=answers.positions
    ).logits[:, :-1]
    best = logits.topk(2, -1).indices
    drawn = answers.tokens[:, 1:, None]
    assert ((best == drawn).any(-1) | ~answers.mask[:, 1:]).all()


def test_an_adapter_arrives_in_the_weights(engine, llama, tokenizer, prompts):
    policy = moved(load_policy(ModelSpec(path=str(llama), lora=LoraSpec(r=4))))
    answers = answered(engine, policy, prompts, num_samples=8)
    assert gap(policy, answers) < 1e-3
    with policy.adapter_disabled():
        assert gap(policy, answers) > 0.1


def test_a_head_that_is_the_embedding_has_the_weights_of_every_update(llama, llama_config, tokenizer, prompts):
    policy = load_policy(ModelSpec(config=llama_config | {"tie_word_embeddings": True}, tokenizer=str(llama)))
    engine = VLLMEngine(GenerationSpec(max_new_tokens=16), tokenizer)
    try:
        for seed in range(3):
            assert gap(policy, answered(engine, policy, prompts, num_samples=8)) < 1e-3
            moved(policy, seed)
    finally:
        engine.close()


def test_prompts_that_leave_no_room_are_refused(engine, policy, prompts):
    with pytest.raises(UserError, match="exceeds the model's context of 64 tokens"):
        answered(engine, policy, prompts, max_new_tokens=60)


def test_an_engine_that_was_closed_goes_on(engine, policy, prompts):
    first = answered(engine, policy, prompts)
    engine.close()
    assert not torch.distributed.is_initialized()  # nothing of vLLM's is left in this process
    assert torch.equal(answered(engine, policy, prompts).tokens, first.tokens)
