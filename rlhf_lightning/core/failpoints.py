"""Named places at which a test makes a run fail; nothing happens at them unless an environment variable names one.

    RLHF_LIGHTNING_FAILPOINT=checkpoint.before_rename         kills the process that gets there
    RLHF_LIGHTNING_FAILPOINT=step.after:3:raise:1             the third time, with an error, in the process of rank 1

For tests of what survives (`tests/callbacks/test_failpoints.py`, `make faults`), not for use.
"""

import os
import signal
from collections import Counter

from rlhf_lightning.core.errors import UserError

VARIABLE = "RLHF_LIGHTNING_FAILPOINT"

POINTS = {
    "checkpoint.before_write": "nothing of a checkpoint is on disk",
    "checkpoint.mid_write": "a part of it is",
    "checkpoint.before_fsync": "all of it is written, under its temporary name",
    "checkpoint.after_fsync": "and on the disk",
    "checkpoint.before_prune": "the one before the last is still there",
    "checkpoint.after_prune": "the last one has taken its name",
    "checkpoint.before_rename": "the manifest knows a checkpoint that is not in its place yet",
    "checkpoint.after_rename": "it is in its place, and the manifest still names the old one too",
    "checkpoint.after_commit": "it is in its place and the only one in the manifest",
    "manifest.before_write": "a manifest is about to be replaced",
    "manifest.before_rename": "the new one is on the disk, under its temporary name",
    "manifest.after_rename": "it has taken its place",
    "metrics.before_write": "rows of metrics.csv wait for the checkpoint of their step",
    "metrics.after_write": "they are in the file, and the checkpoint is not there",
    "samples.before_write": "answers wait to be appended to samples.jsonl",
    "samples.after_write": "they are in the file",
    "collect.before": "a rollout begins",
    "collect.after": "a rollout is ready, and nothing was trained on it",
    "score.before": "answers are sampled and not scored",
    "score.after": "they are scored",
    "ahead.before": "answers to the next prompts are about to be sampled while the policy is trained",
    "ahead.after": "they are sampled, and nobody has asked for them",
    "step.before": "an optimiser step begins",
    "step.before_update": "gradients are there, weights as they were",
    "step.after": "weights have moved, the trainer has not counted the step",
    "export.before": "training is over, nothing exported",
    "export.after": "the export is written, the process still there",
}
"""Every place, and how things stand there."""

ACTIONS = ("kill", "stop", "raise")
"""SIGKILL, SIGSTOP, or an error."""

_reached: Counter[str] = Counter()
"""How often this process was at each place, counted while the variable is set."""


class FailpointError(RuntimeError):
    """What `raise` raises."""


def failpoint(name: str) -> None:
    """Fails here if that is what the environment asks for; else costs a look at the environment."""
    if VARIABLE in os.environ:
        _reach(name, os.environ[VARIABLE])


def _reach(name: str, spec: str) -> None:
    wanted, hit, action, rank = parse(spec)
    _reached[name] += 1
    if name != wanted or _reached[name] != hit or rank not in (None, int(os.environ.get("LOCAL_RANK", "0"))):
        return
    if action == "raise":
        raise FailpointError(f"{VARIABLE}={spec}")
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


def parse(spec: str) -> tuple[str, int, str, int | None]:
    """Name, which time, action and rank of `NAME[:TIME[:ACTION[:RANK]]]`.

    Raises:
        UserError: for a name or action that there is not.
    """
    name, hit, action, rank = [*spec.split(":"), *[""] * 3][:4]
    if name not in POINTS:
        raise UserError(f"{VARIABLE}={spec}: there is no failpoint {name!r}; choose one of {', '.join(POINTS)}")
    if (action or "kill") not in ACTIONS or not (hit or "1").isdigit() or not (rank or "0").isdigit():
        raise UserError(f"{VARIABLE}={spec}: write NAME:TIME:ACTION:RANK, with an action of {', '.join(ACTIONS)}")
    return name, int(hit or "1"), action or "kill", int(rank) if rank else None
