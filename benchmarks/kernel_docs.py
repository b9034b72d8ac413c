"""docs/kernels.md: the page about the kernels, with tables and a plot made from the results on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = Path(__file__).parent / "kernel_docs_head.md"


def _number(x: float | None, digits: int = 1) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def _timing_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| op | shape | implementation | forward ms | backward ms | both ms | GB/s | TFLOP/s | forward | of ceiling "
        "| peak MB | error | commit |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        share = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
        cells = [
            row["op"], " x ".join(map(str, row["shape"])), row["implementation"], _number(row["forward_ms"]),
            _number(row["backward_ms"]), _number(row["both_ms"]), _number(row["gigabytes_per_s"]),
            _number(row["teraflops"], 2), _number(row.get("forward_teraflops"), 2), share, _number(row["peak_mb"], 0),
            error, row.get("commit", ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


MINE = "rlhf_kernels (Triton)"
FUSED = "rlhf_kernels (fused)"
ROUNDED = "rlhf_kernels (fused, rounded sums)"
REFERENCE = "rlhf_kernels (reference)"
VERL = "512 rows at a time (verl's way)"
HEAD_SHAPE, LONG = (4096, 4096, 128256), (16384, 151936)
CPU_SHAPE = (2048, 896, 151936)


@dataclass(frozen=True)
class Target:
    """A figure that was set beforehand."""

    report: str
    op: str
    shape: tuple[int, ...]
    figure: str
    """forward_ms, both_ms, peak_mb or error."""
    bound: float
    """Largest value; of a ratio, the smallest."""
    implementation: str = MINE
    over: str = ""
    """A peer: then the figure is the peer's divided by ours."""

    @property
    def words(self) -> str:
        what = {"forward_ms": "ms forward", "both_ms": "ms", "peak_mb": "MB above the inputs"}.get(self.figure, "error")
        if self.over:
            return f"{what.replace('ms', 'time')} of {self.over} / ours: at least {self.bound:g}"
        return f"{what}: at most {self.bound:g}"

    def value(self, rows: list[dict[str, Any]]) -> float | None:
        """As measured, or None."""
        here = {r["implementation"]: r for r in rows if r["op"] == self.op and tuple(r["shape"]) == self.shape}
        mine, peer = here.get(self.implementation), here.get(self.over)
        if mine is None or (self.over and peer is None):
            return None
        return peer[self.figure] / mine[self.figure] if peer else mine[self.figure]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.over else value <= self.bound


TARGETS = (
    Target("large", "linear_token_logprobs", CPU_SHAPE, "peak_mb", 1200, REFERENCE),
    Target("large", "linear_token_logprobs", CPU_SHAPE, "both_ms", 1.0, REFERENCE, "torch"),
    Target("cuda", "token_logprobs", (8192, 151936), "forward_ms", 0.63),
    Target("cuda", "linear_token_logprobs", HEAD_SHAPE, "forward_ms", 6.7, FUSED),
    Target("cuda", "linear_token_logprobs", HEAD_SHAPE, "forward_ms", 1.5, FUSED, VERL),
    Target("cuda", "linear_token_logprobs", HEAD_SHAPE, "error", 1e-5, ROUNDED),
    Target("cuda", "policy_loss", LONG, "both_ms", 2.7),
    Target("cuda", "policy_loss", LONG, "both_ms", 1.3, over="Liger triton_grpo_loss"),
    Target("cuda", "policy_loss", LONG, "both_ms", 1.3, over="TRL log-prob kernel, torch loss"),
    Target("cuda", "linear_policy_loss", HEAD_SHAPE, "both_ms", 17.6),
    Target("cuda", "linear_policy_loss", HEAD_SHAPE, "both_ms", 8.0, over="Liger fused linear GRPO"),
    Target("cuda", "linear_policy_loss", HEAD_SHAPE, "both_ms", 1.9, over=VERL),
    Target("cuda", "linear_policy_loss", HEAD_SHAPE, "error", 1e-5, ROUNDED),
    Target("cuda", "gae", (512, 8192), "forward_ms", 0.030),
    Target("cuda", "gae", (512, 32768), "forward_ms", 0.110),
    Target("cuda", "gae", (64, 32768), "forward_ms", 0.025),
    Target("cuda", "gae", (512, 32768), "forward_ms", 10_000, over="Python loop over tokens"),
)
"""Those of a GPU were set for one H200."""


def _target_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| op | implementation | shape | on | target | measured | met |", "|---|---|---|---|---|---:|---|"]
    for target in TARGETS:
        report = reports.get(target.report)
        value = None if report is None else target.value(report["rows"])
        found = ["not measured", ""] if value is None else [f"{value:.3g}", "yes" if target.met(value) else "no"]
        if value is not None and value >= 100:
            found[0] = f"{value:.0f}"
        device = "H200" if target.report == "cuda" else "CPU"
        if value is not None and report is not None and device != "CPU":
            device = report["device"]
        shape = " x ".join(map(str, target.shape))
        lines.append(f"| {' | '.join([target.op, target.implementation, shape, device, target.words, *found])} |")
    return lines


