"""The tokenizer a datamodule reads with: found, and its gaps filled by a stated rule."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.names import hub_id, looks_like_a_path

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
    path, name = Path(given).expanduser(), hub_id(given)
    if name is None and not path.is_dir() and looks_like_a_path(given):
        raise UserError(f"tokenizer: no such folder: {given}")
    if path.is_dir() and "auto_map" in _settings(path):
        raise UserError(f"tokenizer: {given} comes with code (tokenizer_config.json: auto_map), which is not run")
    try:
        # said, not left out: transformers would ask on the terminal
        return AutoTokenizer.from_pretrained(name or (str(path) if path.is_dir() else given), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot load {given}: {str(error).splitlines()[0]}") from error


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id written where there is no token: pad, else EOS, else 0. Masks, not ids, say what is padding."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Eight characters that change with the vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:8]


def usable_length(tokenizer: PreTrainedTokenizerBase, wanted: int | None = None) -> int:
    """How many tokens a record may have: what is wanted, else 1024 or what the tokenizer allows if that is less.

    Args:
        tokenizer: whose `model_max_length` is what its model reads, as far as it knows.
        wanted: what the user asked for.
    """
    if wanted is None:
        return min(DEFAULT_LENGTH, tokenizer.model_max_length)
    if wanted > tokenizer.model_max_length:
        log.warning(
            f"max_length={wanted} is more than the {tokenizer.model_max_length} tokens that the tokenizer says its "
            "model reads; lower it unless the model was made for more"
        )
    return wanted
