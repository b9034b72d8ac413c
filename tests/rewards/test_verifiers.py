"""Rewards that compare an answer with a key: exact match, format, ROUGE, facts, countdown, reasoning-gym."""

import ast
import inspect
import sqlite3
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards import Countdown, ExactMatch, FactTable, ReasoningGym, RegexFormat, Rouge
from rlhf_lightning.rewards.arithmetic import NotArithmetic, calculate
from rlhf_lightning.rewards.extract import AnswerPattern, final_answer, last_boxed
from rlhf_lightning.rewards.reasoning_gym import BLOCKED


def said(*texts: str, **columns) -> list[Sample]:
    return [Sample("Q?", text, dict(columns)) for text in texts]


# ---- where the answer stands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed{never closed", None),
        (r"\boxedly{5}", None),
        (r"\boxed", None),
        ("#### 6\n#### 7 \nbye", "7"),
        (r"#### 8 and \boxed{9}", "9"),
        ("no answer", None),
        ("", None),
    ],
)
def test_the_final_answer(text, expected):
    assert final_answer(text) == expected


def test_a_pattern_goes_before_everything():
    pattern = AnswerPattern(r"A: (\d+)")
    assert final_answer(r"A: 1, A: 2, \boxed{3}", pattern) == "2"
    assert final_answer(r"\boxed{3}", pattern) is None
    assert AnswerPattern(r"\d+").last("1 22 x") == "22"


@given(st.text(alphabet=r"\boxed{}# 1", max_size=40))
def test_finding_a_box_never_fails(text):
    found = last_boxed(text)
    assert found is None or found in text


# ---- exact match ----------------------------------------------------------------------------------------------------


def test_exact_match_by_hand():
    samples = said(" Paris ", "paris", "Paris!", "It is Paris", answer="Paris")
    assert ExactMatch()(samples) == [1, 0, 0, 0]
    assert ExactMatch(ignore_case=True)(samples) == [1, 1, 0, 0]
    assert ExactMatch(ignore_case=True, ignore_punctuation=True)(samples) == [1, 1, 1, 0]
    assert ExactMatch(pattern=r"It is (\w+)")(samples) == [0, 0, 0, 1]


def test_one_key_of_several_and_numbers():
    assert ExactMatch(answer_column="keys")(said("b", "c", keys=["a", "b"])) == [1, 0]
    assert ExactMatch()(said("4", "5", answer=4)) == [1, 0]


# ---- format ---------------------------------------------------------------------------------------------------------


def test_format_by_hand():
    texts = said("<a>1</a>", "x <a>1\n2</a>", "<a>1</a><a>2</a>", "nothing")
    assert RegexFormat(pattern="<a>.*?</a>")(texts) == [1, 0, 1, 0]
    assert RegexFormat(pattern="<a>.*?</a>", how="anywhere")(texts) == [1, 1, 1, 0]
    assert RegexFormat(pattern="<a>.*?</a>", how="once")(texts) == [1, 1, 0, 0]


# ---- ROUGE ----------------------------------------------------------------------------------------------------------


def test_rouge_by_hand():
    samples = said("the cat sat", "a dog", reference="the cat lay there")
    out = Rouge(key="rouge1")(samples)  # 2 of 3 words said are there, 2 of 4 words there are said
    assert out.scores == pytest.approx([2 * (2 / 3) * 0.5 / (2 / 3 + 0.5), 0])
    assert out.parts["precision"] == pytest.approx([2 / 3, 0])
    assert Rouge(key="rouge2", statistic="recall")(samples).scores == pytest.approx([1 / 3, 0])
    assert Rouge()(said("b a", reference="a b")).scores == pytest.approx([0.5])


# ---- facts ----------------------------------------------------------------------------------------------------------

CAPITALS = r"(?P<capital>\w+) is the capital of (?P<country>\w+)"
ROWS = [("France", "Paris"), ("Italy", "Rome"), ("Bolivia", "Sucre"), ("Bolivia", "La Paz")]


