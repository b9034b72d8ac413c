"""A data set in memory: the items of its sources, and the share held out by hash."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.building import Encoding, Row, build_items
from rlhf_lightning.data.items import Item, UnpairedItem
from rlhf_lightning.data.mismatch import with_mismatched
from rlhf_lightning.data.readers import Source, closest, iterate, read_source
from rlhf_lightning.data.report import DataReport

log = logging.getLogger(__name__)

Sources = str | Source | list[str | Source]


@dataclass(frozen=True)
class Split:
    """Everything of one data set in memory."""

    items: Sequence[Item]
    """Source after source."""
    counts: tuple[int, ...]
    """Items of each source."""
    weights: tuple[float, ...]
    """How often each source's items are seen per epoch."""
    report: DataReport
    digests: frozenset[bytes] = frozenset()
    """Of every record read."""


@dataclass(frozen=True)
class Holdout:
    """The share of each source that is held out, chosen by each record's hash."""

    fraction: float
    is_held_out: bool
    """True: this data set is the share; False: it is the rest."""

    def keeps(self, record: Mapping[str, Any]) -> bool:
        return (record_share(record) < self.fraction) == self.is_held_out


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source that belong to a data set."""

    source: Source
    columns: Sequence[str]
    unreadable: Sequence[str]
    """What was wrong with lines that were skipped."""
    rows: Iterator[Row]


def read_rows(given: Sources, holdout: Holdout | None, *, skip_bad: bool) -> Iterator[SourceRows]:
    """The rows of each source.

    Args:
        given: the sources, in any form that a user may write.
        holdout: which share of them; None: all.
        skip_bad: whether a line that is no JSON is left out instead of being an error.
    """
    for source in as_sources(given):
        table = read_source(source, skip_bad=skip_bad)
        rows = iterate(table)
        if holdout is not None:
            rows = ((place, row) for place, row in rows if holdout.keeps(row))
        yield SourceRows(source, table.columns(), table.bad, rows)


def read_split(
    name: str, given: Sources, encoding: Encoding, *, holdout: Holdout | None = None, weighted: bool = True
) -> Split:
    """Read, check and encode a data set; log what became of its records.

    Args:
        name: of the data set: train, val, test or pretraining.
        given: its sources.
        encoding: how records become tokens.
        holdout: which share of the sources; None: all.
        weighted: whether the sources' weights count (False: each record is seen once).
    """
    report = DataReport(name)
    items: list[Item] = []
    counts, weights = [], []
    seen: set[bytes] = set()
    files = [source.path for source in as_sources(given)]
    for part in read_rows(given, holdout, skip_bad=encoding.skip_bad):
        for line in part.unreadable:
            report.read += 1
            report.leave_out("bad record", line)
        rows = _note_repeats(part.rows, seen, report)
        made = build_items(rows, part.columns, part.source.path, encoding, report)
        if made:
            items += made
            counts.append(len(made))
            weights.append(part.source.weight if weighted else 1.0)
    if encoding.batch_format == "mismatched" and items:
        unpaired = [item for item in items if isinstance(item, UnpairedItem)]
        share = f"val_frac={holdout.fraction} of " if holdout is not None and holdout.is_held_out else ""
        whence = f"{name} ({share}{', '.join(files)})"
        items = list(with_mismatched(unpaired, encoding.rule, encoding.tokenizer.bos_token_id, whence))
    if not items:
        reasons = "; ".join(
            f"{count} {reason} (first: {report.examples[reason][0]})" for reason, count in report.left_out.items()
        )
        if holdout and not report.read:
            lower = "holds out all of the records" if name == "train" else "holds out none of the records"
            remedy = "lower it" if name == "train" else "raise it, give val instead, or 0 to train without validation"
            raise UserError(f"val_frac={holdout.fraction} {lower} of {', '.join(files)}: {remedy}")
        raise UserError(f"{name}: none of its {report.read} records can be used: {reasons}")
    report.log()
    return Split(items, tuple(counts), tuple(weights), report, frozenset(seen))


def warn_of_overlap(train: Split, held_out: Split) -> None:
    """Say how many records are trained on and tested on."""
    shared = len(train.digests & held_out.digests)
    if shared:
        name = held_out.report.name
        held_out.report.notes["also in train"] = shared
        log.warning(f"{name}: {shared} of its records are in train too: its figures will look better than they are")


def as_sources(given: Sources | Mapping[str, Any]) -> list[Source]:
    """Whatever a user may write for sources, as a list of `Source`."""
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise UserError("the list of sources is empty")
    return [_as_source(entry) for entry in entries]


def _as_source(entry: str | Source | Mapping[str, Any]) -> Source:
    if isinstance(entry, Source):
        return entry
    if isinstance(entry, Mapping):
        known = [field.name for field in fields(Source)]
        unknown = [name for name in entry if name not in known]
        if unknown or "path" not in entry:
            what = f"{unknown[0]} is no option of a source{closest(unknown[0], known)}" if unknown else "it has no path"
            raise UserError(f"source {dict(entry)}: {what}; it takes {', '.join(known)}")
        return Source(**entry)
    if entry.lstrip().startswith(("{", "[")):  # on the command line, what fits no source is taken for a path
        try:
            given = yaml.safe_load(entry)
        except yaml.YAMLError:
            given = None
        for inner in given if isinstance(given, list) else [given]:
            if isinstance(inner, Mapping):
                _as_source(inner)
        raise UserError(f"source {entry!r} is no path; its options are {', '.join(f.name for f in fields(Source))}")
    return Source(entry)


def record_share(record: Mapping[str, Any]) -> float:
    """A number in [0, 1) that depends on the record's content alone: not on its place, nor on other records."""
    return int.from_bytes(_digest(record), "big") / 2**64


def _digest(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _note_repeats(rows: Iterator[Row], seen: set[bytes], report: DataReport) -> Iterator[Row]:
    for place, record in rows:
        digest = _digest(record)
        if digest in seen:
            report.note("the same as an earlier record (kept)", place)
        seen.add(digest)
        yield place, record
