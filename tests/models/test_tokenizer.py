"""End tokens, padding tokens, chat templates."""

import json
import shutil

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.models.tokenizer import load_tokenizer, say_once

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def without(tiny_tokenizer, tmp_path):
    """A copy of the tiny tokenizer in which the given tokens have no role (`named`) or are plain words (`special`)."""

    def make(named: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> ModelSpec:
        folder = tmp_path / "tokenizer"
        shutil.copytree(tiny_tokenizer, folder)
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in config.items() if key not in named}))
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in special]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return ModelSpec(tokenizer=str(folder))

    return make


def test_a_complete_tokenizer_is_left_alone(tiny_tokenizer, caplog):
    tokenizer = load_tokenizer(ModelSpec(tokenizer=str(tiny_tokenizer)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not caplog.text


def test_padding_falls_back_to_a_token_named_pad_and_says_so_once(without, caplog):
    say_once.cache_clear()
    spec = without(named=("pad_token",))
    tokenizers = [load_tokenizer(spec) for _ in range(3)]
    assert [t.pad_token for t in tokenizers] == ["<pad>"] * 3
    assert caplog.text.count("has no padding token: padding with '<pad>'") == 1


def test_padding_falls_back_to_the_unknown_token(without):
    assert load_tokenizer(without(named=("pad_token",), special=("<pad>",))).pad_token == "<unk>"


def test_padding_falls_back_to_the_end_token_last(without):
    tokenizer = load_tokenizer(without(named=("pad_token", "unk_token"), special=("<pad>", "<unk>")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_no_end_token_is_an_error_with_a_remedy(without):
    with pytest.raises(UserError, match=r'no end-of-sequence token.*"eos_token"'):
        load_tokenizer(without(named=("eos_token",)))


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UserError, match="no tokenizer: give `tokenizer`"):
        load_tokenizer(ModelSpec(config={"model_type": "llama"}))
    with pytest.raises(UserError, match=r"tokenizer folder './nowhere' does not exist"):
        load_tokenizer(ModelSpec(tokenizer="./nowhere"))
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(ModelSpec(tokenizer=str(tmp_path)))


def test_a_chat_template_is_a_string_or_a_file(tiny_tokenizer, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    for given in (TEMPLATE, str(file)):
        tokenizer = load_tokenizer(ModelSpec(tokenizer=str(tiny_tokenizer), chat_template=given))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False) == "<user>good"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("missing.jinja", r"neither a file nor a Jinja template: there is no /.*missing\.jinja"),
        ("{% for m in messages %}{{ m.content }}", "chat_template, line 1"),
        ("{{ messages[0].content }", "chat_template, line 1"),
    ],
)
def test_a_chat_template_that_cannot_work_is_refused(tiny_tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelSpec(tokenizer=str(tiny_tokenizer), chat_template=template))


THINKING = (
    "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% if think %}!{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ '+' if think is defined and think else '-' }}{% endfor %}"
    "{{ style | default('plain') }}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "<user>good-plain"),
        ({"think": True}, "<user>good!+plain"),
        ({"think": False, "style": 'a "quoted" {{ word }}'}, '<user>good-a "quoted" {{ word }}'),
        ({"think": None, "style": "é"}, "<user>good-é"),
    ],
)
def test_variables_of_a_chat_template_have_values_in_the_export_too(tiny_tokenizer, tmp_path, values, expected):
    spec = ModelSpec(tokenizer=str(tiny_tokenizer), chat_template=THINKING, chat_template_kwargs=values)
    tokenizer = load_tokenizer(spec)
    tokenizer.save_pretrained(tmp_path)
    for either in (tokenizer, load_tokenizer(ModelSpec(tokenizer=str(tmp_path)))):
        assert either.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False) == expected


def test_a_value_for_what_is_no_variable_of_the_template_is_refused(tiny_tokenizer):
    spec = ModelSpec(tokenizer=str(tiny_tokenizer), chat_template=THINKING, chat_template_kwargs={"thinking": True})
    with pytest.raises(UserError, match=r"chat_template_kwargs\.thinking: .* no such variable; .*: style, think$"):
        load_tokenizer(spec)
    with pytest.raises(UserError, match=r"'think': True.* are for a chat template, and the tokenizer .* has none"):
        load_tokenizer(ModelSpec(tokenizer=str(tiny_tokenizer), chat_template_kwargs={"think": True}))
