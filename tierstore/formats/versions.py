"""Versions as the catalog has them: which rows were published after the base, in which files.

Input: catalog records `version/00000001` and so on. Output: `VersionRecord`s, oldest first, and digests of a store at
a version. Errors: `FormatError` for records that are damaged, `ConfigError` for a version that is not there.

A version is the base and the rows of all versions up to it: of a row that several have, the newest counts. The oldest
one may be folded: it has all rows of those before it, which are gone; its digest is what it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..layout import TableLayout, checked_path
from .version_rows import ROWS_MAX, RowsFile


@dataclass(frozen=True)
class VersionTable:
    """The rows that a version has of one table.

    Attributes:
        file: Of its rows, relative to the store.
        num_bytes: Of the file.
        num_rows: In the file.
        num_touched: Rows that this version, or one before it, has: what a reader's index must have room for.
        sha256: Of the file, hex.
    """

    file: str
    num_bytes: int
    num_rows: int
    num_touched: int
    sha256: str


@dataclass(frozen=True)
class VersionRecord:
    """A published version. A table whose rows did not change has no part of it.

    Attributes:
        number: 1, 2, ...; 0 is the base, which has no record.
        commit: Of the training that it was published from; None if it is not of a commit.
        created_at: Seconds since 1970.
        tables: By name.
        folded: None, or, of the oldest one if it has the rows of all before it, its digest.
        common: What the versions of all slices have in common that ranks committed together; None: of no such commit.
    """

    number: int
    commit: int | None
    created_at: float
    tables: Mapping[str, VersionTable]
    folded: str | None = None
    common: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as a JSON-able dict."""
        tables = {name: vars(table) for name, table in self.tables.items()}
        record = {"number": self.number, "commit": self.commit, "created_at": self.created_at, "tables": tables}
        optional = {"folded": self.folded, "common": self.common}
        return record | {name: value for name, value in optional.items() if value is not None}

    @classmethod
    def from_dict(cls, record: Any, layouts: Mapping[str, TableLayout], what: str) -> VersionRecord:
        """Reads what `to_dict` wrote; `what` names the record in errors. Raises `FormatError`."""
        try:
            tables = {name: VersionTable(**table) for name, table in record["tables"].items()}
            created_at, folded, common = float(record["created_at"]), record.get("folded"), record.get("common")
            made = cls(record["number"], record["commit"], created_at, tables, folded, common)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{what} is damaged ({error!r:.200}); restore the catalog") from error
        if type(made.number) is not int or not (made.commit is None or type(made.commit) is int):
            raise FormatError(f"{what} is damaged: its number is {made.number!r}; restore the catalog")
        for digest in (made.folded, made.common):
            if not isinstance(digest, str | None):
                raise FormatError(f"{what} is damaged: its digest is {digest!r:.100}; restore the catalog")
        for name, table in made.tables.items():
            _check_table(name, table, layouts, what)
        return made


def _check_table(name: str, table: VersionTable, layouts: Mapping[str, TableLayout], what: str) -> None:
    """Checks every number that a reader computes with, before it does."""
    checked_path(table.file, what)
    numbers = table.num_bytes, table.num_rows, table.num_touched
    spec = layouts[name].spec if name in layouts else None
    if (
        spec is None
        or not all(type(number) is int for number in numbers)
        or not 1 <= table.num_rows <= table.num_touched <= min(spec.num_rows, ROWS_MAX)
        or table.num_bytes != RowsFile(0, name, spec.row_bytes, table.num_rows, "", 0).num_bytes
        or not isinstance(table.sha256, str)
    ):
        raise FormatError(f"{what}: the numbers {numbers} of its table {name} contradict the store; restore it")


def check_numbers(path: Path, versions: Mapping[int, VersionRecord]) -> None:
    """Raises `FormatError` unless the versions of a store are 1, 2, ... without a gap, or the first one is folded."""
    first, *later = sorted(versions) or [1]
    if (
        sorted(versions) != list(range(first, first + len(versions)))
        or any(n != v.number for n, v in versions.items())
        or (first != 1 and versions[first].folded is None)
        or any(versions[number].folded is not None for number in later)
    ):
        raise FormatError(f"{path}: the catalog has versions {sorted(versions)}, with a gap; restore the catalog")


def identity_of(base_identity: str, versions: Sequence[VersionRecord]) -> str:
    """Returns the digest, hex, of a store with all of `versions`, oldest first; without any it is the base's."""
    identity = base_identity
    for version in versions:
        if version.folded is not None:
            identity = version.folded
            continue
        tables = {name: [table.num_rows, table.sha256] for name, table in sorted(version.tables.items())}
        text = json.dumps([identity, version.number, tables], sort_keys=True)
        identity = hashlib.sha256(text.encode()).hexdigest()
    return identity


def unknown_version(path: Path, version: object, versions: Mapping[int, VersionRecord]) -> ConfigError:
    """Returns the error for a version that a store does not have."""
    oldest, newest = min(versions, default=0), max(versions, default=0)
    there = f"it has versions 0 (the base) to {newest}" if newest else "it has only its base, version 0"
    if oldest > 1:
        there = f"it has versions 0 (the base) and {oldest} to {newest}; those before {oldest} were folded into it"
    return ConfigError(f"version: {version!r} is not one of {path}: {there}; run 'tierstore versions {path}'")
