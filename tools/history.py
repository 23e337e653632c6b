"""What training and publishing added to a store, for `tierstore inspect` and `tierstore doctor`.

Input: a store's catalog. Output: JSON-able dicts with stable keys, sizes in bytes, and lines for people. Errors: those
of reading the catalog.
"""

from __future__ import annotations

from typing import Any

from tierstore.formats.catalog import CatalogImage
from tierstore.formats.training_records import read_training
from tierstore.units import format_bytes

Record = dict[str, Any]


def versions_record(image: CatalogImage) -> Record:
    """Returns which published version readers open, "newest" (0: the base), and what all versions take."""
    tables = [table for version in image.versions.values() for table in version.tables.values()]
    return {
        "newest": image.newest,
        "folded": image.folded,
        "rows": dict(image.touched),
        "num_bytes": sum(table.num_bytes for table in tables),
    }


def training_record(image: CatalogImage) -> Record | None:
    """Returns what a store's training has on disk; None without one. Runs that several commits list count once."""
    records = read_training(image.path)
    if records is None:
        return None
    runs = {run.file: run for of in records.commits.values() for each in of.runs.values() for run in each}
    newest = max(records.commits, default=None)
    optimizer = records.training.get("optimizer")
    return {
        "rule": optimizer.get("rule") if isinstance(optimizer, dict) else None,
        "commits": len(records.commits),
        "newest": newest,
        "step": None if newest is None else records.commits[newest].step,
        "opens_at": records.current or 0,
        "pinned": sorted(records.pins),
        "runs": len(runs),
        "num_bytes": sum(run.num_bytes for run in runs.values()),
        "missing": sorted(file for file in records.files if not (image.path / file).is_file()),
    }


def versions_words(record: Record) -> str:
    """Returns a `versions_record` with versions for people."""
    return (
        f"readers open version {record['newest']}; {sum(record['rows'].values()):,} rows are newer than the base's, "
        f"{format_bytes(record['num_bytes'])} in all versions"
    )


def training_words(record: Record) -> str:
    """Returns a `training_record` for people."""
    if record["newest"] is None:
        return f"{record['rule']}, no commit yet"
    at = "" if record["opens_at"] == record["newest"] else f", opens at {record['opens_at'] or 'the base'}"
    pinned = f", {len(record['pinned'])} pinned" if record["pinned"] else ""
    return (
        f"{record['rule']}, commit {record['newest']} of step {record['step']:,} is the newest of "
        f"{record['commits']}{pinned}{at}; {record['runs']:,} runs, {format_bytes(record['num_bytes'])}"
    )
