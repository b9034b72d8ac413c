"""The tokenizer of a model: its end token, its padding token and its chat template."""

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.names import without_hub
from rlhf_lightning.models.locate import check_code, resolve_path
from rlhf_lightning.models.spec import ModelSpec

logger = logging.getLogger(__name__)


@cache
def say_once(message: str) -> None:
    """A warning that a run prints once, however often the thing is loaded."""
    logger.warning(message)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec`, with an end token, a padding token and the chat template it asks for.

    Without a padding token it takes, in this order, a special token whose name holds "pad", the unknown token, the end
    token. Which one does not matter to any number: every mask here goes by the attention mask, never by token id.
    """
    name = spec.tokenizer or spec.path
    if name is None:
        raise UserError("no tokenizer: give `tokenizer` (a folder or hub id) next to `config`")
    path = resolve_path(name, "tokenizer")
    check_code(path, spec.trust_remote_code, spec.revision, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        remedy = "" if Path(path).is_dir() else without_hub(path)
        raise UserError(f"cannot load the tokenizer {name!r}: {first_line(error).rstrip('.')}{remedy}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {name!r} has no end-of-sequence token, so no answer could ever end: name one of its tokens "
            'in its tokenizer_config.json ("eos_token": "...")'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = pad_fallback(tokenizer)
        say_once(f"the tokenizer {name!r} has no padding token: padding with {tokenizer.pad_token!r}")
    if spec.chat_template is not None:
        tokenizer.chat_template = read_chat_template(spec.chat_template)
    if spec.chat_template_kwargs:
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(
                f"chat_template_kwargs={spec.chat_template_kwargs} are for a chat template, and the tokenizer {name!r} "
                "has none, or several: give chat_template"
            )
        tokenizer.chat_template = with_values(tokenizer.chat_template, spec.chat_template_kwargs)
    return tokenizer


def pad_fallback(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token to pad with where none is named: rather one that text never holds than the end token."""
    used = {tokenizer.eos_token, tokenizer.bos_token}
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [token for token in added if "pad" in token.lower() and token not in used]
    if named:
        return named[0]
    if tokenizer.unk_token is not None and tokenizer.unk_token not in used:
        return tokenizer.unk_token
    return tokenizer.eos_token


def read_chat_template(template: str) -> str:
    """A chat template given as such or as the file that holds it; checked for its syntax."""
    is_template = "{" in template or "\n" in template
    origin = "chat_template"
    if not is_template:
        file = Path(template).expanduser()
        if not file.is_file():
            raise UserError(
                f"chat_template {template!r} is neither a file nor a Jinja template: there is no {file.absolute()}, "
                "and a template has {{ ... }} in it"
            )
        template, origin = file.read_text(encoding="utf-8"), f"chat template {file}"
    try:
        _parsed(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{origin}, line {error.lineno}: {error.message}") from error
    return template


def with_values(template: str, values: Mapping[str, str | bool | int | float | None]) -> str:
    """The same chat template with values for some of its variables, which whoever renders it need not give any more."""
    known = find_undeclared_variables(_parsed(template)) - _GIVEN
    for name in values:
        if name not in known:
            there = f"those that it has: {', '.join(sorted(known))}" if known else "it has none to be given"
            raise UserError(f"chat_template_kwargs.{name}: the chat template has no such variable; {there}")
    literals = {name: "none" if value is None else json.dumps(value) for name, value in values.items()}
    return "".join(f"{{% set {name} = {literal} %}}" for name, literal in literals.items()) + template


def _parsed(template: str) -> jinja2.nodes.Template:
    return jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag]).parse(template)


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
"""What transformers gives a template, beside special tokens."""


class _GenerationTag(Extension):
    """transformers' `{% generation %}` block, so that templates which use it parse."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def first_line(error: BaseException) -> str:
    """What went wrong, without the advice that follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said}"
