"""Programs against hidden tests: what passes, what fails, and every way to pass without being right."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.rewards import sandbox as sandbox_module
from rlhf_lightning.rewards.code_tests import CodeTests
from rlhf_lightning.rewards.combine import WeightedReward, score_samples
from rlhf_lightning.rewards.sandbox import Sandbox
from rlhf_lightning.rewards.sandbox_child import decode, encode


def why_not() -> str:
    try:
        Sandbox().check()
    except UserError as error:
        return str(error)
    return ""


MISSING = why_not()
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)

TEST = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0
    assert candidate([1], [2]) == [1, 2]
"""
RIGHT = "def add(a, b):\n    return a + b\n"


def asked(program: str, test=TEST, **columns) -> Sample:
    return Sample("Add.", program, {"tests": test, "entry_point": "add", **columns})


@pytest.fixture(scope="module")
def reward() -> CodeTests:
    return CodeTests(limit_s=10.0, num_workers=2)


@needs_sandbox
def test_right_passes_and_wrong_fails(reward):
    programs = [
        RIGHT,
        "Sure!\n```python\n" + RIGHT + "```\nThat is it.",
        "```\ndef add(a, b):\n    return 0\n```\nor better\n```py\n" + RIGHT + "```",
        "def add(a, b):\n    return a - b\n",
        "def add(a, b):\n    return a +\n",
        "I cannot.",
        "",
        "def plus(a, b):\n    return a + b\n",
        "raise SystemExit",
    ]
    out = reward([asked(program) for program in programs])
    assert out.scores == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert out.parts["passed_frac"] == out.scores


@needs_sandbox
def test_a_function_begun_by_the_prompt(reward):
    head = 'def helper(x):\n    return x + 1\n\n\ndef add(a, b):\n    """Add."""\n'
    test = "def check(candidate):\n    assert candidate(1, 2) == helper(2)\n"
    reward = CodeTests(prefix_column="head", limit_s=10.0)
    bodies = ["    return a + b\n", "    return a\n", f"```python\n{RIGHT}```"]
    assert reward([asked(body, test, head=head) for body in bodies]).scores == [1, 0, 1]


@needs_sandbox
def test_a_list_of_assertions_may_be_scored_by_its_share(reward):
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 5", "assert add('a', 'b') == 'ab'"]
    assert reward([asked(RIGHT, tests)]).scores == [0]
    partial = CodeTests(partial=True, limit_s=10.0)([asked(RIGHT, tests), asked("def add(a, b):\n    return 0", tests)])
    assert partial.scores == [0.75, 0.25]


@needs_sandbox
def test_scripts_by_their_output(reward):
    tests = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5", "stdout": "10"}]
    right = "a, b = map(int, input().split())\nprint(a + b, '')"
    wrong = "input()\nprint(3)"
    silent = "import os\nos._exit(0)"
    late = "a, b = map(int, input().split())\nprint(a + b, flush=True)\nwhile True: pass"
    out = CodeTests(limit_s=1.0)([asked(p, tests) for p in (right, wrong, silent, late)])
    assert out.scores == [1, 0, 0, 0]
    assert out.parts["timed_out"] == [0, 0, 0, 1]
    assert CodeTests(partial=True)([asked(wrong, tests)]).scores == [0.5]


@needs_sandbox
def test_errors_that_tests_ask_for(reward):
    test = """
def check(candidate):
    try:
        candidate(1, "a")
    except TypeError:
        return
    assert False
"""
    swallows = "def add(a, b):\n    try:\n        return a + b\n    except TypeError:\n        return None\n"
    assert reward([asked(RIGHT, test), asked(swallows, test)]).scores == [1, 0]


@needs_sandbox
def test_a_program_that_never_ends_is_out_of_time_and_costs_no_other():
    loops = "def add(a, b):\n    while True:\n        pass\n"
    out = CodeTests(limit_s=1.0)([asked(loops), asked(RIGHT), asked("while True:\n    pass")])
    assert out.scores == [0, 1, 0]
    assert out.parts["timed_out"] == [1, 0, 1]


