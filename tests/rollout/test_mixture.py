"""Answers drawn from a geometric mixture of two models have the probabilities that the formula says."""

import pytest
import torch
from one_step import another

from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.reference import Reference, make_reference
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.mixture import MixtureSpec
from rlhf_lightning.rollout.spec import GenerationSpec

PROMPTS = [[4, 5, 6], [7], [5, 5, 8, 9, 4]]


def prompts(tokenizer):
    return collate_prompts(PROMPTS, ["", "", ""], [{}, {}, {}], [0, 1, 2], tokenizer.pad_token_id)


@torch.no_grad()
def logits(policy, answers):
    return policy.causal_lm(
        input_ids=answers.tokens,
        attention_mask=answers.attention_mask.long(),
        position_ids=answers.positions,
        use_cache=False,
    ).logits


@pytest.mark.parametrize("share", [0.125, 0.7, 1.0])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 5}, {"min_new_tokens": 3}, {"cache": "static"}])
def test_what_is_sampled_from_is_the_mixture(share, sampling, tiny_model):
    spec = ModelSpec(path=str(tiny_model))
    tokenizer, policy, other = load_tokenizer(spec), load_policy(spec), load_policy(another(str(tiny_model)))
    generation = GenerationSpec(max_new_tokens=6, num_samples=2, keep_logprobs=True, **sampling)
    engine = HFGenerate(generation, tokenizer).with_mixture(MixtureSpec(Reference(other), share))
    answers = engine.generate(policy, prompts(tokenizer), seed=3)
    mixed = (1 - share) * logits(policy, answers).log_softmax(-1) + share * logits(other, answers).log_softmax(-1)
    mixed = mixed[:, :-1] / generation.temperature
    if answers.kept is not None:
        bits = answers.kept[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
        mixed = mixed.masked_fill(~bits.flatten(-2)[:, 1:, : mixed.shape[-1]].bool(), -torch.inf)
    by_hand = mixed.log_softmax(-1).gather(-1, answers.tokens[:, 1:, None])[..., 0]
    real = answers.mask[:, 1:]
    torch.testing.assert_close(answers.sampler_logprobs[:, 1:][real], by_hand[real], rtol=1e-4, atol=1e-4)
    assert (logits(policy, answers) - logits(other, answers)).abs().max() > 0.1, "two models that differ"


def test_of_a_policy_with_an_adapter_the_other_model_is_itself_without_it(tiny_model):
    spec = ModelSpec(path=str(tiny_model), lora=LoraSpec(r=4))
    tokenizer, policy = load_tokenizer(spec), load_policy(spec)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    reference = make_reference(policy)
    assert reference.shared
    generation = GenerationSpec(max_new_tokens=5, keep_logprobs=True)
    answers = (
        HFGenerate(generation, tokenizer)
        .with_mixture(MixtureSpec(reference, 0.5))
        .generate(policy, prompts(tokenizer), seed=3)
    )
    with_adapter = logits(policy, answers).log_softmax(-1)
    with reference.as_it_was():
        without = logits(policy, answers).log_softmax(-1)
    assert (with_adapter - without).abs().max() > 0.1
    mixed = (0.5 * with_adapter + 0.5 * without)[:, :-1].log_softmax(-1)
    by_hand = mixed.gather(-1, answers.tokens[:, 1:, None])[..., 0]
    real = answers.mask[:, 1:]
    torch.testing.assert_close(answers.sampler_logprobs[:, 1:][real], by_hand[real], rtol=1e-4, atol=1e-4)
