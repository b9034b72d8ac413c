"""Every named place is in the source, once named it fails there, and unnamed nothing happens."""

import ast
import os
import signal
from pathlib import Path

import pytest

from rlhf_lightning.core import failpoints
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.failpoints import POINTS, VARIABLE, FailpointError, failpoint, parse

SOURCE = Path(__file__).resolve().parents[2] / "rlhf_lightning"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(failpoints, "_reached", failpoints.Counter())
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_registry_and_the_source_name_the_same_places():
    called = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "failpoint":
                assert isinstance(node.args[0], ast.Constant), f"{file}: a name must be written out"
                called.append(node.args[0].value)
    assert sorted(called) == sorted(POINTS), "each place once"


def test_nothing_happens_that_the_environment_does_not_ask_for(monkeypatch):
    for name in POINTS:
        failpoint(name)
    monkeypatch.setenv(VARIABLE, "step.after:1:raise")
    failpoint("step.before")
    with pytest.raises(FailpointError, match=r"step\.after:1:raise"):
        failpoint("step.after")


def test_it_fails_the_nth_time_and_in_the_rank_that_is_named(monkeypatch):
    monkeypatch.setenv(VARIABLE, "step.after:2:raise:1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(3):
        failpoint("step.after")
    failpoints._reached.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    failpoint("step.after")
    with pytest.raises(FailpointError):
        failpoint("step.after")
    failpoint("step.after")


@pytest.mark.parametrize(("action", "number"), [("", signal.SIGKILL), (":1:stop", signal.SIGSTOP)])
def test_it_kills_or_stops_its_process(action, number, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, what: sent.append((pid, what)))
    monkeypatch.setenv(VARIABLE, f"collect.before{action}")
    failpoint("collect.before")
    assert sent == [(os.getpid(), number)]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("step.afterwards", "there is no failpoint 'step.afterwards'; choose one of checkpoint.before_write"),
        ("step.after:first", "write NAME:TIME:ACTION:RANK"),
        ("step.after:1:explode", "with an action of kill, stop, raise"),
    ],
)
def test_what_is_no_failpoint_is_said(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)
