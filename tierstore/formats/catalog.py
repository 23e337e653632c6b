"""The catalog: the LMDB environment `catalog.mdb` that says what a store holds.

Input: table layouts and shard records as a build makes them, and last the ready mark. Output: a `CatalogImage`, the
records of one committed transaction. Errors: `FormatError` for foreign, truncated, damaged and newer files.

Readers never map the file: `lmdb_pages` copies it with plain reads, so whoever cuts or overwrites it meanwhile causes
an error and not a signal. Only writers open LMDB, under `build.lock`, after the same check. Nothing here is on the
lookup path. Every record ends in a CRC32C bound to its key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..causes import named
from ..durable import sync_folder
from ..errors import ConfigError, FormatError, StoreNotReadyError
from ..layout import PlacementRecord, ShardRecord, TableLayout, checked_path
from ..lazy import lazy
from ..version import VERSION
from .catalog_records import CATALOG_FILE as CATALOG_FILE
from .catalog_records import as_json, changing, from_json, read_records, write_records
from .in_place import InPlaceFile, InPlaceLayout, check_files
from .initial import InitialLayout
from .versions import VersionRecord, check_numbers, identity_of, unknown_version

STORE_FORMAT_VERSION = 1
IN_PLACE_FORMAT_VERSION = 2  # of a store with tables in place, which older readers cannot read
VERSIONS_FORMAT_VERSION = 3  # of either with published versions: older readers would serve rows of the base for them
INITIAL_FORMAT_VERSION = 4  # of a store from scratch, whose rows older readers cannot draw
SLICE_FORMAT_VERSION = 5  # of any with slices of tables, which older readers would take for whole ones
FOLDED_FORMAT_VERSION = 6  # of any whose oldest versions were folded into one, whose digest older readers cannot know
NEW_CATALOG_FILE = "catalog.mdb.new"
LOCK_FILE = "build.lock"
KNOWN_FORMAT_VERSIONS = (
    STORE_FORMAT_VERSION, IN_PLACE_FORMAT_VERSION, VERSIONS_FORMAT_VERSION, INITIAL_FORMAT_VERSION,
    SLICE_FORMAT_VERSION, FOLDED_FORMAT_VERSION,
)  # fmt: skip


@dataclass(frozen=True)
class CatalogImage:
    """All that a catalog says, copied out.

    Attributes:
        shards: By table (of a store in place: by side table), then by shard index: the records of finished shards.
        placements: The published ones, by epoch.
        epoch: The current placement's, or None.
        last_epoch: The largest number ever given, 0 at first, so that no number is given twice.
        files: Of a store in place: the checkpoint's files that hold its rows.
        versions: The published ones, by number, without a gap; the first one is 1, or is folded.
        version: Which of them this image is of; 0: of the base. As the catalog is read, the newest.
    """

    path: Path
    format_version: int
    ready: bool
    origin: dict[str, Any]
    tables: dict[str, TableLayout]
    shards: dict[str, dict[int, ShardRecord]]
    attachments: dict[str, bytes]
    placements: dict[int, PlacementRecord]
    epoch: int | None
    last_epoch: int
    files: tuple[InPlaceFile, ...] = ()
    versions: dict[int, VersionRecord] = field(default_factory=dict)
    version: int = 0

    @lazy
    def paged(self) -> dict[str, TableLayout]:
        """The layouts of all that has shards, by name: tables, or, of those in place, their side tables."""
        return paged_layouts(self.tables)

    def owner_of(self, name: str) -> str:
        """Returns which table a side table belongs to; a table with shards is its own."""
        if name in self.tables:
            return name
        return next(owner for owner, table in self.tables.items() if name in paged_layouts({owner: table}))

    @property
    def is_initial(self) -> bool:
        """Whether rows that training did not touch are drawn, and stand nowhere."""
        return any(isinstance(table, InitialLayout) for table in self.tables.values())

    @property
    def is_slice(self) -> bool:
        """Whether it holds slices of tables."""
        return any(table.public_spec.is_slice for table in self.tables.values())

    @property
    def is_in_place(self) -> bool:
        """Whether rows lie in files of a checkpoint."""
        return bool(self.files)

    def at_version(self, version: int | None) -> CatalogImage:
        """Returns the image of a version; None: of the newest. Raises `ConfigError` if there is not such a version."""
        if version is not None and (type(version) is not int or version not in {0, *self.versions}):
            raise unknown_version(self.path, version, self.versions)
        return replace(self, version=self.newest if version is None else version)

    @property
    def newest(self) -> int:
        """The newest version; 0 if there is only the base."""
        return max(self.versions, default=0)

    @property
    def folded(self) -> int:
        """The version that has the rows of all before it, which are gone; 0 if none was folded."""
        return next((number for number, version in self.versions.items() if version.folded is not None), 0)

    @property
    def used_versions(self) -> list[VersionRecord]:
        """The versions whose rows this image's version is made of, oldest first."""
        return [self.versions[number] for number in sorted(self.versions) if number <= self.version]

    @lazy
    def touched(self) -> dict[str, int]:
        """How many rows of each table a version has put in place of the base's; only tables that have some."""
        return {name: table.num_touched for version in self.used_versions for name, table in version.tables.items()}

    @lazy
    def identity(self) -> str:
        """A digest, hex, of all that decides what rows a store has at this version: see `base_identity`."""
        return identity_of(self.base_identity, self.used_versions)

    @lazy
    def common_identity(self) -> str:
        """A digest, hex, that all slices of one store share at one version: of the checkpoint, and of the commit that
        it was published from, if ranks made it together; else of the commit's number and the version's. Of resliced
        stores, of the commits that they were made of, too."""
        origin = {key: self.origin.get(key) for key in ("digest", "resliced")}
        compacted = self.origin.get("compacted", {})
        if "common" in compacted:  # a compacted slice's own digest is of its rows alone
            origin["digest"] = compacted["common"]
        newest = [version.common or [version.number, version.commit] for version in self.used_versions[-1:]]
        record = {"origin": origin, "newest": newest}
        return hashlib.sha256(as_json(record)).hexdigest()

    @lazy
    def base_identity(self) -> str:
        """The digest of the base, version 0: of tables, hashes, and every shard's own digest."""
        tables = {name: layout.to_dict() for name, layout in self.tables.items()}
        shards = {name: {index: vars(shard) for index, shard in of.items()} for name, of in self.shards.items()}
        return hashlib.sha256(as_json({"tables": tables, "shards": shards})).hexdigest()


