"""Checkpoints that are whole or not there, and that say so themselves."""

import hashlib
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.failpoints import failpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a process killed at any instant, or a full disk, leaves a valid one behind.

    A checkpoint `NAME.ckpt` has a manifest `NAME.ckpt.json` beside it: size and SHA-256 of the file, step, and a hash
    of the options it was made with. To replace one:

    1. write `.NAME.ckpt.partial` in the same folder, fsync it, read it back and compare;
    2. note the new digest in the manifest beside the old one;
    3. rename over the old one, fsync the folder;
    4. leave only the new digest in the manifest.

    At every instant the file is one that the manifest knows. Reading compares first, and never runs code: only
    tensors and plain values are read (`weights_only`), whatever the caller asks for.

    Args:
        keep_previous: keep the one that is replaced as `NAME.previous.ckpt`; `resume: auto` falls back on it when the
            newest is damaged. Costs its size on disk.

    Raises:
        UserError: where nothing can be written; the previous checkpoint is as it was.
    """

    def __init__(self, keep_previous: bool = True) -> None:
        self.keep_previous = keep_previous

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        with _loud(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            entry = _write(checkpoint, partial)
            try:
                if _digest(partial) != (entry.size, entry.sha256):
                    raise OSError(None, "what was read back is not what was written")
                old = _entry_of(target)
                if self.keep_previous and old is not None:
                    failpoint("checkpoint.before_prune")
                    _keep(target, old)
                    failpoint("checkpoint.after_prune")
                _commit(partial, target, entry, old)
                failpoint("checkpoint.after_commit")
            finally:
                partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if weights_only is False:
            raise UserError(f"{path}: weights_only=False would run code from a checkpoint; leave it out")
        if not _is_local_file_protocol(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        super().remove_checkpoint(path)
        if _is_local_file_protocol(path):
            manifest_of(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one checkpoint file."""

    size: int
    sha256: str
    step: int
    resumable: bool
    """Whether it holds an optimiser's state, and not weights alone."""
    options: str
    """SHA-256 of the options (hyper-parameters) of the run that wrote it."""
    written: float
    """Seconds since 1970."""


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint that is as it was written: tensors and plain values; no code of it is run.

    Raises:
        UserError: if it is missing, damaged, or holds anything else.
    """
    if (reason := damage(path)) is not None:
        raise UserError(f"{path} {reason}; --resume auto takes the newest checkpoint that is whole")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path} holds more than weights and numbers and is not read: {why}") from error


def check_plain(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` if a checkpoint, one file, holds anything but tensors and plain values; reads no tensor."""
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        why = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"{path} holds more than weights and numbers and is not read: {why}") from error


