"""What a catalog says of a training: what it is, its commits and pins, and the numbers that were given.

Input: the catalog's records. Output: `TrainingRecords`, those of one committed transaction; records for the next one.
Errors: `FormatError` for damaged ones, `ConfigError` for commits that are not there. FORMAT.md lists the records.

Readers of other versions pass these records by: they change nothing of the rows that a store serves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..causes import named
from ..errors import ConfigError, FormatError, StoreNotReadyError
from ..layout import checked_path
from .catalog import holds_catalog
from .catalog_records import as_json, from_json, read_records
from .run import Run, RunLayout

PAYLOAD_BYTES_MAX = 1 << 20
KEPT_COMMITS = 2  # the newest; pinned ones stay besides
TRAINING_KEY, NUMBERS_KEY = "training", "training_numbers"


@dataclass(frozen=True)
class RatesRecord:
    """A file of learning rates: relative to the store, its bytes, its SHA-256 (hex)."""

    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """A commit, as the catalog has it.

    Attributes:
        number: Never given twice in a store.
        step: The training's.
        payload: What the caller gave.
        runs: By table, oldest first: the later run has the newer record.
        optimizer: Numbers of the optimizer, JSON-able: steps of each table, and what else the training wants back.
        rates: The file of learning rates; None without one.
        time_s: Seconds since 1970.
        digest: SHA-256, hex, of everything else.
    """

    number: int
    step: int
    payload: bytes
    runs: Mapping[str, tuple[Run, ...]]
    optimizer: Mapping[str, Any]
    rates: RatesRecord | None
    time_s: float
    digest: str

    @property
    def common(self) -> str | None:
        """A digest, hex, that the commits have in common which ranks made together; None: it is of one process."""
        together = self.optimizer.get("together")
        return None if together is None else hashlib.sha256(as_json([self.step, together])).hexdigest()

    @property
    def files(self) -> frozenset[str]:
        """All files that it needs, relative to the store."""
        files = {run.file for runs in self.runs.values() for run in runs}
        return frozenset(files | {self.rates.file} if self.rates else files)

    @property
    def num_bytes(self) -> int:
        """Bytes of its files; commits share them."""
        return sum(run.num_bytes for runs in self.runs.values() for run in runs) + (
            self.rates.num_bytes if self.rates else 0
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the record, JSON-able, without the payload's bytes, but with their digest."""
        return {
            "number": self.number,
            "step": self.step,
            "payload_sha256": hashlib.sha256(self.payload).hexdigest(),
            "runs": {table: [run.to_dict() for run in runs] for table, runs in self.runs.items()},
            "optimizer": dict(self.optimizer),
            "rates": asdict(self.rates) if self.rates else None,
            "time_s": self.time_s,
        }

    def sealed(self) -> Commit:
        """Returns it with its digest."""
        return replace(self, digest=hashlib.sha256(as_json(self.to_dict())).hexdigest())


@dataclass(frozen=True)
class TrainingRecords:
    """All that a catalog says of a training.

    Attributes:
        training: What `create_training` was given: optimizer, layouts, base or initializer.
        commits: The kept ones, by number, ascending.
        pins: Numbers of pinned commits.
        current: The commit that a training opens at; None: the base.
        last_commit: The largest number ever given, 0 at first.
        last_run: The same, of runs.
    """

    path: Path
    training: Mapping[str, Any]
    commits: Mapping[int, Commit]
    pins: frozenset[int]
    current: int | None
    last_commit: int
    last_run: int

    @property
    def files(self) -> frozenset[str]:
        """All files that a kept commit needs, relative to the store."""
        return frozenset().union(*(commit.files for commit in self.commits.values()))

    def commit(self, number: int) -> Commit:
        """Returns a commit; raises `ConfigError`, with those that there are."""
        if number not in self.commits:
            there = ", ".join(map(str, self.commits)) or "none yet"
            raise ConfigError(f"{self.path}: there is no commit {number}; there are: {there}")
        return self.commits[number]

    def unkept(self, newest: int) -> list[int]:
        """Returns commits that are neither pinned nor among the newest so many, nor the current one."""
        old = sorted(self.commits)[: max(0, len(self.commits) - newest)]
        return [number for number in old if number not in self.pins and number != self.current]

    def numbers_record(self) -> dict[str, bytes]:
        """Returns the catalog record of the numbers."""
        numbers = {"current": self.current, "last_commit": self.last_commit, "last_run": self.last_run}
        return {NUMBERS_KEY: as_json(numbers)}


