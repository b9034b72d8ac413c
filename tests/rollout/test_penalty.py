"""The repetition penalty: transformers' numbers of a row alone, whatever shares its batch, and recorded as sampled."""

import pytest
import torch
from fits import fit
from one_step import another
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.engines import vllm_sampling
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.mixture import MixtureSpec
from rlhf_lightning.rollout.penalty import penalise_repetition
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, PPOModule

PROMPTS = [[4, 5, 6], [7], [5, 5, 8, 9, 4]]


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSpec(path=str(tiny_model)))


def asked(tokenizer, prompts=PROMPTS):
    count = len(prompts)
    return collate_prompts(prompts, [""] * count, [{}] * count, list(range(count)), tokenizer.pad_token_id)


def answer(policy, tokenizer, prompts=PROMPTS, seed=1, **spec):
    engine = HFGenerate(GenerationSpec(**({"max_new_tokens": 10} | spec)), tokenizer)
    return engine.generate(policy, asked(tokenizer, prompts), seed=seed)


def texts(answers):
    return [row[mask].tolist() for row, mask in zip(answers.tokens, answers.mask, strict=True)]


def test_by_hand():
    scores = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    tokens, real = torch.tensor([[3, 1, 1, 0]]), torch.tensor([[False, True, True, True]])
    # 1 is said twice and penalised once, 0 too; 3 is padding
    assert penalise_repetition(scores, tokens, real, 2.0).tolist() == [[1.0, -2.0, 0.5, 3.0]]


