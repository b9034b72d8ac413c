"""One reward function asked about a batch: called within its time limit, its answers checked, sample by sample."""

import asyncio
import inspect
import logging
import math
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample

logger = logging.getLogger(__name__)

OnError = Literal["error", "drop", "zero"]
"""What becomes of a sample that a function cannot score: the run stops, the sample carries no loss, it scores 0."""
EXCERPT = 60
"""Characters of a prompt or completion that a message quotes."""
TOLD = 3
"""Failed samples that one call's warnings name; the others are counted."""
REMEDY = "; on_error: drop or zero goes on without it"


@dataclass(frozen=True)
class Answers:
    """What one function said about a batch, checked."""

    scores: list[float] | list[Tensor]
    """A number for each sample, or for each sample a number per token; 0 for those that failed."""
    parts: dict[str, list[float]]
    """Numbers behind the scores, by name."""
    failed: dict[int, str]
    """Samples that it could not score, and why."""
    invalid: list[int]
    """Samples that it asks to be dropped."""


class _Fault(Exception):
    """What a function did wrong, in words; `sample` is its index, None where the whole batch is concerned."""

    def __init__(self, what: str, sample: int | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.sample = sample


class _TimeOut(Exception):
    """The time limit passed before the function answered."""


def ask(
    name: str, reward: RewardFn, samples: Sequence[Sample], *, on_error: OnError, timeout_s: float | None
) -> Answers:
    """The scores of one function.

    A batch that it raises or hangs on, or answers in a wrong shape, is asked again one sample at a time, so that only
    the guilty ones fail. A function that hangs cannot be killed: its thread is left behind.

    Raises:
        UserError: it raised or hung, or returned nothing, the wrong number of scores or one that is no finite number,
            and `on_error` is "error". Names the function and the sample.
    """
    try:
        given = [_answers(name, reward, samples, timeout_s)]
    except _Fault as fault:
        if on_error == "error":
            raise UserError(_blame(name, fault, reward, samples, timeout_s) + REMEDY) from fault.__cause__
        given = [_alone(name, reward, samples, i, timeout_s) for i in range(len(samples))]
    values = [value for entry in given for value in entry.values]
    faults = {i: value.what for i, value in enumerate(values) if isinstance(value, _Fault)}
    if faults and on_error == "error":
        raise UserError(f"reward function {name} {faults[min(faults)]}{REMEDY}")
    _warn(name, faults, samples, on_error)
    names = dict.fromkeys(part for entry in given for part in entry.parts)
    return Answers(
        scores=_without_faults(values, samples),
        parts={part: [x for e in given for x in e.parts.get(part, [0.0] * len(e.values))] for part in names},
        failed=faults,
        invalid=[i for i, valid in enumerate(valid for entry in given for valid in entry.valid) if not valid],
    )


def describe(index: int, samples: Sequence[Sample]) -> str:
    """The sample's index, prompt and completion, for a message."""
    sample = samples[index]
    return f"sample {index} (prompt {_shorten(sample.prompt)}, completion {_shorten(sample.completion)})"


# ---- calling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """A number, a tensor of token scores or a fault for each sample, and what else came with them."""

    values: list[float | Tensor | _Fault]
    parts: dict[str, list[float]]
    valid: list[bool]


def _answers(name: str, reward: RewardFn, samples: Sequence[Sample], timeout_s: float | None) -> _Given:
    try:
        returned = _call(reward, samples, timeout_s)
    except (UserError, torch.OutOfMemoryError):
        raise
    except _TimeOut:
        raise _Fault(f"did not answer within timeout_s={timeout_s:g} seconds") from None
    except (Exception, SystemExit) as error:
        raise _Fault(f"raised {_describe_error(error)}") from error
    parts: dict[str, list[float]] = {}
    valid = [True] * len(samples)
    if isinstance(returned, DetailedScores):
        parts = {part: _numbers(f"{name}/{part}", numbers, samples) for part, numbers in returned.parts.items()}
        valid = valid if returned.valid is None else [bool(v) for v in _as_list(returned.valid, samples)]
        returned = returned.scores
    values = _as_list(returned, samples)
    if any(isinstance(value, list) for value in values):
        return _Given([_token_scores(value, i, samples) for i, value in enumerate(values)], parts, valid)
    return _Given([_number(value, i, samples) for i, value in enumerate(values)], parts, valid)


def _call(reward: RewardFn, samples: Sequence[Sample], timeout_s: float | None) -> Any:
    if timeout_s is not None:
        return _in_thread(lambda: _settled(reward(samples), timeout_s), timeout_s)
    returned = reward(samples)
    # in a thread of its own: the caller may stand in an event loop already (a notebook)
    return _in_thread(lambda: _settled(returned, None), None) if inspect.isawaitable(returned) else returned


def _settled(returned: Any, timeout_s: float | None) -> Any:
    """What an async function returns in the end; cancelled at the limit."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await returned
        except TimeoutError as error:
            raise _TimeOut if limit.expired() else error from None

    return asyncio.run(wait())


def _in_thread(work: Callable[[], Any], timeout_s: float | None) -> Any:
    """The result of `work`; a thread still busy at the limit is left behind."""
    outcomes: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            with torch.no_grad():  # threads begin with gradients on
                outcomes.put((True, work()))
        except BaseException as error:  # handed to the waiting thread, which raises it
            outcomes.put((False, error))

    threading.Thread(target=run, daemon=True, name="reward").start()
    try:
        # an async function is cancelled at the limit and says so a moment later
        succeeded, outcome = outcomes.get(timeout=None if timeout_s is None else timeout_s + 0.25)
    except queue.Empty:
        raise _TimeOut from None
    if not succeeded:
        raise outcome
    return outcome


def _alone(name: str, reward: RewardFn, samples: Sequence[Sample], index: int, timeout_s: float | None) -> _Given:
    try:
        given = _answers(name, reward, samples[index : index + 1], timeout_s)
    except _Fault as fault:
        return _Given([_Fault(f"{fault.what} on {describe(index, samples)}", index)], {}, [True])
    (value,) = given.values
    if isinstance(value, _Fault):  # names the sample by its place in the batch, not in the call
        value = _Fault(value.what.replace("sample 0", f"sample {index}", 1), index)
    return _Given([value], given.parts, given.valid)


def _blame(name: str, fault: _Fault, reward: RewardFn, samples: Sequence[Sample], timeout_s: float | None) -> str:
    """The fault of a whole batch, with the first sample that shows it by itself."""
    if not fault.what.startswith(("raised", "did not answer")):
        return f"reward function {name} {fault.what}"
    for index in range(len(samples)):
        try:
            _answers(name, reward, samples[index : index + 1], timeout_s)
        except _Fault as alone:
            if alone.what.startswith(("raised", "did not answer")):
                return f"reward function {name} {fault.what} on {describe(index, samples)}"
    return f"reward function {name} {fault.what} on the whole batch, though on no sample alone"


def _warn(name: str, faults: dict[int, str], samples: Sequence[Sample], on_error: OnError) -> None:
    becomes = "dropped" if on_error == "drop" else "given 0"
    for index in sorted(faults)[:TOLD]:
        logger.warning("reward function %s %s: the sample is %s", name, faults[index], becomes)
    if len(faults) > TOLD:
        logger.warning("reward function %s: %d of %d samples are %s", name, len(faults), len(samples), becomes)


# ---- checking -------------------------------------------------------------------------------------------------------


def _as_list(returned: Any, samples: Sequence[Sample]) -> list[Any]:
    """One entry per sample: a number or a list, not yet checked."""
    if isinstance(returned, Tensor | np.ndarray):
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise _Fault(f"returned {_shorten(returned)}: a list of {len(samples)} numbers is needed, one per sample")
    if len(returned) != len(samples):
        first = f"; nothing for {describe(len(returned), samples)}" if len(returned) < len(samples) else ""
        raise _Fault(f"returned {len(returned)} scores for {len(samples)} samples{first}")
    return [_plain(value) for value in returned]


def _plain(value: Any) -> Any:
    """Tensors, arrays and tuples as Python numbers and lists."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any, index: int, samples: Sequence[Sample]) -> float | _Fault:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return _Fault(f"returned {_shorten(value)} for {describe(index, samples)}: a finite number is needed", index)
    return float(value)


def _token_scores(value: Any, index: int, samples: Sequence[Sample]) -> Tensor | _Fault:
    wanted = len(samples[index].tokens)
    if not isinstance(value, list):
        return _Fault(
            f"returned {_shorten(value)} for {describe(index, samples)}, but lists for others: "
            "give one number per sample, or one list per sample",
            index,
        )
    if len(value) != wanted:
        return _Fault(
            f"returned {len(value)} token scores for {describe(index, samples)}, which has {wanted} tokens", index
        )
    numbers = [_number(_plain(entry), index, samples) for entry in value]
    fault = next((number for number in numbers if isinstance(number, _Fault)), None)
    return torch.tensor(numbers, dtype=torch.float32) if fault is None else fault


def _numbers(name: str, numbers: Any, samples: Sequence[Sample]) -> list[float]:
    """The numbers behind a score: a fault in them is one of the function as a whole."""
    checked = [_number(value, i, samples) for i, value in enumerate(_as_list(numbers, samples))]
    for number in checked:
        if isinstance(number, _Fault):
            raise _Fault(f"{number.what} (its part {name})")
    return [float(number) for number in checked]  # type: ignore[arg-type]


def _without_faults(values: Sequence[float | Tensor | _Fault], samples: Sequence[Sample]) -> list[float] | list[Tensor]:
    """0 where a sample failed: one number, or one per token where the others have that."""
    if any(isinstance(value, Tensor) for value in values):
        zeros = [torch.zeros(len(sample.tokens)) for sample in samples]
        return [value if isinstance(value, Tensor) else zero for value, zero in zip(values, zeros, strict=True)]
    return [value if isinstance(value, float) else 0.0 for value in values]


def _describe_error(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
