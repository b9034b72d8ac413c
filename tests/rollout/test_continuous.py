"""transformers' continuous batching gives what its generate gives, and says how likely it was."""

from functools import partial

import pytest
import torch
from fits import fit
from one_step import records

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.data.encode import encode_prompt
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout import continuous
from rlhf_lightning.rollout.continuous import HFContinuousBatching
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule

TEXTS = ("the film", "a plot was very", "good")


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    ids = [encode_prompt(tokenizer, text) for text in TEXTS]
    return collate_prompts(ids, list(TEXTS), [{} for _ in TEXTS], range(len(TEXTS)), tokenizer.pad_token_id)


def test_greedy_answers_equal_those_of_generate(policy, tokenizer, prompts):
    spec = GenerationSpec(max_new_tokens=8, temperature=0.0)
    expected = HFGenerate(spec, tokenizer).generate(policy, prompts, seed=0)
    answers = HFContinuousBatching(spec, tokenizer, page_size=16).generate(policy, prompts, seed=0)
    for name in ("tokens", "attention_mask", "mask", "positions", "finished"):
        assert torch.equal(getattr(answers, name), getattr(expected, name)), name
    assert answers.sampler_logprobs is None


def test_log_probabilities_are_the_policys_and_nothing_else_is_touched(tiny_model, tokenizer, prompts):
    policy = load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=4))).train()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    own, attention = policy.causal_lm.generation_config, policy.config._attn_implementation
    own.top_k, own.repetition_penalty = 1, 9.0  # no sampling default of the model leaks in
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    engine = HFContinuousBatching(GenerationSpec(max_new_tokens=8, num_samples=16, temperature=0.7), tokenizer)
    answers = engine.generate(policy, prompts, seed=1)
    assert torch.equal(torch.rand(3), untouched)
    assert policy.training
    assert policy.causal_lm.generation_config is own
    assert policy.config._attn_implementation == attention
    torch.testing.assert_close(
        answers.sampler_logprobs, policy(answers, temperature=0.7).logprobs.detach(), rtol=0, atol=1e-4
    )
    assert answers.finished.any()
    assert not answers.finished.all()
    assert len(answers.tokens[:16].unique(dim=0)) > 5


def test_a_stage_trains_through_it(tiny_model, write_jsonl, tmp_path):
    module = GRPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3), name="reward")],
        generation=GenerationSpec(max_new_tokens=5, num_samples=4),
        engine=partial(HFContinuousBatching, page_size=16),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        seed=1,
    )
    prompts = write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:8]])
    metrics = fit(module, tmp_path, data={"train": prompts, "batch_size": 4}).callback_metrics
    assert metrics["rollout/logprob_gap"] < 1e-5
    assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"stop_strings": ["a"]}, {}, r"generation.stop_strings=\['a'\] is not known to HFContinuousBatching"),
        ({"min_new_tokens": 2}, {}, "generation.min_new_tokens=2 is not known to HFContinuousBatching"),
        ({"min_p": 0.1}, {}, "generation.min_p=0.1 is not known to HFContinuousBatching"),
        ({"repetition_penalty": 1.1}, {}, "generation.repetition_penalty=1.1 is not known to HFContinuousBatching"),
        ({"suppress_tokens": ["a"]}, {}, r"generation.suppress_tokens=\['a'\] is not known to HFContinuousBatching"),
        ({"rows_at_once": 2}, {}, "generation.rows_at_once=2 does nothing with HFContinuousBatching"),
        ({}, {"cache_memory_frac": 0.0}, "engine.cache_memory_frac=0.0: give a share"),
        ({}, {"page_size": 1}, "engine.page_size=1: give at least 4 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(spec, options, message, tokenizer):
    with pytest.raises(UserError, match=message):
        HFContinuousBatching(GenerationSpec(**spec), tokenizer, **options)


def test_answers_that_did_not_come_are_an_error(policy, tokenizer, prompts, monkeypatch):
    monkeypatch.setattr(type(policy.causal_lm), "generate_batch", lambda *args, **kwargs: {})
    with pytest.raises(UserError, match="gave 0 of 3 answers"):
        HFContinuousBatching(GenerationSpec(max_new_tokens=4), tokenizer).generate(policy, prompts, seed=1)


def test_processes_that_share_a_model_are_refused(policy, tokenizer, prompts, monkeypatch):
    engine = HFContinuousBatching(GenerationSpec(max_new_tokens=4), tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(continuous, "is_sharded", lambda module: True)
        with pytest.raises(UserError, match="shares the policy's weights out over processes"):
            engine.generate(policy, prompts, seed=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="would take the processes that train for parts of one model"):
        engine.generate(policy, prompts, seed=1)
