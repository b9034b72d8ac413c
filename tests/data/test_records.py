import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.records import KINDS, check_record, record_kind, split_prompt


def test_the_kind_is_read_off_the_columns():
    assert record_kind(["text"], "tokens", "a") == ("text",)
    assert record_kind(["prompt", "completion", "text"], "tokens", "a") == ("prompt", "completion")
    assert record_kind(["messages"], "prompts", "a") == ("messages",)


def test_a_missing_column_names_itself_those_there_are_and_the_nearest():
    with pytest.raises(UserError) as caught:
        record_kind(["prompt", "chosen", "rejcted"], "pairs", "a.jsonl")
    assert "a.jsonl: missing column rejected (did you mean rejcted?)" in str(caught.value)
    with pytest.raises(UserError, match=r"missing column prompt \(did you mean propmt\?\): this stage reads tokens"):
        record_kind(["propmt", "completion"], "tokens", "a.jsonl")
    assert "the columns here are prompt, chosen, rejcted" in str(caught.value)
    assert "columns: {rejected: <name in your data>}" in str(caught.value)
    with pytest.raises(UserError) as caught:
        record_kind(["prompt", "completion"], "pairs", "a.jsonl")
    assert "missing columns chosen, rejected: " in str(caught.value)
    assert "columns: {chosen: <name in your data>, rejected: <name in your data>}" in str(caught.value)
    with pytest.raises(UserError, match=r"reads tokens \(messages or prompt\+completion or text\)"):
        record_kind(["question"], "tokens", "a")


PAIR = ("prompt", "completion")
FAULTS = [
    (PAIR, {"prompt": "a", "completion": ""}, "x: completion is empty"),
    (PAIR, {"prompt": "a", "completion": " \n"}, "x: completion is empty"),
    (PAIR, {"prompt": "a", "completion": None}, "x: completion is None, a string or a list of messages is needed"),
    (PAIR, {"prompt": 3, "completion": "b"}, "x: prompt is 3"),
    (PAIR, {"promt": "a", "completion": "b"}, r"x: missing column prompt \(did you mean promt\?\)"),
    (PAIR, {"prompt": "a\ud800", "completion": "b"}, "x: prompt holds a lone surrogate at character 1"),
    (PAIR, {"prompt": [], "completion": "b"}, "x: prompt is an empty list"),
    (PAIR, {"prompt": ["a"], "completion": "b"}, "x: message 0 of prompt is 'a'"),
    (
        PAIR,
        {"prompt": "a", "completion": [{"role": "assistant", "content": ""}]},
        "x: completion is empty: its last message has no content",
    ),
    (("text",), {"text": "  "}, "x: text is empty"),
    (("messages",), {"messages": [{"role": "assistant", "content": " "}]}, "x: an assistant's message in messages is"),
    (("messages",), {"messages": "a"}, "x: messages is 'a'"),
    ((*PAIR, "rating"), {"prompt": "a", "completion": "b", "rating": math.nan}, "x: rating is nan, a finite number"),
    ((*PAIR, "rating"), {"prompt": "a", "completion": "b", "rating": "5"}, "x: rating is '5'"),
    ((*PAIR, "rating"), {"prompt": "a", "completion": "b", "rating": True}, "x: rating is True"),
    ((*PAIR, "label"), {"prompt": "a", "completion": "b", "label": 0.5}, "x: label is 0.5"),
    (("chosen", "rejected"), {"chosen": "a", "rejected": "b", "margin": math.inf}, "x: margin is inf"),
    (
        ("prompt", "completions", "ranks"),
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1]},
        "x: 2 completions but 1 ranks: give one each",
    ),
    (
        ("prompt", "completions", "ranks"),
        {"prompt": "a", "completions": ["b"], "ranks": [1]},
        "x: a ranking needs at least 2 completions",
    ),
    (
        ("prompt", "completions", "labels"),
        {"prompt": "a", "completions": ["b", ""], "labels": [True, False]},
        r"x: completions\[1\] is empty",
    ),
    (
        ("prompt", "completions", "ranks"),
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1, None]},
        r"x: ranks\[1\] is None",
    ),
]


@pytest.mark.parametrize(("kind", "record", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faults_name_place_column_and_value(kind, record, message):
    with pytest.raises(UserError, match=message):
        check_record(record, kind, "x")


GOOD = {
    "text": "t",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "prompt": "p",
    "completion": "c",
    "chosen": "c",
    "rejected": "r",
    "gold": "g",
    "completions": ["a", "b"],
    "ranks": [1, 2.0],
    "labels": [True, None],
    "rating": 1,
    "label": True,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", [kind for kinds in KINDS.values() for kind in kinds], ids="-".join)
def test_good_records_pass(kind):
    check_record(GOOD, kind, "x")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(kind=st.sampled_from([kind for kinds in KINDS.values() for kind in kinds]), value=JSON, data=st.data())
def test_whatever_a_field_holds_the_error_is_ours(kind, value, data):
    name = data.draw(st.sampled_from(kind))
    with contextlib.suppress(UserError):
        check_record({**GOOD, name: value}, kind, "x")


def test_the_prompt_that_two_answers_share():
    assert split_prompt("\n\nHuman: q\n\nAssistant: I am", "\n\nHuman: q\n\nAssistant: I can") == (
        "\n\nHuman: q\n\nAssistant:",
        " I am",
        " I can",
    )
    assert split_prompt("tell me: yes", "tell me: yellow") == ("tell me:", " yes", " yellow")
    user, a, b = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    assert split_prompt([user, a], [user, b]) == ([user], [a], [b])
