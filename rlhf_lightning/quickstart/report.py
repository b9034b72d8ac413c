"""One HTML page about a whole chain: figures, learning curves, answers before and after. Opens without a network."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.evaluate import shown_figure
from rlhf_lightning.pipelines.files import write_text

COLOURS = {"first": "#2f6db3", "second": "#d9822b", "faint": "#b9c7d6", "ink": "#22303c", "target": "#a23b3b"}


@dataclass(frozen=True)
class Panel:
    """One small chart: up to two curves over optimiser steps."""

    title: str
    curves: Mapping[str, str]
    """Column of metrics.csv and what the chart calls it."""
    target: str | None = None
    """Dotted key of the run's config whose value is drawn as a line."""
    is_share: bool = False


PANELS = (
    Panel("Loss", {"train/loss": "training", "val/loss": "held out"}),
    Panel(
        "Next word guessed right", {"train/token_accuracy": "training", "val/token_accuracy": "held out"}, None, True
    ),
    Panel("Better answer found", {"train/accuracy": "training", "val/accuracy": "held out"}, None, True),
    Panel("Gap between better and worse", {"train/margin": "training", "val/margin": "held out"}),
    Panel("Reward-model score", {"reward/reward_model": "answers sampled"}),
    Panel("Gold score", {"reward/gold": "answers sampled"}),
    Panel("KL to the SFT model", {"rollout/kl": "nats per answer"}, "model.init_args.kl.control.init_args.target"),
    Panel("Weight of the KL", {"kl/coef": "coefficient"}),
    Panel("Grammatical answers", {"reward/grammatical": "answers sampled"}, None, True),
    Panel("Entropy", {"rollout/entropy": "nats per token"}),
    Panel("Length", {"rollout/length": "tokens per answer"}),
    Panel("Critic: variance explained", {"value/explained_variance": "of returns"}),
)
"""What is drawn of a run, where its metrics.csv has it."""

NOTES = {
    "gold": "what the annotator goes by",
    "reward_model": "what PPO was trained on",
    "kl": "distance to the SFT model, nats per answer",
    "grammatical": "answers that make a review of the language",
    "entropy": "nats per token",
    "length": "tokens, end token included",
    "finished": "ended by themselves",
    "distinct_1": "different words among all",
    "distinct_2": "different word pairs among all",
}
"""What the figures of the table mean."""


