"""Which weights? A digest that changes with them and with nothing else."""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.locate import check_model_folder, resolve_path
from rlhf_lightning.models.spec import ModelSpec


def weights_digest(spec: ModelSpec) -> str:
    """Of the numbers that `load_policy(spec)` would start with, adapters left out (they begin as nothing).

    A folder is known by the content of its config and weight files, a hub id by the commit it resolves to, a new
    model by the config and seed it is drawn from.
    """
    if spec.path is None:
        return _of_text(json.dumps([spec.config, spec.tokenizer, spec.seed], sort_keys=True, default=str))
    path = resolve_path(spec.path)
    if Path(path).is_dir():
        check_model_folder(path)
        digest = hashlib.sha256()
        for file in sorted([Path(path) / "config.json", *Path(path).glob("*.safetensors")]):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()[:32]
    try:
        config = cached_file(path, "config.json", revision=spec.revision)
    except OSError as error:
        raise UserError(f"cannot find the model {spec.path!r}: {str(error).splitlines()[0]}") from error
    return Path(config).parent.name  # a hub's cache keeps each commit in a folder of that name


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
