"""Chat templates: which characters of a rendered conversation are whose, with no `{% generation %}` needed.

The conversation is rendered twice: as it is, and with a private-use marker in place of each message. The markers show
where the template puts each message, whether it reorders, strips or drops them; what lies between is the template's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.text import Part, TextEncoder

Message = Mapping[str, Any]
Messages = Sequence[Message]

_MARKER = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class _Skeleton:
    """A rendered conversation without its texts: literals[0], message order[0], literals[1], ..."""

    literals: tuple[str, ...]
    order: tuple[int, ...]


def conversation_parts(
    encoder: TextEncoder, messages: Messages, *, first_answer: int = 0, only_last: bool = False, tools: Any = None
) -> list[Part]:
    """A conversation as parts; an answer is an assistant's text and the end of its turn, as the template writes it.

    Args:
        encoder: of the tokenizer whose chat template is used.
        messages: the conversation.
        first_answer: index of the first message that may be trained; earlier ones belong to the prompt.
        only_last: train the last assistant's turn alone.
        tools: passed to the template.
    Returns:
        Parts in the order of the rendered text, up to the end of the last answer: what a template writes behind it
        (a line break) is nothing that the model is ever asked for.
    """
    messages = check_messages(messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first_answer]
    if only_last:
        answers = answers[-1:]
    text = render(encoder, messages, tools=tools)
    skeleton = _skeleton(encoder, messages, tools)
    contents = _match(skeleton, messages, text)
    if contents is None:
        return _cut_tail(_parts_by_difference(encoder, messages, text, answers, tools))
    parts = [Part(skeleton.literals[0], is_content=False)]
    turn_end = _turn_end(encoder)
    for place, index in enumerate(skeleton.order):
        content, behind = contents[place], skeleton.literals[place + 1]
        if index not in answers:
            parts += [Part(content, is_content=True), Part(behind, is_content=False)]
            continue
        before = parts.pop().text
        lead = _generated_lead(encoder, messages, index, before, tools)
        end = _answer_end(encoder, behind, turn_end, has_tool_calls=bool(messages[index].get("tool_calls")))
        parts += [
            Part(before[: len(before) - len(lead)], is_content=False),
            Part(lead, is_content=False, is_answer=True),
            Part(content, is_content=True, is_answer=True),
            Part(behind[:end], is_content=False, is_answer=True),
            Part(behind[end:], is_content=False),
        ]
    return _cut_tail(parts)


def prompt_parts(encoder: TextEncoder, messages: Messages, *, tools: Any = None) -> list[Part]:
    """A prompt as parts, with the generation prompt (the opening of the assistant's turn) at its end."""
    messages = check_messages(messages)
    text = render(encoder, messages, tools=tools, add_generation_prompt=True)
    skeleton = _skeleton(encoder, messages, tools, add_generation_prompt=True)
    contents = _match(skeleton, messages, text)
    if contents is None:
        return _split_contents(messages, text)
    parts = [Part(skeleton.literals[0], is_content=False)]
    for content, behind in zip(contents, skeleton.literals[1:], strict=True):
        parts += [Part(content, is_content=True), Part(behind, is_content=False)]
    return [part for part in parts if part.text]


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages with `role` and a string `content`; text parts are joined."""
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f"message {i} is {message!r:.80}: a message is {{role: user, content: ...}}")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "".join(part["text"] for part in content)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise UserError(f"message {i} ({message['role']}) has content {content!r:.60}: text is needed")
        # columns that a reader filled up with None are no keys of the message
        checked.append({k: v for k, v in message.items() if v is not None} | {"content": content})
    return checked


def render(encoder: TextEncoder, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = False) -> str:
    """The text of a conversation by the tokenizer's chat template."""
    if encoder.tokenizer.chat_template is None:
        raise UserError(
            "the records are conversations (lists of {role, content}) and the tokenizer has no chat template; give one "
            "(chat_template of the model, as model.policy.chat_template: a Jinja template or a file holding one), or "
            "use strings instead of conversations"
        )
    try:
        return encoder.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # whatever a template may raise: it is somebody's program
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(f"the chat template refused a conversation with the roles [{roles}]: {error}") from error


def _skeleton(
    encoder: TextEncoder, messages: Messages, tools: Any = None, *, add_generation_prompt: bool = False
) -> _Skeleton:
    shapes = tuple(
        json.dumps({k: v for k, v in m.items() if k != "content"} | {"empty": not m["content"]}, default=str)
        for m in messages
    )
    key = (shapes, json.dumps(tools, default=str), add_generation_prompt)
    if key not in encoder.template_cache:
        if len(encoder.template_cache) > 4096:
            encoder.template_cache.clear()
        marked = [{**m, "content": f"\ue000{i}\ue001" if m["content"] else ""} for i, m in enumerate(messages)]
        pieces = _MARKER.split(render(encoder, marked, tools=tools, add_generation_prompt=add_generation_prompt))
        encoder.template_cache[key] = _Skeleton(tuple(pieces[::2]), tuple(int(i) for i in pieces[1::2]))
    return encoder.template_cache[key]


def _match(skeleton: _Skeleton, messages: Messages, text: str) -> list[str] | None:
    """Each message's text as it was rendered (perhaps stripped), in the skeleton's order; None: nothing fits."""
    if any(m["role"] == "assistant" and i not in skeleton.order for i, m in enumerate(messages)):
        return None
    contents = _match_stripped(skeleton, messages, text)
    if contents is not None:
        return contents
    # a text altered in a way of the template's own: a thought cut out of an earlier turn
    lazy, greedy = (re.fullmatch(gap.join(map(re.escape, skeleton.literals)), text, re.DOTALL) for gap in _GAPS)
    if lazy is None or greedy is None or lazy.groups() != greedy.groups():
        return None  # not the same texts, or more than one way to find them: a message quotes the template
    pairs = zip(lazy.groups(), skeleton.order, strict=True)
    return list(lazy.groups()) if all(part in messages[i]["content"] for part, i in pairs) else None


_GAPS = ("(.*?)", "(.*)")


def _match_stripped(skeleton: _Skeleton, messages: Messages, text: str) -> list[str] | None:
    """Each message's text, as it is or without the blanks around it, if these and the literals make up `text`."""
    if not text.startswith(skeleton.literals[0]):
        return None
    found: list[tuple[int, list[str]]] = [(len(skeleton.literals[0]), [])]  # (characters read, contents so far)
    for index, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
        raw = messages[index]["content"]
        forms = dict.fromkeys((raw, raw.strip(), raw.rstrip(), raw.lstrip()))
        found = [
            (at + len(form) + len(literal), [*contents, form])
            for at, contents in found
            for form in forms
            if text.startswith(form + literal, at)
        ][:16]  # several fit only where texts are blanks: any of them will do
    return next((contents for at, contents in found if at == len(text)), None)


def _turn_end(encoder: TextEncoder) -> str | None:
    """What the template writes behind a last answer, up to its control token: "<|im_end|>", " </s>"; None: nothing."""
    if "turn_end" not in encoder.template_cache:
        probe = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        try:
            behind = _skeleton(encoder, probe).literals[-1]
        except UserError:  # a template that wants other roles: every control token behind an answer will do
            return ""
        match = encoder.controls.search(behind)
        encoder.template_cache["turn_end"] = behind[: match.end()] if match else None
    return encoder.template_cache["turn_end"]


def _answer_end(encoder: TextEncoder, behind: str, turn_end: str | None, *, has_tool_calls: bool) -> int:
    """How many characters of what follows an answer still belong to it."""
    if turn_end is None:
        return 0
    if turn_end and has_tool_calls and turn_end in behind:
        return behind.index(turn_end) + len(turn_end)
    if turn_end:
        return len(turn_end) if behind.startswith(turn_end) else 0
    match = encoder.controls.search(behind)
    return match.end() if match and not behind[: match.start()].strip() else 0


def _generated_lead(encoder: TextEncoder, messages: Messages, index: int, before: str, tools: Any) -> str:
    """Blanks between the generation prompt and the answer: the model is asked for them, so they are trained.

    Llama 2 ends a prompt with "[/INST]" and an answer begins with the blank behind it.
    """
    if index == 0 or not before or not before[-1].isspace():
        return ""
    try:
        opening = _skeleton(encoder, messages[:index], tools, add_generation_prompt=True).literals[-1]
    except UserError:
        return ""
    if before.endswith(opening):
        return ""
    blanks = before[len(before.rstrip()) :]
    for cut in range(1, len(blanks) + 1):
        if before[:-cut].endswith(opening) and opening:
            return before[-cut:]
    return ""


def _cut_tail(parts: list[Part]) -> list[Part]:
    """Everything up to the last answer (all, if there is none)."""
    last = max((i for i, part in enumerate(parts) if part.is_answer and part.text), default=len(parts) - 1)
    return [part for part in parts[: last + 1] if part.text]


def _split_contents(messages: Messages, text: str) -> list[Part]:
    """Parts of a text whose messages are found one after the other; one not found is the template's business."""
    parts, cursor = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, cursor) if content else -1
        if start >= 0:
            parts += [Part(text[cursor:start], is_content=False), Part(content, is_content=True)]
            cursor = start + len(content)
    parts.append(Part(text[cursor:], is_content=False))
    return [part for part in parts if part.text]