def read_training(store: str | os.PathLike[str]) -> TrainingRecords | None:
    """Reads what the catalog says of a training; None without one. Safe beside a writer. Blocks on the disk.

    Raises `StoreNotReadyError` if there is no store, `FormatError` if it is another folder, or its records are damaged.
    """
    path = Path(store)
    try:
        if not holds_catalog(path):
            raise StoreNotReadyError(f"there is no store at {path}; build one: tierstore build CHECKPOINT {path}")
        records = read_records(path)
    except OSError as error:
        raise named(error, f"cannot read {error.filename or path}", error.filename or path) from error
    return training_of(path, records)


def training_of(path: Path, records: Mapping[str, bytes]) -> TrainingRecords | None:
    """Returns what a catalog's records say of a training. Raises `FormatError`."""
    if TRAINING_KEY not in records:
        return None
    training = from_json(records, TRAINING_KEY, path)
    numbers = from_json(records, NUMBERS_KEY, path)
    commits = {}
    for key in sorted(records):
        kind, _, number = key.partition("/")
        if kind == "commit":
            commit = _commit(path, records, number)
            commits[commit.number] = commit
    pins = frozenset(int(key[4:]) for key in records if key.startswith("pin/") and key[4:].isdecimal())
    current, last_commit, last_run = (numbers.get(name) for name in ("current", "last_commit", "last_run"))
    newest_run = max(
        (run.number for commit in commits.values() for of in commit.runs.values() for run in of), default=0
    )
    if (
        type(last_commit) is not int
        or type(last_run) is not int
        or last_commit < max(commits, default=0)
        or last_run < newest_run
        or (current is not None and current not in commits)
    ):
        raise FormatError(
            f"{path}: the catalog's numbers of the training {numbers} do not fit its commits {list(commits)} and runs "
            f"up to {newest_run}; restore the catalog"
        )
    return TrainingRecords(path, training, commits, pins & commits.keys(), current, last_commit, last_run)


def commit_records(commit: Commit) -> dict[str, bytes]:
    """Returns the catalog records of a commit."""
    record = commit.to_dict() | {"digest": commit.digest}
    return {f"commit/{commit.number:08d}": as_json(record), f"payload/{commit.number:08d}": commit.payload}


def keys_of_commits(numbers: Iterable[int]) -> list[str]:
    """Returns the keys of all records that commits have."""
    return [f"{kind}/{number:08d}" for number in numbers for kind in ("commit", "payload", "pin")]


def pin_key(number: int) -> str:
    """Returns the key of a pin."""
    return f"pin/{number:08d}"


def layouts_of(training: Mapping[str, Any]) -> dict[str, RunLayout]:
    """Returns the record layouts, by table, that `create_training` noted. Raises `FormatError`."""
    layouts = training.get("layouts")
    if not isinstance(layouts, dict):
        raise FormatError("the catalog's record of the training has no layouts; restore the catalog")
    return {name: RunLayout.from_dict(layout) for name, layout in layouts.items()}


def _commit(path: Path, records: Mapping[str, bytes], number: str) -> Commit:
    key = f"commit/{number}"
    record = from_json(records, key, path)
    try:
        rates = record["rates"]
        commit = Commit(
            number=int(number),
            step=record["step"],
            payload=records[f"payload/{number}"],
            runs={table: tuple(Run.from_dict(run) for run in runs) for table, runs in record["runs"].items()},
            optimizer=record["optimizer"],
            rates=RatesRecord(checked_path(rates["file"], key), rates["num_bytes"], rates["sha256"]) if rates else None,
            time_s=record["time_s"],
            digest="",
        ).sealed()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: the catalog's record {key} is damaged ({error!r:.100}); restore the catalog"
        ) from error
    if commit.digest != record.get("digest") or type(commit.step) is not int:
        raise FormatError(
            f"{path}: the catalog's record {key} does not have the digest that it names; restore the catalog"
        )
    return commit
