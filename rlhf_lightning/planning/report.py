"""A plan as text."""

from rlhf_lightning.planning.phases import (
    BUCKETS,
    CACHE,
    FEW_BITS,
    FROZEN,
    GATHERED,
    GRADIENTS,
    OPTIMISER,
    STEP,
    WEIGHTS,
)
from rlhf_lightning.planning.plan import USABLE, Phase, Plan
from rlhf_lightning.planning.trace import LOGITS, OTHER, SCRATCH

COLUMNS = (WEIGHTS, FEW_BITS, GRADIENTS, OPTIMISER, FROZEN, GATHERED, BUCKETS, CACHE, LOGITS, OTHER)


def report(plan: Plan) -> str:
    """Phases as a table, what fits, and what to set."""
    run, lines = plan.run, []
    where = "one process" if run.processes == 1 else f"each of {run.processes} processes ({run.strategy})"
    lines.append(f"{plan.stage}, {plan.lengths.origin}: peak memory of {where}, {run.device}, {run.precision}")
    lines += ["", *_table(plan), ""]
    lines += [f"note: {note}" for note in plan.notes]
    room = f"{_size(plan.budget)} of {_size(plan.memory)} ({1 - USABLE:.0%} left for what is not counted)"
    lines.append(f"The run {'fits' if plan.fits else 'does not fit'}: {_size(plan.peak)} of {room}.")
    for name, most in plan.largest.items():
        unit = plan.phases[-1].unit if name.startswith("train") else plan.phases[0].unit
        lines.append(f"Largest that fits, {name}: {most} {unit}{'s' if most != 1 else ''} at a time")
    if plan.proposal is not None:
        options = " ".join(f"--{key} {_value(value)}" for key, value in plan.proposal.items())
        lines += ["", f"Proposal, with optimiser steps of the same size:\n  {options}"]
    return "\n".join(lines)


def does_not_fit(plan: Plan) -> str:
    """Why nothing that changes batches helps."""
    return (
        f"nothing fits in {_size(plan.budget)} ({USABLE:.0%} of {_size(plan.memory)}): without any batch weights, "
        f"gradients, optimiser and frozen models take {_size(plan.floor)}. Set lora or dtype: bfloat16 of the model, "
        "another optimiser, more processes with strategy: fsdp2, or a smaller --length"
    )


def _table(plan: Plan) -> list[str]:
    used = [name for name in COLUMNS if any(phase.peak.parts.get(name) for phase in plan.phases)]
    rest = any(phase.peak.parts.get(name) for phase in plan.phases for name in (SCRATCH, STEP))
    header = ["phase", "at a time", *used, *(["operations"] if rest else []), "peak"]
    rows = [header]
    for phase in plan.phases:
        parts = phase.peak.parts
        inside = [_size(parts.get(SCRATCH, 0) + parts.get(STEP, 0))] if rest else []
        rows.append(
            [phase.name, _at_once(phase), *(_size(parts.get(n, 0)) for n in used), *inside, _size(phase.peak.total)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return ["  ".join(_aligned(row, widths)) for row in rows]


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    """Names to the left, sizes to the right."""
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]


def _at_once(phase: Phase) -> str:
    return f"{phase.at_once} {phase.unit}{'s' if phase.at_once != 1 else ''}"


def _size(size: int) -> str:
    """Bytes in words: 1.23 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
