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
pytest.importorskip("kernel_checks")  # which bench_kernels imports when it runs
sys.path.pop(0)


def test_a_dry_run_checks_ours_against_float64_and_lists_the_others(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_kernels.py"), "--dry-run", "--op", "gae"]
    result = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "dry.json").read_text())
    assert found["done"] == ["gae (3, 40)"]
    assert {row["implementation"] for row in found["rows"]} > {"rlhf_kernels (Triton)", "Python loop over tokens"}
    assert "s] gae (3, 40): rlhf_kernels (Triton) runs, error" in result.stdout  # progress, before anything is timed
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


def test_a_row_measured_again_counts_instead_of_before(tmp_path):
    report = bench_kernels.Report(tmp_path / "cuda.json", ABOUT)
    for milliseconds in (2.0, 1.0):
        report.add({"rows": [{"op": "gae", "shape": [3, 40], "implementation": "ours", "forward_ms": milliseconds}]})
    assert [row["forward_ms"] for row in json.loads((tmp_path / "cuda.json").read_text())["rows"]] == [1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["cuda.json"]  # written aside, then put in place


def test_what_has_a_target_is_what_the_page_asks_for():
    rows = bench_kernels.target_rows("cuda")
    asked = {(t.op, t.shape, name) for t in kernel_docs.TARGETS if t.report == "cuda"
             for name in (t.implementation, t.over) if name}  # fmt: skip
    covered = {(op, shape, name) for op, (shapes, names) in rows.items() for shape in shapes for name in names}
    assert asked <= covered
    for op, (shapes, names) in rows.items():
        assert set(shapes) <= set(bench_kernels.SHAPES["cuda"][op])
        assert set(names) <= set(bench_kernels.CASES[op].implementations) | {"torch"}


def test_checks_come_first_then_the_rows_with_a_target(tmp_path, monkeypatch):
    started = []

    def child(request, environment, report):
        started.append((request["op"], request["only"]))
        shapes = [bench_kernels.key_of(request["op"], shape, request["only"]) for shape in request["shapes"]]
        report.add({"done": shapes or [f"check {request['only'][0]}"]})

    monkeypatch.setattr(bench_kernels, "run_child", child)
    report = bench_kernels.Report(tmp_path / "cuda.json", ABOUT)
    ops = ["checks", *bench_kernels.target_rows("cuda")]
    bench_kernels.run("cuda", "cuda", 1, ops, report, 100, targets=True)
    num_checks = sum(op == "checks" for op, _ in started)
    assert {op for op, _ in started[:num_checks]} == {"checks"}
    assert [op for op, _ in started[num_checks:]] == ops[1:]
    assert all(kernel_docs.MINE in only for op, only in started[num_checks:])
    count = len(started)
    bench_kernels.run("cuda", "cuda", 1, ops, report, 100, targets=True)  # nothing is done twice
    assert len(started) == count
    bench_kernels.run("cuda", "cuda", 1, ["gae"], report, 100)  # all of a shape is more than its targets
    assert len(started) == count + 1


def test_one_of_ours_that_is_wrong_gets_no_row_and_the_others_theirs(monkeypatch):
    case = bench_kernels.CASES["masked_whiten"]
    broken = case.implementations["rlhf_kernels (reference)"]._replace(call=lambda i: i["x"])
    monkeypatch.setitem(case.implementations, "rlhf_kernels (reference)", broken)
    rows, _, failures = bench_kernels.measure("masked_whiten", (3, 40), "cpu", 1, {})
    assert [row.implementation for row in rows] == ["torch"]
    assert len(failures) == 1
    assert "masked_whiten (3, 40), rlhf_kernels (reference): error" in failures[0]
    assert failures[0].endswith("not timed")


def test_pieces_of_one_code_on_one_device_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "RESULTS", tmp_path / "results")
    pieces = [tmp_path / f"{name}.json" for name in "abc"]
    for path, commit in zip(pieces, ("abc", "abc", "def"), strict=True):
        bench_kernels.Report(path, {**ABOUT, "commit": commit}).add({"rows": [{"op": path.stem}]})
    bench_kernels.merge(pieces[:2], None)
    merged = json.loads((tmp_path / "results" / "cuda.json").read_text())
    assert [row["op"] for row in merged["rows"]] == ["a", "b"]
    assert merged["device"] == "a GPU"
    with pytest.raises(SystemExit, match="commit differs: abc, abc, def"):
        bench_kernels.merge(pieces, None)
    # "a" was measured again; what only the older report has says when that was
    bench_kernels.Report(pieces[2], {**ABOUT, "commit": "def"}).add({"rows": [{"op": "a", "forward_ms": 9.0}]})
    bench_kernels.merge(pieces[:2], pieces[2])
    merged = json.loads((tmp_path / "results" / "cuda.json").read_text())
    assert merged["rows"] == [{"op": "a"}, {"op": "b"}, {"commit": "def", "op": "c"}]


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
