"""The quickstart, for several seeds: does it keep what it promises?

    python benchmarks/bench_quickstart.py [--seeds 1 2 3]

Runs configs/quickstart/chain.yaml through the command line, once per seed. Results: benchmarks/results/quickstart.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from bench_common import HERE, about, chain, targets

from rlhf_lightning.pipelines.files import write_json

CHAIN = "configs/quickstart/chain.yaml"


def kl_target() -> float:
    """What the KL controller of the PPO stage steers to."""
    config = yaml.safe_load((HERE.parent / "configs/quickstart/ppo.yaml").read_text())
    return float(config["model"]["init_args"]["kl"]["control"]["init_args"]["target"])


def measure(seed: int, run_dir: Path) -> dict[str, Any]:
    """Run one seed and read what its evaluation found."""
    seconds = chain(CHAIN, run_dir, seed=seed)
    (evaluation,) = run_dir.glob("*/evaluation.json")
    models = json.loads(evaluation.read_text())["models"]
    figures = {name: {k: (v["mean"], v["std"]) for k, v in m["figures"].items()} for name, m in models.items()}
    sft, ppo = figures["sft"], figures["ppo"]
    rise = (ppo["gold"][0] - sft["gold"][0]) / sft["gold"][1]
    checks = {
        "rise of gold, in standard deviations of SFT": (rise, "at least", 1.0),
        "share of grammatical reviews after PPO": (ppo["grammatical"][0], "at least", 0.95),
        "sequence KL to SFT after PPO": (ppo["kl"][0], "at most", kl_target()),
        "seconds": (seconds, "at most", 300.0),
    }
    return {"seed": seed, "seconds": round(seconds, 1), "figures": figures, "targets": targets(checks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_quickstart"), help="where the runs are kept")
    options = parser.parse_args()
    seeds = [measure(seed, options.runs / f"seed_{seed}") for seed in options.seeds]
    path = write_json(HERE / "results" / "quickstart.json", {"about": about(), "seeds": seeds})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
