"""Has anything changed? Hashes of configs and of what lies on disk."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WHOLE_FILE_LIMIT = 256 * 1024 * 1024
"""Files above this size are known by size and time of change instead of content."""


def fingerprint(value: Any) -> str:
    """Of a JSON-like value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fingerprint_path(path: str | Path, without: Iterable[Path] = ()) -> str:
    """Of a file's content, or of all files below a folder with their names; empty if there is nothing.

    Args:
        path: the file or folder.
        without: files and folders below it that do not count.
    """
    path = Path(path)
    if path.is_dir():
        left_out = {inner.resolve() for inner in without}
        files = sorted(file for file in path.rglob("*") if file.is_file())
        if left_out:
            files = [file for file in files if not left_out & {file.resolve(), *file.resolve().parents}]
        return fingerprint([(file.relative_to(path).as_posix(), _of_file(file)) for file in files])
    return _of_file(path) if path.is_file() else ""


def _of_file(path: Path) -> str:
    stat = path.stat()
    if stat.st_size > WHOLE_FILE_LIMIT:
        return f"{stat.st_size}/{stat.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def existing_paths(value: Any) -> list[str]:
    """Every text in a JSON-like value that names a file or folder which is there, in order."""
    return sorted({text for text in _texts(value) if _is_there(text)})


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _is_there(text: str) -> bool:
    # a bare word such as `auto` is no path, even where a folder of that name happens to lie
    if not text or len(text) > 1024 or "\n" in text or not ("/" in text or "." in text):
        return False
    try:
        return Path(text).exists()
    except OSError:
        return False
