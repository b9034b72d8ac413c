"""Records to tokens and a mask of those that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.templates import Messages, conversation_parts, prompt_parts
from rlhf_lightning.data.text import Part, TextEncoder, text_encoder


@dataclass(frozen=True)
class Encoded:
    """One record's tokens."""

    ids: Sequence[int]
    mask: Sequence[bool]
    """True on tokens that are trained or scored: the completion and its end token."""
    ref_logprobs: np.ndarray | None = None
    """What the frozen reference said of the tokens that `scored` counts, in order; None: it was not asked."""

    @property
    def scored(self) -> np.ndarray:
        """True on the tokens of `mask` that something predicts: never the first."""
        scored = np.array(self.mask, np.bool_)
        scored[:1] = False
        return scored

    def __len__(self) -> int:
        return len(self.ids)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, *, tools: Any = None, parse_controls: bool = False
) -> list[int]:
    """Ids of a prompt that is to be answered: a string behind the tokenizer's BOS, or messages by the chat template.

    Args:
        tokenizer: of the model that answers.
        prompt: a string, or messages; these end with the template's generation prompt.
        tools: passed to the chat template.
        parse_controls: whether control tokens spelt out in a string are control tokens (the string was rendered by a
            template before); else they are text.
    """
    encoder = text_encoder(tokenizer)
    if isinstance(prompt, str):
        ids = encoder.prefix + encoder.parts_ids(_string(prompt, parse_controls))
    else:
        ids = encoder.parts_ids(prompt_parts(encoder, prompt, tools=tools))
    if not ids:
        raise UserError("the prompt is empty and the tokenizer puts no BOS in front of it: nothing to continue from")
    return ids


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_eos: bool, parse_controls: bool = False
) -> Encoded:
    """A text of which every token is trained, behind the tokenizer's BOS."""
    encoder = text_encoder(tokenizer)
    ids = encoder.prefix + encoder.parts_ids(_string(text, parse_controls))
    ids += [_eos(tokenizer)] if add_eos else []
    return Encoded(ids, [True] * len(ids))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    add_eos: bool,
    first_answer: int = 0,
    only_last: bool = False,
    tools: Any = None,
) -> Encoded:
    """A conversation whose assistant's turns are trained, each with the end of its turn.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        add_eos: whether a last answer that the template does not end by a control token gets the tokenizer's EOS.
        first_answer: index of the first message that may be trained.
        only_last: train the last assistant's turn alone.
        tools: passed to the chat template.
    """
    encoder = text_encoder(tokenizer)
    parts = conversation_parts(encoder, messages, first_answer=first_answer, only_last=only_last, tools=tools)
    encoded = _encode_parts(encoder, parts)
    last_is_open = parts[-1].is_answer and not encoder.has_control(parts[-1].text if not parts[-1].is_content else "")
    if add_eos and last_is_open and messages[-1]["role"] == "assistant":
        return Encoded([*encoded.ids, _eos(tokenizer)], [*encoded.mask, True])
    return encoded


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    completion: str | Messages,
    *,
    add_eos: bool,
    tools: Any = None,
    parse_controls: bool = False,
) -> Encoded:
    """A prompt and its completion; the mask is True on the completion and the token that ends it.

    The prompt's ids are those of `encode_prompt`: a completion is trained behind exactly the tokens that it is
    sampled behind.

    Args:
        tokenizer: of the model that reads them.
        prompt: a string or messages.
        completion: a string or messages; a string behind messages is the assistant's next turn.
        add_eos: whether the completion ends by itself (False: it was cut off). A chat template ends it its own way.
        tools: passed to the chat template.
        parse_controls: see `encode_prompt`.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        encoder = text_encoder(tokenizer)
        before, answer = _string(prompt, parse_controls), _string(completion, parse_controls)
        before_ids = encoder.parts_ids(before)
        prompt_ids = encoder.prefix + before_ids
        answer_ids = encoder.continuation_ids(before if prompt else [], answer, before_ids)
        answer_ids += [_eos(tokenizer)] if add_eos else []
        return Encoded(prompt_ids + answer_ids, [False] * len(prompt_ids) + [True] * len(answer_ids))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return encode_conversation(
        tokenizer, [*prompt, *completion], add_eos=add_eos, first_answer=len(prompt), tools=tools
    )


def encode_steps(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    steps: Sequence[str],
    *,
    separator: str = "\n",
    parse_controls: bool = False,
) -> tuple[list[int], list[int]]:
    """A prompt and the steps of its solution, each followed by `separator`.

    Returns:
        The ids, and the index of each step's last token: where a process reward model judges it.
    """
    encoder = text_encoder(tokenizer)
    ids = encode_prompt(tokenizer, prompt, parse_controls=parse_controls)
    before = _string(prompt, parse_controls) if isinstance(prompt, str) else prompt_parts(encoder, prompt)
    ends = []
    for step in steps:
        part = _string(step + separator, parse_controls)
        ids = ids + encoder.continuation_ids(before, part)
        ends.append(len(ids) - 1)
        before = part
    return ids, ends


def _string(text: str, parse_controls: bool) -> list[Part]:
    return [Part(text, is_content=not parse_controls)]


def _encode_parts(encoder: TextEncoder, parts: Sequence[Part]) -> Encoded:
    """Ids piece by piece, a new piece where training begins or ends: no token lies on such a border."""
    ids: list[int] = []
    mask: list[bool] = []
    before: list[Part] = []
    known: list[int] | None = None  # ids of `before` as a text of its own: those of the first piece
    for is_answer, group in groupby(parts, key=lambda part: part.is_answer):
        piece = list(group)
        piece_ids = encoder.continuation_ids(before, piece, known)
        known = None if before else piece_ids
        ids += piece_ids
        mask += [is_answer] * len(piece_ids)
        before = piece
    return Encoded(ids, mask)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token to end an answer with; set one, or add_eos: false")
    return tokenizer.eos_token_id
