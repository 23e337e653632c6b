"""export: a store's rows back into a checkpoint that any loader takes: the layout that they came from, byte for byte.

Input: a store, and the checkpoint that it was built from. Output: a new folder with the checkpoint's files, in which
rows that training touched are new and all other bytes are the same; and the SHA-256 of every file. Errors: before
anything is written, a checkpoint that has changed since the build, by name, and what the disk has no room for.

Rows that nobody touched come from the checkpoint's files if these are still the very files that the store was built
from, else from the store, page by page with their checksums. The folder appears whole, when everything is durable.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierstore.causes import named
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.formats.checkpoint import Checkpoint, TableSource
from tierstore.formats.origin import changed_files, same_checkpoint
from tierstore.offline.exporting.new_files import write_files
from tierstore.offline.exporting.new_folder import check_free, new_folder
from tierstore.offline.exporting.parts import StoredRows
from tierstore.process.progress import OnProgress
from tierstore.units import format_bytes

from .checkpoints import sources_of_store
from .export_layout import ExportLayout, TableRows, lay_out_export

JOBS_MAX = 64
SPARE_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        files: In order of name.
        left_out: Files of the checkpoint that the export does not have, each with the reason.
        from_store: Tables whose untouched rows came from the store, because the checkpoint's files were copied or
            moved since the build.
        touched_rows: Rows that training changed, by table.
        seconds: All of it took.
    """

    files: tuple[ExportedFile, ...]
    left_out: Mapping[str, str]
    from_store: tuple[str, ...]
    touched_rows: Mapping[str, int]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def export_checkpoint(
    store_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> ExportReport:
    """Writes a store's tables as a checkpoint, in the layout of the one that it was built from. Blocks until durable.

    Args:
        store_path: The store.
        out: A new folder, which appears whole.
        source: The checkpoint that the store was built from; of a store in place it is found.
        jobs: Files written at once; by default one for each processor, at most 4.
        on_progress: Called with (bytes done, bytes in all), in the calling thread.

    Raises:
        ConfigError: The checkpoint is another one by now, or `out` holds something or cannot be written.
        BudgetError: The disk has too little room.
        FormatError: A file changed while it was read.
        CorruptPageError: A page or block that is needed is damaged.
    """
    started = time.monotonic()
    store_path, out = Path(store_path), Path(out)
    jobs = min(os.cpu_count() or 1, 4) if jobs is None else jobs
    if not 1 <= jobs <= JOBS_MAX:
        raise ConfigError(f"jobs: {jobs} is not within 1 to {JOBS_MAX}")
    check_free(out)
    image = read_catalog(store_path)
    checkpoint = Checkpoint.open(source if source is not None else _source_of(image))
    sources = sources_of_store(image, checkpoint)
    _check_same(image, checkpoint, sources)
    rows = _rows_of(image, sources)
    layout = lay_out_export(checkpoint, sources, rows, [store_path, out])
    total = sum(file.num_bytes for file in layout.files)
    _check_room(out, total)
    try:
        with new_folder(out) as folder:
            digests = write_files(folder, layout.files, jobs, on_progress)
    except OSError as error:
        raise named(error, out, error.filename, writing=True, needed_bytes=total) from error
    return ExportReport(
        _files_of(layout, digests),
        layout.left_out,
        tuple(name for name, each in rows.items() if not each.from_files),
        {name: each.touched.num_rows for name, each in rows.items() if each.touched is not None},
        time.monotonic() - started,
    )


def _files_of(layout: ExportLayout, digests: Mapping[str, str]) -> tuple[ExportedFile, ...]:
    files = (ExportedFile(file.name, file.num_bytes, digests[file.name]) for file in layout.files)
    return tuple(sorted(files, key=lambda file: file.name))


def _source_of(image: CatalogImage) -> Path:
    """Returns where the checkpoint of a store in place lies; of another store nobody noted that."""
    folders = {Path(file.path).parent for file in image.files}
    if len(folders) != 1:
        raise ConfigError(
            f"{image.path}: the catalog does not say where its checkpoint lies; give it: --source CHECKPOINT"
        )
    return folders.pop()


def _check_same(image: CatalogImage, checkpoint: Checkpoint, sources: Sequence[TableSource]) -> None:
    """Raises `ConfigError` if a checkpoint is not the one that the store was built from."""
    origin = checkpoint.to_dict()
    for source in sources:
        table = image.tables.get(source.spec.name)
        if table is None or table.spec != source.spec:
            raise ConfigError(
                f"{checkpoint.path}: table {source.spec.name} is {source.spec}, the store has "
                f"{table.spec if table else 'none'}; give the checkpoint that it was built from"
            )
    if not same_checkpoint(image.origin, origin, sources):
        raise ConfigError(
            f"{checkpoint.path} is not the checkpoint that {image.path} was built from: "
            f"{_differences(image.origin, origin)}; give that one, or build a store of this one"
        )


def _differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Returns which files are others now, as far as the catalog's record shows."""
    words = {"bytes": "bytes", "header_sha256": "header SHA-256", "samples_sha256": "SHA-256 of samples"}
    then = {entry.get("name"): entry for entry in recorded.get("files", []) if isinstance(entry, dict)}
    parts = []
    for entry in found["files"]:
        before = then.get(entry["name"])
        if before is None:
            parts.append(f"{entry['name']} was not there")
            continue
        changed = [key for key in words if before.get(key) != entry[key]]
        if changed:
            parts.append(
                f"{entry['name']} changed since ({words[changed[0]]} {str(before.get(changed[0]))[:12]} then, "
                f"{str(entry[changed[0]])[:12]} now)"
            )
    parts += [f"{name} is gone" for name in then if name not in {entry["name"] for entry in found["files"]}]
    digests = f"digest {str(recorded.get('digest'))[:12]} then, {found['digest'][:12]} now"
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "") if parts else digests


def _rows_of(image: CatalogImage, sources: Sequence[TableSource]) -> dict[str, TableRows]:
    changed = set(changed_files(image.origin, sources))
    return {
        source.spec.name: TableRows(
            StoredRows(image, image.tables[source.spec.name]),
            not changed & {tensor.path.name for tensor in source.tensors},
            None,
        )
        for source in sources
    }


def _check_room(out: Path, total: int) -> None:
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if total + SPARE_DISK_BYTES > free:
        raise BudgetError(
            f"{out}: the export needs {format_bytes(total + SPARE_DISK_BYTES)} ({total + SPARE_DISK_BYTES} bytes), the "
            f"disk has {format_bytes(free)} free ({free} bytes); free some or give a path on another disk"
        )