def paged_layouts(tables: Mapping[str, TableLayout]) -> dict[str, TableLayout]:
    """Returns the layouts of tables that have shards, side tables among them, by name."""
    paged: dict[str, TableLayout] = {}
    for name, table in tables.items():
        if isinstance(table, InPlaceLayout):
            paged |= {side.spec.name: side for side in table.side_tables}
        elif not isinstance(table, InitialLayout):
            paged[name] = table
    return paged


def create_catalog(
    path: Path,
    tables: Mapping[str, TableLayout],
    origin: dict[str, Any],
    attachments: dict[str, bytes],
    files: Sequence[InPlaceFile] = (),
) -> None:
    """Writes the catalog of a store whose build begins: everything but shards and ready mark, in one transaction.

    files: of a store in place; its format version is another.
    """
    version = IN_PLACE_FORMAT_VERSION if files else STORE_FORMAT_VERSION
    if any(isinstance(table, InitialLayout) for table in tables.values()):
        version = INITIAL_FORMAT_VERSION
    head: dict[str, Any] = {"format_version": version, "written_by": f"tierstore {VERSION}"}
    if any(table.public_spec.is_slice for table in tables.values()):
        head |= {"format_version": SLICE_FORMAT_VERSION, "base_format": version}
    records = {"format": as_json(head)}
    if files:
        records["files"] = _files_as_json(files)
    records["origin"] = as_json(origin)
    records["tables"] = as_json(list(tables))
    records |= {f"table/{name}": as_json(layout.to_dict()) for name, layout in tables.items()}
    records |= {f"attachment/{name}": value for name, value in attachments.items()}
    new_files = [path / NEW_CATALOG_FILE, path / f"{NEW_CATALOG_FILE}-lock"]
    try:
        for leftover in new_files:
            leftover.unlink(missing_ok=True)
        write_records(path / NEW_CATALOG_FILE, records)
        (path / NEW_CATALOG_FILE).rename(path / CATALOG_FILE)
    finally:
        for new_file in new_files:
            new_file.unlink(missing_ok=True)
    sync_folder(path)


