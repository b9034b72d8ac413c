"""docs/kernels.md: the page about the kernels, with tables and a plot made from the results on disk."""

import json
from pathlib import Path
from typing import Any

HEAD = Path(__file__).parent / "kernel_docs_head.md"


def _number(x: float | None, digits: int = 1) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def _timing_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| op | shape | implementation | forward ms | backward ms | both ms | GB/s | TFLOP/s | of ceiling | peak MB "
        "| error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
        cells = [
            row["op"], " x ".join(map(str, row["shape"])), row["implementation"], _number(row["forward_ms"]),
            _number(row["backward_ms"]), _number(row["both_ms"]), _number(row["gigabytes_per_s"]),
            _number(row["teraflops"], 2), share, _number(row["peak_mb"], 0), f"{row['error']:.0e}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
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
        cells = [f"{max(r['registers'] for r in rows[n])} / {max(r['shared_bytes'] for r in rows[n])}" for n in names]
        spills = sum(r["spill_stores"] + r["spill_loads"] for n in names for r in rows[n])
        lines.append(f"| `{kernel}` | {len(rows[names[0]])} | {' | '.join(cells)} | {spills} |")
    return lines


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
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
    if "cuda" not in reports:
        lines += [
            "On a GPU: not measured yet. Where there is one, `python benchmarks/bench_kernels.py` fills this in.",
            "",
        ]
    for name, report in reports.items():
        about = ", ".join(f"{key} {report[key]}" for key in ("device", "torch", "triton", "commit") if report.get(key))
        lines += [
            f"### {name}",
            "",
            f"{about}. {report.get('time', 'wall time')}.",
            "",
            *_timing_table(report["rows"]),
            "",
        ]
        lines += [f"Not timed: {problem}" for problem in report["problems"]]
        if name != "large":
            _plot(report["rows"], docs / f"kernels_{name}.svg")
            lines += [f"![ours against torch]({f'kernels_{name}.svg'})", ""]
    (docs / "kernels.md").write_text("\n".join(lines).rstrip() + "\n")
