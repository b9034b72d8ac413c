"""Alignment of a real pretrained model on real text, end to end, from the shipped YAML: figures, targets, pictures.

    python benchmarks/bench_sentiment_chain.py --data PATH [--seeds 1 2 3] [--parts chain frontier overoptimisation hh]

PATH holds models/stories260k (a pretrained 260k-parameter storyteller) and data/hh-rlhf. Every stage runs through the
command line, in one process per chain. Results: benchmarks/results/sentiment/{chain,frontier,overoptimisation,hh}.json
and the PNGs beside them.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_common import about, chain, metrics, targets
from frontier import frontier_at, oracle

from rlhf_lightning.pipelines.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sentiment"
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"


def run_chain(model: Path, runs: Path, seeds: list[int]) -> dict[str, Any]:
    results = []
    for seed in seeds:
        folder = runs / f"chain_{seed}"
        seconds = chain("configs/sentiment/chain.yaml", folder, model=model, seed=seed)
        evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())["models"]
        figures = {name: {k: v["mean"] for k, v in m["figures"].items()} for name, m in evaluation.items()}
        accuracy = metrics(folder / "reward", "val/accuracy", "val/ece")
        results.append(
            {
                "seed": seed,
                "seconds": round(seconds, 1),
                "reward_accuracy": accuracy["val/accuracy"][-1],
                "reward_ece": accuracy["val/ece"][-1],
                "figures": figures,
                "targets": targets(
                    {
                        "SFT gold": (figures["sft"]["gold"], "at least", 0.65),
                        "reward model, held-out accuracy": (accuracy["val/accuracy"][-1], "at least", 0.75),
                        "PPO gold": (figures["ppo"]["gold"], "at least", 0.85),
                        "PPO sequence KL to SFT": (figures["ppo"]["kl"], "at most", 8),
                        "seconds": (seconds, "at most", 600),
                    }
                ),
            }
        )
    draw_chain(runs, seeds)
    return {"seeds": results}


def draw_chain(runs: Path, seeds: list[int]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    columns = {"reward/gold": "gold score", "rollout/score": "reward model", "rollout/kl": "KL to SFT (nats)"}
    for seed in seeds:
        series = metrics(runs / f"chain_{seed}" / "ppo", "step", *columns)
        once: dict[tuple[float, ...], None] = dict.fromkeys(zip(*(series[c] for c in columns), strict=True))
        for axis, values in zip(axes, zip(*once, strict=True), strict=True):
            axis.plot(values, color=BLUE, alpha=0.8)
    for axis, title in zip(axes, columns.values(), strict=True):
        axis.set(title=title, xlabel="rollout")
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axhline(5, color=GREY, ls=":")
    axes[2].text(0, 5.1, "target", color=GREY)
    figure.suptitle(f"PPO on a learnt reward, {len(seeds)} seeds", fontsize=11)
    figure.savefig(RESULTS / "chain.png", dpi=130)
    plt.close(figure)


def run_frontier(model: Path, runs: Path, seeds: list[int]) -> dict[str, Any]:
    results = []
    curve: list[dict[str, float]] = []
    for seed in seeds:
        folder = runs / f"frontier_{seed}"
        seconds = chain("configs/sentiment/frontier.yaml", folder, model=model, seed=seed)
        curve = curve or oracle(model, folder / "prompts" / "val.jsonl")
        evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())["models"]
        for name, measured in evaluation.items():
            if name == "base":
                continue
            gold, kl = measured["figures"]["gold"]["mean"], measured["figures"]["kl"]["mean"]
            bound = frontier_at(curve, kl)
            results.append(
                {"seed": seed, "run": name, "gold": gold, "kl": kl, "oracle_gold": bound, "below": gold <= bound}
            )
        print(f"seed {seed}: {seconds:.0f} s", flush=True)
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    axis.plot([p["kl"] for p in curve], [p["gold"] for p in curve], color=GREY, marker=".", label="oracle")
    axis.scatter([r["kl"] for r in results], [r["gold"] for r in results], color=BLUE, label="PPO on gold", zorder=3)
    axis.set(xlabel="KL to the pretrained model (nats per answer)", ylabel="gold score", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "frontier.png", dpi=130)
    plt.close(figure)
    return {"oracle": curve, "points": results, "all_below": all(r["below"] for r in results)}


def run_overoptimisation(model: Path, runs: Path, seeds: list[int]) -> dict[str, Any]:
    results, drawn = [], []
    for seed in seeds:
        folder = runs / f"overoptimisation_{seed}"
        seconds = chain("configs/sentiment/overoptimisation.yaml", folder, model=model, seed=seed)
        series = metrics(folder / "ppo", "reward/gold", "rollout/score", "rollout/kl")
        gold, proxy, kl = series["reward/gold"], series["rollout/score"], series["rollout/kl"]
        drawn.append((gold, proxy, kl))
        peak = max(range(len(gold)), key=gold.__getitem__)
        results.append(
            {
                "seed": seed,
                "seconds": round(seconds, 1),
                "gold": {"first": gold[0], "peak": gold[peak], "last": gold[-1], "peak_rollout": peak},
                "proxy": {"first": proxy[0], "at_peak_of_gold": proxy[peak], "last": proxy[-1]},
                "kl": {"at_peak_of_gold": kl[peak], "last": kl[-1]},
                "gold_rises_then_falls_below_its_start": gold[peak] > gold[0] > gold[-1],
                "proxy_climbs": proxy[0] < proxy[peak] < proxy[-1],
            }
        )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for gold, proxy, kl in drawn:
        distance = [math.sqrt(max(value, 0)) for value in kl]
        axes[0].plot(distance, gold, color=BLUE, alpha=0.8)
        axes[0].plot(distance, [value / 5 for value in proxy], color=RED, alpha=0.8)
        axes[1].plot(gold, color=BLUE, alpha=0.8)
        axes[1].plot([value / 5 for value in proxy], color=RED, alpha=0.8)
    axes[0].set(xlabel="√KL to the pretrained model", title="against distance")
    axes[1].set(xlabel="rollout", title="against time")
    for axis in axes:
        axis.axhline(drawn[0][0][0], color=GREY, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].plot([], [], color=BLUE, label="gold")
    axes[0].plot([], [], color=RED, label="proxy / 5")
    axes[0].legend(frameon=False)
    figure.suptitle("PPO without KL: the proxy climbs, the gold score turns", fontsize=11)
    figure.savefig(RESULTS / "overoptimisation.png", dpi=130)
    plt.close(figure)
    return {"seeds": results}


def run_hh(model: Path, data: Path, runs: Path) -> dict[str, Any]:
    records = data / "data" / "hh-rlhf" / "train.jsonl"
    if not records.is_file():
        return {"skipped": f"there is no {records.name} under the data folder"}
    folder = runs / "hh"
    command = [sys.executable, "-m", "rlhf_lightning", "fit", "--config", "configs/reward_hh.yaml"]
    command += [f"--trainer.default_root_dir={folder}", f"--model.model.path={model}", f"--data.train={records}"]
    began = time.perf_counter()
    subprocess.run([*command, "--overwrite=true"], check=True)
    measured = metrics(folder, "val/accuracy", "val/loss", "val/ece", "val/margin")
    report = json.loads((folder / "data_report.json").read_text())
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "held_out": {name: values[-1] for name, values in measured.items()},
        "data_report": report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/stories260k and data/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parts", nargs="+", default=["chain", "frontier", "overoptimisation", "hh"])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_sentiment"), help="where the runs are kept")
    options = parser.parse_args()
    model = (options.data / "models" / "stories260k").resolve()
    if not model.is_dir():
        sys.exit(f"skipped: there is no {model}; give --data a folder that holds models/stories260k")
    RESULTS.mkdir(parents=True, exist_ok=True)
    parts = {
        "chain": lambda: run_chain(model, options.runs, options.seeds),
        "frontier": lambda: run_frontier(model, options.runs, options.seeds),
        "overoptimisation": lambda: run_overoptimisation(model, options.runs, options.seeds[:1]),
        "hh": lambda: run_hh(model, options.data, options.runs),
    }
    for part in options.parts:
        result = {"about": about(), **parts[part]()}
        # where the model lies on this machine is nobody's business
        text = json.dumps(result).replace(str(model), "models/stories260k").replace(str(options.data.resolve()), "DATA")
        write_json(RESULTS / f"{part}.json", json.loads(text))
        print(f"wrote {RESULTS / part}.json", flush=True)


if __name__ == "__main__":
    main()
