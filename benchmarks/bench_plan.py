"""Memory as `rlhf-lightning plan` predicts it, beside what a run then takes: python benchmarks/bench_plan.py [CASE ...]

Every case is a stage with a random model of 20 to 50 million parameters on the CPU. Its run is a process of its own, in
which a tiny model has been trained first, so that the code of all operations is loaded: what counts is how far resident
memory (VmHWM, set back before every phase) rises above that. Results: benchmarks/results/plan.json.

--device cuda: the shape of Qwen2.5-0.5B in bf16-mixed, and torch.cuda.max_memory_allocated in place of VmHWM. Results:
benchmarks/results/plan_cuda.json.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from bench_common import HERE, about

from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.loading import load_policy, shapes_only
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.pipelines.files import write_json
from rlhf_lightning.planning.phases import Run
from rlhf_lightning.planning.plan import make_plan
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import DPOModule, GRPOModule, PPOModule, SFTModule
from rlhf_lightning.tasks.characters import character_tokenizer

TARGET = 0.1
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 8192,
}
QWEN = LLAMA | {"model_type": "qwen2", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}
QWEN |= {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True}
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128}
TINY |= {"num_key_value_heads": 1}
LETTERS = "abcdefghijklmnopqrstuvwxyz "

LARGE = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
PRECISION = {"cpu": "32-true", "cuda": "bf16-mixed"}


def cases(device: str) -> dict[str, dict[str, Any]]:
    """Stage, model, rows at a time and their length, and what else differs."""
    if device == "cuda":
        sft = {"stage": "sft", "config": LARGE, "rows": 8, "length": 1024}
        return {
            "SFT, Qwen 2": sft,
            "SFT, Qwen 2, gradient checkpointing": sft | {"rows": 32, "spec": {"gradient_checkpointing": True}},
            "SFT, Qwen 2, LoRA": sft | {"spec": {"lora": LoraSpec()}},
            "DPO, Qwen 2": {"stage": "dpo", "config": LARGE, "rows": 8, "length": 512},
            "PPO, Qwen 2": {"stage": "ppo", "config": LARGE, "rows": 8, "length": 256, "samples": 2},
            "GRPO, Qwen 2": {"stage": "grpo", "config": LARGE, "rows": 8, "length": 256, "samples": 8},
        }
    sft = {"stage": "sft", "config": LLAMA, "rows": 8, "length": 192}
    on_policy = {"config": LLAMA, "rows": 6, "length": 64, "samples": 2}
    return {
        "SFT, Llama": sft,
        "SFT, Llama, gradient checkpointing": sft | {"spec": {"gradient_checkpointing": True}},
        "SFT, Llama, LoRA": sft | {"spec": {"lora": LoraSpec()}},
        "SFT, Qwen 2, tied head, 2 micro-batches": sft | {"config": QWEN, "rows": 4, "accumulate": 2},
        "DPO, Llama": {"stage": "dpo", "config": LLAMA, "rows": 4, "length": 160},
        "PPO, Llama": on_policy | {"stage": "ppo"},
        "GRPO, Llama": on_policy | {"stage": "grpo", "rows": 6, "samples": 4},
    }


# ---- both sides ------------------------------------------------------------------------------------------------------


def make(case: dict[str, Any], folder: Path, *, tiny: bool = False) -> tuple[L.LightningModule, RLHFDataModule]:
    """Stage and records of a case; the same with a model and rows of next to nothing."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        character_tokenizer(LETTERS).save_pretrained(tokenizer)
    config = case["config"] | (TINY if tiny else {})
    spec = replace(ModelSpec(config=config, tokenizer=str(tokenizer)), **case.get("spec", {}))
    length = 16 if tiny else case["length"]
    stage, half = case["stage"], length // 2

    def record(i: int) -> dict[str, str]:
        """No two are equal, and every second one is a token shorter, so that there is padding, as there is in a run."""
        text = LETTERS[i % 27] + LETTERS[i // 27] + (LETTERS * 40)[: length - 4 - i % 2]
        kinds = {"sft": {"text": text}, "dpo": {"prompt": text[:8], "chosen": text[8:], "rejected": text[9:]}}
        return kinds.get(stage, {"prompt": text[: half - 1 - i % 2]})

    file = folder / f"{stage}-{length}.jsonl"
    file.write_text("".join(json.dumps(record(i)) + "\n" for i in range(4 * case["rows"])))
    data = RLHFDataModule(train=str(file), batch_size=case["rows"], on_bad_record="error")
    if stage == "sft":
        return SFTModule(spec), data
    if stage == "dpo":
        return DPOModule(spec), data
    options = {
        "rewards": [WeightedReward(LengthReward(target=4))],
        "generation": GenerationSpec(max_new_tokens=half, num_samples=case["samples"]),
        "updates": UpdateSpec(inner_epochs=1),
    }
    return (PPOModule if stage == "ppo" else GRPOModule)(spec, **options), data


def parameters(case: dict[str, Any], folder: Path) -> float:
    """Millions of parameters of the policy."""
    with shapes_only(), torch.device("meta"):
        policy = load_policy(make(case, folder)[0].model_spec)
    return sum(p.numel() for p in policy.parameters()) / 1e6


def predict(case: dict[str, Any], folder: Path, device: str) -> dict[str, float]:
    """Megabytes by phase."""
    module, data = make(case, folder)
    run = Run(device=device, precision=PRECISION[device], accumulate=case.get("accumulate", 1))
    plan = make_plan(module, data, run, memory=10**12, search=False)
    return {phase.name: phase.peak.total / 1e6 for phase in plan.phases}


# ---- measuring -------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def set_back() -> None:
    """From here on VmHWM is anew the most."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Meter:
    """How memory is read, in megabytes."""

    now: Callable[[], float]
    most: Callable[[], float]
    set_back: Callable[[], None]


METERS = {
    "cpu": Meter(lambda: resident("VmRSS"), lambda: resident("VmHWM"), set_back),
    "cuda": Meter(
        lambda: torch.cuda.memory_allocated() / 1e6,
        lambda: torch.cuda.max_memory_allocated() / 1e6,
        lambda: torch.cuda.reset_peak_memory_stats(),
    ),
}


class Watch(L.Callback):
    """The most that each phase took, above what was held at the beginning."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.base = meter, meter.now()
        self.peaks: dict[str, float] = {}
        self.phase: str | None = None

    def begin(self, phase: str | None) -> None:
        if self.phase is not None:
            peak = self.meter.most() - self.base
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), peak)
        gc.collect()
        self.meter.set_back()
        self.phase = phase

    def on_rollout_phase(self, trainer: Any, module: Any, phase: str) -> None:
        self.begin(phase)

    def on_rollout_end(self, *_: Any) -> None:
        self.begin(None)

    def on_train_batch_start(self, *_: Any) -> None:
        self.begin("train")

    def on_train_batch_end(self, *_: Any) -> None:
        self.begin(None)


