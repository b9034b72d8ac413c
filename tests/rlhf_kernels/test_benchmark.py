"""The benchmark runs where there is no GPU: tiny shapes, kernels in the interpreter, and the page it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
kernel_docs = pytest.importorskip("kernel_docs")
sys.path.pop(0)


def test_a_dry_run_checks_ours_against_float64_and_lists_the_others():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_kernels.py"), "--dry-run", "--op", "gae"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("rlhf_kernels (Triton)", "rlhf_kernels (reference)", "Python loop", "torch associative_scan"):
        assert name in result.stdout


def row(implementation, shape=kernel_docs.HEAD_SHAPE, both_ms=10.0):
    return {"op": "linear_policy_loss", "shape": list(shape), "implementation": implementation, "both_ms": both_ms}


def test_a_target_is_a_figure_or_a_ratio_and_absent_where_nothing_was_measured():
    figure, ratio = (
        next(t for t in kernel_docs.TARGETS if t.op == "linear_policy_loss" and t.over == over)
        for over in ("", kernel_docs.VERL)
    )
    rows = [row(kernel_docs.MINE), row(kernel_docs.VERL, both_ms=25.0)]
    assert figure.value(rows) == 10.0
    assert figure.met(10.0)
    assert not figure.met(17.7)
    assert ratio.value(rows) == 2.5
    assert ratio.met(2.5)
    assert not ratio.met(1.8)
    assert figure.value([]) is None
    assert ratio.value(rows[:1]) is None
    assert "not measured" in "".join(kernel_docs._target_table({}))