@pytest.fixture(params=["csv", "sqlite"])
def table(request, tmp_path):
    if request.param == "csv":
        path = tmp_path / "facts.csv"
        path.write_text("country,capital\n" + "".join(f"{a},{b}\n" for a, b in ROWS))
        return path
    path = tmp_path / "facts.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE facts (country TEXT, capital TEXT)")
        database.executemany("INSERT INTO facts VALUES (?, ?)", ROWS)
    database.close()
    return path


def test_claims_are_looked_up(table):
    reward = FactTable(str(table), CAPITALS, "capital")
    texts = [
        "Paris is the capital of France.",
        "paris is the capital of FRANCE",
        "Rome is the capital of France. Rome is the capital of Italy.",
        "Oslo is the capital of Norway.",
        "Sucre is the capital of Bolivia.",
        "I do not know.",
        "Rome is the capital of France. Rome is the capital of France.",
    ]
    out = reward(said(*texts))
    assert out.scores == [1, 1, 0, 0, 1, 0, -1]
    assert out.parts == {
        "true": [1, 1, 1, 0, 1, 0, 0],
        "false": [0, 0, 1, 0, 0, 0, 1],
        "unknown": [0, 0, 0, 1, 0, 0, 0],
    }
    strict = FactTable(str(table), CAPITALS, "capital", unknown_score=-0.5, no_claim_score=-2.0)
    assert strict(said(texts[3], texts[5])).scores == [-0.5, -2]


def test_what_a_table_lacks_is_named(tmp_path, table):
    with pytest.raises(UserError, match=r"has no column 'river', but country, capital"):
        FactTable(str(table), r"(?P<river>\w+) flows in (?P<country>\w+)", "river")
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.csv"):
        FactTable(str(tmp_path / "nowhere.csv"), CAPITALS, "capital")
    with pytest.raises(UserError, match=r"named groups \['capital', 'country'\].*value_column='river'"):
        FactTable(str(table), CAPITALS, "river")
    with pytest.raises(UserError, match="at least one other"):
        FactTable(str(table), r"(?P<capital>\w+)", "capital")
    with pytest.raises(UserError, match="no regular expression"):
        FactTable(str(table), "(", "capital")


def test_which_table_of_a_database(tmp_path):
    path = tmp_path / "facts.db"
    with sqlite3.connect(path) as database:
        for name in ("old", 'new"; DROP TABLE old; --'):
            quoted = '"' + name.replace('"', '""') + '"'
            database.execute(f"CREATE TABLE {quoted} (country TEXT, capital TEXT)")
            database.execute(f"INSERT INTO {quoted} VALUES ('France', ?)", (name,))
    database.close()
    with pytest.raises(UserError, match=r"holds the tables old, new.*: give table"):
        FactTable(str(path), CAPITALS, "capital")
    with pytest.raises(UserError, match="has no table 'older'"):
        FactTable(str(path), CAPITALS, "capital", table="older")
    assert FactTable(str(path), CAPITALS, "capital", table="old")(said("old is the capital of France")).scores == [1]
    FactTable(str(path), CAPITALS, "capital", table='new"; DROP TABLE old; --')
    (tmp_path / "text.db").write_text("no database at all, but long enough to be read as one" * 20)
    with pytest.raises(UserError, match="cannot be read as an SQLite database"):
        FactTable(str(tmp_path / "text.db"), CAPITALS, "capital")
    (tmp_path / "facts.csv").write_text("country,capital\n")
    with pytest.raises(UserError, match="table='old' names a table of a database"):
        FactTable(str(tmp_path / "facts.csv"), CAPITALS, "capital", table="old")


# ---- arithmetic and countdown ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1 + 2 * 3", 7, [1, 2, 3]),
        ("(1 + 2) × 3 − 4", 5, [1, 2, 3, 4]),
        ("1 / 3 + 1 ÷ 6", Fraction(1, 2), [1, 3, 1, 6]),
        ("-(2 - 5)", 3, [2, 5]),
        ("  7 ", 7, [7]),
    ],
)
def test_sums(text, value, numbers):
    assert calculate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2 ** 3",
        "9**9**9**9",
        "1.5 + 1",
        "1 // 2",
        "7 % 2",
        "1 / (2 - 2)",
        "+1",
        "x",
        "True",
        "f(1)",
        "__import__('os').system('true')",
        "(1).__class__",
        "[1][0]",
        "1 if 1 else 2",
        "(x := 1)",
        "lambda: 1",
        "'1'",
        "1j",
        "1 +",
        "1\n2",
        "1; 2",
        "9" * 60,
        "*".join(["999999999"] * 9),
        "(" * 240 + "1" + ")" * 240,
        "1+" * 300 + "1",
        "\x00",
    ],
)
def test_what_is_no_sum_is_refused(text):
    with pytest.raises(NotArithmetic):
        calculate(text)


