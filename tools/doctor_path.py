"""What `tierstore doctor` says of its PATH: whether it is there, and, if it is a store, whether this user can open it.

Input: a path. Output: findings. Reads the catalog and opens every file of a store for reading; changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tierstore.causes import cause_of
from tierstore.errors import TierStoreError
from tierstore.formats.catalog import CATALOG_FILE, CatalogImage, read_catalog
from tierstore.formats.run import REMEDY as RUN_REMEDY
from tierstore.tiers.files import open_table
from tierstore.tiers.placed import PlacementFile
from tierstore.tiers.version_files import VersionFiles
from tierstore.units import count_text, format_bytes

from .history import training_record, training_words, versions_record, versions_words


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, "ok", "warn" or "fail", what was found, and what to do about it."""

    what: str
    state: str
    fact: str
    remedy: str = ""


def existing_folder(path: Path) -> tuple[Path, Finding | None]:
    """Returns the nearest folder at or above `path` that is there, and a finding if that is not `path` itself."""
    existing = path.absolute()
    while not os.path.isdir(existing) and existing != existing.parent:
        existing = existing.parent
    if existing == path.absolute():
        return existing, None
    try:
        path.stat()
    except FileNotFoundError:
        fact = f"{path} does not exist; the lines on the disk below are of {existing}"
        return existing, Finding("path", "warn", fact, "check the name, unless a store will be built there")
    except OSError as error:
        cause = cause_of(error, path)
        return existing, Finding("path", "warn", f"{path}: {cause.facts}", cause.remedy)
    return existing, Finding("path", "warn", f"{path} is a file", "give the folder of a store, or where one will be")


def check_store(path: Path) -> list[Finding]:
    """If `path` is a store: what does it hold, can this user read all of it, and does it open?"""
    try:
        if not os.path.lexists(path / CATALOG_FILE):
            return []
        image = read_catalog(path, must_be_ready=False, may_be_initial=True)
    except TierStoreError as error:
        fact, remedy = _fact_and_remedy(error)
        return [Finding("store", "fail", fact, remedy)]
    num_rows = sum(layout.spec.num_rows for layout in image.tables.values())
    store_bytes = sum(layout.store_bytes for layout in image.tables.values())
    table_bytes = sum(layout.spec.table_bytes for layout in image.tables.values())
    placed = f"placement {image.epoch}" if image.epoch is not None else "no placement"
    where = f" beside {format_bytes(table_bytes)} in place" if image.is_in_place else ""
    counts = f"{count_text(len(image.tables), 'table')}, {count_text(num_rows, 'row')}"
    fact = f"{counts}, {format_bytes(store_bytes)}{where}, {placed}"
    if not image.ready:
        return [Finding("store", "fail", f"{fact}; its build has not finished", "run the same tierstore build again")]
    findings = [Finding("store", "ok", fact)]
    if not image.is_initial:
        findings.append(_check_opens(image))
    if image.versions:
        findings.append(_check_versions(image))
    return findings + _check_training(image)


def _check_opens(image: CatalogImage) -> Finding:
    """Opens every shard and the placement, as a store does, and closes them; pages are `tierstore verify`'s."""
    num_shards = 0
    try:
        for layout in image.tables.values():
            open_table(image, layout, direct=False).close()
        num_shards = sum(layout.num_shards for layout in image.paged.values())
        if image.epoch is not None:
            PlacementFile(image, image.epoch, direct=False).close()
    except TierStoreError as error:
        fact, remedy = _fact_and_remedy(error)
        return Finding("store's files", "fail", fact, remedy)
    fact = f"{count_text(num_shards, 'shard')} open for user {os.geteuid()}, of the right length"
    if image.is_in_place:
        fact += f"; so do {count_text(len(image.files), 'file')} of the checkpoint, unchanged"
    return Finding("store's files", "ok", fact)


def _check_versions(image: CatalogImage) -> Finding:
    """Opens every file of published rows, as a reader of the newest version does."""
    try:
        for name in image.touched:
            VersionFiles(image, image.tables[name]).close()
    except TierStoreError as error:
        return Finding("versions", "fail", *_fact_and_remedy(error))
    return Finding("versions", "ok", versions_words(versions_record(image)))


def _check_training(image: CatalogImage) -> list[Finding]:
    """Looks whether the files of all commits are there; nothing of a store that was never trained."""
    try:
        record = training_record(image)
    except TierStoreError as error:
        return [Finding("training", "fail", *_fact_and_remedy(error))]
    if record is None:
        return []
    if record["missing"]:
        fact = f"{training_words(record)}; {len(record['missing'])} files are missing: {record['missing'][0]}"
        return [Finding("training", "fail", fact, RUN_REMEDY)]
    return [Finding("training", "ok", training_words(record))]


def _fact_and_remedy(error: TierStoreError) -> tuple[str, str]:
    """Returns what an error says, and what it says last: what to do."""
    fact, _, remedy = str(error).rpartition("; ")
    return (fact, remedy) if fact else (remedy, "run tierstore verify, which says more")
