import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.encode import encode_pair, encode_prompt, encode_steps, encode_text

KINDS = ["bytelevel", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Once upon a", " time"),
        ("Once up", "on a time"),  # the border cuts a word
        ("Once upon ", "a time"),  # the prompt ends in a blank
        ("Once\n", "\nupon"),
        ("", "Once upon"),
        ("What?", "é 😀"),
    ],
)
def test_a_pair_is_the_prompts_own_ids_and_then_the_completion(make_tokenizer, kind, prompt, completion):
    tokenizer = make_tokenizer(kind=kind)
    prompt_ids = encode_prompt(tokenizer, prompt)
    pair = encode_pair(tokenizer, prompt, completion, add_eos=True)
    assert list(pair.ids[: len(prompt_ids)]) == prompt_ids
    assert list(pair.mask) == [False] * len(prompt_ids) + [True] * (len(pair.ids) - len(prompt_ids))
    assert tokenizer.decode(pair.ids) == tokenizer.decode(tokenizer(prompt + completion).input_ids) + "</s>"
    open_pair = encode_pair(tokenizer, prompt, completion, add_eos=False)
    assert [*open_pair.ids, tokenizer.eos_token_id] == list(pair.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_with_bos_and_ends_with_eos(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind=kind)
    text = encode_text(tokenizer, "Paris.", add_eos=True)
    assert (text.ids[0], text.ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert text.mask == [True] * len(text.ids)
    assert encode_text(tokenizer, "Paris.", add_eos=False).ids == text.ids[:-1]


def test_spelt_out_control_tokens_are_text_unless_asked_for(tokenizer):
    as_text = encode_prompt(tokenizer, "a</s>b")
    assert tokenizer.eos_token_id not in as_text
    assert tokenizer.decode(as_text) == "<s>a</s>b"
    assert encode_prompt(tokenizer, "a</s>b", parse_controls=True).count(tokenizer.eos_token_id) == 1


def test_an_empty_prompt_needs_a_bos(make_tokenizer):
    assert encode_prompt(make_tokenizer(), "") == [make_tokenizer().bos_token_id]
    with pytest.raises(UserError, match="the prompt is empty and the tokenizer puts no BOS"):
        encode_prompt(make_tokenizer("chatml"), "")


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_ends_behind_its_separator(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind=kind)
    ids, ends = encode_steps(tokenizer, "What?", ["One.", "Two two."])
    assert [tokenizer.decode(ids[: end + 1]) for end in ends] == [
        tokenizer.decode(encode_prompt(tokenizer, "What?")) + text for text in ("One.\n", "One.\nTwo two.\n")
    ]
    assert ends[-1] == len(ids) - 1


def test_a_tokenizer_without_eos_is_told(make_tokenizer):
    tokenizer = make_tokenizer(kind="bytelevel")
    keep, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(UserError, match="no EOS token to end an answer with; set one, or add_eos: false"):
            encode_pair(tokenizer, "a", "b", add_eos=True)
    finally:
        tokenizer.eos_token = keep


def test_broken_unicode_is_told(tokenizer):
    with pytest.raises(UserError, match="the tokenizer cannot read"):
        encode_prompt(tokenizer, "a\ud800b")
