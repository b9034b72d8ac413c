"""SIGTERM, SIGINT and SIGUSR1 end a run between two optimiser steps, with a checkpoint."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.callbacks.checkpoint import LastCheckpoint
from rlhf_lightning.core.errors import Stopped

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143}


class GracefulStop(Callback):
    """Finishes the optimiser step, writes `last.ckpt`, ends with 143 (SIGTERM, SIGUSR1) or 130 (SIGINT, Ctrl-C).

    A signal to any process of the run stops all of them at the same step. A second one stops at once, and what was
    learnt since the last checkpoint is lost. SIGUSR1 is what SLURM is told to send before a time limit
    (`--signal=USR1@120`).
    """

    def __init__(self) -> None:
        self._asked = 0
        """The signal that was received."""
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning installs its own handlers just before: they speak to other processes from within a handler, listen
        # to the first process only, and end between micro-batches
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._ask)
                for number in (getattr(signal, name, None) for name in EXIT_CODES)
                if number is not None
            }
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(name, EXIT_CODES[name], None)
        self._asked = number
        # not print: the handler may have interrupted one
        os.write(2, f"{name}: stopping after this optimiser step; once more stops at once\n".encode())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        asked = int(self._asked)
        if trainer.world_size > 1:  # any of them may have been told
            asked = int(trainer.strategy.reduce(torch.tensor(asked, device=pl_module.device), reduce_op="max"))
        if asked:
            name = signal.Signals(asked).name
            # Lightning writes a step's metrics after this hook, which is the last one that the step will see
            trainer._logger_connector.update_train_step_metrics()
            checkpoints = [c for c in trainer.callbacks if isinstance(c, LastCheckpoint)]  # type: ignore[attr-defined]
            saved = [checkpoint.save_now(trainer) for checkpoint in checkpoints]
            raise Stopped(name, EXIT_CODES[name], saved[0] if saved else None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
