"""Names of models: a folder of ours, or an id on a hub; and what a folder must hold, and must not."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.names import HUB, hub_id, looks_like_a_path

SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
"""Files of a model folder that may name code (`auto_map`)."""


def resolve_path(path: str, what: str = "model") -> str:
    """A folder that exists, or a name that can only be a hub id; a folder that is missing is the user's mistake.

    Args:
        path: folder or hub id, as the user wrote it; a folder comes first, and hf:// in front asks for the hub.
        what: what the message calls it.
    """
    if (name := hub_id(path)) is not None:
        if not re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", name) or Path(name).exists():
            # transformers itself would take the folder
            raise UserError(f"{what} {path!r}: give {HUB}owner/name, in a place that has no folder of that name")
        return name
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise UserError(f"{what} {path!r} is a file: name the folder that holds it")
    if looks_like_a_path(path):
        raise UserError(
            f"{what} folder {path!r} does not exist (looked for {folder.absolute()}): "
            f"has the stage that writes it run? A hub id has the form name or owner/name ({HUB}{path} if this is one)"
        )
    return path


def check_code(path: str, trusted: bool, revision: str | None, what: str = "model") -> None:
    """Code that comes with a model or tokenizer runs only if the config asks for it and the command line names it.

    Args:
        path: a folder, or a hub id, as `resolve_path` gives it.
        trusted: what the config says (`trust_remote_code`).
        revision: of a hub id.
        what: what the message calls it.
    """
    folder = Path(path)
    for file in SETTINGS:
        settings = _read(folder / file)
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        if named and not trusted:
            raise UserError(
                f"{what} {path!r} comes with custom code ({file}: auto_map), which is not run: remove auto_map "
                "from that file if transformers knows the architecture itself, or set trust_remote_code: true if "
                "you trust its author"
            )
        if "--" in str(named):
            raise UserError(f"{what} {path!r}: {file}: auto_map names code of another repository; copy it beside")
    if not trusted:
        return
    if not trust.allows_model(path):
        raise UserError(
            f"{what} {path!r}: trust_remote_code runs code that comes with it; a config cannot ask for that alone: "
            f"if you trust its author, add {trust.FLAG} {path} to the command line"
        )
    if not folder.is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UserError(
            f"{what} {path!r}: trust_remote_code needs revision: the full hash of the commit that you have read; "
            "else its owner may change the code at any time"
        )


def check_layers(path: str, config: Mapping[str, Any]) -> None:
    """A model's config may choose how its layers are computed, but not by code that somebody has put on a hub.

    transformers would download and import that (package `kernels`), whatever `trust_remote_code` says.

    Args:
        path: of the model, for the message.
        config: the content of its config.json.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            inner = {f"{key}.{name}": below for name, below in value.items()} if "implementation" in key else value
            check_layers(path, inner)
        elif "implementation" in key and "/" in str(value):
            raise UserError(
                f"model {path!r}: config.json: {key} names code on a hub ({value!r}), which is not run: remove the "
                "key, and choose by attn_implementation"
            )


def check_model_folder(path: str) -> None:
    """A local folder must hold a config and weights that are plain numbers; pickles run code when they are opened."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path!r} holds an adapter (adapter_config.json), which names another model to be loaded: merge it into "
            "its model once (peft: merge_and_unload), and give the folder of the result"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{path!r} holds no config.json: it is not a Hugging Face model folder")
    index = _read(folder / "model.safetensors.index.json")
    shards = index.get("weight_map") if isinstance(index, dict) else None
    for shard in {str(name) for name in shards.values()} if isinstance(shards, dict) else ():
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UserError(f"{path!r}: model.safetensors.index.json names {shard!r}; weights are *.safetensors here")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{path!r} holds its weights as a pickle ({pickles[0]}), which can run code when opened: convert them to "
            "safetensors once, with a transformers that you trust: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    raise UserError(f"{path!r} holds no weights (*.safetensors)")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads it for its content says what is wrong
