"""Our decoding loop gives the answers of transformers' `generate`, family by family, and looks at less on the way."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig

from rlhf_lightning.core.batches import PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import LoraSpec
from rlhf_lightning.rollout import by_transformers, decode, generate
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec

TOKENIZER = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def asked(lab, *lengths: int) -> PromptBatch:
    """Left-padded; sliding windows (3) are shorter than most."""
    batch = lab.padded(lab.records(*lengths), "left", extra=2)
    texts = [""] * len(lengths)
    return PromptBatch(batch.tokens, batch.attention_mask, texts, [{} for _ in texts], torch.arange(len(texts)))


def answer(policy, prompts, seed=3, **spec):
    spec = GenerationSpec(**({"max_new_tokens": 16, "num_samples": 3} | spec))
    return HFGenerate(spec, TOKENIZER).generate(policy, prompts, seed=seed)


def ends_soon(policy, answers) -> None:
    """A fifth of the tokens that occur end an answer: rows leave the batch all the time."""
    policy.model.generation_config.eos_token_id = answers.tokens[answers.mask].unique().tolist()[::5]


def same(ours, theirs) -> None:
    for name in ("tokens", "attention_mask", "mask", "positions", "finished"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_greedy_answers_are_those_of_transformers_token_for_token(lab, family, monkeypatch):
    policy, prompts = lab.policy(family), asked(lab, 9, 4, 1, 6)
    ours = answer(policy, prompts, temperature=0.0)
    for soon in (False, True):
        if soon:
            ends_soon(policy, ours)
            ours = answer(policy, prompts, temperature=0.0)
            assert len(set(ours.mask.sum(-1).tolist())) > 1, "answers of different lengths"
        with monkeypatch.context() as patch:
            patch.setattr(HFGenerate, "_decodes", lambda self, policy: False)
            theirs = answer(policy, prompts, temperature=0.0)
        same(ours, theirs)
    same(ours, answer(policy, prompts, temperature=0.0, rows_at_once=5))


@pytest.mark.parametrize("rows_at_once", [None, 5])
def test_every_sampled_token_has_the_policys_log_probability(lab, family, rows_at_once):
    policy, prompts = lab.policy(family), asked(lab, 2, 7, 5, 4)
    spec = {"temperature": 0.8, "top_k": 9, "keep_logprobs": True, "rows_at_once": rows_at_once}
    ends_soon(policy, answer(policy, prompts, **spec))
    answers = answer(policy, prompts, **spec)
    assert len(set(answers.mask.sum(-1).tolist())) > 2, "answers of different lengths"
    scores = policy(answers, temperature=0.8, with_entropy=True)
    torch.testing.assert_close(scores.logprobs, answers.sampler_logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.entropy, answers.sampler_entropy, rtol=1e-4, atol=1e-4)


def test_which_rows_share_a_batch_decides_nothing(lab):
    policy, prompts = lab.policy("mistral"), asked(lab, 3, 8, 1, 5)
    ends_soon(policy, answer(policy, prompts))
    together = answer(policy, prompts)
    for rows_at_once in (1, 5, 100):
        same(answer(policy, prompts, rows_at_once=rows_at_once), together)
    first = PromptBatch(prompts.tokens[:1], prompts.attention_mask[:1], [""], [{}], torch.arange(1))
    alone = answer(policy, first)
    for row in range(3):
        assert alone.tokens[row][alone.mask[row]].tolist() == together.tokens[row][together.mask[row]].tolist()


@pytest.mark.parametrize("every", [3, 8, 100])
def test_looking_seldom_for_who_is_done_changes_no_answer(lab, every, monkeypatch):
    """As on an accelerator, where each look waits for it."""
    policy, prompts = lab.policy("qwen3"), asked(lab, 3, 8, 1, 5)
    ends_soon(policy, answer(policy, prompts))
    each_step = answer(policy, prompts, top_k=5, keep_logprobs=True)
    monkeypatch.setattr(decode, "look_every", lambda device: every)
    seldom = answer(policy, prompts, top_k=5, keep_logprobs=True)
    same(seldom, each_step)
    torch.testing.assert_close(seldom.sampler_logprobs, each_step.sampler_logprobs, rtol=1e-5, atol=1e-5)
    answers = each_step.mask
    assert torch.equal(seldom.kept[answers], each_step.kept[answers])


def test_a_prompt_is_read_once_and_a_finished_answer_leaves(lab):
    policy, prompts = lab.policy("llama", lora=LoraSpec(r=2)), asked(lab, 6, 4)
    ends_soon(policy, answer(policy, prompts, num_samples=8))
    read: list[tuple[int, ...]] = []
    policy.causal_lm.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answers = answer(policy, prompts, num_samples=8)
    assert read[0] == (2, 6)
    lengths = answers.mask.sum(-1)
    assert len(read) == lengths.max()
    for step, (rows, columns) in enumerate(read[1:], start=1):
        assert columns == 1
        unfinished = int((lengths > step).sum())
        assert unfinished <= rows <= max(unfinished / decode.LEAVE_AT + 1, unfinished)
    assert read[-1][0] < 16


def test_prompts_of_like_length_share_a_batch(lab):
    policy, prompts = lab.policy("llama"), asked(lab, 3, 9, 3, 9)
    read = []
    policy.causal_lm.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answer(policy, prompts, num_samples=2, rows_at_once=4, max_new_tokens=1)
    assert read == [(2, 9), (2, 3)]


def test_a_static_cache_gives_the_same_greedy_answers(lab):
    policy, prompts = lab.policy("llama"), asked(lab, 6, 4)
    same(answer(policy, prompts, temperature=0.0, cache="static"), answer(policy, prompts, temperature=0.0))


def test_a_static_cache_lets_transformers_compile_a_step(lab, monkeypatch):
    """As it does on a GPU, by CUDA graphs; here what it compiles is noted, and run as it is."""
    policy, prompts = lab.policy("llama"), asked(lab, 6, 4)
    expected = answer(policy, prompts, temperature=0.0)
    steps, made = [], by_transformers.generation_config

    def anywhere(*given):
        config = made(*given)
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = True
        return config

    def compiled(model, config):
        assert config.mode == "reduce-overhead"
        return lambda **inputs: steps.append(inputs["input_ids"].shape) or model(**inputs)

    monkeypatch.setattr(by_transformers, "generation_config", anywhere)
    monkeypatch.setattr(type(policy.causal_lm), "get_compiled_call", compiled)
    same(answer(policy, prompts, temperature=0.0, cache="static"), expected)
    assert len(steps) > 1
    assert set(steps) == {(6, 1)}, "every step of one shape"


def test_a_model_with_another_cache_goes_through_transformers_and_it_is_said_once(lab, caplog):
    config = {"vocab_size": lab.vocab, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "eos_token_id": 2}
    lab.configs["mamba"] = config | {"pad_token_id": 0, "bos_token_id": 1}
    try:
        policy = lab.policy("mamba")
    finally:
        del lab.configs["mamba"]
    generate._say_once.cache_clear()
    prompts = asked(lab, 4, 4)
    with caplog.at_level(logging.WARNING):
        first, again = (answer(policy, prompts, keep_logprobs=True, rows_at_once=4) for _ in range(2))
    same(first, again)
    torch.testing.assert_close(policy(first).logprobs, first.sampler_logprobs, rtol=1e-4, atol=1e-4)
    said = [r.getMessage() for r in caplog.records if "transformers' own generate" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("models of type 'mamba' are sampled from by transformers' own generate")


def test_broken_weights_are_named_before_a_token_is_trained_on(lab):
    policy, prompts = lab.policy("llama"), asked(lab, 6, 4)
    with torch.no_grad():
        policy.head().weight[5] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=r"logits are not finite.*Lower the learning rate"):
            answer(policy, prompts, temperature=temperature)


def test_an_outcome_is_drawn_where_its_share_of_the_line_is():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(7, 6)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999999, 1 - 2.0**-53], dtype=torch.float64)
    drawn, broken = decode.draw(probs, uniforms)
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4, 4]
    assert not broken.any()


def test_what_is_no_distribution_is_told():
    rows = torch.tensor([[0.5, 0.5], [torch.nan, 0.5], [0.0, 0.0]])
    assert decode.draw(rows, torch.full((3,), 0.9, dtype=torch.float64))[1].tolist() == [False, True, True]
