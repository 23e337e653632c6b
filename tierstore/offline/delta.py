"""Deltas: versions of a store packed on one host, and applied to the same store on another.

Input: a store and a range of versions; or a store and a delta. Output: a file; or the versions, published. Errors:
`ConfigError` if base or versions do not agree, `FormatError` for a delta that is damaged.

Nothing is applied by halves: files come first, whole and synced, then one transaction publishes all their versions.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..causes import Fault, named, naming
from ..durable import read_exactly, replacing, sync_folder, write_all
from ..errors import ConfigError, FormatError
from ..formats.catalog import CatalogImage, publish_versions, read_catalog
from ..formats.delta import DeltaHead, read_delta_head
from ..formats.version_rows import VERSIONS_FOLDER
from ..formats.versions import identity_of
from ..process.progress import OnProgress
from .versions import check_room, locked_for_publish, remove_leftovers, rows_file

COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class DeltaReport:
    """What was packed or applied: versions (first_version .. last_version, none if first is larger), files' bytes."""

    first_version: int
    last_version: int
    num_bytes: int


def write_delta(
    store_path: str | os.PathLike[str],
    since: int,
    until: int,
    out: str | os.PathLike[str],
    on_progress: OnProgress | None = None,
) -> DeltaReport:
    """Packs the versions behind `since` up to `until` into a new file. Blocks on the disk.

    Args:
        store_path: The store.
        since: The version that the other host has; 0: only the base.
        until: The version that it is to have.
        out: The file, which is replaced all at once.
        on_progress: (bytes done, bytes in all).

    Returns:
        What is in it.

    Raises:
        ConfigError: There are not such versions, or the file cannot be written.
        FormatError: A file of a version is missing or is not what the catalog says.
        BudgetError: The disk has too little room.
    """
    path, out = Path(store_path), Path(out)
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out} is there and not a regular file; give the name of a file to write")
    image = read_catalog(path)
    before, after = image.at_version(since), image.at_version(until)
    if since >= until:
        raise ConfigError(f"a delta from version {since} to {until} has nothing: give A..B with A below B")
    if since < image.folded:
        raise ConfigError(
            f"{path}: versions 1 to {image.folded} were folded into one, which no delta has: give A..B with A at least "
            f"{image.folded}, or copy the store to the other host"
        )
    packed = tuple(version for version in after.used_versions if version.number > since)
    head = DeltaHead(image.base_identity, before.identity, after.identity, packed)
    head_bytes = head.to_bytes()
    starts = head.file_starts(len(head_bytes))
    check_room(out.absolute().parent, starts[-1])
    try:
        with replacing(out) as fd:
            write_all(fd, head_bytes, 0)
            os.truncate(fd, starts[-1])
            for (file, num_bytes, sha256), start in zip(head.files, starts, strict=False):
                _pack(path / file, num_bytes, sha256, fd, start)
                if on_progress:
                    on_progress(start + num_bytes, starts[-1])
    except OSError as error:
        raise named(error, out, error.filename, writing=True, needed_bytes=starts[-1]) from error
    return DeltaReport(since + 1, until, starts[-1])


def apply_delta(
    store_path: str | os.PathLike[str], delta: str | os.PathLike[str], on_progress: OnProgress | None = None
) -> DeltaReport:
    """Publishes the versions of a delta that a store does not have yet. Blocks on the disk. Readers go on.

    Args:
        store_path: The store: with the same base, and with the same versions as far as it has them.
        delta: The file.
        on_progress: (bytes done, bytes in all).

    Returns:
        Which versions were published; none, if the store had them all.

    Raises:
        ConfigError: The store is another one, or its versions are others; somebody else publishes.
        FormatError: The delta is damaged; nothing is published.
        BudgetError: The disk has too little room.
    """
    path, delta = Path(store_path), Path(delta)
    read_catalog(path)  # before a lock is made in a folder that is not a store
    with locked_for_publish(path):
        image = read_catalog(path)
        fd = _open_delta(delta)
        try:
            return _apply(path, image, delta, fd, on_progress)
        except OSError as error:
            raise named(error, path, error.filename, writing=True, note="nothing was published") from error
        finally:
            os.close(fd)


