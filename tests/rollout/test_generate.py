"""Masks of generated answers, and sampling that is named by its seed."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.data.encode import encode_prompt
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rollout import decode
from rlhf_lightning.rollout.answers import assemble
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec


def test_an_answer_counts_up_to_and_with_its_end_token_even_if_pad_is_eos():
    eos = pad = 2
    tokens = torch.tensor([[pad, 7, 5, eos, eos], [7, 8, 5, 6, 9]])
    prompt_mask = torch.tensor([[False, True], [True, True]])
    answers = assemble(tokens, prompt_mask, torch.tensor([4, -1]), pad_id=pad)
    assert answers.mask.tolist() == [[False, False, True, True, False], [False, False, True, True, True]]
    assert answers.finished.tolist() == [True, False]
    assert answers.positions.tolist() == [[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]]


def test_what_follows_a_finished_answer_is_padding():
    tokens = torch.tensor([[1, 5, 2, 9, 9]])
    answers = assemble(tokens, torch.ones(1, 1, dtype=torch.bool), torch.tensor([3]), pad_id=0)
    assert answers.tokens.tolist() == [[1, 5, 2, 0, 0]]
    assert answers.attention_mask.tolist() == [[True, True, True, False, False]]


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSpec(path=str(tiny_model)))


def asked(tokenizer, *texts: str):
    ids = [encode_prompt(tokenizer, text) for text in texts]
    decoded = [tokenizer.decode(row) for row in ids]
    return collate_prompts(ids, decoded, [{} for _ in texts], range(len(texts)), tokenizer.pad_token_id)


def answer(policy, tokenizer, prompts, seed=1, **spec):
    return HFGenerate(GenerationSpec(**({"max_new_tokens": 8} | spec)), tokenizer).generate(policy, prompts, seed=seed)


def test_a_seed_names_the_answers_and_leaves_the_global_generator_alone(policy, tokenizer):
    prompts = asked(tokenizer, "the film", "a plot was very")
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    first = answer(policy, tokenizer, prompts, seed=5, num_samples=4)
    assert torch.equal(torch.rand(3), untouched)
    again = answer(policy, tokenizer, prompts, seed=5, num_samples=4)
    other = answer(policy, tokenizer, prompts, seed=6, num_samples=4)
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)


def test_an_answer_does_not_depend_on_the_padding_that_its_neighbours_need(policy, tokenizer):
    alone = answer(policy, tokenizer, asked(tokenizer, "the film"), temperature=0.0)
    crowd = asked(tokenizer, "the film", "a plot was very long and the actors not good")
    together = answer(policy, tokenizer, crowd, temperature=0.0)
    by_rows = answer(policy, tokenizer, crowd, temperature=0.0, rows_at_once=1)
    for answers in (together, by_rows):
        assert answers.tokens[0][answers.mask[0]].tolist() == alone.tokens[0][alone.mask[0]].tolist()


def test_sampled_tokens_follow_the_policy_at_the_sampling_temperature(policy, tokenizer):
    prompts = asked(tokenizer, "the film was")
    answers = answer(policy, tokenizer, prompts, temperature=0.6, max_new_tokens=1, num_samples=4000)
    drawn = torch.bincount(answers.tokens[:, -1], minlength=21) / 4000
    logits = policy.causal_lm(input_ids=prompts.tokens).logits[0, -1]
    expected = (logits / 0.6).softmax(-1)
    # the deviation of a share p of n draws is sqrt(p (1 - p) / n) <= 0.008; four of them
    assert (drawn - expected).abs().max() < 0.032
    scored = policy(answers, temperature=0.6).logprobs[:, -1]
    torch.testing.assert_close(scored, expected.log()[answers.tokens[:, -1]], rtol=1e-4, atol=1e-4)


def test_no_sampling_default_of_the_model_leaks_in(policy, tokenizer):
    own = policy.model.generation_config
    theirs = type(own)(top_k=1, repetition_penalty=9.0, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    policy.model.generation_config = theirs
    try:
        answers = answer(policy, tokenizer, asked(tokenizer, "the"), max_new_tokens=1, num_samples=200)
        assert policy.model.generation_config is theirs
    finally:
        policy.model.generation_config = own
    assert len(answers.tokens[:, -1].unique()) > 5


def test_a_stop_string_ends_an_answer_and_stays_in_it_though_pad_is_eos(tiny_config, tmp_path):
    letters = {letter: i for i, letter in enumerate(["<eos>", *"abcdefgh"])}
    characters = Tokenizer(BPE(letters, merges=[]))
    characters.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<eos>").save_pretrained(tmp_path)
    spec = ModelSpec(config=tiny_config, tokenizer=str(tmp_path))
    tokenizer = load_tokenizer(spec)
    prompts = asked(tokenizer, "ab")
    answers = answer(load_policy(spec), tokenizer, prompts, num_samples=300, stop_strings=["gh"])
    stopped = 0
    for row, mask, finished in zip(answers.tokens, answers.mask, answers.finished, strict=True):
        ids = row[mask].tolist()
        text = "".join(tokenizer.convert_ids_to_tokens(ids))
        assert "gh" not in text[:-1]
        assert bool(finished) == (text.endswith("gh") or ids[-1] == tokenizer.eos_token_id)
        assert ids.count(tokenizer.eos_token_id) <= 1
        stopped += text.endswith("gh")
    assert stopped > 5


def test_stop_strings_on_a_word_level_tokenizer_are_refused(policy, tokenizer):
    with pytest.raises(UserError, match=r"stop_strings=\['good'\] cannot be used with this tokenizer"):
        answer(policy, tokenizer, asked(tokenizer, "the"), stop_strings=["good"])


def test_a_prompt_that_leaves_no_room_for_the_answer_is_named(policy, tokenizer):
    prompts = asked(tokenizer, "the", "the film was good " * 15)  # a context of 64: 1 + 60 tokens leave 3
    answer(policy, tokenizer, prompts, max_new_tokens=3)
    message = r"prompt 1 .*has 61 tokens; with generation.max_new_tokens=4 .*data.max_prompt_length=60"
    with pytest.raises(UserError, match=message):
        answer(policy, tokenizer, prompts, max_new_tokens=4)
    with pytest.raises(UserError, match=r"max_new_tokens=63 leaves no room for a prompt in .* of 64 tokens: lower it"):
        answer(policy, tokenizer, prompts, max_new_tokens=63)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: an answer needs at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 exceeds max_new_tokens=8"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: give 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: use a positive number, above 1"),
        ({"stop_strings": ["\n", ""]}, "stop_strings holds an empty string"),
        ({"temperature": -1.0}, "temperature=-1.0: use 0 for greedy"),
        ({"top_p": 0.0}, "top_p=0.0: use a share"),
        ({"num_samples": 0}, "num_samples=0: sample at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GenerationSpec(**options)


TRUNCATIONS = [
    {"top_p": 0.6},
    {"top_k": 3},
    {"min_p": 0.4},
    {"top_p": 0.8, "top_k": 6, "min_p": 0.1, "temperature": 1.7},
    {"min_new_tokens": 3, "temperature": 0.5},
    {"suppress_tokens": ["film", "<unk>"], "temperature": 0.7},
    {"temperature": 0.6},
]


@pytest.mark.parametrize("spec", TRUNCATIONS, ids=lambda spec: ", ".join(f"{k} {v}" for k, v in spec.items()))
def test_the_policy_gives_every_token_the_log_probability_that_the_sampler_gave_it(policy, tokenizer, spec):
    prompts = asked(tokenizer, "the film", "a plot was very", "actors")
    answers = answer(policy, tokenizer, prompts, num_samples=4, rows_at_once=5, keep_logprobs=True, **spec)
    scores = policy(answers, temperature=spec.get("temperature", 1.0))
    torch.testing.assert_close(scores.logprobs, answers.sampler_logprobs, rtol=1e-5, atol=1e-5)
    # float32 through a cache and without one; a whole-vocabulary ratio would be off by the mass that was cut away
    if set(spec) - {"temperature"}:
        whole = policy(replace(answers, kept=None), temperature=spec.get("temperature", 1.0)).logprobs
        assert (scores.logprobs - whole)[answers.mask].max() > 0.05
        off = (whole + torch.log(scores.kept_mass).neg() - scores.logprobs)[answers.mask]
        torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=1e-5)
    else:
        assert answers.kept is None


def test_what_is_noted_of_answers_does_not_depend_on_how_long_their_rows_stay(policy, tokenizer, monkeypatch):
    """A GPU is asked only now and then who is done, and draws on for those that are."""
    prompts, found = asked(tokenizer, "the film", "a plot was very"), []
    for every in (1, 8):
        monkeypatch.setattr(decode, "look_every", lambda device, every=every: every)
        spec = {"max_new_tokens": 24, "num_samples": 8, "top_p": 0.8, "top_k": 9, "keep_logprobs": True}
        found.append(answer(policy, tokenizer, prompts, **spec))
    for name, value in vars(found[0]).items():
        assert value is None or torch.equal(value, getattr(found[1], name)), name
    assert bool(found[0].kept[found[0].mask].any(-1).all())
    assert not bool(found[0].kept[~found[0].mask].any())


def test_greedy_answers_keep_no_sets(policy, tokenizer):
    assert answer(policy, tokenizer, asked(tokenizer, "the film"), temperature=0.0, top_k=3).kept is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_suppressed_tokens_are_never_drawn(policy, tokenizer, cache):
    prompts = asked(tokenizer, "the film", "a plot was very")
    options = {"num_samples": 40, "max_new_tokens": 6, "cache": cache, "temperature": 2.0}
    free, held = (answer(policy, tokenizer, prompts, **options, suppress_tokens=some) for some in ([], ["film", "a"]))
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(["film", "a"]))
    assert torch.isin(free.tokens[free.mask], ids).any()
    assert not torch.isin(held.tokens[held.mask], ids).any()
    greedy = answer(policy, tokenizer, prompts, temperature=0.0, cache=cache)
    first = tokenizer.convert_ids_to_tokens(int(greedy.tokens[0][greedy.mask[0]][0]))
    other = answer(policy, tokenizer, prompts, temperature=0.0, cache=cache, suppress_tokens=[first])
    logits = policy.causal_lm(input_ids=prompts.tokens[:1], attention_mask=prompts.attention_mask[:1].long()).logits
    assert int(other.tokens[0][other.mask[0]][0]) == int(logits[0, -1].topk(2).indices[1])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            "films",
            "the vocabulary has no token 'films', the nearest is 'film'; a token is written as in tokenizer.json",
        ),
        ("<eos>", "suppress_tokens='<eos>' is the end token, and no answer would end: leave it out"),
    ],
)
def test_tokens_that_cannot_be_suppressed_are_named(tokenizer, token, message):
    with pytest.raises(UserError, match=message):
        HFGenerate(GenerationSpec(suppress_tokens=[token]), tokenizer)