def record_shard(path: Path, table_name: str, shard_index: int, shard: ShardRecord) -> None:
    """Notes a shard that is complete and synced on disk. Durable when it returns."""
    record = {"file": shard.file, "num_bytes": shard.num_bytes, "sha256": shard.sha256}
    write_records(path / CATALOG_FILE, {f"shard/{table_name}/{shard_index:08d}": as_json(record)})


def forget_shards(path: Path, shards: Sequence[tuple[str, int]]) -> None:
    """Takes the records of shards, (table, index) each, out of the catalog: what they hold cannot be relied on."""
    write_records(path / CATALOG_FILE, {}, removed=tuple(f"shard/{name}/{index:08d}" for name, index in shards))


def record_origin(path: Path, origin: dict[str, Any], files: Sequence[InPlaceFile] = ()) -> None:
    """Notes which files hold the checkpoint now, after a build has compared every shard with them.

    files: of a store in place.
    """
    in_place = {"files": _files_as_json(files)} if files else {}
    write_records(path / CATALOG_FILE, {"origin": as_json(origin)} | in_place)


def _files_as_json(files: Sequence[InPlaceFile]) -> bytes:
    return as_json([file.to_dict() for file in files])


def mark_ready(path: Path) -> None:
    """Commits the ready mark, last of all: from now on the store opens."""
    write_records(path / CATALOG_FILE, {"ready": as_json({"ready": True})})


def publish_placement(path: Path, placement: PlacementRecord) -> None:
    """Notes a placement that is complete and synced on disk, and makes it the current epoch, in one transaction."""
    record = {"file": placement.file, "num_bytes": placement.num_bytes}
    write_records(
        path / CATALOG_FILE,
        {
            f"placement/{placement.epoch:08d}": as_json(record),
            "epoch": as_json({"epoch": placement.epoch, "last": placement.epoch}),
        },
    )


def publish_versions(path: Path, versions: Sequence[VersionRecord]) -> None:
    """Notes versions whose files are complete and synced on disk, in one transaction. Durable when it returns.

    From the first one on, the store's format is another. Raises `ConfigError` if they are not the next ones.
    """
    with changing(path):
        image = read_catalog(path)
        numbers = [version.number for version in versions]
        if numbers != list(range(image.newest + 1, image.newest + 1 + len(versions))):
            raise ConfigError(f"{path} has versions up to {image.newest}, and {numbers} are not the next ones")
        head = {
            "format_version": _format_with_versions(image),
            "base_format": IN_PLACE_FORMAT_VERSION if image.is_in_place else STORE_FORMAT_VERSION,
            "written_by": f"tierstore {VERSION}",
        }
        records = {f"version/{version.number:08d}": as_json(version.to_dict()) for version in versions}
        write_records(path / CATALOG_FILE, {"format": as_json(head)} | records)


def _format_with_versions(image: CatalogImage) -> int:
    if image.folded:
        return FOLDED_FORMAT_VERSION
    return SLICE_FORMAT_VERSION if image.is_slice else VERSIONS_FORMAT_VERSION


def publish_folded(path: Path, version: VersionRecord) -> None:
    """Notes a version that has the rows of all before it, and forgets those, in one transaction. Durable when it
    returns. Its files are complete and synced; those of the versions that go may be removed then."""
    with changing(path):
        records = read_records(path)
        gone = tuple(key for key in records if key.startswith("version/") and int(key[8:]) < version.number)
        head = from_json(records, "format", path) | {"format_version": FOLDED_FORMAT_VERSION}
        changed = {"format": as_json(head), f"version/{version.number:08d}": as_json(version.to_dict())}
        write_records(path / CATALOG_FILE, changed, removed=gone)


