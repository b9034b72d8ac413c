"""Our GRPO, RLOO, PPO and DPO beside TRL's GRPO, RLOO and DPO: reward against KL, tokens per second, memory.

    python benchmarks/bench_sentiment_frontier.py --data PATH [--seeds 1 2 3] [--more-seeds 4 5 6 7] [--runs FOLDER]
                                                  [--grpo-seeds 8 9 10]

PATH holds models/stories260k, a pretrained 260k-parameter storyteller. The gold score is the VADER sentiment of the
answer, and it is what the online methods are rewarded with; DPO learns from 4096 pairs. Both libraries start from the
same weights and take the same prompts (pairs), seeds, optimiser, learning rates and numbers of steps, one process per
run, ours and TRL's in turn; all policies are evaluated by the same code. Each library shuffles and samples with its own
generator, so a seed names neither one order of the pairs nor the same answers: what both have is run with more seeds,
of which only the distance from the oracle is kept (GRPO with the most), and DPO once more with the pairs in one order
for both. A run that is on disk is not run again. Results: benchmarks/results/sentiment/family.json and family.png.

`--speed grpo rloo` runs those alone, with no evaluation, and compares processor seconds from the first step to the
last: results/sentiment/speed.json, or speed_dpo.json of `--speed dpo dpo_share_prompts`. The second is DPO with each
pair's prompt computed once on our side; TRL has no such option and runs as in `dpo`. With `--prompt-tokens 127` prompts
are longer than these 15 tokens, and longer than the answers: speed_long_prompts.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_common import about
from frontier import frontier_at, oracle

from rlhf_lightning.pipelines.evaluate import EVALUATION_FILE, EvaluatePolicies
from rlhf_lightning.pipelines.files import read_jsonl, write_json
from rlhf_lightning.pipelines.label_pairs import LabelPairs
from rlhf_lightning.pipelines.sampling import SamplePrompts
from rlhf_lightning.rewards.sentiment import VaderSentiment
from rlhf_lightning.rollout.spec import GenerationSpec

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sentiment"
PROMPTS, GROUP, ANSWER, ROLLOUTS = 16, 8, 32, 60
PROMPT_TOKENS = 15
PAIRS, PAIRS_PER_STEP = 4096, 32
IN_FILE_ORDER, SHARED = "dpo_in_file_order", "dpo_share_prompts"
LR = {"grpo": 5e-4, "rloo": 5e-4, "ppo": 5e-4, "dpo": 1e-4, IN_FILE_ORDER: 1e-4, SHARED: 1e-4}
COEF = {"grpo": 0.5, "rloo": 0.1, "ppo": 0.1, "dpo": 0.3, IN_FILE_ORDER: 0.3, SHARED: 0.3}
RUNS = [("ours", "grpo"), ("trl", "grpo"), ("ours", "rloo"), ("trl", "rloo"), ("ours", "dpo"), ("trl", "dpo")]
RUNS += [("ours", "ppo")]
COMPARED = [run for run in RUNS if run[1] != "ppo"]
GRPO = [run for run in RUNS if run[1] == "grpo"]
COLOURS = {"ours": "#2563eb", "trl": "#dc2626"}
MARKERS = {"grpo": "o", "rloo": "s", "ppo": "^", "dpo": "D"}


# ---- one run, in a process of its own --------------------------------------------------------------------------------


def peak_mb() -> float:
    """The most memory that this program has held; `ru_maxrss` starts from that of the process which started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(float(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Took:
    """What a run cost from `begin` on: wall and processor seconds, memory before and at its peak, tokens.

    Training alone: TRL encodes its records when its trainer is made, we do when ours begins.
    """

    def begin(self) -> None:
        self.before = peak_mb()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def figures(self, tokens: float) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"seconds": wall, "cpu_seconds": cpu, "tokens": tokens, "peak_mb": peak_mb(), "before_mb": self.before}


def ours(algorithm: str, model: str, data: Path, out: Path, seed: int) -> dict[str, float]:
    import lightning as L
    import torch

    from rlhf_lightning import ModelSpec, RLHFDataModule
    from rlhf_lightning.advantages import FixedKL, GroupNormalised, LeaveOneOut
    from rlhf_lightning.losses import DPO, Reinforce
    from rlhf_lightning.rewards import WeightedReward
    from rlhf_lightning.rollout.loader import UpdateSpec
    from rlhf_lightning.stages import DPOModule, GRPOModule, PPOModule
    from rlhf_lightning.stages.critic import CriticSpec
    from rlhf_lightning.stages.reward_shaping import KLSpec
    from rlhf_lightning.stages.schedule import Schedule

    common: dict[str, Any] = {
        "policy": ModelSpec(path=model),
        "optimizer": lambda params: torch.optim.AdamW(
            params,
            lr=LR[algorithm],
            weight_decay=0.0,
            fused=True,  # as transformers' Trainer has it
        ),
        "schedule": Schedule("linear"),
        "seed": seed,
    }
    on_policy: dict[str, Any] = {
        "rewards": [WeightedReward(VaderSentiment(), name="gold")],
        "generation": GenerationSpec(max_new_tokens=ANSWER, num_samples=GROUP, keep_logprobs=algorithm != "ppo"),
        "updates": UpdateSpec(inner_epochs=1),
    }
    coef = COEF[algorithm]
    in_reward = KLSpec(FixedKL(coef))
    # the weight is TRL's use_bias_correction_kl, on by default there too: without it k3 has another gradient
    in_loss = KLSpec(FixedKL(0.0), loss_coef=coef, loss_estimator="k3", loss_importance_weighted=True)
    module: L.LightningModule
    if algorithm in ("grpo", "rloo"):
        on_policy["old_logprobs"] = "sampler"  # one step per rollout: TRL does not measure its sampler either
    if algorithm == "grpo":
        module = GRPOModule(**common, **on_policy, credit=GroupNormalised(floor=1e-4), kl=in_loss)
    elif algorithm == "rloo":
        module = GRPOModule(
            **common, **on_policy, credit=LeaveOneOut(), loss=Reinforce(), kl=in_reward, reduction="length_weighted"
        )
    elif algorithm == "ppo":
        module = PPOModule(**common, **on_policy, kl=in_reward, critic=CriticSpec(learning_rate=1e-3))
    else:
        module = DPOModule(**common, loss=DPO(beta=coef), share_prompts=algorithm == SHARED)
    online = not algorithm.startswith("dpo")
    seen: list[float] = []
    took = Took()

    class Count(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            took.begin()

        def on_rollout_end(self, trainer: Any, module: Any, rollouts: Any) -> None:
            seen.append(float(rollouts.mask.sum()))

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if not online:
                seen.append(float(batch.chosen.attention_mask.sum() + batch.rejected.attention_mask.sum()))

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        max_steps=ROLLOUTS if online else -1,
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=out,
        callbacks=[Count()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = data / ("prompts.jsonl" if online else "pairs.jsonl")
    datamodule = RLHFDataModule(
        train=str(train), batch_size=PROMPTS if online else PAIRS_PER_STEP, shuffle=algorithm != IN_FILE_ORDER
    )
    trainer.fit(module, datamodule=datamodule)
    figures = took.figures(sum(seen))
    module.export(out / "hf")
    return figures


def trl(algorithm: str, model: str, data: Path, out: Path, seed: int) -> dict[str, float]:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from rlhf_lightning.core.interfaces import Sample

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    common: dict[str, Any] = {
        "output_dir": str(out / "trainer"),
        "learning_rate": LR[algorithm],
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": seed,
        "beta": COEF[algorithm],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    judge = VaderSentiment()
    tokens: list[float] = []

    def gold(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(float(sum(map(len, completion_ids))))
        return list(judge([Sample(p, c) for p, c in zip(prompts, completions, strict=True)]))

    took = Took()

    class Begin(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            took.begin()

    class CountPairs(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "num_tokens" in (logs or {}):
                tokens[:] = [float(logs["num_tokens"])]

    trainer: Any
    if algorithm.startswith("dpo"):
        rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in read_jsonl(data / "pairs.jsonl")]
        arguments = trl.DPOConfig(
            **common, per_device_train_batch_size=PAIRS_PER_STEP, num_train_epochs=1, max_length=512
        )
        dataset = Dataset.from_list(rows)

        class InFileOrder(trl.DPOTrainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(dataset)

        kind = InFileOrder if algorithm == IN_FILE_ORDER else trl.DPOTrainer
        trainer = kind(
            policy, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[CountPairs()]
        )
    else:
        dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in read_jsonl(data / "prompts.jsonl")])
        online: dict[str, Any] = {
            "per_device_train_batch_size": PROMPTS * GROUP,
            "num_generations": GROUP,
            "max_completion_length": ANSWER,
            "temperature": 1.0,
            "max_steps": ROLLOUTS,
        }
        if algorithm == "grpo":
            arguments = trl.GRPOConfig(**common, **online, loss_type="grpo", scale_rewards="group")
            trainer = trl.GRPOTrainer(policy, gold, arguments, dataset, processing_class=tokenizer)
        else:
            arguments = trl.RLOOConfig(**common, **online)
            trainer = trl.RLOOTrainer(policy, gold, arguments, dataset, processing_class=tokenizer)
    trainer.add_callback(Begin())
    trainer.train()
    figures = took.figures(sum(tokens))
    trainer.model.save_pretrained(out / "hf")
    tokenizer.save_pretrained(out / "hf")
    return figures


WORKERS: dict[str, Callable[..., dict[str, float]]] = {"ours": ours, "trl": trl}


# ---- all runs --------------------------------------------------------------------------------------------------------


def prepare(model: Path, folder: Path, seed: int, prompt_tokens: int = PROMPT_TOKENS) -> None:
    if (folder / "pairs.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    prompts, held_out = str(folder / "prompts.jsonl"), str(folder / "held_out.jsonl")
    SamplePrompts(str(model), prompts, 2048, held_out, 512, num_tokens=prompt_tokens, seed=seed).run()
    generation = GenerationSpec(max_new_tokens=ANSWER, num_samples=2)
    LabelPairs(
        str(model), prompts, VaderSentiment(), str(folder / "pairs.jsonl"), PAIRS, generation=generation, seed=seed
    ).run()


def evaluate(model: Path, folder: Path, runs: dict[str, Path], seed: int) -> dict[str, dict[str, Any]]:
    done = folder / EVALUATION_FILE
    if not done.is_file():
        EvaluatePolicies(
            models={"base": str(model)} | {name: str(path / "hf") for name, path in runs.items()},
            reference="base",
            scores={"gold": VaderSentiment()},
            prompts=str(folder / "held_out.jsonl"),
            out_dir=str(folder),
            generation=GenerationSpec(max_new_tokens=ANSWER, num_samples=4),
            limit=512,
            prompts_at_once=256,
            seed=seed,
        ).run()
    return json.loads(done.read_text())["models"]


def run(library: str, algorithm: str, model: Path, folder: Path, seed: int) -> Path:
    """A run in a process of its own, unless it is on disk."""
    out = folder / f"{library}_{algorithm}"
    if not (out / "took.json").is_file():
        print(f"seed {seed}: {library} {algorithm}", flush=True)
        command = [sys.executable, __file__, "--worker", library, algorithm, str(model), str(folder), str(out)]
        subprocess.run([*command, "--seeds", str(seed)], check=True, stdout=subprocess.DEVNULL)
    return out


def same_order(options: argparse.Namespace, model: Path) -> dict[str, float]:
    """DPO with the pairs in one order: how far the weights moved, and how far the two libraries' then are apart."""
    from transformers import AutoModelForCausalLM

    folder = options.runs / "same_order"
    prepare(model, folder, 1)
    folders = {library: run(library, IN_FILE_ORDER, model, folder, 1) / "hf" for library in WORKERS} | {"base": model}
    weights = {n: list(AutoModelForCausalLM.from_pretrained(f).parameters()) for n, f in folders.items()}

    def apart(a: str, b: str) -> float:
        return sum(float((x - y).detach().square().sum()) for x, y in zip(weights[a], weights[b], strict=True)) ** 0.5

    return {"ours_moved": apart("ours", "base"), "trl_moved": apart("trl", "base"), "apart": apart("ours", "trl")}


def speeds(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Tokens per processor second, ours and TRL's in turn."""
    rows = []
    for seed in options.seeds:
        long = options.prompt_tokens != PROMPT_TOKENS
        folder = options.runs / (f"seed_{seed}_prompts_{options.prompt_tokens}" if long else f"seed_{seed}")
        prepare(model, folder, seed, options.prompt_tokens)
        for algorithm in options.speed:
            took = {
                name: json.loads((run(name, algorithm, model, folder, seed) / "took.json").read_text())
                for name in WORKERS
            }
            rate = {name: t["tokens"] / t["cpu_seconds"] for name, t in took.items()}
            rows.append({"seed": seed, "algorithm": algorithm, **rate, "ratio": rate["ours"] / rate["trl"]})
    return rows


def run_seed(
    options: argparse.Namespace, model: Path, seed: int, runs: list[tuple[str, str]], curve: list[dict[str, float]]
) -> list[dict[str, Any]]:
    folder = options.runs / f"seed_{seed}"
    prepare(model, folder, seed)
    curve.extend(oracle(model, folder / "held_out.jsonl") if not curve else [])
    paths = {}
    for library, algorithm in runs:
        paths[f"{library} {algorithm}"] = run(library, algorithm, model, folder, seed)
    measured = evaluate(model, folder, paths, seed)
    points = []
    for name, path in paths.items():
        library, algorithm = name.split()
        gold, kl = (measured[name]["figures"][figure] for figure in ("gold", "kl"))
        bound = frontier_at(curve, kl["mean"])
        took = json.loads((path / "took.json").read_text())
        points.append(
            {"seed": seed, "library": library, "algorithm": algorithm, "coef": COEF[algorithm], "gold": gold["mean"]}
            | {"kl": kl["mean"], "oracle_gold": bound, "below": gold["mean"] <= bound}
            | {"short_of_oracle": bound - gold["mean"], "objective": gold["mean"] - COEF[algorithm] * kl["mean"]}
            | ({"tokens_per_second": took["tokens"] / took["seconds"], **took} if runs is RUNS else {})
        )
    return points


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def compare(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against TRL's, algorithm by algorithm: distance to the oracle; tokens per second and memory where measured.

    The standard error is that of the mean over seeds of ours minus TRL's, which share prompts and pairs.
    """
    rows = []
    for algorithm in ("grpo", "rloo", "dpo"):
        of = {name: [p for p in points if (p["library"], p["algorithm"]) == (name, algorithm)] for name in WORKERS}
        short = {name: [p["short_of_oracle"] for p in ps] for name, ps in of.items()}
        differences = [a - b for a, b in zip(short["ours"], short["trl"], strict=True)]
        difference, error = mean_and_error(differences)
        timed = [pair for pair in zip(of["ours"], of["trl"], strict=True) if "tokens" in pair[0]]
        speed = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in timed]
        cpu = [a["tokens"] / a["cpu_seconds"] / (b["tokens"] / b["cpu_seconds"]) for a, b in timed]
        memory = {name: statistics.fmean(p["peak_mb"] for p in ps if "tokens" in p) for name, ps in of.items()}
        rows.append(
            {
                "algorithm": algorithm,
                "seeds": [p["seed"] for p in of["ours"]],
                "short_of_oracle": {name: statistics.fmean(values) for name, values in short.items()},
                "difference_by_seed": differences,
                "difference": difference,
                "standard_error": error,
                "not_below_trl": difference <= error,
                "speed_ratio": statistics.median(speed),
                "speed_ratio_by_processor_time": statistics.median(cpu),
                "peak_mb": memory,
            }
        )
    return rows


def draw(points: list[dict[str, Any]], curve: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    axis.plot([p["kl"] for p in curve], [p["gold"] for p in curve], color="#6b7280", marker=".", label="oracle")
    for library, algorithm in RUNS:
        chosen = [p for p in points if (p["library"], p["algorithm"]) == (library, algorithm)]
        axis.scatter(
            [p["kl"] for p in chosen],
            [p["gold"] for p in chosen],
            color=COLOURS[library],
            marker=MARKERS[algorithm],
            label=f"{library} {algorithm}",
            zorder=3,
            alpha=0.8,
        )
    axis.set(xlabel="KL to the pretrained model (nats per answer)", ylabel="gold score", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "family.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/stories260k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--more-seeds", type=int, nargs="*", default=[4, 5, 6, 7], help="seeds of what TRL has too")
    parser.add_argument("--grpo-seeds", type=int, nargs="*", default=range(8, 21), help="seeds of GRPO alone, besides")
    parser.add_argument(
        "--speed", nargs="+", choices=["grpo", "rloo", "dpo", SHARED], help="run these alone, not evaluated"
    )
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="length of the prompts, with --speed")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_family"), help="where the runs are kept")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        library, algorithm, model, folder, out = options.worker
        Path(out).mkdir(parents=True, exist_ok=True)
        figures = WORKERS[library](algorithm, model, Path(folder), Path(out), options.seeds[0])
        write_json(Path(out) / "took.json", figures)
        return
    if options.data is None or not (options.data / "models" / "stories260k").is_dir():
        sys.exit("skipped: give --data a folder that holds models/stories260k")
    model = (options.data / "models" / "stories260k").resolve()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    described = about()
    described["versions"]["trl"] = version("trl")
    if options.speed:
        result = {"about": described, "runs": speeds(options, model)}
        # what else the machine did meanwhile: a busy one lengthens processor time too, of both alike
        result |= {"load_average": os.getloadavg()[2], "cores": os.cpu_count()}
        of_dpo = all(algorithm.startswith("dpo") for algorithm in options.speed)
        short = "speed_dpo" if of_dpo else "speed"
        result["prompt_tokens"] = options.prompt_tokens
        path = RESULTS / f"{short if options.prompt_tokens == PROMPT_TOKENS else 'speed_long_prompts'}.json"
        write_json(path, result)
        print(f"wrote {path}")
        return
    curve: list[dict[str, float]] = []
    planned = [(seed, RUNS) for seed in options.seeds] + [(seed, COMPARED) for seed in options.more_seeds]
    planned += [(seed, GRPO) for seed in options.grpo_seeds]
    points = [point for seed, runs in planned for point in run_seed(options, model, seed, runs, curve)]
    draw(points, curve)
    result = {"about": described, "oracle": curve, "points": points, "all_below": all(p["below"] for p in points)}
    result |= {"against_trl": compare(points), "dpo_in_file_order": same_order(options, model)}
    write_json(RESULTS / "family.json", result)
    print(f"wrote {RESULTS / 'family.json'}")


if __name__ == "__main__":
    main()
