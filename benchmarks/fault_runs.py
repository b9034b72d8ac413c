"""Runs that can be killed by the hundred: forks of one process that has imported everything; and what they leave."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from rlhf_lightning.callbacks.atomic_checkpoint import read_checkpoint
from rlhf_lightning.cli import app, ranks
from rlhf_lightning.core import failpoints

STAGES = ("SFTModule", "RewardModule", "DPOModule", "PPOModule", "GRPOModule")
ON_POLICY = ("PPOModule", "GRPOModule")
AHEAD = ("PPOModule, ahead", "GRPOModule, ahead")
"""The same, with `updates.async_rollouts`."""
REACHED = ".reached.json"
Status = int
"""An exit code; the negative number of a signal."""


def make_material(folder: Path) -> dict[str, dict[str, Any]]:
    """A tokenizer of words, records for every stage, and a config for each: a second or two of training."""
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
    updates = {"inner_epochs": 2, "num_minibatches": 2}
    on_policy |= {"updates": updates}
    # long answers, so that a moment drawn at random is likely to find some on their way
    long = {"max_new_tokens": 40, "min_new_tokens": 20, "num_samples": 4, "keep_logprobs": True}
    ahead = {"generation": long, "updates": {**updates, "async_rollouts": True}, "correction": {"cap": 2.0}}
    ahead |= {"rewards": [{"reward": {"class_path": "LengthReward", "init_args": {"target": 25}}}]}
    stages: dict[str, tuple[dict[str, Any], str]] = {
        "SFTModule": ({"policy": model}, "rows"),
        "RewardModule": ({"model": model}, "pairs"),
        "DPOModule": ({"policy": model}, "pairs"),
        **dict.fromkeys(ON_POLICY, (on_policy, "prompts")),
        **dict.fromkeys(AHEAD, (on_policy | ahead, "prompts")),
    }
    callbacks = [
        {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 2}},
        {"class_path": "SampleLogger", "init_args": {"num_prompts": 2, "max_new_tokens": 5, "show": False}},
    ]
    trainer = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "callbacks": callbacks}
    trainer |= {"enable_model_summary": False, "enable_progress_bar": False}
    steps = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}}}
    steps |= {"schedule": {"shape": "cosine", "warmup_frac": 0.1}}
    configs = {}
    for stage, (init_args, data) in stages.items():
        configs[stage] = {
            "seed_everything": 3,
            "trainer": {**trainer, "max_epochs": 2 if data == "prompts" else 4},
            "default_callbacks": ["nan_guard", "export", "stop"],
            "model": {"class_path": stage.partition(",")[0], "init_args": {**init_args, **steps}},
            "data": {"train": str(folder / f"{data}.jsonl"), "batch_size": 4},
        }
    return configs


def prepare() -> None:
    """Imports what runs need, before the first fork; processes of one run are forked too."""
    from rlhf_lightning.data import datamodule  # noqa: F401

    app.family()
    torch.set_num_threads(1)
    ranks.RankLauncher._call_children_scripts = _fork_children  # type: ignore[method-assign]


# --- runs


def start(config: Mapping[str, Any], run: Path, failpoint: str | None = None) -> int:
    """`fit --resume auto` in a fork of this process; gives its pid."""
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "default_root_dir": str(run)}}))
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["FAULT_RUN"] = str(run)
    if failpoint is not None:
        os.environ[failpoints.VARIABLE] = failpoint
    sys.argv = ["rlhf-lightning", "fit", "--config", str(file), "--resume", "auto"]
    _fit_and_exit()
    return 0


def _fit_and_exit() -> None:
    from rlhf_lightning.__main__ import main

    code = 1
    try:
        code = main(sys.argv[1:])
        if os.environ.get("LOCAL_RANK", "0") == "0":
            Path(os.environ["FAULT_RUN"] + REACHED).write_text(json.dumps(failpoints._reached))
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """What the launcher asks of a `Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _fork_children(launcher: Any) -> None:
    """The other processes of a run, as Lightning would start them, without their 10 seconds of imports."""
    environment = launcher.cluster_environment
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = "0", "0"
    os.environ["WORLD_SIZE"] = str(launcher.num_processes)
    launcher.procs = []
    for rank in range(1, launcher.num_processes):
        pid = os.fork()
        if pid == 0:
            os.environ["LOCAL_RANK"] = str(rank)
            rank_zero_only.rank = rank
            _fit_and_exit()
        named = Path(os.environ["FAULT_RUN"]).with_suffix(f".rank{rank}")
        partial = named.with_suffix(f".part{rank}")
        partial.write_text(str(pid))
        partial.replace(named)  # whoever waits for it reads it at once
        launcher.procs.append(Forked(pid))


def ended(pid: int, limit_seconds: float = 300.0) -> Status | None:
    """How a run ended; None, and it is killed, if it did not in time."""
    run = Forked(pid)
    try:
        return run.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait(10)
        return None


def other_pid(run: Path) -> int:
    """Of the process of rank 1."""
    return int(run.with_suffix(".rank1").read_text())


def lives(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def said(run: Path) -> str:
    """The end of what a run printed; of one that crashed, from the stacks on."""
    printed = run.with_suffix(".log").read_text()
    crashed = printed.rfind("Fatal Python error")
    return printed[crashed if crashed >= 0 else -1500 :]


def forget(run: Path) -> None:
    """Deletes what a run left."""
    shutil.rmtree(run, ignore_errors=True)
    for file in run.parent.glob(f"{run.name}.*"):
        file.unlink()


# --- what they leave


def outcome(run: Path) -> dict[str, str]:
    """Digests of the state at the end of a run, of its samples and of its export."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    found = {}
    for name, keys in (("weights", ["state_dict"]), ("optimiser", ["optimizer_states", "lr_schedulers"])):
        hashed = hashlib.sha256()
        for key in keys:
            _hash(checkpoint[key], hashed)
        found[name] = hashed.hexdigest()
    for name, file in (("samples", "samples.jsonl"), ("export", "hf/model.safetensors")):
        path = run / file
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    return found


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


def undisturbed(config: Mapping[str, Any], folder: Path, failpoint: str | None = None) -> tuple[Path, float]:
    """A run that nobody touches, and its seconds."""
    run, began = folder / "whole", time.perf_counter()
    code = ended(start(config, run, failpoint))
    assert code == 0, said(run)
    return run, time.perf_counter() - began


def same(run: Path, expected: Mapping[str, str]) -> bool:
    """Whether a run ended as another one did; says where not."""
    try:
        found = outcome(run)
    except Exception as error:
        print(f"{run.name}: {error}\n{said(run)}", flush=True)
        return False
    wrong = [name for name, digest in expected.items() if found[name] != digest]
    if wrong:
        print(f"{run.name}: other {', '.join(wrong)}\n{said(run)}", flush=True)
    return not wrong
