"""What a config says about the machines it is for, kept apart from the machine that reads it."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.planning.phases import Run

STRATEGIES = {"FSDP2Strategy": "fsdp2", "DDPStrategy": "ddp"}


def run_of(trainer: Any, *, memory_given: bool) -> Run:
    """What of the trainer's options decides about memory.

    Args:
        trainer: the section of the config.
        memory_given: a card was named: `accelerator: auto` is then a GPU, though there be none here.
    """
    accelerator = str(trainer.get("accelerator") or "auto")
    on_gpu = accelerator not in ("cpu", "auto") or (accelerator == "auto" and (memory_given or _has_gpu()))
    processes = _devices(trainer.get("devices"), on_gpu=on_gpu) * (trainer.get("num_nodes") or 1)
    name, options = _strategy(trainer.get("strategy"))
    name = "fsdp" if name == "FSDP1Strategy" else name
    if processes == 1 and name in ("auto", "fsdp"):
        name = "one process"
    name = "ddp" if name == "auto" else name
    if name not in ("one process", "ddp", "fsdp2"):
        raise UserError(
            f"trainer.strategy={name}: plan knows one process, ddp and fsdp2; of fsdp, what fsdp2 takes is an estimate"
        )
    group = options.get("tensor_parallel_size", 1)
    replicas = options.get("num_replicas", 1) if group == 1 else max(processes // group, 1)
    dtype = options.get("param_dtype")
    return Run(
        device="cuda" if on_gpu else "cpu",
        precision=str(trainer.get("precision") or "32-true"),
        accumulate=trainer.get("accumulate_grad_batches") or 1,
        clip=trainer.get("gradient_clip_val"),
        strategy=name if processes > 1 else "one process",
        processes=processes,
        shards=max(processes // replicas, 1) if name == "fsdp2" else 1,
        tensor_parallel=group if name == "fsdp2" and processes > 1 else 1,
        reshards=options.get("reshard_after_forward", True),
        param_dtype=None if dtype is None else getattr(torch, dtype),
    )


def _strategy(given: Any) -> tuple[str, Mapping[str, Any]]:
    if given is None or isinstance(given, str):
        return (given or "auto").removeprefix("single_device") or "auto", {}
    name = given["class_path"].rpartition(".")[2]
    return STRATEGIES.get(name, name), given.get("init_args") or {}


def _devices(given: Any, *, on_gpu: bool) -> int:
    if isinstance(given, list):
        return len(given)
    text = str(given or "auto")
    if text in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if on_gpu else 1
    return len(text.split(",")) if "," in text else int(text)


def on_one_cpu() -> dict[str, Any]:
    """Trainer options under which anything can be read anywhere."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": None,
        "logger": None,
        "callbacks": None,
        "plugins": None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def memory_at_hand() -> int:
    """Bytes of the first GPU, or where there is none of this machine."""
    if _has_gpu():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _has_gpu() -> bool:
    return torch.cuda.is_available()
