"""Answers sampled on the GPU: the tokens of the CPU, and log-probabilities that the policy itself finds."""

from functools import partial

import pytest
import torch
from on_gpu import ACCELERATOR, DEVICE, ON_GPU, or_skip

or_skip()

from fits import fit
from one_step import records

from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.data.encode import encode_prompt
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.continuous import HFContinuousBatching
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.mixture import MixtureSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule

pytestmark = pytest.mark.gpu

TEXTS = ("the film", "a plot was very long and the actors not good", "good")
SPECS = {
    "greedy": GenerationSpec(max_new_tokens=24, temperature=0.0),
    "sampled": GenerationSpec(max_new_tokens=24, temperature=0.7, num_samples=8, keep_logprobs=True),
    "truncated": GenerationSpec(max_new_tokens=24, top_p=0.8, top_k=9, min_p=0.02, num_samples=8, keep_logprobs=True),
    "of a minimum length": GenerationSpec(max_new_tokens=12, min_new_tokens=5, num_samples=4, keep_logprobs=True),
    "penalised": GenerationSpec(max_new_tokens=24, repetition_penalty=1.5, num_samples=4),
    "suppressed": GenerationSpec(
        max_new_tokens=24, suppress_tokens=["film", "good"], num_samples=4, keep_logprobs=True
    ),
    "by rows": GenerationSpec(max_new_tokens=24, num_samples=4, rows_at_once=5),
}
FIELDS = ("tokens", "attention_mask", "mask", "positions", "finished", "kept")


def made(model, device=DEVICE, **options):
    return load_policy(ModelSpec(path=str(model), **options)).to(device).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    ids = [encode_prompt(tokenizer, text) for text in TEXTS]
    return collate_prompts(ids, list(TEXTS), [{} for _ in TEXTS], range(len(TEXTS)), tokenizer.pad_token_id)


def assert_answers(found, expected):
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.device.type == DEVICE
            assert torch.equal(ours.cpu(), theirs), name


@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_those_of_the_cpu(name, tiny_model, tokenizer, prompts):
    engine = HFGenerate(SPECS[name], tokenizer)
    expected = engine.generate(made(tiny_model, "cpu"), prompts, seed=5)
    assert_answers(engine.generate(made(tiny_model), prompts.to(DEVICE), seed=5), expected)


def test_tokens_of_a_mixture_are_those_of_the_cpu(tiny_model, tokenizer, prompts):
    answers = []
    for device in ("cpu", DEVICE):
        policy, other = (made(tiny_model, device) for _ in range(2))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        engine = HFGenerate(SPECS["sampled"], tokenizer).with_mixture(MixtureSpec(Reference(other), 0.4))
        answers.append(engine.generate(policy, prompts.to(device), seed=5))
    assert_answers(answers[1], answers[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sampled", "truncated"])
def test_what_the_sampler_said_is_what_the_policy_says(name, dtype, wide_model, tokenizer, prompts):
    spec, policy = SPECS[name], made(wide_model, dtype=dtype)
    answers = HFGenerate(spec, tokenizer).generate(policy, prompts.to(DEVICE), seed=5)
    with torch.no_grad():
        own = policy(answers, temperature=spec.temperature, answers=answers.mask).logprobs
    gap = (own - answers.sampler_logprobs)[answers.mask].abs()
    assert float(gap.max()) < (1e-4 if dtype == "float32" else 0.3)
    assert float(gap.mean()) < (1e-5 if dtype == "float32" else 0.03)


@pytest.mark.slow  # transformers compiles its steps
def test_a_static_cache_gives_the_same_greedy_answers(tiny_model, tokenizer, prompts):
    policy, answers = made(tiny_model), []
    for cache in ("dynamic", "static"):
        spec = GenerationSpec(max_new_tokens=24, temperature=0.0, cache=cache)
        answers.append(HFGenerate(spec, tokenizer).generate(policy, prompts.to(DEVICE), seed=5).tokens)
    assert torch.equal(*answers)


@pytest.mark.slow  # transformers compiles its steps
def test_a_static_cache_draws_by_its_seed_and_leaves_the_generators_alone(tiny_model, tokenizer, prompts):
    engine = HFGenerate(GenerationSpec(max_new_tokens=8, num_samples=4, cache="static"), tokenizer)
    policy, asked = made(tiny_model), prompts.to(DEVICE)
    torch.manual_seed(0)
    untouched = torch.rand(3, device=DEVICE)
    torch.manual_seed(0)
    first = engine.generate(policy, asked, seed=5)
    assert torch.equal(torch.rand(3, device=DEVICE), untouched)
    assert torch.equal(first.tokens, engine.generate(policy, asked, seed=5).tokens)


@pytest.mark.slow  # transformers sets up a cache and graphs
def test_answers_of_continuous_batching(tiny_model, tokenizer, prompts):
    """Greedy ones are those of generate; sampled ones come with the policy's own log-probabilities."""
    policy, asked = made(tiny_model), prompts.to(DEVICE)
    options = {"page_size": 16, "cache_memory_frac": 0.02}  # of a card that other processes use too
    greedy = GenerationSpec(max_new_tokens=8, temperature=0.0)
    expected = HFGenerate(greedy, tokenizer).generate(policy, asked, seed=0)
    answers = HFContinuousBatching(greedy, tokenizer, **options).generate(policy, asked, seed=0)
    for name in ("tokens", "attention_mask", "mask", "positions", "finished"):
        assert torch.equal(getattr(answers, name), getattr(expected, name)), name
    spec = GenerationSpec(max_new_tokens=8, num_samples=8, temperature=0.7)
    answers = HFContinuousBatching(spec, tokenizer, **options).generate(policy, asked, seed=1)
    own = policy(answers, temperature=0.7).logprobs.detach()
    torch.testing.assert_close(answers.sampler_logprobs, own, rtol=0, atol=1e-4)
    assert len(answers.tokens.unique(dim=0)) > 5


@pytest.mark.slow  # transformers sets up a cache and graphs
def test_a_stage_trains_through_continuous_batching(tiny_model, write_jsonl, tmp_path):
    module = GRPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=5, num_samples=4),
        engine=partial(HFContinuousBatching, page_size=16, cache_memory_frac=0.02),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        seed=1,
    )
    asked = write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:8]])
    data = {"train": asked, "batch_size": 4}
    seen = fit(module, tmp_path, data=data, accelerator=ACCELERATOR).callback_metrics
    assert seen["rollout/logprob_gap"] < 1e-4
    assert seen["policy/ratio"].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="autocast on the CPU knows fewer operations")
def test_sampling_under_autocast_is_what_training_sees(wide_model, tokenizer, prompts):
    """The ratio of a first step is 1 as far as bfloat16 lets it."""
    spec, policy = SPECS["sampled"], made(wide_model)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        answers = HFGenerate(spec, tokenizer).generate(policy, prompts.to(DEVICE), seed=5)
        own = policy(answers, temperature=spec.temperature).logprobs.float()
    gap = (own - answers.sampler_logprobs)[answers.mask].abs()
    assert float(gap.mean()) < 0.03
