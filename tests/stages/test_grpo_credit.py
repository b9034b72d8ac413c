"""GRPO: what answers and tokens are credited with, where more than scores decides it."""

from dataclasses import replace

import pytest
import torch
from fits import fit
from grpo_runs import NO_KL, Constant, FirstToken, Keep, grpo, prompts

from rlhf_lightning.advantages import (
    Centred,
    FixedKL,
    OptimalTokenBaseline,
    ReMax,
    RewardsToCome,
)
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping


def test_kl_is_credited_with_the_score_or_to_the_tokens_before_it(tiny_model):
    """Two answers to one prompt, of 3 and 1 tokens; scores 4 and 2, KL rewards -1 0 -2 and -3: by hand."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores, kl = torch.tensor([[0.0, 0.0, 4.0], [2.0, 0.0, 0.0]]), torch.tensor([[-1.0, 0.0, -2.0], [-3.0, 0.0, 0.0]])
    groups, zeros = torch.tensor([0, 0]), torch.zeros(2, 3)
    module = grpo(tiny_model, credit=Centred(), kl=KLSpec(control=FixedKL(0.1), credited="to_come"))
    apart, returns = module.advantages(scores, zeros, mask, groups, kl_rewards=kl)
    assert apart.tolist() == [[1 - 3, 1 - 2, 1 - 2], [-1 - 3, 0, 0]]
    assert returns.tolist() == [[4 - 3, 4 - 2, 4 - 2], [2 - 3, 0, 0]]
    together, _ = grpo(tiny_model, credit=Centred()).advantages(scores + kl, zeros, mask, groups)
    assert together.tolist() == [[1, 1, 1], [-1, 0, 0]]  # scores 1 and -1: their mean is 0


def test_kl_apart_reaches_advantages_and_metrics(tiny_model, write_jsonl, tmp_path):
    """The reference is the policy with other weights: its KL is in the rewards that are logged, and in each token's
    advantage, and the baseline is of scores alone."""
    kl = KLSpec(control=FixedKL(0.5), credited="to_come", loss_coef=0.0)
    module = grpo(tiny_model, credit=Centred(), kl=kl)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.reference.policy.parameters():
            parameter.mul_(1.5)
    keep = Keep(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    rollouts = keep.rollouts[0]
    price = -0.5 * (rollouts.old_logprobs - rollouts.ref_logprobs)
    assert price.abs().max() > 1e-2
    scores = rollouts.scores
    mean = torch.stack([scores[rollouts.groups == g].mean() for g in rollouts.groups])
    to_come = price.flip(-1).cumsum(-1).flip(-1)
    expected = torch.where(rollouts.mask, (scores - mean)[:, None] + to_come, 0.0)
    torch.testing.assert_close(rollouts.advantages, expected, rtol=1e-4, atol=1e-5)
    rewards = (scores + price.sum(-1)).mean().item()
    assert trainer.callback_metrics["rollout/reward"].item() == pytest.approx(rewards, rel=1e-4)


def test_long_answers_lose_a_point_bit_by_bit(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, Constant(), shaping=RewardShaping(overlong_cache=2, overlong_factor=0.5), kl=NO_KL)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    # limit 5: free up to 3 tokens, half a point at 4, all of it at 5
    expected = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1 - 0.25, 5: 1 - 0.5}
    lengths = rollouts.mask.sum(-1).tolist()
    assert {4, 5} & set(lengths)
    assert rollouts.rewards.sum(-1).tolist() == pytest.approx([expected[length] for length in lengths])


def test_remax_compares_with_the_score_of_the_greedy_answer(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, FirstToken(4, 5, 6, 7), credit=ReMax(), kl=NO_KL)
    greedy, score = [], module.score

    def noting(prompts, answers):
        scored = score(prompts, answers)
        greedy.append(scored.total) if len(scored.total) == len(prompts.texts) else None
        return scored

    module.score = noting
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    baseline = greedy[0].repeat_interleave(4)
    assert 0 < baseline.sum() < 48, "some greedy answers score and some do not"
    torch.testing.assert_close(rollouts.values.sum(-1), baseline)
    # the reward comes at the end: every token of an answer has the same lead over the greedy one
    lead = (rollouts.scores - baseline)[:, None].expand_as(rollouts.mask)
    torch.testing.assert_close(rollouts.advantages[rollouts.mask], lead[rollouts.mask])


@pytest.mark.parametrize("truncated", [False, True])
def test_the_token_baseline_is_told_how_far_gradients_vary(truncated, tiny_model, write_jsonl, tmp_path):
    """1 - 2 p + sum p^2 of the logits themselves, over what the tokens were sampled from."""
    generation = GenerationSpec(max_new_tokens=4, num_samples=4, temperature=0.7, top_k=5 if truncated else 0)
    options = {"kl": NO_KL, "generation": generation, "optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    module = grpo(tiny_model, FirstToken(*range(4, 12)), credit=OptimalTokenBaseline(), **options)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    with torch.no_grad():
        logits = module.policy.causal_lm(
            input_ids=rollouts.tokens,
            attention_mask=rollouts.attention_mask.long(),
            position_ids=rollouts.positions,
        ).logits[:, :-1]
    logits = logits / 0.7
    if truncated:
        logits = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1)
    variance = 1 - 2 * probs.gather(-1, rollouts.tokens[:, 1:, None])[..., 0] + probs.square().sum(-1)
    mask = rollouts.mask[:, 1:]
    torch.testing.assert_close(rollouts.values[:, 1:][mask], variance[mask], atol=1e-5, rtol=1e-4)
    assert variance[mask].max() > 0.5
    expected, _ = OptimalTokenBaseline()(rollouts.rewards, rollouts.values, rollouts.mask, rollouts.groups)
    torch.testing.assert_close(rollouts.advantages, expected)
    assert rollouts.advantages.any()


def test_a_reference_that_is_a_teacher_is_what_a_token_is_credited_with(tiny_model, tiny_config, tmp_path, write_jsonl):
    """On-policy distillation: each token's advantage is the teacher's log-probability less its own, held."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import load_tokenizer

    spec = ModelSpec(config=tiny_config | {"num_hidden_layers": 3}, tokenizer=str(tiny_model))
    teacher = export_policy(load_policy(spec), load_tokenizer(spec), tmp_path / "teacher")
    module = GRPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3), weight=0.0)],
        reference=ModelSpec(path=str(teacher)),
        generation=GenerationSpec(max_new_tokens=5, num_samples=1),
        updates=UpdateSpec(inner_epochs=5),
        credit=RewardsToCome(gamma=0.0),
        kl=KLSpec(control=FixedKL(1.0), bound=10.0),
        reduction="token_mean",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        seed=1,
    )
    keep = Keep(module)
    data = {"train": prompts(write_jsonl), "batch_size": 12}
    trainer = fit(module, tmp_path, data=data, max_epochs=8)
    for rollouts in keep.rollouts:
        lead = (rollouts.ref_logprobs - rollouts.old_logprobs).clamp(-10, 10)
        torch.testing.assert_close(rollouts.advantages, torch.where(rollouts.mask, lead, 0.0))
    first, last = (float(-r.advantages.sum() / r.mask.sum()) for r in (keep.rollouts[0], keep.rollouts[-1]))
    assert last < 0.7 * first, f"KL per token to the teacher went from {first} to {last}"
    assert trainer.callback_metrics["rollout/score"].item() == 0


def test_the_token_baseline_weighs_gradients_as_the_correction_does(tiny_model, write_jsonl, tmp_path):
    """A token whose gradient is multiplied by w varies w^2 times as much."""
    seen = []
    for correction in (None, SamplerCorrection(cap=1.2)):
        options = {"kl": NO_KL, "optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
        generation = GenerationSpec(max_new_tokens=4, num_samples=4, keep_logprobs=True)
        credit = OptimalTokenBaseline()
        module = grpo(tiny_model, credit=credit, generation=generation, correction=correction, **options)
        sample = module.sample

        def mistaken(prompts, sample=sample):
            answers = sample(prompts)
            wrong = answers.sampler_logprobs + 0.4 * torch.sin(answers.tokens.float())
            return replace(answers, sampler_logprobs=wrong)

        module.sample = mistaken
        keep = Keep(module)
        fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
        seen += keep.rollouts
    plain, weighed = seen
    assert len(weighed.weights[weighed.mask].unique()) > 3
    torch.testing.assert_close(weighed.values, plain.values * weighed.weights.square())
    expected, _ = OptimalTokenBaseline()(weighed.rewards, weighed.values, weighed.mask, weighed.groups)
    torch.testing.assert_close(weighed.advantages, expected)
