"""Text to token ids, with the one distinction that tokenizers do not make: what the template wrote, what people wrote.

A template's "<|im_end|>" is a control token. The same characters inside somebody's message are text, and stay text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError


@dataclass(frozen=True)
class Part:
    """A stretch of text of one origin."""

    text: str
    is_content: bool
    """True: people wrote it, control tokens in it are text. False: the template wrote it."""
    is_answer: bool = False
    """True: belongs to what is trained."""


class TextEncoder:
    """Encodes parts with one tokenizer. Get it by `text_encoder(tokenizer)`, which keeps one per tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template_cache: dict[Any, Any] = {}
        controls = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        controls |= set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, controls), key=lambda token: (-len(token), token))
        self.controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.prefix = self._opening_tokens()

    def has_control(self, text: str) -> bool:
        """Whether `text` holds the characters of a control token."""
        return self.controls.search(text) is not None

    def ids(self, text: str) -> list[int]:
        """Ids of text that people wrote: control tokens in it are split into ordinary pieces."""
        return self._call(text, split_special_tokens=True)

    def parts_ids(self, parts: Sequence[Part]) -> list[int]:
        """Ids of joined parts; only the template's own control tokens become control tokens."""
        joined = "".join(part.text for part in parts)
        if not any(part.is_content and self.has_control(part.text) for part in parts):
            return self._call(joined, split_special_tokens=False)
        ids: list[int] = []
        run = ""
        for part in parts:
            if part.is_content:
                run += part.text
                continue
            end = 0
            for match in self.controls.finditer(part.text):
                run += part.text[end : match.start()]
                ids += self.ids(run) if run else []
                ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                run, end = "", match.end()
            run += part.text[end:]
        return ids + (self.ids(run) if run else [])

    def continuation_ids(
        self, before: Sequence[Part], parts: Sequence[Part], before_ids: list[int] | None = None
    ) -> list[int]:
        """Ids of `parts` as they follow `before`, which was encoded on its own (as a prompt is when it is answered).

        Joint encoding is cut where `before` ends; where a token would straddle that border, the parts are encoded
        behind a neutral character instead, so that no tokenizer adds the space it puts in front of a text's first word.

        Args:
            before: what comes in front.
            parts: what to encode.
            before_ids: ids of `before`, if they are known.
        """
        if not before:
            return self.parts_ids(parts)
        before_ids = self.parts_ids(before) if before_ids is None else before_ids
        joint = self.parts_ids((*before, *parts))
        if joint[: len(before_ids)] == before_ids:
            return joint[len(before_ids) :]
        anchor = [Part("\n", is_content=True)]
        anchor_ids = self.parts_ids(anchor)
        joint = self.parts_ids((*anchor, *parts))
        if joint[: len(anchor_ids)] == anchor_ids:
            return joint[len(anchor_ids) :]
        return self.parts_ids(parts)

    def _call(self, text: str, *, split_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=split_special_tokens,
                return_attention_mask=False,
                verbose=False,  # a text longer than model_max_length is our own business: truncation.py
            )["input_ids"]
        except (TypeError, UnicodeEncodeError) as error:
            shown = repr(text if len(text) < 60 else text[:60] + "...")
            raise UserError(f"the tokenizer cannot read {shown}: {error}. Is it broken Unicode?") from error

    def _opening_tokens(self) -> list[int]:
        """What the tokenizer itself puts in front of a text: BOS, or nothing."""
        bare = self._call("a", split_special_tokens=False)
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []


_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, TextEncoder]] = WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """The `TextEncoder` of a tokenizer, made anew when its vocabulary or template has changed."""
    version = (len(tokenizer), tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None)
    known = _encoders.get(tokenizer)
    if known is None or known[0] != version:
        known = (version, TextEncoder(tokenizer))
        _encoders[tokenizer] = known
    return known[1]
