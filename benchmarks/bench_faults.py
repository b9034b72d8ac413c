"""Kills, corruptions, full disks and signals, counted: python benchmarks/bench_faults.py [--only save fit ...]

Every count has a naive double beside it that the same faults catch, else it would show nothing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from bench_common import HERE, about
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO, damage, newest_first, read_checkpoint
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.files import write_json

STAGES = ("SFTModule", "RewardModule", "DPOModule", "PPOModule", "GRPOModule")
Save = Callable[[dict[str, Any], Path], Any]


def state(step: int, size: int = 200_000) -> dict[str, Any]:
    """A checkpoint of 0.8 MB whose weights all say which step it is of."""
    return {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}, "optimizer_states": []}


# --- killed while saving


def kill_saves(kills: int, save: Save, folder: Path, seed: int, longest: float = 0.06) -> dict[str, int]:
    """Kills a child that saves over and over, at random moments: how many left a corrupt file, or lost a done one."""
    draw, corrupt, lost = random.Random(seed), 0, 0
    path, done = folder / "last.ckpt", folder / "done"
    for _ in range(kills):
        first = int(done.read_text()) + 1 if done.exists() else 1
        pid = os.fork()
        if pid == 0:
            _save_on(first, save, path, done)
        time.sleep(draw.uniform(0.003, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not done.exists():
            continue  # nothing was said to be saved yet
        step = _step_of(path)
        corrupt += step is None
        lost += step is not None and step < int(done.read_text())
    return {"kills": kills, "corrupt": corrupt, "lost": lost}


def _save_on(first: int, save: Save, path: Path, done: Path) -> None:
    try:
        for step in range(first, first + 10_000):
            save(state(step), path)
            descriptor = os.open(done, os.O_WRONLY | os.O_CREAT)
            os.pwrite(descriptor, f"{step:09d}".encode(), 0)
            os.close(descriptor)
    finally:
        os._exit(1)


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint that is whole, by its content and by what is said of it."""
    try:
        found = torch.load(path, weights_only=True)
        same = bool((found["state_dict"]["weight"] == found["global_step"]).all())
    except Exception:
        return None
    return int(found["global_step"]) if same and damage(path) is None else None


def saves(num: int, seed: int) -> dict[str, Any]:
    """Ours and others', with TMPDIR on the file system of the target and on another one."""
    others = [Path(p) for p in ("/dev/shm", "/tmp") if Path(p).is_dir()]
    results = {}
    with tempfile.TemporaryDirectory() as near, tempfile.TemporaryDirectory(dir=others[0]) as far:
        savers: dict[str, tuple[Save, str]] = {
            "AtomicCheckpointIO": (AtomicCheckpointIO().save_checkpoint, near),
            "AtomicCheckpointIO, TMPDIR on another file system": (AtomicCheckpointIO().save_checkpoint, far),
            "Lightning's TorchCheckpointIO, TMPDIR on another file system": (TorchCheckpointIO().save_checkpoint, far),
            "torch.save": (torch.save, near),
        }
        for number, (name, (save, where)) in enumerate(savers.items()):
            folder = Path(where) / str(number)
            folder.mkdir()
            results[name] = kill_saves(num, save, folder, seed)
            print(name, results[name], flush=True)
    return results


# --- killed while training


def make_material(folder: Path) -> dict[str, dict[str, Any]]:
    """A tokenizer of words, records for every stage, and a config for each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "film", "was", "good", "bad", "long", "short", "great", "dull", "and", "but", "plot", "end"]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    draw = random.Random(0)
    text = lambda: " ".join(draw.choices(words, k=draw.randint(1, 6)))  # noqa: E731
    rows = [{"prompt": text(), "completion": text()} for _ in range(24)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": text() + " end"} for row in rows]
    for name, records in (("rows", rows), ("pairs", pairs), ("prompts", [{"prompt": r["prompt"]} for r in rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = {"config": llama, "tokenizer": str(folder / "tokenizer")}
    rewards = [{"reward": {"class_path": "LengthReward", "init_args": {"target": 3}}}]
    generation = {"max_new_tokens": 5, "num_samples": 2}
    on_policy = {"policy": model, "rewards": rewards, "generation": generation}
    updates = {"updates": {"inner_epochs": 2, "num_minibatches": 2}}
    stages: dict[str, tuple[dict[str, Any], str]] = {
        "SFTModule": ({"policy": model}, "rows"),
        "RewardModule": ({"model": model}, "pairs"),
        "DPOModule": ({"policy": model}, "pairs"),
        "PPOModule": ({**on_policy, **updates}, "prompts"),
        "GRPOModule": ({**on_policy, **updates}, "prompts"),
    }
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 4, "log_every_n_steps": 1}
    trainer |= {"enable_model_summary": False, "enable_progress_bar": False}
    configs = {}
    for stage, (init_args, data) in stages.items():
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}}
        schedule = {"shape": "cosine", "warmup_frac": 0.1}
        configs[stage] = {
            "seed_everything": 3,
            "trainer": {
                **trainer,
                "callbacks": [{"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 2}}],
            },
            "default_callbacks": ["nan_guard", "stop"],
            "model": {"class_path": stage, "init_args": {**init_args, "optimizer": optimizer, "schedule": schedule}},
            "data": {"train": str(folder / f"{data}.jsonl"), "batch_size": 4},
        }
    return configs


def fit_child(config: Mapping[str, Any], run: Path) -> int:
    """`fit --resume auto` in a fork of this process, which has imported everything; gives its pid."""
    from rlhf_lightning.__main__ import main

    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "default_root_dir": str(run)}}))
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["rlhf-lightning"]
        code = main(["fit", "--config", str(file), "--resume", "auto"])
    finally:
        os._exit(code)


def digest(run: Path) -> str:
    """Of weights, optimiser and schedule at the end of a run, and of what was logged of the losses."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    hashed = hashlib.sha256()
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        _hash(checkpoint[part], hashed)
    return hashed.hexdigest()


