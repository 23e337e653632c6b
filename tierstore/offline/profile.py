"""profile: traces -> counts of what was accessed, held-out documents, and what each gigabyte of memory would buy.

Input: a store's geometry and traces of keys, or profiles to merge; `engram_adapter.token_profile` takes traces of
tokens. Output: a file, and a `Profile` that says what it holds. Errors: traces of another kind or of other tables,
damaged files, a full disk. Blocks; an interrupt leaves no file, and an older one as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..decisions.hit_rates import GroupCurves
from ..decisions.item_statistics import TableGroup
from ..decisions.recommend import Recommendation, default_choice
from ..errors import ConfigError, FormatError
from ..formats.catalog import CatalogImage, read_catalog
from ..formats.key_trace import read_key_trace_info
from ..formats.profile import ProfileHeader, ProfileReader, ProfileWriter
from ..process.progress import COUNTING, WRITING, OnPhase, no_report
from .analysis import analyse
from .count_documents import MEMORY_BYTES, CountedText, ProfileCounts, count_documents, count_profiles, read_groups
from .documents import (
    Document,
    ItemMapping,
    KeyItems,
    held_out_fraction,
    key_documents,
    key_profile_header,
    stretch_accesses,
)

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Profile:
    """What was counted of a store's use, and what it predicts. Immutable; any thread may use it.

    Attributes:
        path: the file. Without an `output` it is a temporary one, which goes with the last reference to this.
        header: the tables by name, fingerprint and orders; the kind ("ngrams" or "keys"); the fraction held out.
        counts: tokens (of keys: lookups) and documents, in all and held out.
        mapping: what the items mean to the store.

    Held-out documents stay in memory once they were counted or read, some 60 bytes a token, so that several plans read
    them once.
    """

    path: Path
    header: ProfileHeader
    counts: ProfileCounts
    mapping: ItemMapping = field(repr=False)
    _analysis: dict[str, Any] = field(repr=False)
    _groups: list[TableGroup] = field(repr=False)  # empty until they are read

    @property
    def curves(self) -> tuple[GroupCurves, ...]:
        """Hit rates over budgets of DRAM, for each table group of which anything was held out. Raises `FormatError`."""
        try:
            return tuple(GroupCurves.from_dict(record) for record in self._analysis["groups"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self.path}: the profile's curves are damaged ({error!r}); profile again") from error

    @property
    def recommended(self) -> Recommendation | None:
        """The budget of DRAM to plan with if nobody asks for another; None if nothing was held out."""
        curves = self.curves
        return default_choice([group.recommended for group in curves]) if curves else None

    def to_dict(self) -> dict[str, Any]:
        """Returns what the file's footer says, for JSON: kind, counts and analysis."""
        return {"kind": self.header.kind, "counts": asdict(self.counts), "analysis": self._analysis}

    def open(self) -> ProfileReader:
        """Opens the file, to read items; raises `ConfigError` if it is gone, or another one by now."""
        reader = ProfileReader(self.path)
        if (reader.header, reader.counts) != (self.header, asdict(self.counts)):
            reader.close()
            raise ConfigError(f"{self.path} is another profile than the one that was opened; open it again")
        return reader

    def groups(self, on_progress: OnPhase | None = None) -> list[TableGroup]:
        """Returns what decisions need, read from the file at the first call. Blocks then."""
        if not self._groups:
            with self.open() as reader:
                self._groups[:] = read_groups(reader, self.mapping, on_progress)
        return self._groups


def profile(
    store_path: StrPath,
    traces: StrPath | Sequence[StrPath],
    held_out: float | None = None,
    *,
    output: StrPath | None = None,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: OnPhase | None = None,
) -> Profile:
    """Counts traces of keys, as `Store.start_trace` records them, and says what memory would buy; `tierstore.profile`.

    Blocks: seconds a million accesses. An interrupt leaves no file.

    Args:
        store_path: the store that recorded them.
        traces: one or several files.
        held_out: the fraction of the recorded stretches to keep back for testing predictions, above 0 and below 1; by
            default a quarter, and of long traces about four million lookups.
        output: the profile's file, replaced if there is one; by default a temporary one.
        memory_bytes: of the counter; the held-out part comes on top.
        on_progress: called with (phase, done, of how many or None), on any thread.

    Raises:
        StoreNotReadyError, FormatError: there is no finished store, or a file is damaged or of another kind.
        FingerprintMismatchError: a trace is of other tables.
        ConfigError: traces do not fit each other, or a file cannot be written.
        BudgetError: the disk is full.
        ValueError: `held_out` is not such a fraction.
    """
    image = read_catalog(store_path)
    paths = trace_paths(traces)
    infos = [read_key_trace_info(path) for path in paths]
    num_lookups = sum(info.num_batches for info in infos)
    header = key_profile_header(infos, image.tables, checked_fraction(held_out, num_lookups))
    documents = key_documents(paths, stretch_accesses(sum(info.num_accesses for info in infos)))
    return profile_documents(
        image,
        header,
        documents,
        KeyItems(),
        num_lookups,
        output=output,
        memory_bytes=memory_bytes,
        on_progress=on_progress,
    )