SUMS = st.recursive(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n), [n])),
    lambda x: st.tuples(x, st.sampled_from("+-*/"), x).map(
        lambda t: (
            f"({t[0][0]} {t[1]} {t[2][0]})",
            None
            if t[0][1] is None or t[2][1] is None or (t[1] == "/" and t[2][1] == 0)
            else {"+": t[0][1].__add__, "-": t[0][1].__sub__, "*": t[0][1].__mul__, "/": t[0][1].__truediv__}[t[1]](
                t[2][1]
            ),
            t[0][2] + t[2][2],
        )
    ),
    max_leaves=6,
)


@settings(max_examples=100)
@given(SUMS)
def test_any_sum_by_fractions(written):
    text, value, numbers = written
    if value is None:
        with pytest.raises(NotArithmetic):
            calculate(text)
    else:
        assert calculate(text) == (value, numbers)


@given(st.text(max_size=30))
def test_no_text_does_anything_but_count_or_be_refused(text):
    try:
        value, _ = calculate(text)
    except NotArithmetic:
        return
    assert isinstance(value, Fraction)


@pytest.mark.parametrize(
    ("answer", "correct", "well_formed"),
    [
        ("(25 - 5) * 4 / 8", 1, 1),
        ("4 * (25 - 5) / 8 = 10", 1, 1),
        ("(25 - 5) / 8 * 4", 1, 1),
        ("25 - 5 * 4 / 8", 0, 1),  # every number, another value
        ("(25 - 5) / 2", 0, 1),  # the value, another number
        ("5 + 5", 0, 1),  # a number twice
        ("(25 - 5) * 4 / 8 + 8 - 8", 0, 1),
        ("10", 0, 1),
        ("10 == 10", 0, 1),
        ("255 - 245", 0, 1),
        ("25 - 5 and more", 0, 0),
        ("", 0, 0),
        ("25 / (5 - 5)", 0, 0),
    ],
)
def test_countdown_by_hand(answer, correct, well_formed):
    sample = said(f"Let me see. <answer>{answer}</answer>", target=10, numbers=[25, 5, 4, 8])
    out = Countdown(format_score=0.1)(sample)
    assert out.parts == {"correct": [correct], "well_formed": [well_formed]}
    assert out.scores == [1 if correct else 0.1 * well_formed]


def test_countdown_takes_the_last_answer_and_each_number_as_often_as_given():
    twice = said("<answer>3</answer> no: <answer>3 * 3</answer>", "<answer>3 + 6</answer>", target="9", numbers=[3, 3])
    assert Countdown()(twice).parts["correct"] == [1, 0]
    assert Countdown()(said("3 * 3", target=9, numbers=[3, 3])).scores == [0]
    assert Countdown(pattern="(.*)")(said("3 * 3", target=9, numbers=["3", "3"])).scores == [0]
    assert Countdown(pattern="(.+)")(said("3 * 3", target=9, numbers=["3", "3"])).scores == [1]


def test_thirds_are_exact():
    out = Countdown()(said("<answer>8 / (3 - 8 / 3)</answer>", target=24, numbers=[3, 3, 8, 8]))
    assert out.scores == [1]


def test_columns_of_another_kind_are_named():
    with pytest.raises(UserError, match="column 'target' holds 'ten'"):
        Countdown()(said("", target="ten", numbers=[1]))
    with pytest.raises(UserError, match="column 'numbers' holds '1 2'"):
        Countdown()(said("", target=1, numbers="1 2"))


# ---- reasoning-gym --------------------------------------------------------------------------------------------------


