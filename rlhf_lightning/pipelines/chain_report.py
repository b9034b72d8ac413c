"""What a chain shows: the figures of each stage and a table at the end."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class StageResult:
    """What became of a stage."""

    name: str
    what: str
    state: str
    """ran, resumed, skipped, failed or not reached."""
    seconds: float
    values: Mapping[str, Any]
    """Figures and paths that the stage gave back."""


def last_metrics(path: Path, prefixes: Sequence[str] = ("val/", "rollout/score", "rollout/kl")) -> dict[str, float]:
    """The last value of each metric of a metrics.csv that sums a stage up."""
    found: dict[str, float] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found |= {k: float(v) for k, v in row.items() if v and k and k.startswith(tuple(prefixes))}
    return found


def show_summary(results: Sequence[StageResult]) -> None:
    """A table of the stages: what became of each, its time, its figures."""
    console = Console(width=None if Console().is_terminal else 110)
    table = Table("stage", "state", "time", "figures", title="chain")
    for result in results:
        figures = [f"{name} {value:.4g}" for name, value in result.values.items() if isinstance(value, int | float)]
        more = f" (+{len(figures) - 6})" if len(figures) > 6 else ""
        table.add_row(result.name, result.state, readable_time(result.seconds), "  ".join(figures[:6]) + more)
    ran = sum(result.seconds for result in results if result.state != "skipped")
    table.add_section()
    table.add_row("all", "", readable_time(ran), "")
    console.print(table)


def readable_time(seconds: float) -> str:
    """3.2 s, or 4 min 10 s."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