def test_numbers_of_rows_without_padding_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    scores, tokens = torch.randn(5, 30, generator=generator), torch.randint(0, 30, (5, 40), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(tokens, scores)
    assert torch.equal(penalise_repetition(scores, tokens, torch.ones_like(tokens, dtype=torch.bool), 1.3), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("penalty", [1.2, 3.0])
def test_greedy_answers_are_those_of_transformers(policy, tokenizer, penalty, cache):
    answers = answer(policy, tokenizer, temperature=0.0, repetition_penalty=penalty, cache=cache)
    for prompt, mine in zip(PROMPTS, texts(answers), strict=True):
        # one at a time: in a batch transformers' processor counts the padding token as said
        alone = policy.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            repetition_penalty=penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert mine == alone[0, len(prompt) :].tolist()
    assert texts(answers) != texts(answer(policy, tokenizer, temperature=0.0))


def test_who_shares_the_batch_does_not_matter(policy, tokenizer):
    options = {"repetition_penalty": 2.0, "num_samples": 6, "keep_logprobs": True, "max_new_tokens": 20}
    together = answer(policy, tokenizer, **options)
    apart = answer(policy, tokenizer, **options, rows_at_once=2)
    assert texts(together) == texts(apart)
    torch.testing.assert_close(together.sampler_logprobs, apart.sampler_logprobs, rtol=1e-4, atol=1e-5)
    assert len({len(text) for text in texts(together)}) > 2, "answers that leave the batch at different times"


@torch.no_grad()
def by_hand(policy, answers, penalty, temperature, other=None, share=0.0):
    """Log-probabilities of the answers' tokens, one position at a time."""
    given = {
        "input_ids": answers.tokens,
        "attention_mask": answers.attention_mask.long(),
        "position_ids": answers.positions,
    }
    logits = policy.causal_lm(**given).logits
    if other is not None:
        logits = (1 - share) * logits + share * other.causal_lm(**given).logits
    out = torch.zeros(answers.tokens.shape)
    for row, column in answers.mask.nonzero().tolist():
        said = set(answers.tokens[row, :column][answers.attention_mask[row, :column]].tolist())
        z = logits[row, column - 1].clone()
        for v in said:
            z[v] = z[v] * penalty if z[v] < 0 else z[v] / penalty
        if answers.kept is not None:
            bits = answers.kept[row, column, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
            z[~bits.flatten()[: len(z)].bool()] = -torch.inf
        out[row, column] = (z / temperature).log_softmax(-1)[answers.tokens[row, column]]
    return out


@pytest.mark.parametrize(
    "sampling", [{}, {"top_p": 0.7, "temperature": 0.8}, {"min_new_tokens": 4}, {"cache": "static"}]
)
def test_what_is_recorded_is_what_was_sampled_from(policy, tokenizer, sampling):
    options = {"repetition_penalty": 1.5, "num_samples": 4, "keep_logprobs": True} | sampling
    answers = answer(policy, tokenizer, **options)
    expected = by_hand(policy, answers, 1.5, sampling.get("temperature", 1.0))
    torch.testing.assert_close(answers.sampler_logprobs, expected, rtol=1e-4, atol=1e-4)
    # the policy's own numbers, which training uses, are without it
    own = policy(answers, temperature=sampling.get("temperature", 1.0)).logprobs
    assert float((own - answers.sampler_logprobs)[answers.mask].abs().max()) > 0.1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_of_a_mixture_the_mixture_is_penalised(policy, tokenizer, tiny_model, cache):
    other = load_policy(another(str(tiny_model)))
    spec = GenerationSpec(max_new_tokens=6, num_samples=2, keep_logprobs=True, repetition_penalty=1.5, cache=cache)
    engine = HFGenerate(spec, tokenizer).with_mixture(MixtureSpec(Reference(other), 0.4))
    answers = engine.generate(policy, asked(tokenizer), seed=3)
    expected = by_hand(policy, answers, 1.5, 1.0, other, 0.4)
    torch.testing.assert_close(answers.sampler_logprobs, expected, rtol=1e-4, atol=1e-4)


def test_vllm_is_told():
    assert vllm_sampling(GenerationSpec(repetition_penalty=1.2), [2])["repetition_penalty"] == 1.2


# ---- training on it --------------------------------------------------------------------------------------------------


def grpo(tiny_model, **options):
    generation = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True, repetition_penalty=1.5)
    options = {"generation": generation, "correction": SamplerCorrection(cap=None)} | options
    return GRPOModule(ModelSpec(path=str(tiny_model)), [WeightedReward(LengthReward(target=3))], **options)


def test_the_policys_loss_is_weighed_by_policy_over_sampler(tiny_model, write_jsonl, tmp_path):
    module, seen = grpo(tiny_model), []
    collect = module.collect
    module.collect = lambda draw: seen.append(collect(draw)) or seen[-1]
    said = []
    answers_of = module._answers_of_engine
    module._answers_of_engine = lambda *args: said.append(answers_of(*args)) or said[-1]
    records = write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "a plot was"}])
    trainer = fit(module, tmp_path, data={"train": records, "batch_size": 2}, max_epochs=1)
    [rollouts], [answers] = seen, said
    expected = torch.exp(rollouts.old_logprobs - answers.sampler_logprobs)
    torch.testing.assert_close(rollouts.weights[answers.mask], expected[answers.mask], rtol=1e-4, atol=1e-4)
    assert float(expected[answers.mask].std()) > 0.05
    # r is of the policy on both sides
    assert float(trainer.callback_metrics["policy/ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(trainer.callback_metrics["rollout/logprob_gap"]) > 0.05


def test_a_correction_between_one_and_one_weighs_every_token_alike():
    old, said = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.0]])
    corrected = SamplerCorrection(cap=1.0, floor=1.0)(old, said, torch.ones(1, 2, dtype=torch.bool))
    assert corrected.weights.tolist() == [[1.0, 1.0]]


PLAIN = GenerationSpec(max_new_tokens=5, num_samples=4, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"correction": None, "generation": PLAIN},
            r"correction=null .* set correction: \{cap: 2.0\} .* or leave repet",
        ),
        ({"correction": SamplerCorrection(weight="none", keep="token", low=0.5)}, r"weight='none' weighs none of them"),
        (
            {"old_logprobs": "sampler"},
            r"old_logprobs='sampler' .* or leave repetition_penalty out",
        ),
    ],
)
def test_training_as_if_the_policy_had_sampled_is_refused(tiny_model, options, message):
    with pytest.raises(UserError, match=r"generation.repetition_penalty=1.5 samples answers .*" + message):
        grpo(tiny_model, **options)


def test_ppo_refuses_it_too(tiny_model):
    with pytest.raises(UserError, match=r"generation.repetition_penalty=1.5 .* correction=null"):
        PPOModule(ModelSpec(path=str(tiny_model)), [WeightedReward(LengthReward(target=3))], generation=PLAIN)
