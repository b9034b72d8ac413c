"""Files that are whole or not there: written beside their place, then moved into it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.core.errors import UserError


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file."""
    path = Path(path)
    _make_parent(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records, one JSON object a line."""
    return write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_json(path: str | Path, value: Any) -> Path:
    """Write one JSON value, indented."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_folder(folder: str | Path, fill: Callable[[str], Any]) -> Path:
    """Let `fill` write into a new folder, then put it in the place of `folder`."""
    folder = Path(folder)
    _make_parent(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(str(partial))
        if folder.exists():
            shutil.rmtree(folder)
        partial.chmod(0o755)  # mkdtemp's is private
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read records, one JSON object a line; blank lines are passed over."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: an earlier step should have written it, or the path is misspelt")
    records = []
    # not splitlines: JSON strings may hold other line separators as they are
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a record must be a JSON object, this is {type(record).__name__}")
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no records")
    return records


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: {path.parent} is a file, not a folder") from error
