"""Sharded checkpoints (torch's DCP folders) that do nothing but hold tensors and numbers."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlhf_lightning.core.errors import UserError

ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""All that torch writes into `.metadata`, beside dtypes."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_sharded(folder: str | Path) -> None:
    """Reads everything of a sharded checkpoint that torch's own reader would unpickle, and runs none of it.

    That reader takes `.metadata`, and every value that is no tensor, for pickles that it may run
    (`torch.distributed.checkpoint`: for trusted folders only). What passes here is safe for it.

    Args:
        folder: with `.metadata` and `*.distcp` files, and Lightning's `meta.pt`.

    Raises:
        UserError: if anything else than tensors, plain values and torch's own descriptions is in it.
    """
    folder = Path(folder)
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} is no checkpoint, or was not finished: it holds no .metadata")
    if (folder / "meta.pt").exists():
        _check_values(folder / "meta.pt", (folder / "meta.pt").read_bytes())
    for file in sorted(folder.glob("*.metadata")):
        try:
            metadata = _Restricted(io.BytesIO(file.read_bytes())).load()
            described, stored = dict(metadata.state_dict_metadata), dict(metadata.storage_data or {})
        except Exception as error:  # whatever bytes that are no pickle may raise
            raise _refused(file, error) from error
        for index, place in stored.items():
            path = folder / place.relative_path
            if Path(place.relative_path).name != str(place.relative_path):
                raise UserError(f"{file} names {place.relative_path}, which is outside of the checkpoint; not read")
            if not isinstance(described.get(index.fqn), BytesStorageMetadata):
                continue  # a tensor, which torch reads by weights_only
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{path} holds {index.fqn} in a packed form that cannot be checked; not read")
            with path.open("rb") as shard:
                shard.seek(place.offset)
                _check_values(path, shard.read(place.length))


def guard(strategy: Any) -> None:
    """Has a strategy look through a sharded checkpoint (`check_sharded`) before it reads one, whoever called it."""
    read = strategy.load_checkpoint
    if getattr(read, "is_guarded", False):
        return

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(checkpoint_path).is_dir():
            check_sharded(checkpoint_path)
        return read(checkpoint_path, *args, **kwargs)

    load_checkpoint.is_guarded = True  # type: ignore[attr-defined]
    strategy.load_checkpoint = load_checkpoint


def _check_values(file: Path, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refused(file, error) from error


def _refused(file: Path, error: Exception) -> UserError:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{file} holds more than weights and numbers and is not read: {why}")