def _open_delta(delta: Path) -> int:
    remedy = "give a file that 'tierstore delta STORE A..B -o FILE' wrote"
    with naming(delta, delta, fault=Fault(ConfigError, remedy)):
        fd = os.open(delta, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block for ever
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{delta} is not a regular file; {remedy}")
    return fd


def _apply(path: Path, image: CatalogImage, delta: Path, fd: int, on_progress: OnProgress | None) -> DeltaReport:
    head, head_bytes = read_delta_head(delta, fd, image.tables)
    has = image.newest
    first, last = head.versions[0].number, head.versions[-1].number
    _check_history(path, image, delta, head)
    missing = tuple(version for version in head.versions if version.number > has)
    if not missing:
        return DeltaReport(last + 1, last, 0)
    check_room(path, sum(num_bytes for _, num_bytes, _ in replace(head, versions=missing).files))
    (path / VERSIONS_FOLDER).mkdir(exist_ok=True)
    sync_folder(path)
    remove_leftovers(path, image)
    starts = iter(head.file_starts(head_bytes))
    records = []
    for version in head.versions:
        tables = {}
        for name, table in sorted(version.tables.items()):
            start = next(starts)
            # The name is the store's to give: a delta leads nobody out of its folder.
            tables[name] = replace(table, file=rows_file(image, version.number, name))
            if version.number > has:
                _unpack(delta, fd, start, table.num_bytes, table.sha256, path / tables[name].file)
                if on_progress:
                    on_progress(start + table.num_bytes, head.file_starts(head_bytes)[-1])
        # Commits are numbered by each host's own training.
        records.append(replace(version, commit=None, tables=tables))
    publish_versions(path, [record for record in records if record.number > has])
    return DeltaReport(max(first, has + 1), last, sum(n for _, n, _ in replace(head, versions=missing).files))


def _check_history(path: Path, image: CatalogImage, delta: Path, head: DeltaHead) -> None:
    """Refuses a delta of another base, of other versions than the store's, or that begins behind what it has."""
    if head.base != image.base_identity:
        raise ConfigError(
            f"{delta} is of a store whose base has digest {head.base[:12]}, that of {path} has "
            f"{image.base_identity[:12]}: build or copy the same store first"
        )
    first, has = head.versions[0].number, image.newest
    if first - 1 > has:
        raise ConfigError(
            f"{delta} begins behind version {first - 1}, {path} has versions up to {has}: apply the delta of "
            f"{has}..{first - 1} before it"
        )
    if identity_of(head.since, head.versions) != head.until:
        raise FormatError(f"{delta}: its versions do not have the digest that it names; copy it again")
    common = min(has, head.versions[-1].number)
    wanted = identity_of(head.since, [version for version in head.versions if version.number <= common])
    found = image.at_version(common).identity
    if found != wanted:
        raise ConfigError(
            f"{delta} and {path} differ at version {common} (digest {wanted[:12]}, and there {found[:12]}): they were "
            f"published apart; compact one of them into a new store"
        )


def _pack(file: Path, num_bytes: int, sha256: str, to: int, start: int) -> None:
    """Copies a version's file into a delta, and checks it on the way."""
    with file.open("rb") as opened:
        found_bytes = os.fstat(opened.fileno()).st_size
        if found_bytes != num_bytes:
            raise FormatError(
                f"{file}: {found_bytes} bytes on disk, the catalog says {num_bytes}; run 'tierstore verify'"
            )
        _copy(str(file), opened.fileno(), 0, num_bytes, sha256, to, start)


def _unpack(delta: Path, fd: int, start: int, num_bytes: int, sha256: str, file: Path) -> None:
    with replacing(file) as to:
        _copy(f"{delta}: the file {file.name}", fd, start, num_bytes, sha256, to, 0)


def _copy(what: str, fd: int, start: int, num_bytes: int, sha256: str, to: int, to_start: int) -> None:
    digest = hashlib.sha256()
    for at, data in _pieces(what, fd, start, num_bytes):
        digest.update(data.data)
        write_all(to, data, to_start + at)
    if digest.hexdigest() != sha256:
        raise FormatError(
            f"{what}: SHA-256 {digest.hexdigest()[:16]}..., its record says {sha256[:16]}...; copy it again"
        )


def _pieces(what: str, fd: int, start: int, num_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, num_bytes, COPY_BYTES):
        data = np.empty(min(COPY_BYTES, num_bytes - at), dtype=np.uint8)
        with naming(what):
            read_exactly(fd, data, start + at, what)
        yield at, data