def open_profile(path: StrPath, mapping: ItemMapping | None = None) -> Profile:
    """Opens a finished profile of keys; also `tierstore.open_profile`. `engram_adapter.open_profile` opens any.

    Args:
        mapping: what the items mean, if they are not keys.

    Raises:
        FormatError: the file is not a profile, is damaged, or of a newer version.
        ConfigError: it cannot be read.
    """
    with ProfileReader(path) as reader:
        counts = ProfileCounts(**reader.counts)
        return Profile(reader.path, reader.header, counts, mapping or KeyItems(), reader.footer.get("analysis", {}), [])


def merge_profiles(
    store_path: StrPath,
    profiles: Sequence[Profile],
    *,
    output: StrPath | None = None,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: OnPhase | None = None,
) -> Profile:
    """Makes the profile of all documents of profiles that were counted in parts; also `tierstore.merge_profiles`.

    Blocks.

    The result is the one that counting everything at once gives, to the byte. Arguments and errors are those of
    `profile`; the parts must be of the same tables and the same `held_out`.
    """
    image = read_catalog(store_path)
    with ExitStack() as stack:
        mapping = profiles[0].mapping
        readers = [stack.enter_context(part.open()) for part in profiles]
        for reader in readers:
            mapping.check(image.tables, reader.header)
        return _written(
            image,
            readers[0].header,
            mapping,
            output,
            lambda writer: count_profiles(writer, readers, mapping, on_progress, memory_bytes),
            on_progress,
        )


def profile_documents(
    image: CatalogImage,
    header: ProfileHeader,
    documents: Iterable[Document],
    mapping: ItemMapping,
    num_tokens: int,
    *,
    output: StrPath | None,
    memory_bytes: int,
    on_progress: OnPhase | None,
) -> Profile:
    """Counts documents of any kind, num_tokens in all, into a profile: what `profile` and its like have in common."""
    report = on_progress or no_report

    def report_of_all(phase: str, done: int, total: int | None) -> None:
        report(phase, done, num_tokens if phase == COUNTING else total)

    def count(writer: ProfileWriter) -> CountedText:
        return count_documents(writer, documents, report_of_all, memory_bytes)

    return _written(image, header, mapping, output, count, report_of_all)


def trace_paths(traces: StrPath | Sequence[StrPath]) -> list[Path]:
    """Returns the files that the argument of a job names; raises `ConfigError` if it names none."""
    paths = [Path(traces)] if isinstance(traces, str | os.PathLike) else [Path(trace) for trace in traces]
    if not paths:
        raise ConfigError("there is no trace to profile; give one or several files")
    return paths


def checked_fraction(held_out: float | None, num_tokens: int) -> float:
    """Returns the fraction of documents to hold out of a trace; raises `ValueError` if the one asked for is not one."""
    if held_out is None:
        return held_out_fraction(num_tokens)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: {held_out} is not a fraction above 0 and below 1")
    return held_out


def _written(
    image: CatalogImage,
    header: ProfileHeader,
    mapping: ItemMapping,
    output: StrPath | None,
    count: Callable[[ProfileWriter], CountedText],
    on_progress: OnPhase | None,
) -> Profile:
    """Writes a profile of what `count` counts into it."""
    report = on_progress or no_report
    folder = None
    if output is None:
        folder = Path(tempfile.mkdtemp(prefix="tierstore-profile-"))
        output = folder / "temporary.profile"
    try:
        with ProfileWriter(output, header) as writer:
            counted = count(writer)
            curves = analyse(image.tables, counted.groups, counted.counts, report)
            analysis = {"groups": [group.to_dict() for group in curves]}
            report(WRITING, 0, None)
            writer.finish({"kind": header.kind, "counts": asdict(counted.counts), "analysis": analysis})
        made = Profile(Path(output), header, counted.counts, mapping, analysis, counted.groups)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if folder is not None:
        weakref.finalize(made, _remove, folder, os.getpid())
    return made


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child leaves its parent's file
        shutil.rmtree(folder, ignore_errors=True)
