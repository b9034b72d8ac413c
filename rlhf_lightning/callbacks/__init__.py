"""What watches a run: sample tables, progress, throughput, checkpoints, exports."""

from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO
from rlhf_lightning.callbacks.checkpoint import LastCheckpoint
from rlhf_lightning.callbacks.graceful_stop import GracefulStop
from rlhf_lightning.callbacks.health import Health
from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.callbacks.metrics_csv import MetricsCSV
from rlhf_lightning.callbacks.nan_guard import NaNGuard
from rlhf_lightning.callbacks.optimizer_offload import OptimizerOffload
from rlhf_lightning.callbacks.progress import RolloutProgress
from rlhf_lightning.callbacks.sample_logger import SampleLogger
from rlhf_lightning.callbacks.throughput import Throughput

__all__ = [
    "AtomicCheckpointIO",
    "GracefulStop",
    "HFExport",
    "Health",
    "LastCheckpoint",
    "MetricsCSV",
    "NaNGuard",
    "OptimizerOffload",
    "RolloutProgress",
    "SampleLogger",
    "Throughput",
]
