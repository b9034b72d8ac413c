"""Shortest paths from random walks, for several seeds: does GRPO learn what imitation cannot?

    python benchmarks/bench_random_walks.py [--seeds 1 2 3]

Runs configs/random_walks/chain.yaml through the command line, once per seed. Results: random_walks.json and
random_walks.png under benchmarks/results/.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_common import HERE, about, chain, metrics, phase_seconds, processor_seconds, targets

from rlhf_lightning.pipelines.files import write_json

CHAIN = "configs/random_walks/chain.yaml"
BLUE, GREY = "#2563eb", "#6b7280"


def measure(seed: int, run_dir: Path) -> dict[str, Any]:
    """Run one seed; what its walks are worth."""
    seconds = chain(CHAIN, run_dir, seed=seed)
    models = json.loads((run_dir / "evaluate" / "evaluation.json").read_text())["models"]
    reached = {name: model["figures"]["optimality"]["mean"] for name, model in models.items()}
    curve = metrics(run_dir / "grpo", "step", "reward/optimality")["reward/optimality"]
    checks = {
        f"optimality after {len(curve)} steps of GRPO": (reached["grpo"], "at least", 0.95),
        "seconds": (seconds, "at most", 60.0),
    }
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds(run_dir), 1),
        "data": json.loads((run_dir / "material" / "finished.json").read_text())["values"]["optimality"],
        "optimality": reached,
        "curve": curve,
        "grpo_seconds": phase_seconds(run_dir / "grpo"),
        "targets": targets(checks),
    }


def draw(seeds: list[dict[str, Any]]) -> Path:
    """Optimality of every rollout."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for seed in seeds:
        axis.plot(seed["curve"], color=BLUE, alpha=0.8)
    for value, name in ((seeds[0]["data"], "the walks imitated"), (0.95, "target")):
        axis.axhline(value, color=GREY, ls=":")
        axis.text(len(seeds[0]["curve"]) - 1, value - 0.08, name, color=GREY, ha="right")
    axis.set(xlabel="step of GRPO", ylabel="optimality of 128 walks", ylim=(0, 1.05))
    axis.spines[["top", "right"]].set_visible(False)
    path = HERE / "results" / "random_walks.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_random_walks"), help="where the runs are kept")
    options = parser.parse_args()
    seeds = [measure(seed, options.runs / f"seed_{seed}") for seed in options.seeds]
    path = write_json(HERE / "results" / "random_walks.json", {"about": about(), "seeds": seeds})
    print(f"wrote {path} and {draw(seeds)}")


if __name__ == "__main__":
    main()
