"""Check every op of rlhf_kernels, then time it against plain torch and against each peer that is installed.

On a GPU, what matters most first: every check, then the rows that have a target, ours and what it is compared with:

    PYTHONPATH=kernels:. python3 benchmarks/bench_kernels.py --targets --out out/0

Then everything, in pieces of less than ten minutes. What was cut off goes on where it stopped, if it finds its file:

    PYTHONPATH=kernels:. python3 benchmarks/bench_kernels.py --part 1 --out out/1  # checks; ops on logits
    PYTHONPATH=kernels:. python3 benchmarks/bench_kernels.py --part 2 --out out/2  # log-probs from hidden states
    PYTHONPATH=kernels:. python3 benchmarks/bench_kernels.py --part 3 --out out/3  # the loss from them; advantages
    python benchmarks/bench_kernels.py --merge out/*/cuda.json                     # one file; docs/kernels.md

Elsewhere:

    python benchmarks/bench_kernels.py                 # this machine's device -> results/kernels/*.json, docs
    python benchmarks/bench_kernels.py --large         # CPU: only 2048 tokens x 151936 words, ours and torch (10 min)
    python benchmarks/bench_kernels.py --dry-run       # tiny shapes, kernels in the interpreter: nothing is measured
    python benchmarks/bench_kernels.py --docs          # write docs/kernels.md from the results, measuring nothing

Each op runs in a process of its own (on the CPU: each shape of it; the checks: each its own, all at once on a GPU), and
what a shape gave is on disk before the next begins. An implementation is first checked against float64 and reported
with its error; one of ours whose error is above its tolerance gets no row and the command fails. A peer that is not
installed, needs another device or fails is listed by name with the reason (most of them come with `pip install
liger-kernel cut-cross-entropy trl`). Timings are medians over interleaved rounds on rotated buffers of random numbers;
an implementation that has used up its time drops out of further rounds. On a GPU they are times between events with
the queue filled ahead, so that a launch that waits for the host does not count as work of the kernel; the ceilings
(copy bandwidth, bfloat16 matrix product) are measured in the same process, so that a share of them means something.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, Case, build
from kernel_docs import MINE, TARGETS, write_docs
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels"
LARGE = (2048, 896, 151936)
SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "cpu": {
        "token_logprobs": [(256, 32000)],
        "linear_token_logprobs": [(512, 896, 32000)],
        "policy_loss": [(128, 32000)],
        "linear_policy_loss": [(512, 896, 32000)],
        "linear_exact_kl": [(256, 896, 32000)],
        "exact_kl": [(128, 32000)],
        "gae": [(64, 1024), (16, 8192)],
        "masked_whiten": [(64, 8192)],
    },
    "large": {"linear_token_logprobs": [LARGE], "linear_policy_loss": [LARGE]},
    "dry": {
        "token_logprobs": [(5, 300)],
        "linear_token_logprobs": [(5, 16, 300)],
        "policy_loss": [(5, 300)],
        "linear_policy_loss": [(5, 16, 300)],
        "linear_exact_kl": [(5, 16, 300)],
        "exact_kl": [(5, 300)],
        "gae": [(3, 40)],
        "masked_whiten": [(3, 40)],
    },
    "cuda": {
        "token_logprobs": [(n, v) for n in (4096, 16384) for v in (32000, 128256, 151936)]
        + [(8192, 151936), (16384, 50257)],
        "policy_loss": [(n, v) for n in (4096, 16384) for v in (32000, 128256, 151936)] + [(16384, 50257)],
        "exact_kl": [(4096, v) for v in (32000, 128256, 151936)],
        "linear_token_logprobs": [(4096, h, 128256) for h in (896, 2048, 4096)] + [(16384, 2048, 151936)],
        "linear_policy_loss": [(4096, h, 128256) for h in (896, 2048, 4096)] + [(16384, 2048, 151936)],
        "linear_exact_kl": [(4096, 2048, 128256)],
        "gae": [(64, 1024), (512, 8192), (64, 32768), (512, 32768)],
        "masked_whiten": [(512, 8192)],
    },
}
PARTS = {
    1: ("checks", "token_logprobs", "policy_loss", "exact_kl"),
    2: ("linear_token_logprobs",),
    3: ("linear_policy_loss", "linear_exact_kl", "gae", "masked_whiten"),
}
"""What one call of ten minutes does."""


def target_rows(name: str) -> dict[str, tuple[list[tuple[int, ...]], list[str]]]:
    """Of each op that has a target on a GPU: the shapes, and the implementations that the target compares."""
    rows: dict[str, tuple[list[tuple[int, ...]], list[str]]] = {}
    for target in TARGETS:
        if target.report == "cuda":
            shapes, implementations = rows.setdefault(target.op, ([], ["torch", MINE]))
            shapes += [s for s in ([target.shape] if name == "cuda" else SHAPES[name][target.op]) if s not in shapes]
            some = (target.implementation, target.over)
            implementations += [i for i in some if i and i not in implementations]
    return rows


SECONDS = {"cpu": 600.0, "cuda": 4.0}
"""Time an implementation may take at one shape before it drops out of further rounds; it gets three in any case.

