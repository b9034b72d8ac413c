"""What a run has without asking: a CSV logger and the built-in callbacks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger

from rlhf_lightning.callbacks.checkpoint import LastCheckpoint
from rlhf_lightning.callbacks.graceful_stop import GracefulStop
from rlhf_lightning.callbacks.health import Health
from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.callbacks.metrics_csv import MetricsCSV
from rlhf_lightning.callbacks.nan_guard import NaNGuard
from rlhf_lightning.callbacks.progress import RolloutProgress
from rlhf_lightning.callbacks.sample_logger import SampleLogger
from rlhf_lightning.callbacks.throughput import Throughput

DefaultCallback = Literal[
    "checkpoint", "progress", "learning_rate", "throughput", "samples", "export", "nan_guard", "health", "stop"
]


def default_logger(folder: Path) -> Logger:
    """metrics.csv straight in the run folder."""
    return MetricsCSV(folder)


def default_callbacks(
    wanted: Sequence[str], given: Sequence[Callback], trainer: dict[str, Any], subcommand: str | None, folder: Path
) -> list[Callback]:
    """The built-in callbacks that the user has neither named away nor replaced.

    Args:
        wanted: names, of `DefaultCallback`.
        given: the user's own callbacks; one of the same kind replaces ours.
        trainer: arguments of the Trainer; its enable_* and logger switches are obeyed.
        subcommand: only `fit` gets those that write.
        folder: the run folder.
    """
    makers: dict[str, tuple[type[Callback], Callable[[], Callback]]] = {
        "checkpoint": (LastCheckpoint, lambda: LastCheckpoint(dirpath=folder / "checkpoints")),
        "progress": (ProgressBar, RolloutProgress),
        "learning_rate": (LearningRateMonitor, lambda: LearningRateMonitor("step")),
        "throughput": (Throughput, Throughput),
        "samples": (SampleLogger, SampleLogger),
        "export": (HFExport, HFExport),
        "nan_guard": (NaNGuard, NaNGuard),
        "health": (Health, Health),
        "stop": (GracefulStop, GracefulStop),  # the last one: it ends a step that all others have seen
    }
    off = set()
    if subcommand != "fit" or trainer.get("barebones"):
        off |= set(makers) - {"progress"}
    if trainer.get("barebones") or trainer.get("enable_progress_bar") is False:
        off.add("progress")
    if trainer.get("enable_checkpointing") is False:
        off.add("checkpoint")
    if trainer.get("logger") is False:
        off |= {"learning_rate", "throughput"}
    if trainer.get("fast_dev_run"):
        off |= {"checkpoint", "export"}
    return [
        make()
        for name, (kind, make) in makers.items()
        if name in wanted and name not in off and not any(isinstance(callback, kind) for callback in given)
    ]