def _compile_table(folder: Path) -> list[str]:
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("sm_*.json"))}
    if not reports:
        return ["Not compiled yet: `python benchmarks/bench_compile.py`."]
    names = sorted(reports, key=lambda name: int(name[3:]))
    kernels = list(dict.fromkeys(row["kernel"] for report in reports.values() for row in report["kernels"]))
    version = next(iter(reports.values()))["triton"]
    lines = [
        f"triton {version}; largest over the shipped configurations; registers per thread / shared bytes.",
        "",
        f"| kernel | configurations | {' | '.join(names)} | spilled instructions |",
        f"|---|---:|{'---:|' * len(names)}---:|",
    ]
    for kernel in kernels:
        rows = {name: [row for row in reports[name]["kernels"] if row["kernel"] == kernel] for name in names}
        most = [[max((r[what] for r in rows[n]), default=0) for what in ("registers", "shared_bytes")] for n in names]
        cells = [f"{registers} / {shared}" if registers else "not for it" for registers, shared in most]
        spills = sum(r["spill_stores"] + r["spill_loads"] for n in names for r in rows[n])
        lines.append(f"| `{kernel}` | {max(map(len, rows.values()))} | {' | '.join(cells)} | {spills} |")
    return lines


def _ceilings(report: dict[str, Any]) -> str:
    top = report.get("ceilings")
    if not top:
        return ""
    copy, product = top["copy_gb_s"], top["matmul_tflop_s"]
    return f" In the same process a copy moved {copy:.0f} GB/s, and a bfloat16 product made {product:.0f} TFLOP/s."


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same picture is the same file
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["op"], tuple(row["shape"])) for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.55 * len(groups) + 1.5), sharey=True)
    labels = [f"{op}\n{' x '.join(map(str, shape))}" for op, shape in groups]
    for axis, key, title in (
        (axes[0], "both_ms", "time, ours / torch"),
        (axes[1], "peak_mb", "peak memory, ours / torch"),
    ):
        for y, group in enumerate(groups):
            some = {r["implementation"]: r for r in rows if (r["op"], tuple(r["shape"])) == group}
            mine = some.get("rlhf_kernels (Triton)") or some.get("rlhf_kernels (reference)")
            plain = some.get("torch") or some.get("Python loop over tokens")
            if mine and plain:
                top, bottom = (r[key] if r[key] is not None else r["forward_ms"] for r in (mine, plain))
                axis.barh(y, top / max(bottom, 1e-9), color="tab:blue")
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=title, yticks=range(len(groups)), yticklabels=labels)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_docs(root: Path) -> None:
    """Write docs/kernels.md, and a plot per device measured."""
    results, docs = root / "benchmarks" / "results", root / "docs"
    lines = [HEAD.read_text().rstrip(), "", "## What the kernels compile to", "", *_compile_table(results / "compile")]
    lines += ["", "## Measured", ""]
    reports = {path.stem: json.loads(path.read_text()) for path in sorted((results / "kernels").glob("*.json"))}
    lines += ["Targets were set before anything was measured; those of the GPU are for one H200.", ""]
    lines += [*_target_table(reports), ""]
    if "cuda" not in reports:
        lines += [
            "On a GPU: not measured yet. Where there is one, `python benchmarks/bench_kernels.py` fills this in, "
            "in one go or in three pieces of less than ten minutes; with `--targets`, the checks and these rows first.",
            "",
        ]
    for name, report in reports.items():
        about = ", ".join(f"{key} {report[key]}" for key in ("device", "torch", "triton", "commit") if report.get(key))
        lines += [
            f"### {name}",
            "",
            f"{about}. {report.get('time', 'wall time')}.{_ceilings(report)}",
            "",
            *_timing_table(report["rows"]),
            "",
        ]
        if report.get("checks"):
            lines += ["| check | holds | largest error | seconds |", "|---|---|---:|---:|"]
            for check in report["checks"]:
                error = "" if check["error"] is None else f"{check['error']:.0e}"
                lines.append(f"| {check['what']} | {check['outcome']} | {error} | {check['seconds']} |")
            lines.append("")
        if report["problems"]:
            lines += ["Not timed:", "", *(f"- {problem}" for problem in report["problems"]), ""]
        if name != "large":
            _plot(report["rows"], docs / f"kernels_{name}.svg")
            lines += [f"![ours against torch]({f'kernels_{name}.svg'})", ""]
    (docs / "kernels.md").write_text("\n".join(lines).rstrip() + "\n")