def _parts_by_difference(
    encoder: TextEncoder, messages: Messages, text: str, answers: Sequence[int], tools: Any
) -> list[Part]:
    """Answers as what a longer conversation's text has more than a shorter one's (tool calls, cut thoughts)."""
    spans = []
    for index in answers:
        until = render(encoder, messages[: index + 1], tools=tools)
        opening = render(encoder, messages[:index], tools=tools, add_generation_prompt=True) if index else ""
        if not (text.startswith(until) and until.startswith(opening)):
            raise UserError(
                f"cannot tell which part of the rendered conversation is message {index} (assistant, "
                f"{messages[index]['content']!r:.60}): the chat template changes its text and what comes before it. "
                "Use a template that keeps both, or give prompt and completion as strings"
            )
        ends = [match.end() for match in encoder.controls.finditer(until, len(opening))]
        spans.append((len(opening), ends[-1] if ends and not until[ends[-1] :].strip() else len(until)))
    parts, cursor = [], 0
    for part in _split_contents(messages, text):
        borders = sorted(
            {0, len(part.text), *(b - cursor for s in spans for b in s if 0 < b - cursor < len(part.text))}
        )
        for start, end in pairwise(borders):
            is_answer = any(a <= cursor + start and cursor + end <= b for a, b in spans)
            parts.append(Part(part.text[start:end], part.is_content, is_answer))
        cursor += len(part.text)
    return parts