What --each sets."""


SLEEP_CYCLES = 6_000_000
"""Three milliseconds: both passes of an op take the host about one."""
CACHE_BYTES = 256 << 20
"""More than the L2 cache of any GPU: the buffers that are rotated are together larger, or 64."""


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
    error: float | None
    """Largest difference from float64: log-probability (nats), KL, or advantage relative to scale.

    None where the implementation does not return the numbers."""
    gigabytes_per_s: float | None = None
    """Of the logits or rows read once and their gradient written once, in both passes."""
    teraflops: float | None = None
    """6 N H V over both passes, for ops from hidden states."""
    ceiling_share: float | None = None
    """Of the copy bandwidth or the matrix product measured in the same process (GPU only)."""
    forward_teraflops: float | None = None
    """2 N H V over the forward pass, for ops from hidden states."""


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds. On the CPU: of processor time, which other work on the machine does not lengthen."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)  # meanwhile the host launches what is timed
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


def checked(
    op: str, shape: tuple[int, ...], device: str, inputs: dict[str, Tensor], only: list[str] | None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Each implementation that runs, with its error from float64; why others do not; what is wrong with ours."""
    exact = CASES[op](None).exact(inputs)
    found: dict[str, tuple[Case, float | None]] = {}
    problems: list[str] = []
    failures: list[str] = []
    for name in CASES[op].implementations:
        if only is not None and name not in only:
            continue
        if shape == LARGE and device == "cpu" and name not in ("rlhf_kernels (reference)", "torch"):
            continue  # half a minute per pass
        if obstacle := CASES[op].obstacle(name, device):
            problems.append(f"{op}, {name}: {obstacle}")
            continue
        try:
            case = CASES[op](name)
            result = case.call(inputs)
            error = case.error(result, exact)
            with torch.no_grad():
                case.call(inputs)  # what compiles for this mode compiles now
            if case.leaves:
                both_passes(case, inputs)()
        except Exception as problem:  # a peer of another version, or out of memory: reported, never timed
            lines = str(problem).splitlines() or [""]
            what = f"{name}: {type(problem).__name__}: {lines[0][:200]}"
            if name.startswith("rlhf_kernels"):
                failures.append(f"{op} {shape}, {what}")
            else:
                problems.append(f"{op}, {what}")
            continue
        bound = case.tolerance(inputs)
        if name.startswith("rlhf_kernels") and not (error <= bound and len(case.read(result)) == len(exact)):
            failures.append(f"{op} {shape}, {name}: error {error:.1e} is above {bound:.0e}: not timed")
            continue
        found[name] = (case, error if error == error else None)
        tell(progress=[f"{op} {shape}: {name} runs, error {error:.0e}"])
    return found, problems, failures


