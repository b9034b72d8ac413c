"""Claims that a table can confirm or refute."""

import csv
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample

SQLITE_ENDINGS = (".db", ".sqlite", ".sqlite3")


class FactTable(RewardFn):
    r"""Claims are read out of the answer by a pattern and looked up in a table.

        score = mean over claims of (true: 1, false: false_score, unknown: unknown_score), no_claim_score without any

    A claim is a match of `pattern`, whose named groups are columns of the table. `value_column` is what is claimed,
    the other groups say about what: r"(?P<country>\w+)'s capital is (?P<capital>\w+)" with value_column=capital. True:
    a row agrees in all groups. False: rows agree in all but the value. Unknown: none does. Case and white space do not
    count. A claim made twice counts once.

    Args:
        path: a CSV file (UTF-8, with a header) or an SQLite database (.db, .sqlite, .sqlite3); read once.
        pattern: regular expression with named groups.
        value_column: the group that is claimed.
        table: name of the table in the database; null = the only one.
        false_score, unknown_score, no_claim_score: what else than truth is worth.
    """

    def __init__(
        self,
        path: str,
        pattern: str,
        value_column: str,
        table: str | None = None,
        false_score: float = -1.0,
        unknown_score: float = 0.0,
        no_claim_score: float = 0.0,
    ) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(f"pattern={pattern!r} of FactTable is no regular expression: {error}") from error
        groups = list(self._pattern.groupindex)
        if value_column not in groups or len(groups) < 2:
            raise UserError(
                f"pattern={pattern!r} of FactTable has the named groups {groups}: one must be value_column="
                f"{value_column!r} and at least one other must say what the claim is about"
            )
        self.value_column = value_column
        self.false_score = false_score
        self.unknown_score = unknown_score
        self.no_claim_score = no_claim_score
        self._about = [group for group in groups if group != value_column]
        self._facts: dict[tuple[str, ...], set[str]] = {}
        """What the table says: values by what they are about."""
        for row in _rows(Path(path).expanduser(), table, groups):
            about = tuple(_plain(row[column]) for column in self._about)
            self._facts.setdefault(about, set()).add(_plain(row[value_column]))

    def __call__(self, samples: Sequence[Sample]) -> DetailedScores:
        found = [self._verdicts(sample.completion) for sample in samples]
        worth = {"true": 1.0, "false": self.false_score, "unknown": self.unknown_score}
        scores = [sum(worth[v] for v in vs) / len(vs) if vs else self.no_claim_score for vs in found]
        return DetailedScores(scores, {verdict: [float(vs.count(verdict)) for vs in found] for verdict in worth})

    def _verdicts(self, text: str) -> list[str]:
        claims = {
            (tuple(_plain(m[column] or "") for column in self._about), _plain(m[self.value_column] or ""))
            for m in self._pattern.finditer(text)
        }
        verdicts = []
        for about, value in claims:
            known = self._facts.get(about)
            verdicts.append("unknown" if known is None else "true" if value in known else "false")
        return verdicts


def _plain(value: Any) -> str:
    return " ".join(str(value).casefold().split())


def _rows(path: Path, table: str | None, columns: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"FactTable: there is no file {path.absolute()}")
    if path.suffix.lower() in SQLITE_ENDINGS:
        return _from_sqlite(path, table, columns)
    if table is not None:
        raise UserError(f"FactTable: table={table!r} names a table of a database, but {path.name} is read as CSV")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_columns(path.name, list(reader.fieldnames or []), columns)
        return [{column: row[column] or "" for column in columns} for row in reader]


def _from_sqlite(path: Path, table: str | None, columns: list[str]) -> list[dict[str, Any]]:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            query = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'"
            tables = [name for (name,) in database.execute(query)]
            if table is None and len(tables) != 1:
                raise UserError(f"FactTable: {path.name} holds the tables {', '.join(tables) or 'none'}: give table")
            chosen = tables[0] if table is None else table
            if chosen not in tables:
                raise UserError(f"FactTable: {path.name} has no table {table!r}, but {', '.join(tables) or 'none'}")
            cursor = database.execute(f"SELECT * FROM {_quoted(chosen)}")
            names = [entry[0] for entry in cursor.description]
            _check_columns(f"{path.name}, table {chosen}", names, columns)
            return [dict(zip(names, row, strict=True)) for row in cursor]
    except sqlite3.DatabaseError as error:
        raise UserError(f"FactTable: {path.name} cannot be read as an SQLite database: {error}") from error


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _check_columns(where: str, there: list[str], wanted: list[str]) -> None:
    missing = [column for column in wanted if column not in there]
    if missing:
        raise UserError(f"FactTable: {where} has no column {missing[0]!r}, but {', '.join(there) or 'none'}")
