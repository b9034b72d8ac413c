"""What the end-to-end benchmarks share: running chains, reading their metrics, figures beside their targets."""

import csv
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.pipelines.files import write_json

HERE = Path(__file__).parent


def about() -> dict[str, Any]:
    """What the figures were measured with."""
    commit = ""
    if shutil.which("git"):  # a machine that is lent a copy of the files may have none
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
        commit = asked.stdout.strip()
    return {
        "commit": commit,
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")}
        | {"python": platform.python_version()},
    }


def chain(config: str, run_dir: Path, **settings: Any) -> float:
    """Run a chain and give its seconds; a finished one is not run again and gives the seconds it took."""
    command = [sys.executable, "-m", "rlhf_lightning", "chain", "--config", config, "--set", f"run_dir={run_dir}"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    print(" ".join(command), flush=True)
    took = run_dir / "seconds.json"
    began, worked = time.perf_counter(), _processor_seconds()
    subprocess.run(command, check=True)
    if not took.is_file():
        wall, processor = time.perf_counter() - began, _processor_seconds() - worked
        write_json(took, {"seconds": wall, "processor_seconds": processor})
    return json.loads(took.read_text())["seconds"]


def _processor_seconds() -> float:
    """Of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor_seconds(run_dir: Path) -> float:
    """What `chain` took of the processor, which other work on the machine hardly lengthens."""
    return json.loads((run_dir / "seconds.json").read_text())["processor_seconds"]


def stage_seconds(folder: Path) -> float:
    """What a stage of a chain took."""
    return json.loads((folder / "finished.json").read_text())["seconds"]


def phase_seconds(folder: Path) -> dict[str, float]:
    """Where the time of an on-policy stage went: the phases of its rollouts, and all else, which is mostly training."""
    names = ("generate", "score", "measure")
    found = metrics(folder, "step", *(f"time/{name}_s" for name in (*names, "rollout")))
    spent = {name: sum(found[f"time/{name}_s"]) for name in names}
    rollouts = sum(found["time/rollout_s"])
    rest = {"rest of the rollouts": rollouts - sum(spent.values()), "all else": stage_seconds(folder) - rollouts}
    return {name: round(seconds, 2) for name, seconds in (spent | rest).items()}


def metrics(folder: Path, *columns: str) -> dict[str, list[float]]:
    """Columns of a run's metrics.csv, the rows in which all of them stand; repeats of a rollout once."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    kept = [tuple(float(row[c]) for c in columns) for row in rows if all(row.get(c) not in (None, "") for c in columns)]
    once = list(dict.fromkeys(kept))
    return {name: [row[i] for row in once] for i, name in enumerate(columns)}


def targets(checks: dict[str, tuple[float, str, float]]) -> dict[str, Any]:
    """Each figure beside its target, met or not."""
    met = {"at least": lambda value, target: value >= target, "at most": lambda value, target: value <= target}
    return {
        name: {"value": round(value, 4), "target": f"{how} {target}", "met": bool(met[how](value, target))}
        for name, (value, how, target) in checks.items()
    }
