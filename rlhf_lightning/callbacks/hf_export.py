"""The run's hand-over: a Hugging Face folder at the end, and on the way if wanted."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.core.failpoints import failpoint
from rlhf_lightning.models.sharded import is_sharded


class HFExport(Callback):
    """Writes `hf/` into the run folder when training ends; the next stage and transformers load it from there.

    Args:
        folder: where to write; default: `hf` in the run folder.
        every_n_steps: also write `hf-step-N` beside it every so many optimiser steps.
    """

    def __init__(self, folder: str | None = None, every_n_steps: int | None = None) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self._last_step = -1

    def _path(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "hf"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step != self._last_step and step % self.every_n_steps == 0:
            path = self._path(trainer)
            export(trainer, pl_module, path.with_name(f"{path.name}-step-{step}"))
        self._last_step = step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_train_end: a run resumed at its very end trains no more, and still owes its export
        path = self._path(trainer)
        failpoint("export.before")
        export(trainer, pl_module, path)
        failpoint("export.after")
        if trainer.is_global_zero:
            print(f"exported to {path}", flush=True)


def export(trainer: Trainer, module: LightningModule, folder: Path) -> None:
    """Has the module write `folder`: by the first process, or by all where each holds only a part of the weights."""
    if is_sharded(module) or trainer.is_global_zero:
        module.export(folder)
    trainer.strategy.barrier("export")
