"""A progress bar that says what a rollout is doing, and plain lines where there is no terminal to draw on."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

HIDDEN_METRICS = {"v_num"}


class RolloutProgress(RichProgressBar):
    """Rich's bar with rollout phases; in a log file or CI one line of metrics every few seconds instead.

    Args:
        refresh_rate: how often per second the bar is drawn; 0 shows nothing at all.
        line_every_seconds: without a terminal, the time between two lines.
        leave: leave the finished bar of each epoch on the screen.
    """

    def __init__(self, refresh_rate: int = 10, line_every_seconds: float = 10.0, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._plain = not Console().is_terminal
        self._wants_lines = self._plain and refresh_rate > 0
        self._line_every_seconds = line_every_seconds
        self._last_line_at = 0.0
        self._started_at = 0.0
        self._phase = ""

    def disable(self) -> None:
        super().disable()
        self._wants_lines = False  # Lightning silences every rank but the first this way

    def enable(self) -> None:
        super().enable()
        self._wants_lines = self._plain and self.refresh_rate > 0

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and not self._plain

    # --- rollout phases, called by on-policy stages

    def on_rollout_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._show_phase("rollout")

    def on_rollout_phase(self, trainer: Trainer, module: LightningModule, phase: str) -> None:
        self._show_phase(phase)

    def on_rollout_end(self, trainer: Trainer, module: LightningModule, rollouts: Any) -> None:
        self._show_phase("")

    def _show_phase(self, phase: str) -> None:
        self._phase = phase
        if self.progress is not None and self.is_enabled and self.train_progress_bar_id is not None:
            description = self._get_train_description(self.trainer.current_epoch)
            self.progress.update(self.train_progress_bar_id, description=description)
            self.refresh(hard=True)

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch).rstrip()
        return f"{description} · {self._phase}" if self._phase else description

    # --- lines

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name not in HIDDEN_METRICS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started_at = time.monotonic()
        self._last_line_at = float("-inf")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_last = batch_idx + 1 == self.total_train_batches
        if self._wants_lines and (is_last or time.monotonic() - self._last_line_at >= self._line_every_seconds):
            metrics = self.get_metrics(trainer, pl_module)
            now = {name: value for name, value in metrics.items() if not name.startswith("val/")}
            self._line(trainer, f"batch {batch_idx + 1}/{self.total_train_batches}", now)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._wants_lines and trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self._line(trainer, "validated", found)

    def _line(self, trainer: Trainer, what: str, metrics: dict[str, Any]) -> None:
        self._last_line_at = time.monotonic()
        shown = " ".join(f"{name} {format_number(value)}" for name, value in metrics.items())
        seconds = self._last_line_at - self._started_at
        print(
            f"[{seconds:6.1f} s] epoch {trainer.current_epoch} {what} step {trainer.global_step}  {shown}", flush=True
        )


def format_number(value: Any) -> str:
    """Four significant digits for numbers, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
