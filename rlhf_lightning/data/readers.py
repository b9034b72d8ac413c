"""Where records come from: JSONL, JSON, Parquet, CSV, a directory of these, a saved `datasets` folder, or a hub id."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.names import hub_id, looks_like_a_path, without_hub

FileFormat = Literal["jsonl", "json", "parquet", "csv"]
_FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}

_ABOUT_RECORDS = ("dataset_info.json", "dataset_infos.json")
"""Files of the hub that describe a data set."""


@dataclass(frozen=True)
class Source:
    """One source of records."""

    path: str
    """A file, a directory of files, a folder written by `datasets`, or a hub id."""
    format: FileFormat | None = None
    """How the files are written; None: by their suffix (.gz behind it is fine)."""
    split: str | None = None
    """Of a hub data set or a directory; None: "train" for a hub id, every file of a directory."""
    name: str | None = None
    """Configuration of a hub data set."""
    columns: dict[str, str] | None = None
    """Our name for a column -> the name it has in the data, e.g. {prompt: question, completion: answer}."""
    weight: float = 1.0
    """How often each record is seen per epoch: 2 = twice, 0.5 = every other one, drawn anew each epoch."""
    limit: int | None = None
    """Use only the first so many records."""

    def check(self) -> None:
        """Raise if a number cannot be meant."""
        # not when it is made: a parser that may take a text instead would say that no text was given
        if not self.weight > 0:
            raise UserError(f"source {self.path}: weight={self.weight} must be above 0; leave the source out instead")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"source {self.path}: limit={self.limit} must be at least 1")


@dataclass
class Table:
    """The records of one source, with where each of them stands."""

    label: str
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str] | None = None
    """Where each row stands ("train.jsonl, line 3"); None: "<label>, row <i>"."""
    bad: list[str] = field(default_factory=list)
    """What was wrong with the rows that could not be read and were skipped."""

    def place(self, i: int) -> str:
        return self.places[i] if self.places is not None else f"{self.label}, row {i}"

    def columns(self) -> list[str]:
        """Columns of the first row (of all rows, where the source says so)."""
        return list(getattr(self.rows, "column_names", None) or (self.rows[0] if len(self.rows) else ()))


def read_source(source: Source, *, skip_bad: bool = False) -> Table:
    """All records of a source, with its columns renamed to ours.

    Args:
        source: which one.
        skip_bad: whether a line that is no JSON is noted and left out instead of being an error.
    """
    source.check()
    path = Path(source.path).expanduser()
    if hub_id(source.path) is not None:
        table = _read_hub(source)
    elif path.is_file():
        table = _read_file(path, source.format, skip_bad)
    elif path.is_dir():
        table = _read_directory(path, source, skip_bad)
    elif _looks_local(source.path):
        _missing(path)
    else:
        table = _read_hub(source)
    if len(table.rows) == 0:
        lost = f" ({len(table.bad)} unreadable ones were skipped)" if table.bad else ""
        raise UserError(
            f"{table.label} holds no records{lost}: check the path, the split and that the file was written"
        )
    if source.limit is not None and len(table.rows) > source.limit:
        taken = range(source.limit)
        rows = table.rows.select(taken) if hasattr(table.rows, "select") else table.rows[: source.limit]
        table = Table(table.label, rows, table.places and table.places[: source.limit], table.bad)
    return _rename(table, source.columns) if source.columns else table


def closest(name: str, known: Sequence[str]) -> str:
    """' (did you mean x?)' if something known is near, else ''."""
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _read_file(path: Path, file_format: FileFormat | None, skip_bad: bool) -> Table:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    file_format = file_format or _FORMATS.get(suffixes[-1].lower() if suffixes else "")
    if file_format is None:
        raise UserError(f"{path}: cannot tell its format by the suffix; set format to one of jsonl, json, parquet, csv")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    if file_format == "jsonl":
        return _read_jsonl(path, skip_bad)
    if file_format == "json":
        return _read_json(path)
    return _read_arrow(path, file_format)


def _open(path: Path) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _read_jsonl(path: Path, skip_bad: bool) -> Table:
    rows, places, bad = [], [], []
    for number, line in enumerate(_open(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line, f"{path}, line {number}")
        except UserError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
            continue
        rows.append(row)
        places.append(f"{path.name}, line {number}")
    return Table(str(path), rows, places, bad)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte {error.start} of the line is {error.object[error.start]:#x})"
        ) from error
    except json.JSONDecodeError as error:
        shown = line[:60].decode("utf-8", "replace")
        raise UserError(f"{place}: broken JSON: {error.msg} at column {error.colno}: {shown!r}") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply to be a record") from error
    except _DuplicateKey as error:
        raise UserError(f"{place}: the key {error} appears twice in one object") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a record is an object {{...}}, this is {type(row).__name__}")
    return row


class _DuplicateKey(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(repr(next(key for key in keys if keys.count(key) > 1)))
    return made


def _read_json(path: Path) -> Table:
    try:
        content = json.loads(_open(path).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = "; is it JSONL? Then set format: jsonl" if error.msg == "Extra data" else ""
        raise UserError(
            f"{path}, line {error.lineno}: broken JSON: {error.msg} at column {error.colno}{hint}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be records") from error
    except _DuplicateKey as error:
        raise UserError(f"{path}: the key {error} appears twice in one object") from error
    if isinstance(content, dict):  # {"data": [...]} and the like
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise UserError(f"{path}: JSON data is a list of records [{{...}}, ...]")
    for i, row in enumerate(content):
        if not isinstance(row, dict):
            raise UserError(f"{path}, record {i}: a record is an object {{...}}, this is {type(row).__name__}")
    return Table(str(path), content, [f"{path.name}, record {i}" for i in range(len(content))])


def _read_arrow(path: Path, file_format: FileFormat) -> Table:
    import datasets

    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    try:
        with _quiet(datasets):
            data = datasets.load_dataset(file_format, data_files=str(path), split="train", **options)
    except Exception as error:  # whatever the reader of somebody's file may raise
        raise UserError(f"{path}: cannot be read as {file_format}: {_root(error)}") from error
    return Table(str(path), data)


def _read_directory(path: Path, source: Source, skip_bad: bool) -> Table:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            split = source.split or "train"
            if split not in data:
                raise UserError(f"{path}: no split {split!r}; it holds {', '.join(data)}{closest(split, list(data))}")
            data = data[split]
        return Table(str(path), data)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _holds_records(file.relative_to(path)))
    if source.split is not None:
        found = files
        files = [f for f in files if f.name.startswith(source.split) or source.split in f.relative_to(path).parts[:-1]]
        if found and not files:
            raise UserError(f"{path}: no file of split {source.split!r} among {', '.join(f.name for f in found[:10])}")
    if not files:
        raise UserError(f"{path} is a directory without .jsonl, .json, .parquet or .csv files")
    tables = [_read_file(file, source.format, skip_bad) for file in files]
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for row in table.rows]
    places = [table.place(i) for table in tables for i in range(len(table.rows))]
    return Table(str(path), rows, places, [line for table in tables for line in table.bad])


def _holds_records(file: Path) -> bool:
    """Not what an editor, a file system or a hub keeps beside them."""
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name not in _ABOUT_RECORDS and _suffix(file) in _FORMATS


def _read_hub(source: Source) -> Table:
    import datasets

    split, name = source.split or "train", hub_id(source.path) or source.path
    if Path(name).exists():  # `datasets` itself would take that, whatever it is
        raise UserError(f"{source.path}: give this in a place that has no file or folder {name}")
    try:
        with _quiet(datasets):
            data = datasets.load_dataset(name, source.name, split=split)
    except Exception as error:  # network, authentication, a missing split: the library's own words are the best
        raise UserError(
            f"cannot load {source.path} (split {split}) from the hub: {_root(error)}{without_hub(name, is_data=True)}"
        ) from error
    return Table(f"{source.path}[{split}]", data)


def _rename(table: Table, columns: Mapping[str, str]) -> Table:
    there = table.columns()
    for ours, theirs in columns.items():
        if theirs not in there:
            raise UserError(
                f"{table.label}: columns maps {ours} to {theirs!r}, which is not there{closest(theirs, there)}; "
                f"the columns are {', '.join(there)}"
            )
    ours_by_theirs = {theirs: ours for ours, theirs in columns.items()}
    hidden = set(columns) - set(columns.values())  # a column of theirs that has the name we now give to another
    rows = [
        {ours_by_theirs.get(key, key): value for key, value in row.items() if key not in hidden} for row in table.rows
    ]
    return Table(table.label, rows, table.places, table.bad)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes else ""


def _looks_local(path: str) -> bool:
    return looks_like_a_path(path) or _suffix(Path(path)) in _FORMATS


def _missing(path: Path) -> NoReturn:
    folder = path.parent
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    where = f"{folder} holds {', '.join(there[:8])}" if there else f"the folder {folder} does not exist or is empty"
    raise UserError(f"no such file or folder: {path}{closest(path.name, there)}; {where}")


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class _quiet:
    """No progress bars of `datasets` while a small local file is read."""

    def __init__(self, datasets: Any) -> None:
        self.bars = datasets.utils.logging

    def __enter__(self) -> None:
        self.was_on = self.bars.is_progress_bar_enabled()
        self.bars.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            self.bars.enable_progress_bar()


def iterate(table: Table) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of every row."""
    for i, row in enumerate(table.rows):
        yield table.place(i), row