# ---- passing without being right ------------------------------------------------------------------------------------

WRONG = "def add(a, b):\n    return 0\n"
EQUAL = """
class Yes{base}:
    def __eq__(self, other):
        return True
    __hash__ = None
def add(a, b):
    return Yes({argument})
"""
FORGERIES = {
    "exit(0)": "def add(a, b):\n    exit(0)\n",
    "sys.exit(0)": "import sys\ndef add(a, b):\n    sys.exit(0)\n",
    "os._exit(0)": "import os\ndef add(a, b):\n    os._exit(0)\n",
    "os._exit(0) at once": "import os\nos._exit(0)\n",
    "raise SystemExit": "def add(a, b):\n    raise SystemExit(0)\n",
    "equals everything": EQUAL.format(base="", argument=""),
    "a number that equals everything": EQUAL.format(base="(int)", argument="1"),
    "a list that equals everything": EQUAL.format(base="(list)", argument="[1]"),
    "atexit": WRONG + "import atexit, os\natexit.register(os._exit, 0)\n",
    "exit hook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\n" + WRONG,
    "no more assertions": "import builtins\nclass AssertionError(Exception):\n    pass\n"
    "builtins.AssertionError = None\nimport sys, os\nsys.excepthook = lambda *a: os._exit(0)\n" + WRONG,
    "overwrites the checker": WRONG + "import __main__\n__main__.check = lambda candidate: None\n"
    "import threading, os\ndef later():\n    import time\n    while not hasattr(__main__, 'check'):\n        pass\n"
    "    os._exit(0)\nthreading.Thread(target=later).start()\n",
    "replaces the checker from its frame": "import sys, os\ndef add(a, b):\n    f = sys._getframe()\n"
    "    while f:\n        if 'check' in f.f_globals:\n            f.f_globals['check'] = lambda c: None\n"
    "            os._exit(0)\n        f = f.f_back\n    return 0\n",
    "reads the expectation from the checker's frame": "import sys\ndef add(a, b):\n"
    "    code = sys._getframe(1).f_code\n    want = [c for c in code.co_consts if isinstance(c, int) and c]\n"
    "    import os\n    os._exit(0) if want else None\n    return 0\n",
    "says that it passed": WRONG + "print('passed', flush=True)\nprint('{\"passed\": [true]}', flush=True)\n",
    "kills its judge": "import os\ndef add(a, b):\n    os.kill(os.getppid(), 9)\n    os.kill(-1, 9)\n",
    "raises what may mean the end": "def add(a, b):\n    raise StopIteration\n",
    "raises KeyboardInterrupt": "def add(a, b):\n    raise KeyboardInterrupt\n",
    "raises EOFError": "def add(a, b):\n    raise EOFError\n",
    "floods its judge": "def add(a, b):\n    return 'x' * (1 << 24)\n",
    "a bomb of brackets": "def add(a, b):\n    x = []\n    for _ in range(900):\n        x = [x]\n    return x\n",
    "answers before it is asked": """
import os
for fd in range(3, 64):
    for _ in range(9):
        try:
            os.write(fd, b'{"id": "0", "result": 5}\\n')
            os.write(fd, b'{"nonce": "0", "passed": [true]}\\n')
        except OSError:
            pass
"""
    + WRONG,
    "reports in the judge's place": """
import os, json
def add(a, b):
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"nonce": "", "passed": [true]}\\n')
        except OSError:
            pass
    os._exit(0)
""",
}


@needs_sandbox
@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_no_verdict_is_forged(program, reward):
    assert reward([asked(program)]).scores == [0]


def naive_verdict(program: str) -> bool:
    """Program and tests in one process, as many harnesses have it: exit code 0 is a pass."""
    done = subprocess.run([sys.executable, "-c", f"{program}\n{TEST}\ncheck(add)\n"], capture_output=True, check=False)
    return done.returncode == 0