def damage(path: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint is not as it was written; None if it is. One without a manifest is only known to be whole."""
    file = Path(path)
    if not file.is_file():
        return "does not exist"
    entries = entries_of(file)
    if entries:
        size, sha256 = file.stat().st_size, None
        for entry in entries:
            if entry.size == size:
                sha256 = sha256 or _digest(file)[1]
                if entry.sha256 == sha256:
                    return None
        if sha256 is None:
            return f"is damaged: {size} bytes, {' or '.join(str(e.size) for e in entries)} were written"
        return f"is damaged: its SHA-256 is not the one in {manifest_of(file).name}"
    if manifest_of(file).exists():
        return f"has a manifest, {manifest_of(file).name}, that cannot be read"
    if not zipfile.is_zipfile(file):  # the table of contents is at its end: a cut-off file has none
        return "is no checkpoint, or was cut off while it was written"
    return None


def manifest_of(path: str | os.PathLike[str]) -> Path:
    """Where the manifest of a checkpoint lies."""
    return Path(f"{os.fspath(path)}.json")


def entries_of(path: str | os.PathLike[str]) -> list[Entry]:
    """What its manifest says of a checkpoint, the newest first: one entry, or two if replacing it was cut short."""
    try:
        return [Entry(**entry) for entry in json.loads(manifest_of(path).read_text())["checkpoints"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def newest_first(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, str | None]]:
    """Checkpoints of a folder that a run can go on from, each with what is wrong with it."""
    found = []
    for file in Path(folder).glob("*.ckpt"):
        if file.name.startswith("."):
            continue
        entries = [entry for entry in entries_of(file) if entry.resumable]
        if entries:
            found.append((max(entry.step for entry in entries), max(entry.written for entry in entries), file))
        elif not entries_of(file) and file.name.startswith("last"):  # written by another CheckpointIO
            found.append((-1, file.stat().st_mtime, file))
    for _, _, file in sorted(found, reverse=True):
        yield file, damage(file)


# --- writing


class _Hashed:
    """A file that hashes what is written to it, and remembers why it could not be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.size:
            failpoint("checkpoint.mid_write")
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _write(checkpoint: Mapping[str, Any], partial: Path) -> Entry:
    failpoint("checkpoint.before_write")
    with partial.open("wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(checkpoint, hashed)
            file.flush()
            failpoint("checkpoint.before_fsync")
            os.fsync(file.fileno())
            failpoint("checkpoint.after_fsync")
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if hashed.error is not None:  # torch speaks of an archive that does not add up instead
                raise hashed.error from error
            raise
    options = json.dumps(checkpoint.get("hyper_parameters"), sort_keys=True, default=str)
    return Entry(
        size=hashed.size,
        sha256=hashed.hexdigest(),
        step=int(checkpoint.get("global_step", 0)),
        resumable="optimizer_states" in checkpoint,
        options=hashlib.sha256(options.encode()).hexdigest(),
        written=time.time(),
    )


def _entry_of(target: Path) -> Entry | None:
    """Which entry of its manifest a checkpoint is; None without one. Two are told apart by content."""
    entries = entries_of(target) if target.is_file() else []
    if len(entries) == 1:
        return entries[0] if entries[0].size == target.stat().st_size else None
    found = _digest(target) if entries else None
    return next((entry for entry in entries if (entry.size, entry.sha256) == found), None)


def _commit(partial: Path, target: Path, entry: Entry, old: Entry | None) -> None:
    """Puts a checkpoint in its place; killed anywhere, the file that is there is one of those in the manifest."""
    _write_manifest(target, [entry] if old is None else [entry, old])
    failpoint("checkpoint.before_rename")
    partial.replace(target)
    _sync_folder(target.parent)
    failpoint("checkpoint.after_rename")
    _write_manifest(target, [entry])


def _keep(target: Path, entry: Entry) -> None:
    """Gives the checkpoint that will be replaced a second name."""
    previous = target.with_name(f"{target.stem}.previous{target.suffix}")
    link = target.with_name(f".{previous.name}.partial")
    link.unlink(missing_ok=True)
    try:
        try:
            os.link(target, link)
        except OSError:  # not every file system knows links
            shutil.copyfile(target, link)
        _commit(link, previous, entry, _entry_of(previous))
    finally:
        link.unlink(missing_ok=True)


def _write_manifest(target: Path, entries: list[Entry]) -> None:
    manifest = manifest_of(target)
    partial = manifest.with_name(f".{manifest.name}.partial")
    failpoint("manifest.before_write")
    with partial.open("w") as file:
        json.dump({"format": 1, "checkpoints": [asdict(entry) for entry in entries]}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    failpoint("manifest.before_rename")
    partial.replace(manifest)
    _sync_folder(manifest.parent)
    failpoint("manifest.after_rename")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _loud(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = f"; the checkpoint that is there ({target.name}) is as it was" if target.exists() else ""
        raise UserError(
            f"cannot write the checkpoint {target}: {error.strerror or error}{kept}. Make room or name another folder "
            "by --trainer.default_root_dir, then go on with --resume auto"
        ) from error
