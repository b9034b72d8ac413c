import pickle

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards.combine import WeightedReward, score_samples
from rlhf_lightning.rewards.python_function import PythonFunction

FUNCTIONS = """
import asyncio
from dataclasses import dataclass

LIMIT = 3

@dataclass
class Memory:
    calls: "int" = 0

class Scorer:
    pass

def lengths(completions):
    return [len(c) for c in completions]

def exact(completions, answer, **rest):
    return [float(c == a) for c, a in zip(completions, answer)]

def everything(**given):
    return sorted(given)

def by_sample(samples):
    return [sample.record["bonus"] for sample in samples]

def per_token(completion_ids, scale=1.0):
    return [[scale * i for i in ids] for ids in completion_ids]

def whole(prompts, completions, completion_ids, finished):
    return [prompts, completions, completion_ids, finished]

def positional(texts, /):
    return texts

async def slow(completions):
    await asyncio.sleep(0)
    return [len(c) for c in completions]
"""

SAMPLES = [
    Sample("2+2=", "4", {"prompt": "2+2=", "answer": "4", "bonus": 1.5}, (9, 2), True),
    Sample("1+1=", "3", {"prompt": "1+1=", "answer": "2", "bonus": 0.5, "hint": "small"}, (8,), False),
]


@pytest.fixture
def at(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(FUNCTIONS)
    return lambda name, **kwargs: PythonFunction(f"{file}:{name}", **kwargs)


def test_only_the_named_arguments_are_given(at):
    assert at("lengths")(SAMPLES) == [1, 1]


def test_columns_arrive_by_name(at):
    assert at("exact")(SAMPLES) == [1, 0]


def test_a_function_of_samples_gets_samples(at):
    assert at("by_sample")(SAMPLES) == [1.5, 0.5]


def test_a_function_that_takes_everything_gets_every_column_and_its_own_arguments(at):
    names = at("everything", kwargs={"scale": 2})(SAMPLES)
    assert names == ["answer", "bonus", "completion_ids", "completions", "finished", "hint", "prompts", "scale"]


def test_one_number_per_token_and_an_argument_from_the_config(at):
    assert at("per_token", kwargs={"scale": 0.5})(SAMPLES) == [[4.5, 1], [4]]


def test_what_each_argument_holds(at):
    assert at("whole")(SAMPLES) == [["2+2=", "1+1="], ["4", "3"], [[9, 2], [8]], [True, False]]


def test_conversations_arrive_as_messages(at):
    question = [{"role": "user", "content": "2+2="}]
    sample = Sample("user: 2+2=", "4", {"prompt": question}, (1,))
    prompts, completions, *_ = at("whole")([sample])
    assert prompts == [question]
    assert completions == [[{"role": "assistant", "content": "4"}]]


def test_a_conversation_in_messages_is_answered_from_the_last_question(at):
    question, reply = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    prompts, *_ = at("whole")(
        [Sample("", "5", {"messages": [question, reply]}), Sample("", "5", {"messages": [question]})]
    )
    assert prompts == [[question], [question]]


def test_a_module_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "some_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    assert PythonFunction("some_package.some_rewards.lengths")(SAMPLES) == [1, 1]


def test_its_name_is_the_functions(at):
    out = score_samples([WeightedReward(at("lengths")), WeightedReward(at("by_sample"), 2.0)], SAMPLES)
    assert set(out.breakdown) == {"lengths", "by_sample"}
    assert out.total.tolist() == [4, 2]


def test_it_survives_pickling(at):
    assert pickle.loads(pickle.dumps(at("per_token", kwargs={"scale": 2.0})))(SAMPLES) == [[18, 4], [16]]


def test_an_async_function_is_awaited(at):
    assert score_samples([WeightedReward(at("slow"))], SAMPLES).total.tolist() == [1, 1]


def test_only_what_the_environment_allows_is_imported(at, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_LIGHTNING_REWARD_MODULES", f"team.rewards, {tmp_path / 'my_rewards.py'}")
    assert at("lengths")(SAMPLES) == [1, 1]
    (tmp_path / "other.py").write_text("raise SystemExit\n")
    for path in (f"{tmp_path / 'other.py'}:f", "os.path.basename", "team.rewards_of_others.f"):
        with pytest.raises(UserError, match="RLHF_LIGHTNING_REWARD_MODULES allows"):
            PythonFunction(path)
    with pytest.raises(UserError, match="there is no module"):  # allowed, but not there
        PythonFunction("team.rewards.maths.f")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("length", {}, "has no 'length': did you mean lengths?"),
        ("LIMIT", {}, "is 3, which cannot be called"),
        ("Scorer", {}, "is a class"),
        ("positional", {}, "'texts' is positional-only"),
        ("per_token", {"scal": 1}, r"kwargs\.scal: .*did you mean scale\?"),
        ("lengths", {"prompts": []}, r"kwargs\.prompts .* filled by the samples"),
    ],
)
def test_what_cannot_work_is_said_at_once(at, name, kwargs, message):
    with pytest.raises(UserError, match=message.replace("lengths?", r"lengths\?")):
        at(name, kwargs=kwargs)


def test_a_missing_column_is_named_with_those_there_are(at):
    with pytest.raises(UserError, match=r"exact asks for 'answer', .*\(bonus\)"):
        at("exact")([Sample("", "", {"bonus": 1})])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reward", r"give package\.module\.function"),
        ("no_such_package.rewards.f", "there is no module 'no_such_package'"),
        ("rlhf_lightning.no_such_module.f", "there is no module 'rlhf_lightning.no_such_module'"),
        ("nowhere/rewards.py:f", "there is no file .*nowhere/rewards.py"),
    ],
)
def test_a_wrong_path_is_named(path, message):
    with pytest.raises(UserError, match=message):
        PythonFunction(path)


def test_a_file_that_breaks_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match=r"broken\.py raised ModuleNotFoundError\(.*no_such_package"):
        PythonFunction(f"{tmp_path}/broken.py:f")
