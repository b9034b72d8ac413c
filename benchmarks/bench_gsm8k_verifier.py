"""Verifiers against what is known: do they agree, and what does a verdict cost?

    python benchmarks/bench_gsm8k_verifier.py --data PATH

MathAnswer on every labelled solution of GSM8K's example_model_solutions.jsonl (5276 of them), and CodeTests on
HumanEval's canonical solutions, whole and with their last line broken. PATH holds data/gsm8k and data/humaneval, as
published.
Results: benchmarks/results/verifiers.json.
"""

import argparse
import gzip
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_common import HERE, about, targets

from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.pipelines.files import write_json
from rlhf_lightning.rewards import CodeTests, MathAnswer

ANSWER = r"A: *([^\n]*)"
"""Where the answer stands in these solutions."""


def labelled(path: Path) -> tuple[list[Sample], list[bool]]:
    """Every solution of every model, with the label that GSM8K gave it."""
    samples, labels = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for solved in record.values():
            if isinstance(solved, dict):
                samples.append(Sample(record["question"], solved["solution"], {"answer": record["ground_truth"]}))
                labels.append(bool(solved["is_correct"]))
    return samples, labels


def maths(path: Path) -> dict[str, Any]:
    """Agreement with the labels: of MathAnswer, and of math-verify asked about every pair, plain numbers too."""
    samples, labels = labelled(path)
    reward = MathAnswer(pattern=ANSWER)
    reward(samples[:1])
    began = time.perf_counter()
    out = reward(samples)
    seconds = time.perf_counter() - began
    pool = reward._workers()
    pairs = [(reward._answer(s.record["answer"]), reward._answer(s.completion)) for s in samples]
    jobs = [{"gold": gold, "answer": said} for gold, said in pairs if gold and said]
    labels_of_jobs = [label for label, (gold, said) in zip(labels, pairs, strict=True) if gold and said]
    pool.map(jobs[:2])
    began = time.perf_counter()
    answers = pool.map(jobs)
    pool_seconds = time.perf_counter() - began
    pool.close()
    by_verify = [answer is not None and answer["equal"] for answer in answers]
    return {
        "solutions": len(samples),
        "correct_by_label": sum(labels),
        "agreement": sum(bool(s) == label for s, label in zip(out.scores, labels, strict=True)) / len(labels),
        "ms_per_answer": 1000 * seconds / len(samples),
        "unanswered": int(len(samples) - sum(out.parts["answered"])),
        "timed_out": int(sum(out.parts["timed_out"])),
        "math_verify_alone": {
            "pairs": len(jobs),
            "agreement": sum(v == label for v, label in zip(by_verify, labels_of_jobs, strict=True)) / len(jobs),
            "ms_per_answer": 1000 * pool_seconds / len(jobs),
            "timed_out": sum(answer is None for answer in answers),
        },
    }


def broken(solution: str) -> str:
    """The solution whose last line returns nothing: not a text, which is as good as True to `assert`."""
    lines = solution.rstrip().split("\n")
    indent = lines[-1][: len(lines[-1]) - len(lines[-1].lstrip())]
    return "\n".join([*lines[:-1], f"{indent}return None"])


def programs(path: Path) -> dict[str, Any]:
    tasks = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    reward = CodeTests(tests_column="test", prefix_column="prompt", num_workers=2, limit_s=30.0)
    reward.to("cpu")
    result: dict[str, Any] = {"tasks": len(tasks)}
    for name, change in (("canonical", str), ("broken", broken)):
        samples = [Sample(task["prompt"], change(task["canonical_solution"]), task) for task in tasks]
        began = time.perf_counter()
        out = reward(samples)
        seconds = time.perf_counter() - began
        result[name] = {
            "passed": int(sum(out.scores)),
            "timed_out": int(sum(out.parts["timed_out"])),
            "ms_per_program": 1000 * seconds / len(tasks),
            "surprises": [
                t["task_id"] for t, s in zip(tasks, out.scores, strict=True) if bool(s) != (name == "canonical")
            ],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/gsm8k and data/humaneval")
    options = parser.parse_args()
    solutions = options.data / "data" / "gsm8k" / "example_model_solutions.jsonl"
    tasks = options.data / "data" / "humaneval" / "HumanEval.jsonl.gz"
    for path in (solutions, tasks):
        if not path.is_file():
            sys.exit(f"skipped: there is no {path}; give --data a folder that holds data/gsm8k and data/humaneval")
    measured_with = about()
    measured_with["versions"] |= {name: version(name) for name in ("math-verify", "sympy")}
    bwrap = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True)
    measured_with["versions"]["bubblewrap"] = bwrap.stdout.split()[-1]
    math, code = maths(solutions), programs(tasks)
    checks = {
        "agreement of MathAnswer with the labels": (math["agreement"], "at least", 0.995),
        "canonical programs that pass": (code["canonical"]["passed"], "at least", code["tasks"]),
        "broken programs that pass": (code["broken"]["passed"], "at most", 0),
    }
    result = {"about": measured_with, "targets": targets(checks), "gsm8k": math, "humaneval": code}
    print(json.dumps(result, indent=2))
    print(f"wrote {write_json(HERE / 'results' / 'verifiers.json', result)}")


if __name__ == "__main__":
    main()
