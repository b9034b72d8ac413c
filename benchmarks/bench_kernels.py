"""Time every op of rlhf_kernels against plain torch and against each peer that is installed.

    python benchmarks/bench_kernels.py                 # this machine's device -> benchmarks/results/kernels/*.json
    python benchmarks/bench_kernels.py --large         # CPU: also 2048 tokens x 151936 words (a few minutes)
    python benchmarks/bench_kernels.py --docs          # write docs/kernels.md from the results, measuring nothing

Each op and shape runs in a process of its own. An implementation is first checked against float64 and reported with its
error; an op of ours whose error is above its tolerance gets no row and the command fails. Timings are medians over
interleaved rounds on rotated buffers of random numbers. On a GPU the ceilings (copy bandwidth, bfloat16 matrix product)
are measured in the same process, so that a share of them means something.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, Case, build
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels"
SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "cpu": {
        "token_logprobs": [(256, 32000)],
        "linear_token_logprobs": [(512, 896, 32000)],
        "policy_loss": [(128, 32000)],
        "linear_policy_loss": [(512, 896, 32000)],
        "exact_kl": [(128, 32000)],
        "gae": [(64, 1024), (16, 8192)],
    },
    "large": {"linear_token_logprobs": [(2048, 896, 151936)]},
    "cuda": {
        "token_logprobs": [(n, v) for n in (4096, 16384) for v in (32000, 128256, 151936)],
        "policy_loss": [(n, v) for n in (4096, 16384) for v in (32000, 128256, 151936)],
        "exact_kl": [(4096, v) for v in (32000, 128256, 151936)],
        "linear_token_logprobs": [(4096, h, 128256) for h in (896, 2048, 4096)] + [(16384, 2048, 151936)],
        "linear_policy_loss": [(4096, h, 128256) for h in (896, 2048, 4096)] + [(16384, 2048, 151936)],
        "gae": [(64, 1024), (512, 8192), (64, 32768), (512, 32768)],
    },
}


@dataclass
class Row:
    """One implementation of one op at one shape."""

    op: str
    shape: tuple[int, ...]
    implementation: str
    forward_ms: float | None
    both_ms: float | None
    """Forward and backward together; None where the op has no backward."""
    backward_ms: float | None
    peak_mb: float
    """Memory above the inputs, forward and backward."""
    error: float
    """Largest difference from float64: log-probability (nats), KL, or advantage relative to scale."""
    gigabytes_per_s: float | None = None
    """Of the logits or rows read once and their gradient written once, in both passes."""
    teraflops: float | None = None
    """6 N H V over both passes, for ops from hidden states."""
    ceiling_share: float | None = None
    """Of the copy bandwidth or the matrix product measured in the same process (GPU only)."""


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds. On the CPU: of processor time, which other work on the machine does not lengthen."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.process_time()
    call()
    return (time.process_time() - begin) * 1e3


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most memory above what is there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def ceilings(device: str) -> dict[str, float]:
    """Copy bandwidth (GB/s) and bfloat16 matrix product (TFLOP/s), random data; {} on the CPU."""
    if device != "cuda":
        return {}
    source = torch.randn(1 << 30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
        a @ b
    copy = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(20))
    product = statistics.median(timed(lambda: a @ b, device) for _ in range(20))
    return {"copy_gb_s": 4 * source.numel() / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


def both_passes(case: Case, inputs: dict[str, Tensor]) -> Callable[[], None]:
    leaves = [inputs[name] for name in case.leaves]

    def run() -> None:
        torch.autograd.grad(case.scalar(case.call(inputs)), leaves)

    return run


def measure(op: str, shape: tuple[int, ...], device: str, rounds: int) -> tuple[list[Row], list[str]]:
    """Rows of every implementation that runs, and what went wrong with the others."""
    problems: list[str] = []
    top = ceilings(device)
    copies = 1 if device == "cpu" else 3
    buffers = [build(op, shape, device, seed) for seed in range(copies)]
    exact = CASES[op](None).exact(buffers[0])
    cases: dict[str, Case] = {}
    errors: dict[str, float] = {}
    for name in CASES[op].names(device):
        try:
            case = CASES[op](name)
            errors[name] = case.error(case.call(buffers[0]), exact)
        except Exception as problem:  # a peer of another version: reported, never timed
            problems.append(f"{op} {name}: {type(problem).__name__}: {problem}")
            continue
        if name.startswith("rlhf_kernels") and not errors[name] <= case.tolerance:
            raise SystemExit(f"{op} {shape}: error {errors[name]:.1e} is above {case.tolerance:.0e}: no speed reported")
        cases[name] = case
    forward: dict[str, list[float]] = {name: [] for name in cases}
    both: dict[str, list[float]] = {name: [] for name in cases}
    peaks = {}
    for name, case in cases.items():
        run = both_passes(case, buffers[0]) if case.leaves else lambda case=case: case.call(buffers[0])
        peaks[name] = peak_bytes(run, device)
    for i in range(rounds):
        inputs = buffers[i % copies]
        for name, case in cases.items():
            with torch.no_grad():
                forward[name].append(timed(lambda case=case, inputs=inputs: case.call(inputs), device))
            if case.leaves:
                both[name].append(timed(both_passes(case, inputs), device))
    rows = []
    for name, case in cases.items():
        first = statistics.median(forward[name])
        total = statistics.median(both[name]) if both[name] else None
        row = Row(
            op, shape, name, first, total, None if total is None else total - first, peaks[name] / 1e6, errors[name]
        )
        if case.bytes_moved:
            row.gigabytes_per_s = case.bytes_moved(buffers[0]) / (total or first) / 1e6
            row.ceiling_share = row.gigabytes_per_s / top["copy_gb_s"] if top else None
        if case.flops and total:
            row.teraflops = case.flops(shape) / total / 1e9
            row.ceiling_share = row.teraflops / top["matmul_tflop_s"] if top else None
        rows.append(row)
    return rows, problems


def describe(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    about = {"torch": torch.__version__, "commit": commit.strip(), "threads": torch.get_num_threads()}
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        about["driver"] = str(torch._C._cuda_getDriverVersion())
        about["ceilings"] = ceilings(device)
    else:
        about["device"] = platform.processor() or platform.machine()
        about["time"] = "processor time, one thread"
    return about


def child(argument: str) -> None:
    """One op and shape, in this process: prints its rows as JSON on the last line."""
    request = json.loads(argument)
    torch.set_num_threads(1)
    rows, problems = measure(request["op"], tuple(request["shape"]), request["device"], request["rounds"])
    print(json.dumps({"rows": [asdict(row) for row in rows], "problems": problems}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="CPU: only the shape of a 152k vocabulary")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--rounds", type=int, help="timed rounds per implementation")
    parser.add_argument("--docs", action="store_true", help="write docs/kernels.md from the results on disk")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        child(arguments.one)
        return 0
    if not arguments.docs:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        name = "large" if arguments.large else device
        rounds = arguments.rounds or {"cpu": 5, "large": 1, "cuda": 40}[name]
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        failed = False
        for op, shapes in SHAPES[name].items():
            for shape in shapes if arguments.op in (None, op) else []:
                request = json.dumps({"op": op, "shape": shape, "device": device, "rounds": rounds})
                command = [sys.executable, __file__, "--one", request]
                result = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                if result.returncode:
                    failed = True
                    print(f"{op} {shape}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                answer = json.loads(result.stdout.splitlines()[-1])
                rows += answer["rows"]
                problems += answer["problems"]
                for row in answer["rows"]:
                    both = row["both_ms"]
                    timing = f"{row['forward_ms']:10.2f} ms forward {both or 0:10.2f} ms both"
                    print(f"{op:22} {tuple(shape)!s:20} {row['implementation']:28} {timing} {row['peak_mb']:8.0f} MB")
        RESULTS.mkdir(parents=True, exist_ok=True)
        report = {**describe(device), "rows": rows, "problems": sorted(set(problems))}
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        if failed:
            return 1
    from kernel_docs import write_docs

    write_docs(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
