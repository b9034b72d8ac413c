"""checkpoints/last.ckpt: where a run that broke goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.callbacks.metrics_csv import MetricsCSV
from rlhf_lightning.core.failpoints import failpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, the newest, as `last.ckpt`; a `ModelCheckpoint` for the best one can stand beside it.

    Args:
        dirpath: where to write; default: `checkpoints` in the run folder.
        every_n_train_steps: write every so many optimiser steps.
        every_minutes: write after so many minutes, if `every_n_train_steps` is not given. The end of each epoch, and
            of a run that stops inside one (max_steps, max_time, early stopping), is written in any case.
    """

    def __init__(
        self, dirpath: str | Path | None = None, every_n_train_steps: int | None = None, every_minutes: float = 5.0
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            monitor=None,
            save_top_k=1,
            enable_version_counter=False,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=timedelta(minutes=every_minutes) if every_n_train_steps is None else None,
        )
        self._stop_waits = False
        """Whether the run was told to stop between two micro-batches of the current step."""

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # the same however often it writes, so that a resumed run may change that

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step > 0:  # resumed: what was logged after the checkpoint will be logged again
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.forget_from(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # between the micro-batches of a step, gradients wait that no checkpoint holds: it is written after the step,
        # and a run that is told to stop there stops after it
        told = self._stop_waits or trainer.should_stop
        self._stop_waits = trainer.fit_loop._should_accumulate() and told
        trainer.should_stop = told and not self._stop_waits
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _counted_as_it_is(trainer):
            super().on_train_epoch_end(trainer, pl_module)
            self._last_global_step_saved = -1  # what was written after the step knows nothing of the epoch's end
            self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> str:
        """Writes the checkpoint unless that of this step is there already; gives its path. All processes call it."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        return str(Path(str(self.dirpath)) / "last.ckpt")

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        failpoint("metrics.before_write")
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):  # a run that goes on from here does not log these steps again
                logger.save_before(trainer.global_step - 1)
        failpoint("metrics.after_write")
        super()._save_checkpoint(trainer, filepath)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: the folder may have moved, and there is only one file."""


@contextmanager
def _counted_as_it_is(trainer: Trainer) -> Iterator[None]:
    """While inside, an epoch that a run stops within is not counted as done, which Lightning does wherever it stops.

    A run that goes on from a checkpoint with that count leaves the rest of the epoch out.
    """
    loop = trainer.fit_loop
    missing = 0 if loop.epoch_loop._num_ready_batches_reached() else 1
    counts = (loop.epoch_progress.total, loop.epoch_progress.current)
    for count in counts:
        count.processed -= missing
    try:
        yield
    finally:
        for count in counts:
            count.processed += missing