def set_epoch(path: Path, epoch: int | None) -> None:
    """Makes a published placement the current one; None: stores open without any. The caller holds the store's lock."""
    last_epoch = read_catalog(path, must_be_ready=False).last_epoch
    write_records(path / CATALOG_FILE, {"epoch": as_json({"epoch": epoch, "last": last_epoch})})


def forget_placement(path: Path, epoch: int) -> None:
    """Takes the record of a placement that is not the current one out of the catalog; its file may go then."""
    write_records(path / CATALOG_FILE, {}, removed=(f"placement/{epoch:08d}",))


def read_catalog(
    path: str | os.PathLike[str], *, must_be_ready: bool = True, may_be_initial: bool = False
) -> CatalogImage:
    """Reads the catalog of the store at `path`: one committed transaction, whole. Blocks on the disk, shortly.

    may_be_initial: for those who train a store from scratch, or export it; nobody else can read its rows, and gets a
    `ConfigError`. Safe beside a writer, and beside whoever cuts or overwrites the file. Raises `StoreNotReadyError` if
    there is no store or its build has not finished (unless must_be_ready is False), `FormatError` if the catalog is
    foreign, truncated, damaged or of a newer format, `ConfigError` if it cannot be read, `BudgetError` if it does not
    fit in memory.
    """
    path = Path(path)
    try:
        if not holds_catalog(path):
            raise StoreNotReadyError(f"there is no store at {path}; build one: tierstore build CHECKPOINT {path}")
        records = read_records(path)
    except OSError as error:
        raise named(error, f"cannot read {error.filename or path}", error.filename or path) from error
    head = from_json(records, "format", path)
    version = head.get("format_version")
    if version not in KNOWN_FORMAT_VERSIONS:
        known = ", ".join(map(str, KNOWN_FORMAT_VERSIONS))
        raise FormatError(
            f"{path}: store format {version}, this tierstore {VERSION} reads {known}; install a newer tierstore or "
            f"rebuild the store with this one"
        )
    image = _image(path, records, version)
    if image.is_initial and not may_be_initial:
        raise ConfigError(
            f"{path} was made by 'tierstore init': its rows stand nowhere until it is exported; train it with "
            f"open_training, or make a store of it: tierstore export {path} CHECKPOINT, then tierstore build CHECKPOINT"
        )
    if must_be_ready and not image.ready:
        done = sum(len(shards) for shards in image.shards.values())
        total = sum(layout.num_shards for layout in image.paged.values())
        raise StoreNotReadyError(
            f"{path}: its build has not finished ({done} of {total} shards); run the same tierstore build command again"
        )
    return image


def _image(path: Path, records: dict[str, bytes], version: int) -> CatalogImage:
    names = from_json(records, "tables", path, kind=list)
    tables, files = _tables_and_files(path, records, names)
    paged = paged_layouts(tables)
    shards: dict[str, dict[int, ShardRecord]] = {name: {} for name in paged}
    attachments = {}
    placements = {}
    versions = {}
    for key in records:
        kind, _, rest = key.partition("/")
        if kind == "attachment":
            attachments[rest] = records[key]
        elif kind == "placement":
            placement = _placement_record(rest, from_json(records, key, path), path)
            placements[placement.epoch] = placement
        elif kind == "version":
            of_key = VersionRecord.from_dict(from_json(records, key, path), tables, f"{path}: catalog record {key!r}")
            versions[int(rest) if rest.isdecimal() else 0] = of_key
        elif kind == "shard":
            name, _, index = rest.rpartition("/")
            if name not in paged or not index.isdecimal() or int(index) >= paged[name].num_shards:
                raise FormatError(f"{path}: the catalog has shard record {key!r} of no table; restore it or rebuild")
            shards[name][int(index)] = _shard_record(from_json(records, key, path), paged[name], int(index))
    ready = "ready" in records
    for name, layout in paged.items():
        if ready and len(shards[name]) != layout.num_shards:
            raise FormatError(
                f"{path}: the catalog is marked ready with {len(shards[name])} of {layout.num_shards} shards of table "
                f"{name}; restore it or rebuild"
            )
    numbers = from_json(records, "epoch", path) if "epoch" in records else {}
    newest = max(placements, default=0)
    epoch, last_epoch = numbers.get("epoch"), numbers.get("last", newest)
    if type(last_epoch) is not int or last_epoch < newest:
        raise FormatError(f"{path}: the catalog's last epoch is {last_epoch!r}, not that of its placements; restore it")
    if epoch is not None and (type(epoch) is not int or epoch not in placements):
        raise FormatError(
            f"{path}: the catalog's current epoch {epoch!r} is not one of its placements; restore the catalog"
        )
    origin = from_json(records, "origin", path)
    check_numbers(path, versions)
    return CatalogImage(
        path, version, ready, origin, tables, shards, attachments, placements, epoch, last_epoch, files, versions,
        version=max(versions, default=0),
    )  # fmt: skip