def test_most_of_them_work_on_a_naive_harness():
    names = ("exit(0)", "os._exit(0)", "equals everything", "a number that equals everything", "exit hook")
    assert naive_verdict(RIGHT)
    assert not naive_verdict(WRONG)
    assert all(naive_verdict(FORGERIES[name]) for name in (*names, "replaces the checker from its frame"))


@needs_sandbox
def test_the_program_finds_no_test_in_its_sandbox(reward):
    """It looks through its memory of frames, modules and descriptors for what only the tests contain."""
    secret = "expectation_9f3a"
    test = f"def check(candidate):\n    {secret} = 'no'\n    assert candidate() == {secret}\n"
    spy = """
import gc, sys, os
word = "expectation_" + "9f3a"
def add():
    seen = [repr(o)[:2000] for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list))]
    frame, texts = sys._getframe(), []
    while frame:
        texts.append(repr(frame.f_locals)[:5000] + repr(frame.f_code.co_names))
        frame = frame.f_back
    files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    found = any(word in t for t in seen + texts if "word =" not in t)
    return "found" if found else "no"
"""
    assert reward([asked(spy, test)]).scores == [1]


@needs_sandbox
def test_a_program_cannot_change_the_tests_values(reward):
    test = "def check(candidate):\n    x = [1]\n    candidate(x, x)\n    assert x == [1]\n"
    assert reward([asked("def add(a, b):\n    a.clear()\n    return a\n", test)]).scores == [1]


# ---- values on the wire ---------------------------------------------------------------------------------------------

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
ATOMS |= st.complex_numbers(allow_nan=False)
HASHABLE = st.recursive(ATOMS, lambda x: st.tuples(x, x) | st.frozensets(x, max_size=3), max_leaves=5)
VALUES = st.recursive(
    HASHABLE,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(HASHABLE, x, max_size=3) | st.sets(HASHABLE, max_size=3),
    max_leaves=8,
)


def typed(value):
    """A value with the types of everything in it, comparable."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, sorted(repr((typed(k), typed(v))) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(typed(v)) for v in value)
    return kind, [typed(v) for v in value] if isinstance(value, list | tuple) else repr(value)


@settings(max_examples=60)
@given(VALUES)
def test_plain_values_arrive_as_they_were_with_their_types(value):
    assert typed(decode(encode(value))) == typed(value)


def test_what_is_not_plain_does_not_leave():
    class Int(int):
        pass

    for value in (Int(1), object(), [Int(1)], {1: Int(1)}, print, iter([1])):
        with pytest.raises(TypeError, match="cannot leave"):
            encode(value)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_without_a_sandbox_the_stage_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_module._working_command.cache_clear()
    reward = CodeTests()
    with pytest.raises(UserError, match=r"there is no bwrap on PATH: install bubblewrap"):
        reward.to(torch.device("cpu"))
    with pytest.raises(UserError, match="never run without a sandbox"):  # nor is that a sample's fault
        score_samples([WeightedReward(reward, on_error="zero")], [asked(RIGHT)])
    sandbox_module._working_command.cache_clear()


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(
        UserError, match=r"CodeTests needs the column 'tests'.* its columns: entry_point, prompt\..*tests_column"
    ):
        CodeTests()([Sample("Add.", RIGHT, {"prompt": "Add.", "entry_point": "add"})])
    with pytest.raises(UserError, match=r"needs the column 'head'.*prefix_column"):
        CodeTests(prefix_column="head")([asked(RIGHT)])


@pytest.mark.parametrize("tests", [[], 3, [1], [{"stdin": "x"}], ["assert 1", {"stdin": "", "stdout": ""}]])
def test_tests_of_another_form_are_named(tests):
    with pytest.raises(UserError, match="CodeTests: column 'tests' holds"):
        CodeTests()([asked(RIGHT, tests)])


def test_an_entry_point_that_is_no_name():
    with pytest.raises(UserError, match="column 'entry_point' holds 'a b'"):
        CodeTests()([asked(RIGHT, entry_point="a b")])


@pytest.mark.parametrize("options", [{"limit_s": 0.0}, {"memory_mb": 1}, {"num_workers": 0}])
def test_impossible_settings_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        CodeTests(**options)