def _hash(value: Any, hashed: Any) -> None:
    if isinstance(value, torch.Tensor):
        hashed.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hashed.update(str(key).encode())
            _hash(value[key], hashed)
    elif isinstance(value, list | tuple):
        for inner in value:
            _hash(inner, hashed)
    else:
        hashed.update(repr(value).encode())


def kill_fits(config: Mapping[str, Any], folder: Path, runs: int, seed: int) -> dict[str, Any]:
    """Runs that are killed at random moments, up to eight times each, against one that is not."""
    draw = random.Random(seed)
    whole = folder / "whole"
    began = time.perf_counter()
    code = os.waitpid(fit_child(config, whole), 0)[1]
    assert code == 0, whole.with_suffix(".log").read_text()[-2000:]
    seconds, expected = time.perf_counter() - began, digest(whole)
    same, kills, failed = 0, 0, []
    for number in range(runs):
        run, left = folder / f"run{number}", draw.randint(3, 8)
        while True:
            pid = fit_child(config, run)
            if left:
                time.sleep(draw.uniform(0.2, 0.95) * seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if not os.WIFSIGNALED(status):
                break
            left, kills = left - 1, kills + 1
        ended = os.WEXITSTATUS(status) == 0 and digest(run) == expected
        same += ended
        if not ended:
            failed.append(run.with_suffix(".log").read_text()[-600:])
            print(failed[-1])
        shutil.rmtree(run)
    return {"runs": runs, "kills": kills, "bit-identical": same, "seconds of an undisturbed run": round(seconds, 2)}


def fits(num: int, seed: int) -> dict[str, Any]:
    """`num` runs of each stage."""
    from rlhf_lightning.cli import app
    from rlhf_lightning.data import datamodule  # noqa: F401  imported before the forks

    app.family()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, config in make_material(Path(folder)).items():
            (Path(folder) / stage).mkdir()
            results[stage] = kill_fits(config, Path(folder) / stage, num, seed)
            print(stage, results[stage], flush=True)
    return results


# --- damaged, full, malicious


def corruptions(num: int, seed: int) -> dict[str, Any]:
    """Truncations and flipped bits at random places: how many are found, and how often the one before is taken."""
    draw, found, fell_back, unnoticed = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        for step in (1, 2):
            AtomicCheckpointIO().save_checkpoint(state(step, 20_000), path)
        whole = path.read_bytes()
        for number in range(num):
            at = draw.randrange(len(whole))
            broken = bytearray(whole[:at] if number % 3 == 0 else whole)
            if number % 3:
                broken[at] ^= 1 << draw.randrange(8)
            path.write_bytes(broken)
            found += damage(path) is not None
            taken = next(file for file, reason in newest_first(folder) if reason is None)
            fell_back += read_checkpoint(taken)["global_step"] == 1
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=True)
                unnoticed += 1
    return {"corruptions": num, "found": found, "fell back on the one before": fell_back, "torch.load took": unnoticed}


def full_disk(num: int, seed: int) -> dict[str, Any]:
    """A tmpfs of 2 MB that has no room for the next checkpoint: how often the one before is intact."""
    draw, kept, loud, naive = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            return {"skipped": "no right to mount a tmpfs"}
        try:
            for number in range(num):
                place = Path(folder) / str(number)
                place.mkdir()
                path = place / "last.ckpt"
                AtomicCheckpointIO().save_checkpoint(state(1, 100_000), path)
                too_large = state(2, draw.randrange(450_000, 900_000))
                try:
                    AtomicCheckpointIO().save_checkpoint(too_large, path)
                except UserError as error:
                    loud += "No space left on device" in str(error)
                kept += damage(path) is None and read_checkpoint(path)["global_step"] == 1
                with contextlib.suppress(Exception):
                    torch.save(too_large, path)
                naive += _step_of(path) == 1
                shutil.rmtree(place)
        finally:
            subprocess.run(["umount", folder], check=True)
    return {"full disks": num, "said so": loud, "kept the one before": kept, "torch.save kept it": naive}


