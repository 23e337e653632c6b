"""Merging: the live records of runs that are mostly dead, or small and many, go to a new run.

Input: a table's runs with how many records of each are live. Output: new runs, to be listed in place of the old ones by
the next commit, behind all runs that were there before. Errors: those of `RunReader` and `RunWriter`; nothing is moved
then, and the old runs stay.

Records keep their order, so that rows that were touched together stay neighbours. Memory: the writer's buffers, 14
bytes a record of the run that is written, at most MERGED_RECORDS_MAX, and 8 bytes a record of one that is read. Steps
and reads go on meanwhile: `RowPlaces.move` leaves alone what was written anew, and `RunReader.read` asks again for what
has moved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .. import kernels
from ..formats.run import Run
from .live import PART_ROWS, LiveRows, live_of_run
from .run_writer import RunWriter
from .runs import RunReader

LIVE_FRACTION = 0.5  # a run of which less is live is merged
RUNS_MANY = 128  # of a table: beyond, the smallest are merged, too,
RUNS_FEW = 64  # until so many are left
MERGED_RECORDS_MAX = 1 << 19
RATE_BYTES_S = 64 << 20  # by default: read and written, each


@dataclass(frozen=True)
class Merged:
    """What a merge made of a table.

    Attributes:
        removed: Ordinals of runs that have no live record any more.
        added: Ordinal, run and writer of the new run, finished and readable, not yet synced; None if nothing was live.
    """

    removed: tuple[int, ...]
    added: tuple[int, Run, RunWriter] | None

    def applied_to(self, runs: Mapping[int, Run], num_known: int) -> dict[int, Run]:
        """Returns a table's runs, by ordinal, oldest first, as the next commit lists them.

        num_known: how many of them there were when the merge began: later ones are newer than what was merged.
        """
        known, newer = list(runs.items())[:num_known], list(runs.items())[num_known:]
        kept = [(ordinal, run) for ordinal, run in known if ordinal not in self.removed]
        return dict([*kept, *([self.added[:2]] if self.added else []), *newer])


def choose_runs(num_records: Sequence[int], num_live: Sequence[int]) -> list[int]:
    """Returns the indexes of runs to merge: those of which less than half is live; if many are left, the smallest."""
    dead = [i for i, (all_, live) in enumerate(zip(num_records, num_live, strict=True)) if live < LIVE_FRACTION * all_]
    left = sorted(set(range(len(num_records))) - set(dead), key=lambda i: num_live[i])
    if len(left) <= RUNS_MANY:
        return dead
    return sorted([*dead, *left[: len(left) - RUNS_FEW]])


def merge_runs(
    reader: RunReader,
    places: kernels.RowPlaces,
    chosen: Sequence[int],
    make_writer: Callable[[], RunWriter],
    *,
    rate_bytes_s: float = RATE_BYTES_S,
    stop: threading.Event | None = None,
) -> Merged | None:
    """Writes live records of runs to a new one, and moves `places` there. Blocks on the disk and for the rate.

    Takes at most MERGED_RECORDS_MAX records: what is left is for another call. One thread merges a table at a time.

    Args:
        reader: Where the runs are open.
        places: Where the newest records lie.
        chosen: Ordinals, in the commit's order.
        make_writer: Makes the writer of a run with the next number.
        rate_bytes_s: At most so many bytes a second are read, and written.
        stop: Set it to end the merge within a buffer.

    Returns:
        What the next commit lists; None if it was stopped, and then nothing has changed.
    """
    pace = _Pace(rate_bytes_s, stop or threading.Event())
    writer, moved = None, list[LiveRows]()
    try:
        for part in _parts(reader, places, chosen):
            start = 0
            while start < len(part[0]):
                writer = writer or make_writer()
                buffer = writer.buffer()
                row_ids, runs, found = (of[start : start + len(buffer)] for of in part)
                records = buffer[: len(row_ids)]
                reader.read(row_ids, runs, found, records[:, : reader.layout.record_bytes], places)
                writer.write(len(row_ids), row_ids)
                moved.append((row_ids, runs, found))
                start += len(row_ids)
                if not pace.after(records.nbytes):
                    writer.discard()
                    return None
        added = None
        if writer is not None:
            run = writer.finish()
            added = reader.add(run, writer.path), run, writer
            _move(places, moved, added[0])
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    return Merged(tuple(ordinal for ordinal in chosen if places.live(ordinal) == 0), added)


def _parts(reader: RunReader, places: kernels.RowPlaces, chosen: Sequence[int]) -> Iterator[LiveRows]:
    """The live records of runs, MERGED_RECORDS_MAX at most."""
    left = MERGED_RECORDS_MAX
    for ordinal in chosen:
        for part in live_of_run(reader, places, ordinal, PART_ROWS):
            row_ids, runs, found = (of[:left] for of in part)
            yield row_ids, runs, found
            left -= len(row_ids)
            if left == 0:
                return


def _move(places: kernels.RowPlaces, moved: Sequence[LiveRows], ordinal: int) -> None:
    place = 0
    for row_ids, runs, found in moved:
        places.move(row_ids, runs, found, ordinal, place)
        place += len(row_ids)


class _Pace:
    """Keeps work at a rate."""

    def __init__(self, rate_bytes_s: float, stop: threading.Event) -> None:
        self._rate, self._stop = rate_bytes_s, stop
        self._begin, self._done = time.monotonic(), 0

    def after(self, num_bytes: int) -> bool:
        """Waits until so many more bytes may be done; returns False if the work should stop."""
        self._done += num_bytes
        wait_s = self._done / self._rate - (time.monotonic() - self._begin)
        return not self._stop.wait(max(0.0, wait_s))