RUN_TEXT = ("eval", "exec", "parse_expr", "sympify", "simplify", "S", "compile", "__import__")


def evaluates(cls: type) -> bool:
    """Whether a task's scoring reaches eval, exec or sympy's parse_expr, by its source and that of what it calls."""
    module = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    owner = next(base for base in cls.__mro__ if "score_answer" in vars(base))
    if owner.__module__ != cls.__module__:
        return False
    todo, seen = ["score_answer"], set()
    while todo:
        name = todo.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                # a function of such a name which the module defines itself is judged by its own source
                if called in RUN_TEXT and called not in functions:
                    return True
                todo.append(called)
    return False


def test_the_block_list_is_what_the_packages_source_says():
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    assert {name for name, (cls, _) in DATASETS.items() if evaluates(cls)} == set(BLOCKED)


def record(task: str, seed: int = 0) -> dict:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=1, seed=seed)[0]


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "letter_counting", "basic_arithmetic"])
def test_a_tasks_own_key_scores_1(task):
    pytest.importorskip("reasoning_gym")
    made = record(task)
    right = Sample(made["question"], f"so <answer>\n{made['answer']} </answer>", made)
    none = Sample(made["question"], made["answer"], made)
    wrong = Sample(made["question"], "<answer>zzz</answer>", made)
    out = ReasoningGym()([right, none, wrong])
    assert out.scores[:2] == [1, 0]
    assert out.scores[2] < 0.1
    assert out.parts == {"answered": [1, 0, 1]}
    assert ReasoningGym(pattern=None)([none]).scores == [1]


@pytest.mark.parametrize("task", BLOCKED)
def test_a_task_that_evaluates_is_blocked(task, tmp_path):
    marker = tmp_path / "ran"
    answer = f"<answer>__import__('pathlib').Path('{marker}').touch()</answer>"
    sample = Sample("Q?", answer, {"answer": "1", "metadata": {"source_dataset": task}})
    with pytest.raises(UserError, match=f"task '{task}' is blocked, for its scoring evaluates"):
        ReasoningGym()([sample])
    assert not marker.exists()


def test_records_that_are_no_tasks_are_named(monkeypatch):
    with pytest.raises(UserError, match="needs the column 'metadata'"):
        ReasoningGym()(said("x", answer="1"))
    with pytest.raises(UserError, match=r"holds \{'a': 1\}.*source_dataset"):
        ReasoningGym()(said("x", answer="1", metadata={"a": 1}))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        ReasoningGym()(said("x", answer="1", metadata={"source_dataset": "chain_sum"}))


def test_a_task_that_is_not_there():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match="has no task 'telepathy'"):
        ReasoningGym()(said("x", answer="1", metadata={"source_dataset": "telepathy"}))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "column"),
    [(ExactMatch(), "answer"), (Rouge(), "reference"), (Countdown(), "target"), (ReasoningGym(), "answer")],
    ids=lambda value: type(value).__name__,
)
def test_a_missing_column_is_named_with_reward_and_columns(reward, column):
    name = type(reward).__name__
    with pytest.raises(
        UserError, match=rf"{name} needs the column '{column}'.*sample 0.*its columns: key, text\. Name .*"
    ):
        reward(said("x", key=1, text="y"))
    with pytest.raises(UserError, match="its columns: none at all"):
        reward(said("x"))


def test_a_column_of_another_kind_is_named():
    with pytest.raises(UserError, match=r"Rouge: column 'reference' of sample 0 holds \['a'\], a list"):
        Rouge()(said("x", reference=["a"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactMatch(pattern="("), "pattern='\\(' is no regular expression"),
        (lambda: ExactMatch(pattern="(a)(b)"), "has 2 groups: give at most 1"),
        (lambda: RegexFormat(pattern="["), "no regular expression"),
        (lambda: RegexFormat(pattern="a", how="twice"), "how='twice'"),
        (lambda: Rouge(key="rouge9"), "key='rouge9'"),
        (lambda: Rouge(statistic="f1"), "statistic='f1'"),
        (lambda: Countdown(format_score=1.0), r"format_score=1\.0"),
        (lambda: Countdown(pattern="("), "no regular expression"),
    ],
)
def test_impossible_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
