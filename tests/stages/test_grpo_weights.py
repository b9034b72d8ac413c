"""GRPO: tokens whose loss is weighed or left out, by their entropy, their sampler or their answer."""

import math
from dataclasses import replace

import pytest
import torch
from fits import fit
from grpo_runs import NO_KL, Keep, grpo, prompts

from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule


def test_only_the_tokens_of_highest_entropy_carry_the_loss(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, entropy_top_frac=0.25)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    share = rollouts.weights[rollouts.mask].mean().item()
    assert share == pytest.approx(0.25, abs=0.02)
    assert set(rollouts.weights.unique().tolist()) == {0.0, 1.0}


def test_a_sampler_that_was_exact_has_weights_of_1(tiny_model, write_jsonl, tmp_path):
    generation = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True, top_p=0.9)
    module = grpo(tiny_model, generation=generation, correction=SamplerCorrection(cap=2.0))
    keep = Keep(module)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    [rollouts] = keep.rollouts
    torch.testing.assert_close(rollouts.weights[rollouts.mask], torch.ones(int(rollouts.mask.sum())), atol=1e-4, rtol=0)
    assert metrics["correction/ratio"].item() == pytest.approx(1, abs=1e-4)
    assert metrics["correction/truncated_frac"].item() == 0


@pytest.mark.parametrize("generation", [{"temperature": 0.7}, {"top_p": 0.8}])
def test_what_the_sampler_said_saves_a_forward_pass(generation, tiny_model, write_jsonl, tmp_path):
    spec = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True, **generation)
    both = []
    for source in ("recomputed", "sampler"):
        module = grpo(tiny_model, generation=spec, old_logprobs=source)
        keep = Keep(module)
        metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
        both.append((keep.rollouts[0].old_logprobs, metrics["rollout/entropy"]))
        assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-5)


class OffByHalf(GRPOModule):
    """Its sampler says 1 / 1.5 of every probability."""

    def generate(self, prompts, seed):
        answers = super().generate(prompts, seed)
        return replace(answers, sampler_logprobs=answers.sampler_logprobs - math.log(1.5))


def off_by_half(model, **options):
    return OffByHalf(
        ModelSpec(path=str(model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True),
        correction=SamplerCorrection(cap=2.0),
        **options,
    )


def test_a_sampler_that_was_wrong_is_weighed_by_the_ratio(tiny_model, write_jsonl, tmp_path):
    module = off_by_half(tiny_model)
    keep = Keep(module)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    weights = keep.rollouts[0].weights[keep.rollouts[0].mask]
    torch.testing.assert_close(weights, torch.full_like(weights, 1.5), rtol=1e-4, atol=0)
    assert metrics["rollout/logprob_gap"].item() == pytest.approx(math.log(1.5), rel=1e-4)


def test_bad_answers_that_the_policy_has_left_carry_no_loss(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, off_policy_threshold=1e-6, updates=UpdateSpec(inner_epochs=2))
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    assert 0 < metrics["policy/off_policy_frac"].item() < 1


def test_weights_multiply_the_loss_of_their_tokens_and_no_denominator(tiny_model, write_jsonl, tmp_path):
    """By hand: sum of weight times loss over the tokens, divided by all tokens, whatever they weigh."""
    module = grpo(
        tiny_model, kl=NO_KL, reduction="token_mean", optimizer=lambda params: torch.optim.SGD(params, lr=0.0)
    )
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    module.log_step_means = lambda batch_idx: None
    rollouts = keep.rollouts[0]
    weights = torch.linspace(0, 3, rollouts.mask.numel()).view(rollouts.mask.shape)
    # off policy by 0.1 nats: no clipping, and no ratio is 1
    rollouts = replace(rollouts, weights=weights, old_logprobs=rollouts.old_logprobs - 0.1 * rollouts.mask)
    count = float(rollouts.mask.sum())
    found = module.training_step(rollouts.with_totals({"tokens": count, "sequences": 48.0}), 0)
    by_hand = -(math.exp(0.1) * rollouts.advantages * weights)[rollouts.mask].sum() / count
    assert abs(by_hand) > 1e-2
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_two_kinds_of_weights_are_multiplied(tiny_model, write_jsonl, tmp_path):
    module = off_by_half(tiny_model, entropy_top_frac=0.25)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    weights = keep.rollouts[0].weights[keep.rollouts[0].mask]
    chosen = weights > 0
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(weights[chosen], torch.full_like(weights[chosen], 1.5), rtol=1e-4, atol=0)
