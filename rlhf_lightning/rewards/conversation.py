"""Samples of conversational records: what was said before, as messages."""

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.core.interfaces import Sample


def prompt_messages(sample: Sample) -> list[Mapping[str, Any]] | None:
    """The messages that the sample answers; None if its record's prompt is a string.

    A record whose only prompt is `messages` is answered from its last message that is not the assistant's.
    """
    prompt = sample.record.get("prompt")
    if isinstance(prompt, list):
        return prompt
    messages = sample.record.get("messages")
    if prompt is not None or not isinstance(messages, list):
        return None
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