def _tables_and_files(
    path: Path, records: dict[str, bytes], names: list[Any]
) -> tuple[dict[str, TableLayout], tuple[InPlaceFile, ...]]:
    """Returns the layouts of all tables, and, of a store in place, the files that they lie in."""
    head = from_json(records, "format", path)
    base_format = head.get("base_format", head.get("format_version"))
    if base_format == INITIAL_FORMAT_VERSION:
        return {name: InitialLayout.from_dict(from_json(records, f"table/{name}", path)) for name in names}, ()
    if base_format == STORE_FORMAT_VERSION:
        return {name: TableLayout.from_dict(from_json(records, f"table/{name}", path)) for name in names}, ()
    files = tuple(InPlaceFile.from_dict(record) for record in from_json(records, "files", path, kind=list))
    tables = {name: InPlaceLayout.from_dict(from_json(records, f"table/{name}", path)) for name in names}
    for table in tables.values():
        check_files(path, table, files)
    return dict(tables), files


def _placement_record(number: str, record: dict[str, Any], path: Path) -> PlacementRecord:
    num_bytes = record.get("num_bytes")
    if not number.isdecimal() or type(num_bytes) is not int or num_bytes < 0:
        raise FormatError(f"{path}: the catalog's record of placement {number!r} is damaged; restore the catalog")
    return PlacementRecord(int(number), checked_path(record.get("file"), f"placement {number}"), num_bytes)


def _shard_record(record: dict[str, Any], layout: TableLayout, shard_index: int) -> ShardRecord:
    page_start, page_end = layout.shard_pages(shard_index)
    expected_bytes = (page_end - page_start) * layout.page_bytes
    file = checked_path(record.get("file"), f"table {layout.spec.name}")
    if record.get("num_bytes") != expected_bytes or not isinstance(record.get("sha256"), str):
        raise FormatError(
            f"shard {shard_index} of table {layout.spec.name}: the catalog says {record.get('num_bytes')} bytes, its "
            f"pages take {expected_bytes}; restore the catalog or rebuild"
        )
    return ShardRecord(file, expected_bytes, record["sha256"])


def holds_catalog(path: Path) -> bool:
    """Whether a folder is a store. Raises `FormatError` if it is another folder with files in it, or a file."""
    if (path / CATALOG_FILE).is_file():
        return True
    if path.is_dir() and any(
        entry.name != LOCK_FILE and not entry.name.startswith(NEW_CATALOG_FILE) for entry in path.iterdir()
    ):
        raise FormatError(
            f"{path} holds files but no {CATALOG_FILE}: it is not a tierstore store; give the path of one; if it is a "
            f"checkpoint, make a store of it: tierstore build {path} NEW_STORE"
        )
    if path.exists() and not path.is_dir():
        raise FormatError(f"{path} is a file; a store is a folder with {CATALOG_FILE}")
    return False
