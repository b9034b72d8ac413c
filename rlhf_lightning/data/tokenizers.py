"""The tokenizer a datamodule reads with: found, and its gaps filled by a stated rule."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError

log = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024


def find_tokenizer(given: PreTrainedTokenizerBase | str | None) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a folder or hub id.

    Args:
        given: a tokenizer, a path or a hub id.
    """
    if given is None:
        raise UserError("no tokenizer: set data.tokenizer to a folder or hub id, or use a model that has one")
    if not isinstance(given, str):
        return given
    path = Path(given).expanduser()
    if not path.is_dir() and (given.startswith((".", "/", "~")) or given.count("/") > 1):
        raise UserError(f"tokenizer: no such folder: {given}")
    try:
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else given)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot load {given}: {str(error).splitlines()[0]}") from error


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id written where there is no token: pad, else EOS, else 0. Masks, not ids, say what is padding."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def usable_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """1024 tokens, or fewer if the tokenizer says that its model reads fewer."""
    return min(DEFAULT_LENGTH, tokenizer.model_max_length)
