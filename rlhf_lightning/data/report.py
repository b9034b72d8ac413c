"""What became of the data: read, kept, cut, left out and why. Logged and written: nothing is lost in silence."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


@dataclass
class DataReport:
    """Counts over one data set (training or validation)."""

    name: str
    read: int = 0
    """Records in the sources."""
    kept: int = 0
    """Records that are used (a split text counts as its pieces)."""
    truncated: int = 0
    """Records cut to fit max_length or max_prompt_length."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records not used, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """What else is worth knowing, and how many records it concerns."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few places for each reason."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each kept row."""
    trained: int = 0
    """Tokens that count."""

    def leave_out(self, reason: str, place: str) -> None:
        self.left_out[reason] += 1
        self._example(reason, place)

    def note(self, reason: str, place: str) -> None:
        self.notes[reason] += 1
        self._example(reason, place)

    def cut(self, place: str) -> None:
        self.truncated += 1
        self._example("truncated", place)

    def _example(self, reason: str, place: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < 5:
            places.append(place)

    def as_dict(self) -> dict[str, object]:
        """Everything as plain numbers and strings."""
        lengths = np.asarray(self.lengths or [0])
        return {
            "read": self.read,
            "kept": self.kept,
            "truncated": self.truncated,
            "left_out": dict(self.left_out),
            "notes": dict(self.notes),
            "examples": self.examples,
            "tokens": int(lengths.sum()),
            "trained_tokens": self.trained,
            "length": {
                "mean": round(float(lengths.mean()), 1),
                "median": float(np.median(lengths)),
                "p95": float(np.percentile(lengths, 95)),
                "max": int(lengths.max()),
            },
        }

    def lines(self) -> list[str]:
        """The report in words: one line of figures, then one for each thing that happened to records."""
        figures = self.as_dict()
        length = figures["length"]
        assert isinstance(length, dict)
        lines = [
            f"{self.name}: {self.kept} of {self.read} records, {figures['tokens']} tokens ({self.trained} trained), "
            f"length {length['mean']:.0f} mean, {length['max']} max"
        ]
        happened = Counter({"truncated": self.truncated}) + Counter(
            {f"left out: {reason}": count for reason, count in self.left_out.items()}
        )
        for what, count in (happened + self.notes).items():
            places = self.examples.get(what.removeprefix("left out: "), [])
            lines.append(f"{self.name}: {count} {what} ({', '.join(places[:2])}{', ...' if count > 2 else ''})")
        return lines

    def log(self) -> None:
        """Figures as information, whatever happened to records as a warning."""
        first, *rest = self.lines()
        log.info(first)
        for line in rest:
            log.warning(line)


def write_reports(reports: list[DataReport], folder: Path) -> Path:
    """All reports as data_report.json in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data_report.json"
    path.write_text(json.dumps({report.name: report.as_dict() for report in reports}, indent=2, ensure_ascii=False))
    return path
