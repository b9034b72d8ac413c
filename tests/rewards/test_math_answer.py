"""Answers compared as mathematics; hostile ones cost their time limit and nothing else."""

import os
import pickle
import subprocess
import sys
import time

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards import worker_pool
from rlhf_lightning.rewards.combine import WeightedReward, score_samples
from rlhf_lightning.rewards.math_answer import WORKER, MathAnswer

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def reward():
    reward = MathAnswer(limit_s=5.0)
    yield reward
    reward._workers().close()


def asked(answer: str, key: str) -> Sample:
    return Sample("How much?", answer, {"answer": key})


EQUAL = [
    ("18", "#### 18"),
    ("It is 9 * 2 = 18.\n#### 18", r"so \boxed{18}"),
    ("18", r"#### \$18.00"),
    ("18", "#### 18."),
    ("1,234", "#### 1234"),
    ("-3", r"\boxed{-3}"),
    ("0.333333", "#### .3333333"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    ("1/2", r"\boxed{\frac{2}{4}}"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}"),
    ("(x+1)^2", r"\boxed{x^2 + 2x + 1}"),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
    ("x > 1", r"\boxed{(1, \infty)}"),
    ("x = 5", r"\boxed{5}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
    (r"\text{Tuesday}", r"\boxed{\text{Tuesday}}"),
]
DIFFERENT = [
    ("18", "#### 19"),
    ("18", "18"),  # says so nowhere
    ("18", "#### "),
    ("18", r"\boxed{18"),
    ("18", "#### 1.8"),
    ("18", "#### 18\n#### 20"),
    ("1/2", r"\boxed{\frac{1}{3}}"),
    ("(1, 2)", r"\boxed{(2, 1)}"),
    ("x > 1", r"\boxed{x \ge 1}"),
    ("18", r"\boxed{??}"),
    ("18", "#### " + "1" * 3000),
]


def test_what_is_equal_and_what_is_not(reward):
    out = reward([asked(answer, key) for key, answer in [*EQUAL, *DIFFERENT]])
    judged = dict(zip([*EQUAL, *DIFFERENT], out.scores, strict=True))
    assert [pair for pair in EQUAL if not judged[pair]] == []
    assert [pair for pair in DIFFERENT if judged[pair]] == []
    assert not any(out.parts["timed_out"])
    assert out.parts["answered"][-len(DIFFERENT) :] == [1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1]


def test_a_pattern_says_where_the_answer_stands():
    reward = MathAnswer(pattern=r"A: *(.*)")
    assert reward([asked("A: 3\nA: 4", "Some words\nA: 4"), asked(r"\boxed{4}", "4")]).scores == [1, 0]


def hostile(marker) -> list[str]:
    run = f"__import__('os').system('touch {marker}')"
    texts = [
        run,
        rf"\text{{{run}}}",
        rf"\mathrm{{{run}}}",
        rf"\max({run}, 1)",
        rf"\operatorname{{{run}}}(2)",
        rf"\sum_{{n=1}}^{{3}} {run}",
        rf"x_{{{run}}}",
        rf"\frac{{{run}}}{{2}}",
        rf"[{run}]",
        rf"\begin{{pmatrix}} {run} \end{{pmatrix}}",
        f"lambda: {run}",
        f"exec(\"import os; os.system('touch {marker}')\")",
        "open('/etc/passwd').read()",
        "().__class__.__bases__[0].__subclasses__()",
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "99999999!",
        r"\sum_{n=1}^{1000000000} n^{n}",
        r"\int_0^1 \sin(x^{x^{x}}) dx",
        "{" * 300 + "2" + "}" * 300,
        "(" * 800 + "2" + ")" * 800,
        r"\frac{1}{" * 150 + "2" + "}" * 150,
        r"\sqrt{" * 200 + "2" + "}" * 200,
        r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 25)] * 25) + r"\end{pmatrix}^{-1}",
        "9" * 1900,
        "1e999999999",
        "0." + "0" * 1000 + "1",
        "x^{" + "9" * 300 + "}",
        "\x00\x01\x02",
        "\ud800",
        "％２",
        "٣",
        "\\" * 500,
        "$" * 500,
        "2" + "=2" * 300,
        "2," * 500,
        r"\cos(" * 100 + "2" + ")" * 100,
        "} {",
        "%" * 100,
        "",
    ]
    return texts


