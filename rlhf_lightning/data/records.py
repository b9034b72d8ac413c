"""What a record must hold, by the batch format it is read for; every fault is named with its place."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.data.readers import closest
from rlhf_lightning.data.templates import Messages

KINDS: dict[BatchFormat, tuple[tuple[str, ...], ...]] = {
    "tokens": (("messages",), ("prompt", "completion"), ("text",)),
    "pairs": (("chosen", "rejected"),),
    "triples": (("chosen", "rejected", "gold"),),
    "ranked": (("prompt", "completions", "ranks"),),
    "rated": (("prompt", "completion", "rating"),),
    "unpaired": (("prompt", "completion", "label"),),
    "mismatched": (("prompt", "completion", "label"),),
    "steps": (("prompt", "completions", "labels"),),
    "prompts": (("prompt",), ("messages",)),
}
"""Columns that each batch format can be made of, the first that is there wins."""


def record_kind(columns: Sequence[str], batch_format: BatchFormat, label: str) -> tuple[str, ...]:
    """Which columns of a source are read.

    Args:
        columns: what the source has.
        batch_format: what the stage wants.
        label: of the source, for the message.
    """
    for kind in KINDS[batch_format]:
        if set(kind) <= set(columns):
            return kind

    # the fewest missing; of two, what has a column, or one of nearly its name
    def distance(kind: Sequence[str]) -> tuple[int, int]:
        missing = set(kind) - set(columns)
        return len(missing), -len(kind) - sum(bool(closest(name, columns)) for name in missing)

    nearest = min(KINDS[batch_format], key=distance)
    missing = [name for name in nearest if name not in columns]
    hints = ", ".join(f"{name}{closest(name, columns)}" for name in missing)
    renamed = ", ".join(f"{name}: <name in your data>" for name in missing)
    wanted = " or ".join("+".join(kind) for kind in KINDS[batch_format])
    raise UserError(
        f"{label}: missing column{'s' * (len(missing) > 1)} {hints}: this stage reads {batch_format} ({wanted}), "
        f"the columns here are {', '.join(columns)}. Rename in the source: {{path: ..., columns: {{{renamed}}}}}"
    )


def check_record(record: Mapping[str, Any], kind: Sequence[str], place: str) -> None:
    """Raise a UserError that names the place, the column and its value if the record cannot be used."""
    for name in kind:
        if name not in record:
            there = list(record)
            raise UserError(f"{place}: missing column {name}{closest(name, there)}; this record has {', '.join(there)}")
        _CHECKS[name](record[name], name, place)
    if "prompt" in record and "prompt" not in kind and record["prompt"] is not None:
        _prompt(record["prompt"], "prompt", place)
    if record.get("margin") is not None and "chosen" in kind:
        _number(record["margin"], "margin", place)
    if "completions" in kind:
        other = "ranks" if "ranks" in kind else "labels"
        if len(record["completions"]) != len(record[other]):
            raise UserError(
                f"{place}: {len(record['completions'])} completions but {len(record[other])} {other}: give one each"
            )
        if other == "ranks" and len(record["completions"]) < 2:
            raise UserError(f"{place}: a ranking needs at least 2 completions, this record has 1")


def content_strings(record: Mapping[str, Any], kind: Sequence[str]) -> list[str]:
    """Every text that people wrote in the columns that are read."""
    found: list[str] = []
    for name in {*kind, "prompt"}:
        value = record.get(name)
        for item in value if isinstance(value, list) else [value]:
            text = item.get("content") if isinstance(item, Mapping) else item
            found += [text] if isinstance(text, str) else []
    return found


def _text(value: Any, name: str, place: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {value!r:.60}, a string is needed")
    if not value.strip():
        raise UserError(f"{place}: {name} is empty")
    _utf8(value, name, place)


def _prompt(value: Any, name: str, place: str) -> None:
    if isinstance(value, str):
        _utf8(value, name, place)
    else:
        _messages(value, name, place)


def _completion(value: Any, name: str, place: str) -> None:
    if isinstance(value, str):
        _text(value, name, place)
        return
    _messages(value, name, place)
    last: Any = value[-1]
    if last["role"] == "assistant" and not last.get("content") and not last.get("tool_calls"):
        raise UserError(f"{place}: {name} is empty: its last message has no content")


def _messages(value: Any, name: str, place: str) -> None:
    if not isinstance(value, list):
        raise UserError(f"{place}: {name} is {value!r:.60}, a string or a list of messages is needed")
    if not value:
        raise UserError(f"{place}: {name} is an empty list")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{place}: message {i} of {name} is {message!r:.60}, {{role: ..., content: ...}} is needed")
        if isinstance(message.get("content"), str):
            _utf8(message["content"], f"message {i} of {name}", place)
        elif not message.get("tool_calls") and not isinstance(message.get("content"), list):
            raise UserError(f"{place}: message {i} of {name} has no content")


def _conversation(value: Any, name: str, place: str) -> None:
    _messages(value, name, place)
    answers = [message for message in value if message["role"] == "assistant"]
    for message in answers:
        content = message.get("content")
        if not message.get("tool_calls") and not (content.strip() if isinstance(content, str) else content):
            raise UserError(f"{place}: an assistant's message in {name} is empty")


def _completions(value: Any, name: str, place: str) -> None:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {name} is {value!r:.60}, a list is needed")
    for i, completion in enumerate(value):
        _completion(completion, f"{name}[{i}]", place)


def _number(value: Any, name: str, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: {name} is {value!r}, a finite number is needed")


def _ranks(value: Any, name: str, place: str) -> None:
    if not isinstance(value, list):
        raise UserError(f"{place}: {name} is {value!r:.60}, a list of numbers is needed (1 = best)")
    for i, rank in enumerate(value):
        _number(rank, f"{name}[{i}]", place)


def _label(value: Any, name: str, place: str) -> None:
    if value not in (True, False, 0, 1):
        raise UserError(f"{place}: {name} is {value!r}, true (desirable) or false is needed")


def _labels(value: Any, name: str, place: str) -> None:
    if not isinstance(value, list):
        raise UserError(f"{place}: {name} is {value!r:.60}, a list with one label per step is needed")
    for i, label in enumerate(value):
        if label is None or isinstance(label, bool):
            continue
        _number(label, f"{name}[{i}]", place)
        if not 0 <= label <= 1:
            raise UserError(
                f"{place}: {name}[{i}] is {label!r}, and a step is right with a probability from 0 to 1 (true, false; "
                "null = not judged): map other labels first"
            )


def _utf8(value: str, name: str, place: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {name} holds a lone surrogate at character {error.start}") from error


_CHECKS = {
    "text": _text,
    "messages": _conversation,
    "prompt": _prompt,
    "completion": _completion,
    "chosen": _completion,
    "rejected": _completion,
    "gold": _completion,
    "completions": _completions,
    "ranks": _ranks,
    "labels": _labels,
    "label": _label,
    "rating": _number,
}


def split_prompt(chosen: str | Messages, rejected: str | Messages) -> tuple[Any, Any, Any]:
    """The prompt that two answers share, and the two rests.

    Messages share their equal beginning. Strings share it up to the last "Assistant:" in it if there is one
    (transcripts), else up to the last blank, so that no word is cut.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not isinstance(chosen, str):
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        return chosen[:shared], chosen[shared:], rejected[shared:]
    prefix = chosen[:shared]
    turn = prefix.rfind("\n\nAssistant:")
    if turn >= 0:
        shared = turn + len("\n\nAssistant:")
    elif shared < max(len(chosen), len(rejected)):
        shared = max(prefix.rfind(" "), prefix.rfind("\n") + 1, 0)
    return chosen[:shared], chosen[shared:], rejected[shared:]
