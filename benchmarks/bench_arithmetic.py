"""Two-digit addition from demonstrations half of them wrong, for several seeds: GRPO, and as many tokens of SFT.

    python benchmarks/bench_arithmetic.py [--seeds 1 2 3]

Runs configs/arithmetic/chain.yaml through the command line, once per seed. Results: arithmetic.json and arithmetic.png
under benchmarks/results/.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_common import HERE, about, chain, metrics, phase_seconds, processor_seconds, stage_seconds, targets

from rlhf_lightning.pipelines.files import read_jsonl, write_json

CHAIN = "configs/arithmetic/chain.yaml"
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"


def correct(folder: Path) -> dict[str, float]:
    """Share of right answers to the sums held out, by model."""
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    return {name: model["figures"]["correct"]["mean"] for name, model in models.items()}


def measure(seed: int, run_dir: Path) -> dict[str, Any]:
    """Run one seed; how often its answers are right."""
    seconds = chain(CHAIN, run_dir, seed=seed)
    sampled, greedy = correct(run_dir / "evaluate"), correct(run_dir / "greedy")
    held_out = metrics(run_dir / "grpo", "step", "val/reward_correct")
    # `step` names the step before the evaluation, counted from 0
    curve = {round(step) + 1: value for step, value in zip(*held_out.values(), strict=True)}
    rollouts = metrics(run_dir / "grpo", "step", "reward/correct", "rollout/tokens")
    demonstrated = sum(len(r["completion"]) + 1 for r in read_jsonl(run_dir / "material" / "more.jsonl"))
    checks = {
        "accuracy after 100 steps of GRPO": (curve[100], "at least", 0.70),
        "accuracy after 200 steps of GRPO": (curve[200], "at least", 0.80),
        "GRPO above SFT on as many tokens": (sampled["grpo"] - sampled["control"], "at least", 0.0),
        "seconds": (seconds, "at most", 180.0),
    }
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds(run_dir), 1),
        "stage_seconds": {n: round(stage_seconds(run_dir / n), 1) for n in ("sft", "grpo", "control")},
        "grpo_seconds": phase_seconds(run_dir / "grpo"),
        "answer_tokens": {"grpo": round(sum(rollouts["rollout/tokens"])), "control": demonstrated},
        "sampled": sampled,
        "greedy": greedy,
        "curve": {0: sampled["sft"], **curve},
        "rollouts": rollouts["reward/correct"],
        "targets": targets(checks),
    }


def draw(seeds: list[dict[str, Any]]) -> Path:
    """Accuracy on the sums held out, as GRPO goes on, and where SFT ends."""
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for seed in seeds:
        axis.plot(list(seed["curve"]), list(seed["curve"].values()), color=BLUE, marker=".")
        last = max(seed["curve"])
        axis.plot([0, last], [seed["sampled"]["sft"], seed["sampled"]["control"]], color=RED, marker=".", ls="--")
    axis.plot([], [], color=BLUE, marker=".", label="GRPO")
    axis.plot([], [], color=RED, marker=".", ls="--", label="SFT on as many tokens")
    axis.plot([100, 200], [0.7, 0.8], color=GREY, marker="_", ms=14, ls="", label="targets")
    axis.axhline(0.5, color=GREY, ls=":")
    axis.text(200, 0.465, "the demonstrations", color=GREY, ha="right")
    axis.set(xlabel="step", ylabel="right answers, sampled", ylim=(0.2, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc=(0.5, 0.36))
    path = HERE / "results" / "arithmetic.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_arithmetic"), help="where the runs are kept")
    options = parser.parse_args()
    seeds = [measure(seed, options.runs / f"seed_{seed}") for seed in options.seeds]
    path = write_json(HERE / "results" / "arithmetic.json", {"about": about(), "seeds": seeds})
    print(f"wrote {path} and {draw(seeds)}")


if __name__ == "__main__":
    main()
