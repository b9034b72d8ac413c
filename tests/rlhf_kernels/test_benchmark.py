"""The benchmark runs where there is no GPU: tiny shapes, kernels in the interpreter, and the page it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
kernel_docs = pytest.importorskip("kernel_docs")
bench_kernels = pytest.importorskip("bench_kernels")
sys.path.pop(0)


def test_a_dry_run_checks_ours_against_float64_and_lists_the_others():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_kernels.py"), "--dry-run", "--op", "gae"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("rlhf_kernels (Triton)", "rlhf_kernels (reference)", "Python loop", "torch associative_scan"):
        assert name in result.stdout


ABOUT = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}


def test_a_report_goes_on_where_the_same_code_stopped(tmp_path):
    path = tmp_path / "cuda.json"
    first = bench_kernels.Report(path, ABOUT)
    first.add({"rows": [{"op": "gae"}], "done": ["gae (3, 40)"], "failures": ["exact_kl: out of memory"]})
    again = bench_kernels.Report(path, ABOUT)
    assert again.found["done"] == ["gae (3, 40)"]
    assert again.found["rows"] == [{"op": "gae"}]
    assert again.found["failures"] == []  # tried again
    other = bench_kernels.Report(path, {**ABOUT, "commit": "def"})
    assert other.found["rows"] == other.found["done"] == []


def test_pieces_of_one_code_on_one_device_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "RESULTS", tmp_path / "results")
    pieces = [tmp_path / f"{name}.json" for name in "abc"]
    for path, commit in zip(pieces, ("abc", "abc", "def"), strict=True):
        bench_kernels.Report(path, {**ABOUT, "commit": commit}).add({"rows": [{"op": path.stem}]})
    bench_kernels.merge(pieces[:2])
    merged = json.loads((tmp_path / "results" / "cuda.json").read_text())
    assert [row["op"] for row in merged["rows"]] == ["a", "b"]
    assert merged["device"] == "a GPU"
    with pytest.raises(SystemExit, match="commit differs: abc, abc, def"):
        bench_kernels.merge(pieces)


def test_the_parts_are_everything():
    done = [op for ops in bench_kernels.PARTS.values() for op in ops]
    assert sorted(done) == sorted(["checks", *bench_kernels.SHAPES["cuda"]])


def test_nothing_begins_after_the_deadline(tmp_path):
    report = bench_kernels.Report(tmp_path / "dry.json", ABOUT)
    bench_kernels.run("dry", "cpu", 1, ["gae"], report, seconds=-1)
    assert report.found["left"] == ["gae (3, 40)"]
    assert report.found["rows"] == []


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
