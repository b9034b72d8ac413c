"""metrics.csv in the run folder: one row per logged step, kept and continued when a run is resumed."""

import csv
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


class _ContinuedWriter(ExperimentWriter):
    """Lightning's CSV writer deletes what it finds; this one goes on from it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """One row per step, however many callers log to it."""
        super().log_metrics(metrics_dict, step)
        if len(self.metrics) < 2:
            return
        before, new = self.metrics[-2:]
        if all(before.get(key, value) == value for key, value in new.items()):
            before.update(self.metrics.pop())

    def forget_from(self, step: int) -> None:
        """Drops the rows of `step` and later, which a resumed run writes again, and a row that was cut off."""
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
        rows = list(csv.DictReader(whole.splitlines()))
        kept = [row for row in rows if not row.get("step") or float(row["step"]) < step]
        if len(kept) < len(rows) or whole != text:
            partial = path.with_name(f".{path.name}.partial")
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(kept)
            partial.replace(path)

    def save_before(self, step: int) -> None:
        """Writes the rows of earlier steps, which are whole; those of `step` may still grow."""
        waiting = [row for row in self.metrics if row.get("step", 0) >= step]
        self.metrics = [row for row in self.metrics if row.get("step", 0) < step]
        self.save()
        self.metrics = waiting


class MetricsCSV(CSVLogger):
    """Writes `metrics.csv` straight into a folder.

    Args:
        folder: the run folder.
        flush_every_n_steps: rows are written to disk every so many steps.
    """

    def __init__(self, folder: str | Path, flush_every_n_steps: int = 10) -> None:
        super().__init__(save_dir=str(folder), name="", version="", flush_logs_every_n_steps=flush_every_n_steps)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        # a step's numbers come in several calls: rows go to disk when the next step begins, whole
        rows = self.experiment.metrics
        if len(rows) >= self._flush_logs_every_n_steps and rows[-1].get("step") != step:
            self.save()
        self.experiment.log_metrics(dict(metrics), step)

    @property
    def log_dir(self) -> str:
        return self._save_dir

    @property
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _ContinuedWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drops the rows of `step` and later: a resumed run will write them again."""
        self.experiment.forget_from(step)

    @rank_zero_only
    def save_before(self, step: int) -> None:
        """Writes the rows of earlier steps to disk."""
        self.experiment.save_before(step)