@dataclass(frozen=True)
class WriteReport:
    """Writes a self-contained report.html about the runs of a chain and the evaluation of their models."""

    evaluation: str
    """evaluation.json, as `EvaluatePolicies` writes it."""
    out: str
    """HTML file to write."""
    runs: dict[str, str] = field(default_factory=dict)
    """Name and folder of each training run, in order; its metrics.csv and config.yaml are read."""
    title: str = "Quickstart report"
    """Heading of the page."""
    gold: str = "gold"
    """Name of the score that the summary and the histogram are about."""

    def run(self) -> dict[str, str]:
        evaluation = self._evaluation()
        page = jinja2.Environment(
            loader=jinja2.PackageLoader("rlhf_lightning.quickstart", "."), autoescape=True, trim_blocks=True
        ).get_template("report.html.j2")
        html = page.render(
            title=self.title,
            evaluation=evaluation,
            cards=self._cards(evaluation),
            rows=_table(evaluation),
            histogram=self._histogram(evaluation),
            runs=[_run(name, Path(folder)) for name, folder in self.runs.items()],
            gold=self.gold,
        )
        path = write_text(self.out, html)
        print(f"report: {path.resolve()}", flush=True)
        return {"report": str(path)}

    def _evaluation(self) -> dict[str, Any]:
        path = Path(self.evaluation)
        if not path.is_file():
            raise UserError(f"there is no evaluation {path}: run EvaluatePolicies first, or mend `evaluation`")
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        figures = next(iter(evaluation["models"].values()))["figures"]
        if self.gold not in figures:
            raise UserError(f"gold={self.gold!r} is not among the figures of {path}: {', '.join(figures)}")
        return evaluation

    def _cards(self, evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
        """The numbers that the page opens with: the last model beside the reference."""
        models = evaluation["models"]
        last = list(models)[-1]
        before, after = (models[name]["figures"] for name in (evaluation["reference"], last))
        gain = (after[self.gold]["mean"] - before[self.gold]["mean"]) / (before[self.gold]["std"] or 1.0)
        cards = [
            {
                "label": f"gold score, {evaluation['reference']} → {last}",
                "value": f"{before[self.gold]['mean']:.2f} → {after[self.gold]['mean']:.2f}",
                "note": f"{gain:+.1f} standard deviations of {evaluation['reference']}",
            }
        ]
        if "grammatical" in after:
            cards.append({"label": f"grammatical, {last}", "value": f"{after['grammatical']['mean']:.1%}", "note": ""})
        cards.append({"label": f"KL, {last}", "value": f"{after['kl']['mean']:.1f}", "note": "nats per answer"})
        return cards

    def _histogram(self, evaluation: Mapping[str, Any]) -> str:
        """Gold scores of every model's answers, a row each, as an image."""
        models = {name: model["ratings"][self.gold] for name, model in evaluation["models"].items()}
        low, high = min(min(v) for v in models.values()), max(max(v) for v in models.values())
        picture = Picture(figsize=(9, 0.9 * len(models) + 0.5), layout="constrained")
        for i, (axes, (name, values)) in enumerate(
            zip(picture.subplots(len(models), sharex=True, squeeze=False)[:, 0], models.items(), strict=True)
        ):
            colour = COLOURS["second"] if i == len(models) - 1 else COLOURS["first"]
            axes.hist(values, bins=48, range=(low, high), color=colour)
            axes.axvline(sum(values) / len(values), color=COLOURS["ink"], linewidth=1.2)
            axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
            _tidy(axes)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        return _embedded(picture)


def _table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    models = evaluation["models"]
    return [
        {
            "name": key.replace("_", " "),
            "note": NOTES.get(key, ""),
            "cells": [shown_figure(key, model["figures"][key]) for model in models.values()],
        }
        for key in next(iter(models.values()))["figures"]
    ]


def _run(name: str, folder: Path) -> dict[str, str]:
    """What the page says about one training run."""
    metrics, config = folder / "metrics.csv", folder / "config.yaml"
    for path in (metrics, config):
        if not path.is_file():
            raise UserError(f"runs.{name}: {folder} holds no {path.name}; is it the folder of a finished run?")
    text = config.read_text(encoding="utf-8")
    return {"name": name, "curves": _curves(_columns(metrics), yaml.safe_load(text)), "config": text}


def _columns(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of every metric."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key and value and row.get("step"):
                    steps, values = columns.setdefault(key, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
    return columns


def _curves(columns: Mapping[str, tuple[list[float], list[float]]], config: Mapping[str, Any]) -> str:
    """The panels that a run has something for, four to a row, as an image."""
    panels = [panel for panel in PANELS if any(key in columns for key in panel.curves)]
    if not panels:
        return ""
    across = max(2, min(4, len(panels)))
    down = -(-len(panels) // across)
    picture = Picture(figsize=(9 if across == 2 else 12, 2.6 * down), layout="constrained")
    spots = picture.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(spots, panels, strict=False):
        _draw(axes, panel, columns, config)
    for axes in spots[len(panels) :]:
        axes.set_visible(False)
    return _embedded(picture)


def _draw(axes: Axes, panel: Panel, columns: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    curves = [(label, *columns[key]) for key, label in panel.curves.items() if key in columns]
    for i, (label, steps, values) in enumerate(curves):
        colour = COLOURS["second"] if i else COLOURS["first"]
        if len(values) > 24 and not i:
            axes.plot(steps, values, color=COLOURS["faint"], linewidth=0.9)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
    target = _at(config, panel.target)
    if target is not None:
        axes.axhline(float(target), color=COLOURS["target"], linestyle="--", linewidth=1.2, label=f"target {target:g}")
    if len(curves) > 1 or target is not None:
        axes.legend(frameon=False, fontsize=8, labelcolor=COLOURS["ink"])
    else:
        axes.set_xlabel(curves[0][0] + ", by step", fontsize=8, color="#667788")
    axes.set_title(panel.title, fontsize=10.5, loc="left", color=COLOURS["ink"])
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4ced8")
    axes.tick_params(colors="#667788", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a tenth of the curve, centred."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _at(config: Any, key: str | None) -> Any:
    """The value of a dotted key, or None where there is no such key."""
    for part in key.split(".") if key else ():
        config = config.get(part) if isinstance(config, Mapping) else None
    return config if key else None


def _embedded(picture: Picture) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