class _Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def malicious(num: int, seed: int) -> dict[str, Any]:
    """Checkpoints that make a folder when they are unpickled, as a zip and as a bare pickle."""
    ran, naive = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num):
            path, marker = Path(folder) / f"{number}.ckpt", Path(folder) / f"marker{number}"
            evil = state(1, 10) | {"extra": _Bomb(str(marker))}
            torch.save(evil, path) if number % 2 else path.write_bytes(pickle.dumps(evil))
            for asked in (None, True, False):
                with contextlib.suppress(UserError):
                    AtomicCheckpointIO().load_checkpoint(path, weights_only=asked)
            ran += marker.exists()
            torch.load(path, weights_only=False) if number % 2 else pickle.loads(path.read_bytes())
            naive += marker.exists()
    return {"attacks": num, "ran": ran, "ran against a naive reader": naive}


# --- signals and dead processes, two real ones


TROUBLED = """
import os, time
from pathlib import Path
from rlhf_lightning import SFTModule
class Slow(SFTModule):
    def on_train_batch_start(self, batch, batch_idx):
        Path(os.environ["PIDS"], str(self.global_rank)).write_text(str(os.getpid()))
        time.sleep(0.05)
"""


def two_processes(num: int, seed: int) -> dict[str, Any]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGKILL to either process of a run of two: exit codes, seconds, who is left."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slow.py").write_text(TROUBLED)
        config = make_material(folder)["SFTModule"]
        config["model"]["class_path"] = "slow.Slow"
        config["trainer"] |= {"devices": 2, "strategy": "ddp", "max_epochs": 400}
        (folder / "fit.yaml").write_text(yaml.safe_dump(config))
        expected = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143, "SIGKILL": 1}
        for what, code in expected.items():
            for rank in (0, 1):
                seen = [_signalled(folder, what, rank) for _ in range(num)]
                want = -signal.SIGKILL if what == "SIGKILL" and rank == 0 else code
                results[f"{what} to rank {rank}"] = {
                    "runs": num,
                    "right exit code": sum(c == want for c, _, _ in seen),
                    "seconds, longest": round(max(s for _, s, _ in seen), 1),
                    "left behind": sum(left for _, _, left in seen),
                }
                print(what, rank, results[f"{what} to rank {rank}"], flush=True)
    return results


def _signalled(folder: Path, what: str, rank: int) -> tuple[int, float, int]:
    pids = folder / "pids"
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir()
    command = [sys.executable, "-m", "rlhf_lightning", "fit", "--config", "fit.yaml", "--overwrite", "true"]
    command += ["--allow_module", "slow"]
    with (folder / "out.txt").open("w") as out:
        env = {**os.environ, "PIDS": str(pids)}
        started = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        while len([p for p in pids.iterdir() if p.read_text()]) < 2:
            assert started.poll() is None, (folder / "out.txt").read_text()[-2000:]
            time.sleep(0.05)
        time.sleep(0.3)
        both = [int((pids / str(r)).read_text()) for r in (0, 1)]
        began = time.perf_counter()
        os.kill(both[rank], getattr(signal, what))
        code = started.wait(timeout=120)
    while any(map(_lives, both)) and time.perf_counter() - began < 30:
        time.sleep(0.05)
    return code, time.perf_counter() - began, sum(map(_lives, both))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SECTIONS: dict[str, tuple[str, Callable[[int, int], dict[str, Any]], int]] = {
    "saves": ("kill -9 during checkpoint saves", saves, 200),
    "corruptions": ("truncated and bit-flipped checkpoints", corruptions, 300),
    "full_disk": ("full disk", full_disk, 20),
    "malicious": ("malicious checkpoints", malicious, 20),
    "two_processes": ("signals to a run of two processes", two_processes, 3),
    "fits": ("kill -9 during fit, then --resume auto", fits, 40),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--num", type=int, help="how many of each, instead of the full number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "faults.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"sections": {}}
    for name in options.only:
        title, run, full = SECTIONS[name]
        began = time.perf_counter()
        figures = run(options.num or full, options.seed)
        seconds = round(time.perf_counter() - began, 1)
        results["sections"][name] = {"title": title, "seed": options.seed, "seconds": seconds, "figures": figures}
        results["about"] = about()
        write_json(options.out, results)
        print(title, figures, f"{seconds} s", flush=True)


if __name__ == "__main__":
    main()