def test_hostile_answers_run_nothing_and_cost_no_more_than_their_limit(tmp_path, monkeypatch):
    ask, took = worker_pool._Worker.ask, []

    def timed(*args):
        began = time.perf_counter()
        answer = ask(*args)
        took.append(time.perf_counter() - began)
        return answer

    monkeypatch.setattr(worker_pool._Worker, "ask", timed)  # without the start of a worker, which a busy machine slows
    quick = MathAnswer(limit_s=0.4)
    marker = tmp_path / "ran"
    answers = hostile(marker)
    out = quick([asked(f"#### {text}" if "}" in text else f"\\boxed{{{text}}}", "7") for text in answers])
    assert out.scores == [0] * len(answers)
    assert not marker.exists()
    assert any(out.parts["timed_out"]), "some must run into the limit, or the corpus is too tame"
    assert len(took) > len(answers) // 2, "the others are told apart without a comparison"
    assert max(took) < 0.4 + worker_pool.GRACE_S + 2.0  # on an idle machine 0.4
    quick._workers().close()


REFUSED = [
    "eval('1 + 1')",
    "exec('x = 1')",
    "sympy.sympify('x + 1')",
    "sympy.Number('__import__(\"os\")')",
    "sympy.parsing.sympy_parser.parse_expr('1 + 1')",
    "sympy.lambdify(sympy.Symbol('x'), sympy.Symbol('x') + 1)",
    "os.system('true')",
    "subprocess.run(['true'])",
    "os.fork()",
    "socket.socket()",
    "open('/tmp/x-of-math-worker', 'w')",
    "os.open('/tmp/x-of-math-worker', os.O_CREAT | os.O_WRONLY)",
    "os.remove('/tmp/x-of-math-worker')",
]
ALLOWED = [
    "sympy.Number('12').p == 12",
    "sympy.Number('1.5') == 1.5",
    "__import__('colorsys')",
    "__import__('email.message')",
]


def test_the_guard_refuses_what_a_comparison_has_no_need_of():
    program = f"""
import os, socket, subprocess, sys
sys.path.insert(0, {str(WORKER.parent)!r})
import math_worker, sympy
import sympy.parsing.sympy_parser
math_worker.equal("1", "1")
codes = [compile(code, {__file__!r}, "eval") for code in {REFUSED + ALLOWED!r}]  # a file's code, not text
math_worker.forbid_evaluation()
for code in codes:
    try:
        eval(code)
        print("ran")
    except math_worker.Refused as error:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"] * len(REFUSED) + ["ran"] * len(ALLOWED), done.stderr


def test_workers_see_no_environment_and_die_with_their_pool(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary")
    reward = MathAnswer(num_workers=1)
    assert reward([asked(r"\boxed{\frac{1}{2}}", "1/2")]).scores == [1]
    (worker,) = reward._workers()._alive
    with open(f"/proc/{worker.process.pid}/environ", "rb") as file:
        assert b"canary" not in file.read()
    process = worker.process
    del worker, reward
    process.wait(timeout=10)


def test_a_worker_that_is_gone_is_replaced():
    reward = MathAnswer(num_workers=1)
    half = asked(r"\boxed{\frac{1}{2}}", "1/2")
    assert reward([half]).scores == [1]
    (worker,) = reward._workers()._alive
    os.kill(worker.process.pid, 9)
    worker.process.wait()
    assert reward([half]).scores == [1]
    assert pickle.loads(pickle.dumps(reward))._pool is None


def test_metrics_and_columns():
    out = score_samples([WeightedReward(MathAnswer(), name="math")], [asked("#### 1", "1"), asked("one", "1")])
    assert out.parts["math/answered"].tolist() == [1, 0]
    assert MathAnswer(answer_column="n")([Sample("", "#### 3", {"n": 3})]).scores == [1]
    with pytest.raises(UserError, match=r"MathAnswer needs the column 'answer'.*its columns: key\..*answer_column"):
        MathAnswer()([Sample("Q", "#### 1", {"key": "1"})])


@pytest.mark.parametrize("options", [{"limit_s": 0.0}, {"num_workers": 0}])
def test_impossible_settings_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        MathAnswer(**options)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install math-verify"):
        MathAnswer()
