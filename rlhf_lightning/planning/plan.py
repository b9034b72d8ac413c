"""What a run needs, what fits, and what to set so that it fits."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_lightning.core.batches import PairRollouts, Rollouts
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.planning.phases import FEW_BITS, FROZEN, OPTIMISER, WEIGHTS, Run, Simulation
from rlhf_lightning.planning.shapes import Lengths, lengths_of
from rlhf_lightning.planning.trace import Peak

USABLE = 0.9
"""Share of the memory that is planned with: an allocator loses some to fragments, and the driver takes its own."""
MOST = 65536
"""No larger batch is looked for."""
SEVERAL_ROWS = ("pairs", "triples", "ranked", "mismatched")
"""Formats whose records are more than one row each."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Sizes:
    """How much a run computes at a time; None: it has no such phase."""

    train: int
    """Units of a micro-batch."""
    step: int
    """Units of an optimiser step in one process."""
    unit: str
    rollout: int | None = None
    """Answers that are collected at once."""
    measure: int | None = None
    """Of them those that are measured in one pass."""
    generate: int | None = None
    """Of them those that are generated in one batch."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run at its fullest."""

    name: str
    """generate, score, measure or train."""
    at_once: int
    unit: str
    peak: Peak


@dataclass(frozen=True)
class Plan:
    """The answer to whether a run fits."""

    stage: str
    run: Run
    lengths: Lengths
    memory: int
    """Bytes of the card."""
    phases: list[Phase]
    largest: Mapping[str, int]
    """The most that fits at a time: train, train with gradient checkpointing, measure, generate."""
    proposal: Mapping[str, Any] | None
    """Options that let the run fit, its optimiser steps as large as they are; None: nothing does."""
    floor: int
    """Bytes of weights, gradients, the optimiser's state and frozen models: what no batch size changes."""
    notes: list[str] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Bytes that are planned with."""
        return int(self.memory * USABLE)

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase, as the run is configured."""
        return max(phase.peak.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether the run fits as it is configured."""
        return self.peak <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers and strings."""
        known = asdict(self) | {"budget": self.budget, "peak": self.peak, "fits": self.fits}
        known["run"]["param_dtype"] = None if self.run.param_dtype is None else str(self.run.param_dtype)
        return known


def bytes_of(text: str) -> int:
    """80GB, 79.2 GiB, 24g: bytes.

    Raises:
        UserError: it is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--memory {text!r} is no amount of memory: give one like 80GB, 24GiB or 512MB")
    size = int(float(match[1]) * UNITS[match[2] or ""])
    if size < 10**6:
        raise UserError(f"--memory {text!r} is less than a megabyte: give one like 80GB, 24GiB or 512MB")
    return size


def make_plan(
    module: Any, data: RLHFDataModule, run: Run, memory: int, length: int | None = None, *, search: bool = True
) -> Plan:
    """Predict what a stage will need on one device, and what of it fits.

    Args:
        module: the stage, not built.
        data: its records; their options too.
        run: the trainer's options.
        memory: bytes of the device.
        length: tokens of a row; None: the longest of the data.
        search: also what is the most that fits, and propose.
    """
    lengths = lengths_of(module, data, length)
    sizes = sizes_of(module, data, run, lengths)
    # a rollout that is cut is cut anywhere: answers to one prompt need not lie together
    usual = Simulation(module, run, lengths, rollout=sizes.rollout if sizes.train == sizes.rollout else None)
    phases = _phases(usual, sizes)
    notes = list(usual.notes)
    checkpointing = module.model_spec.gradient_checkpointing
    largest, proposal = {}, None
    if search:
        largest = _largest(usual, sizes, int(memory * USABLE), module, notes)
        proposal = propose(module, data, run, sizes, largest, checkpointing)
    trained = phases[-1].peak.parts
    return Plan(
        stage=type(module).__name__,
        run=run,
        lengths=lengths,
        memory=memory,
        phases=phases,
        largest=largest,
        proposal=proposal,
        floor=sum(trained.get(name, 0) for name in (WEIGHTS, FEW_BITS, OPTIMISER, FROZEN)) + usual.gradient_bytes,
        notes=notes,
    )


def _largest(usual: Simulation, sizes: Sizes, budget: int, module: Any, notes: list[str]) -> dict[str, int]:
    """The most of every phase that fits; notes what could not be looked at."""
    largest = {}
    for name, on in (("train", False), ("train with gradient checkpointing", True)):
        try:
            same = on == module.model_spec.gradient_checkpointing
            simulation = usual if same else Simulation(module, usual.run, usual.lengths, checkpointing=on)
        except ValueError as error:
            notes.append(f"gradient checkpointing: {str(error).splitlines()[0]}")
            continue
        largest[name] = largest_that_fits(lambda n, it=simulation: it.train(n).total, budget)  # type: ignore[misc]
    if sizes.measure is not None:
        largest["measure"] = largest_that_fits(lambda n: _total(usual.measure(n)), budget)
    if sizes.generate is not None:
        largest["generate"] = largest_that_fits(lambda n: usual.generate(n).total, budget)
    return largest


def sizes_of(module: Any, data: RLHFDataModule, run: Run, lengths: Lengths) -> Sizes:
    """What the options say is computed at a time."""
    options = data.options
    unit = {"pairs": "pair", "triples": "pair", "ranked": "ranking"}.get(module.batch_format, "sequence")
    if module.batch_format != "prompts":
        size = options["batch_size"]
        if options["tokens_per_batch"]:
            cells = lengths.row * (lengths.rows if module.batch_format in SEVERAL_ROWS else 1)
            size = max(options["tokens_per_batch"] // cells, 1)
        measured = size if module.batch_format in SEVERAL_ROWS else None
        return Sizes(size, size * run.accumulate, unit, measure=measured)
    rows = options["batch_size"] * module.generation.num_samples
    pairs = module.rollout_kind is PairRollouts
    units = max(rows // 2, 1) if pairs else rows
    step = -(-units // module.updates.num_minibatches)
    return Sizes(
        train=-(-step // run.accumulate),
        step=step,
        unit="pair" if pairs else "sequence",
        rollout=rows,
        measure=None if module.rollout_kind is not Rollouts else min(module.rows_at_once or rows, rows),
        generate=min(module.generation.rows_at_once or rows, rows),
    )


def _phases(simulation: Simulation, sizes: Sizes) -> list[Phase]:
    answers = "answer" if sizes.rollout is not None else sizes.unit
    asked: list[tuple[str, int | None, str, Callable[[int], Peak | None]]] = [
        ("generate", sizes.generate, answers, simulation.generate),
        ("score", sizes.rollout, answers, simulation.score),
        ("measure", sizes.measure, answers, simulation.measure),
        ("train", sizes.train, sizes.unit, simulation.train),
    ]
    found = [(name, n, unit, run(n)) for name, n, unit, run in asked if n is not None]
    return [Phase(name, n, unit, peak) for name, n, unit, peak in found if peak is not None]


def _total(peak: Peak | None) -> int:
    return 0 if peak is None else peak.total


def largest_that_fits(size: Callable[[int], int], budget: int, most: int = MOST) -> int:
    """The largest n with size(n) <= budget, up to `most`; 0: not even 1. `size` rises, nearly in a straight line."""
    first = size(1)
    if first > budget:
        return 0
    low, high, guess = 1, most + 1, 2
    for attempt in range(64):
        found = size(guess)
        low, high = (guess, high) if found <= budget else (low, guess)
        if high - low <= 1:
            break
        slope = (found - first) / (guess - 1)
        line = most if slope <= 0 else int(1 + (budget - first) / slope)
        # a line that does not get there gives way to halving
        guess = min(max(line, low + 1), high - 1) if attempt < 8 else (low + high) // 2
    return low


def propose(
    module: Any, data: RLHFDataModule, run: Run, sizes: Sizes, largest: Mapping[str, int], checkpointing: bool
) -> dict[str, Any] | None:
    """Options that let a run fit, with optimiser steps of the size that they have.

    Activations are kept if a quarter of the step then fits at a time, else computed again: what checkpointing costs is
    about a third of the time, what very small micro-batches cost is more.
    """
    plain, again = (largest.get(name, 0) for name in ("train", "train with gradient checkpointing"))
    on = checkpointing if (again if checkpointing else plain) >= sizes.train else plain < -(-sizes.step // 4)
    room = again if on else plain
    if room == 0 or largest.get("generate", 1) == 0 or largest.get("measure", 1) == 0:
        return None
    accumulate = run.accumulate if room >= sizes.train else math.ceil(sizes.step / room)
    name = "model" if module.batch_format != "prompts" and not hasattr(module, "policy") else "policy"
    proposal: dict[str, Any] = {f"model.{name}.gradient_checkpointing": on}
    if module.batch_format == "prompts":
        proposal["trainer.accumulate_grad_batches"] = accumulate
        for key, asked, fits in (
            ("model.rows_at_once", sizes.measure, largest.get("measure")),
            ("model.generation.rows_at_once", sizes.generate, largest.get("generate")),
        ):
            if asked is not None and fits is not None and fits < asked:
                proposal[key] = fits
        return proposal
    micro = sizes.train if accumulate == run.accumulate else math.ceil(sizes.step / accumulate)
    if data.options["tokens_per_batch"]:
        proposal["data.tokens_per_batch"] = data.options["tokens_per_batch"] * micro // sizes.train
    else:
        proposal["data.batch_size"] = micro
    return proposal | {"trainer.accumulate_grad_batches": accumulate}