def measure(case: dict[str, Any], folder: Path, device: str) -> dict[str, float]:
    """Megabytes by phase of two optimiser steps, in this process."""
    for tiny in (True, False):
        gc.collect()
        watch = Watch(METERS[device])
        module, data = make(case, folder, tiny=tiny)
        trainer = L.Trainer(
            accelerator=device,
            devices=1,
            precision=PRECISION[device],
            max_steps=2,
            accumulate_grad_batches=case.get("accumulate", 1),
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        trainer.fit(module, datamodule=data)
        del module, data, trainer
    return watch.peaks


def measured_apart(name: str, folder: Path, device: str) -> dict[str, float]:
    """`measure` in a process whose allocator gives memory back at once."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--device", device, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, device: str) -> tuple[list[dict[str, Any]], float]:
    """Rows of a case, and millions of parameters."""
    rows, case = [], cases(device)[name]
    with tempfile.TemporaryDirectory() as folder:
        size = parameters(case, Path(folder))
        predicted, measured = predict(case, Path(folder), device), measured_apart(name, Path(folder), device)
    for phase in sorted(predicted.keys() & measured.keys()):
        row = {"case": name, "phase": phase, "predicted_mb": predicted[phase], "measured_mb": measured[phase]}
        row["error"] = predicted[phase] / measured[phase] - 1
        rows.append(row)
        print(f"{name:45} {phase:10} {predicted[phase]:8.0f} {measured[phase]:8.0f} {row['error']:+.1%}", flush=True)
    return rows, size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", help="names of cases; default: all")
    parser.add_argument("--device", choices=sorted(METERS), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--out", type=Path, help="where the results go; default: benchmarks/results")
    parser.add_argument("--measure", help="print what this case takes, and nothing else")
    parser.add_argument("--folder", help="for --measure: where records are")
    options = parser.parse_args()
    if options.measure is not None:
        with contextlib.redirect_stdout(sys.stderr):
            peaks = measure(cases(options.device)[options.measure], Path(options.folder), options.device)
        print(json.dumps(peaks))
        return
    names = options.cases or list(cases(options.device))
    found: dict[str, tuple[list[dict[str, Any]], float]] = {}
    failed = []
    # what a process takes is its own: others beside it change nothing. The last ones sample, and take longest
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=prepare) as pool:
        running = {pool.submit(compare, name, options.device): name for name in names[::-1]}
        for done in as_completed(running):
            try:
                found[running[done]] = done.result()
            except RuntimeError as error:
                print(error, flush=True)
                failed.append(running[done])
            if found and not options.cases:
                write(found, names, options.device, options.out or HERE / "results")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def prepare() -> None:
    """What every process begins with."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def write(found: dict[str, tuple[list[dict[str, Any]], float]], names: list[str], device: str, folder: Path) -> None:
    """The results of the cases that are done: a run that is cut off has shown something too."""
    done = [name for name in names if name in found]
    rows, sizes = [row for name in done for row in found[name][0]], [found[name][1] for name in done]
    met = sum(abs(row["error"]) <= TARGET for row in rows)
    result = {"about": about(), "target": TARGET, "met": met, "rows": rows}
    if missing := [name for name in names if name not in found]:
        result["missing"] = missing
    if device == "cuda":
        result["about"]["device"] = torch.cuda.get_device_name()
    result["parameters"] = f"{min(sizes):.0f} to {max(sizes):.0f}"
    write_json(folder / ("plan.json" if device == "cpu" else f"plan_{device}.json"), result)


if __name__ == "__main__":
    prepare()
    main()