def measure(
    op: str,
    shape: tuple[int, ...],
    device: str,
    rounds: int,
    top: dict[str, float],
    only: list[str] | None = None,
    each: float | None = None,
) -> tuple[list[Row], list[str], list[str]]:
    """Rows of every implementation that runs (of `only` these), what went wrong with peers, and with ours."""
    buffers = [build(op, shape, device, seed=0)]
    size = sum(x.numel() * x.element_size() for x in buffers[0].values())
    copies = 1 if device == "cpu" else min(64, max(3, CACHE_BYTES // size + 1))
    buffers += [build(op, shape, device, seed) for seed in range(1, copies)]
    cases, problems, failures = checked(op, shape, device, buffers[0], only)
    forward: dict[str, list[float]] = {name: [] for name in cases}
    both: dict[str, list[float]] = {name: [] for name in cases}
    peaks = {}
    for name, (case, _) in cases.items():
        run = both_passes(case, buffers[0]) if case.leaves else lambda case=case: case.call(buffers[0])
        peaks[name] = peak_bytes(run, device)
    for i in range(rounds):
        inputs = buffers[i % copies]
        for name, (case, _) in cases.items():
            if i >= 3 and sum(forward[name]) + sum(both[name]) > (each or SECONDS[device]) * 1e3:
                continue
            with torch.no_grad():
                forward[name].append(timed(lambda case=case, inputs=inputs: case.call(inputs), device))
            if case.leaves:
                both[name].append(timed(both_passes(case, inputs), device))
    rows = []
    for name, (case, error) in cases.items():
        first = statistics.median(forward[name])
        total = statistics.median(both[name]) if both[name] else None
        row = Row(op, shape, name, first, total, None if total is None else total - first, peaks[name] / 1e6, error)
        if case.bytes_moved:
            row.gigabytes_per_s = case.bytes_moved(buffers[0]) / (total or first) / 1e6
            row.ceiling_share = row.gigabytes_per_s / top["copy_gb_s"] if top else None
        if case.flops:
            row.forward_teraflops = case.flops(shape) / 3 / first / 1e9
            row.ceiling_share = row.forward_teraflops / top["matmul_tflop_s"] if top else None
        if case.flops and total:
            row.teraflops = case.flops(shape) / total / 1e9
            row.ceiling_share = row.teraflops / top["matmul_tflop_s"] if top else None
        rows.append(row)
    return rows, problems, failures


def describe(device: str, commit: str | None) -> dict[str, Any]:
    if commit is None:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"torch": torch.__version__, "commit": commit, "threads": torch.get_num_threads()}
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
        about["ceilings"] = ceilings(device)
        torch.cuda.empty_cache()  # the processes that measure need the memory
    else:
        about["device"] = platform.processor() or platform.machine()
        about["time"] = "processor time, one thread"
    return about


def child(argument: str) -> None:
    """One op, in this process: prints what each shape gave as a line of JSON, as soon as it is there."""
    request = json.loads(argument)
    device = request["device"]
    torch.set_num_threads(1)
    if request["op"] == "checks":
        from kernel_checks import run as run_checks

        for outcome in run_checks(device, request["only"]):
            wrong = [f"{outcome['check']}: {outcome['wrong']}"] if outcome["wrong"] else []
            tell(checks=[outcome], failures=wrong, done=[] if wrong else [f"check {outcome['check']}"])
        return
    top = ceilings(device)
    for shape in map(tuple, request["shapes"]):
        if time.time() > request["deadline"]:
            tell(left=[f"{request['op']} {shape}"])
            continue
        try:
            how = (request["rounds"], top, request["only"], request["each"])
            rows, problems, failures = measure(request["op"], shape, device, *how)
            done = [] if failures else [key_of(request["op"], shape, request["only"])]
            tell(rows=[asdict(row) for row in rows], problems=problems, failures=failures, done=done)
        except Exception as problem:
            tell(failures=[f"{request['op']} {shape}: {type(problem).__name__}: {problem}"])
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()


def key_of(op: str, shape: tuple[int, ...], only: list[str] | None) -> str:
    """What is done when a shape is: all of it, or the implementations that have a target."""
    return f"{op} {shape}" if only is None else f"{op} {shape}, targets"


def tell(**found: list[Any]) -> None:
    print(LINE + json.dumps(found), flush=True)


LINE = "found: "
"""Begins a line that is for the parent; everything else is somebody's chatter."""


class Report:
    """What was found, on disk after every shape; taken up again if the same code on the same device wrote it."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.lock = path, threading.Lock()
        empty: dict[str, list[Any]] = {key: [] for key in ("rows", "problems", "checks", "failures", "left", "done")}
        self.found = {**about, **empty}
        if path is not None and path.is_file():
            old = json.loads(path.read_text())
            if "done" in old and all(old.get(key) == about[key] for key in SAME):
                self.found = {**old, "failures": [], "left": []}

    def add(self, more: dict[str, list[Any]]) -> None:
        with self.lock:
            for key, some in more.items():
                new = [x for x in some if x not in self.found[key]]
                if key in ("rows", "checks"):  # what was done again counts instead of before
                    again = {_identity(row) for row in new}
                    self.found[key] = [row for row in self.found[key] if _identity(row) not in again]
                self.found[key] += new
            self.write()

    def write(self) -> None:
        """Whole or not at all, whenever the process is ended."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1) + "\n")
            part.replace(self.path)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("check"), row.get("op"), tuple(row.get("shape", ())), row.get("implementation")


SAME = ("device", "torch", "triton", "commit")


def run(
    name: str,
    device: str,
    rounds: int,
    ops: list[str],
    report: Report,
    seconds: float,
    *,
    targets: bool = False,
    each: float | None = None,
) -> None:
    """All shapes of `ops` (of `targets`, those that have one), as far as `seconds` reach; fills the report."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name == "dry":
        environment["TRITON_INTERPRET"] = "1"
    began = time.time()
    deadline = began + seconds
    common = {"device": device, "rounds": rounds, "each": each, "deadline": deadline, "began": began}
    rows = target_rows(name) if targets else {op: (shapes, None) for op, shapes in SHAPES[name].items()}
    for op in ops:
        if op == "checks":
            from kernel_checks import CHECKS

            left = [check.__name__ for check in CHECKS if f"check {check.__name__}" not in report.found["done"]]
            requests = [{**common, "op": op, "shapes": [], "only": [check]} for check in left]
            if time.time() > deadline:
                report.add({"left": [f"{op} {check}" for check in left]})
                continue
            # most of what they wait for is the compiler, so all at once; on a CPU there is nothing to wait for
            with ThreadPoolExecutor(len(requests) or 1 if device == "cuda" else 1) as pool:
                list(pool.map(lambda request: run_child(request, environment, report), requests))
            continue
        shapes, only = rows[op]
        shapes = [shape for shape in shapes if key_of(op, shape, only) not in report.found["done"]]
        # memory of a process is only comparable while it is fresh; a GPU counts its own
        for group in [shapes] if device == "cuda" else [[shape] for shape in shapes]:
            if time.time() > deadline:
                report.add({"left": [f"{op} {shape}" for shape in group]})
            elif group:
                run_child({**common, "op": op, "shapes": group, "only": only}, environment, report)


def run_child(request: dict[str, Any], environment: dict[str, str], report: Report) -> None:
    """One process, read line by line; ended a minute after the deadline, whatever it does then."""
    said = " ".join([request["op"], *map(str, request["shapes"] or request["only"])])
    print(f"[{time.time() - request['began']:4.0f} s] {said}", flush=True)
    command = [sys.executable, __file__, "--one", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        left = min(max(0.0, request["deadline"] - time.time()) + 60, threading.TIMEOUT_MAX)
        watchdog = threading.Timer(left, process.kill)
        watchdog.start()
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(LINE):
                continue
            found = json.loads(line.removeprefix(LINE))
            for step in found.pop("progress", []):
                print(f"[{time.time() - request['began']:4.0f} s] {step}", flush=True)
            if found:
                report.add(found)
            for row in found.get("rows", []):
                timing = f"{row['forward_ms']:10.3f} ms forward {row['both_ms'] or 0:10.3f} ms both"
                shape = str(tuple(row["shape"]))
                print(
                    f"{row['op']:22} {shape:20} {row['implementation']:36} {timing} {row['peak_mb']:8.0f} MB",
                    flush=True,
                )
            for check in found.get("checks", []):
                print(f"{check['outcome']:8} {check['seconds']:6.1f} s  {check['check']}: {check['what']}", flush=True)
        code = process.wait()
        watchdog.cancel()
        if code:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"ended with {code}"])[-1]
            report.add({"failures": [f"{said}: {last}"]})


def merge(paths: list[Path], keep: Path | None) -> None:
    """Pieces that one code found on one kind of device -> results/kernels/cuda.json.

    Rows that only an older report has are kept from there, marked with the commit they were measured at.
    """
    pieces = [json.loads(path.read_text()) for path in paths]
    for key in SAME:
        if len({piece[key] for piece in pieces}) > 1:
            raise SystemExit(
                f"{key} differs: {', '.join(str(piece[key]) for piece in pieces)}; merge what belongs together"
            )
    report = Report(None, {key: value for key, value in pieces[0].items() if not isinstance(value, list)})
    for piece in pieces:
        report.add({key: value for key, value in piece.items() if isinstance(value, list)})
    if keep is not None:
        old = json.loads(keep.read_text())
        for kind in ("rows", "checks"):
            there = {_identity(row) for row in report.found[kind]}
            some = [{"commit": old["commit"], **row} for row in old[kind] if _identity(row) not in there]
            report.found[kind] += some
        report.found["problems"] = sorted({*report.found["problems"], *old["problems"]})
    report.path = RESULTS / "cuda.json"
    report.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=PARTS, help="a piece of less than ten minutes; default: everything")
    parser.add_argument("--targets", action="store_true", help="the checks, then only the rows that have a target")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of the repository's")
    parser.add_argument("--seconds", type=float, help="begin nothing after so many (--part, --targets: 480)")
    parser.add_argument("--merge", type=Path, nargs="+", help="put the files of several parts together, write the docs")
    parser.add_argument("--keep", type=Path, help="with --merge: an older report, for rows that the parts lack")
    parser.add_argument("--commit", help="of the code, where it lies without its history")
    parser.add_argument("--large", action="store_true", help="CPU: only the shape of a 152k vocabulary")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter; written to --out only")
    parser.add_argument("--op", help="only this op (or: checks); written to --out only")
    parser.add_argument("--rounds", type=int, help="timed rounds per implementation")
    parser.add_argument("--each", type=float, help="seconds an implementation may take at a shape (a GPU: 4)")
    parser.add_argument("--docs", action="store_true", help="write docs/kernels.md from the results on disk")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        child(arguments.one)
        return 0
    if arguments.merge:
        merge(arguments.merge, arguments.keep)
    elif not arguments.docs:
        device = "cuda" if torch.cuda.is_available() and not arguments.dry_run else "cpu"
        name = "dry" if arguments.dry_run else "large" if arguments.large else device
        rounds = arguments.rounds or {"cpu": 5, "large": 3, "cuda": 40, "dry": 1}[name]
        partial = arguments.dry_run or arguments.op or arguments.part or arguments.targets
        folder = arguments.out or (None if partial else RESULTS)
        report = Report(folder and folder / f"{name}.json", describe(device, arguments.commit))
        every = PARTS.get(arguments.part, ("checks", *SHAPES[name]))
        if arguments.targets:
            if name not in ("cuda", "dry"):
                parser.error("--targets are those of a GPU, and there is none: try it with --dry-run")
            every = ("checks", *target_rows(name))
        ops = [arguments.op] if arguments.op else list(every)
        if name in ("cpu", "large") and "checks" in ops:
            ops.remove("checks")  # nothing to check: the kernels do not run here
        seconds = arguments.seconds or (480 if arguments.part or arguments.targets else math.inf)
        run(name, device, rounds, ops, report, seconds, targets=arguments.targets, each=arguments.each)
        for problem in sorted(set(report.found["problems"])):
            print(f"not timed: {problem}")
        for left in report.found["left"]:
            print(f"no time left for {left}: the same command goes on from here")
        for failure in report.found["failures"]:
            print(failure, file=sys.stderr)
        if report.found["failures"] or report.found["left"]:
            return 1
        if folder != RESULTS:
            return 0
    write_docs(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
