"""Counters of a worker, for the process that answers the engine's metrics: a small file that is replaced every second.

Input: the layers of a worker. Output: JSON, one file a worker, named by the engine's instance and the rank, in a folder
that only this user may open. Errors: a file that cannot be written is logged once; serving goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from ..device_rows import DeviceEngineRows
from ..rows import EngineRows

logger = logging.getLogger("vllm.tierstore")  # below the engine's logger, whose handlers show it

WRITE_S = 1.0
KEPT_S = 86_400.0  # a file that no worker has touched for so long is of one that was killed
FILE_BYTES_MAX = 1 << 20
_INSTANCE_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"


def counters_folder() -> Path:
    """Returns the folder of this user's workers; makes it. Raises `OSError` if another user's is in its place."""
    folder = Path(tempfile.gettempdir()) / f"tierstore-engines-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} is not a folder that user {os.getuid()} alone may open (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}); remove it, or set TMPDIR"
        )
    return folder


def file_stem(instance_id: str) -> str:
    """Returns what the names of an engine's files begin with: its instance's id, without what a path might mean."""
    return "".join(each if each in _INSTANCE_CHARACTERS else "_" for each in instance_id) + "."


class WorkerCounters:
    """Writes a worker's counters, every second if they have changed, until the layers are gone."""

    def __init__(self, instance_id: str, rank: int, layers: dict[str, EngineRows | DeviceEngineRows]) -> None:
        """Starts the thread; layers: by their names in the engine."""
        self._path: Path | None = None
        try:
            folder = counters_folder()
            _remove_leftovers(folder)
            self._path = folder / f"{file_stem(instance_id)}{rank}.json"
        except OSError as error:
            logger.warning("the engine's metrics will have no counters of rank %d: %s", rank, error)
            return
        self._stop = threading.Event()
        self._written: dict[str, Any] = {}
        # Weak, so that this thread keeps no store open.
        self._layers = {name: weakref.ref(rows) for name, rows in layers.items()}
        self._ended = weakref.finalize(self, _end, self._stop, self._path)
        thread = threading.Thread(target=_write_often, args=(weakref.ref(self), self._stop), daemon=True)
        thread.name = "tierstore-counters"
        thread.start()

    def write(self) -> None:
        """Writes the counters if they have changed. Raises `OSError`."""
        layers = {name: rows() for name, rows in self._layers.items()}
        found = {name: rows for name, rows in layers.items() if rows is not None}
        if not found or self._path is None:
            return
        store = next(iter(found.values())).store
        stats = store.stats()
        counts = {
            "layers": {name: rows.stats() for name, rows in found.items()},
            "hits": stats["hits"],
            "rows": stats.get("rows", 0),
            "bytes_read": stats.get("bytes_read", 0),
        }
        if counts != self._written:
            temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(counts))
            temporary.rename(self._path)
            self._written = counts
        else:
            os.utime(self._path)


def counters_of(vllm_config: Any, layers: dict[str, EngineRows | DeviceEngineRows]) -> WorkerCounters | None:
    """Returns what writes the counters of a worker's layers, as long as it is held; None without layers."""
    if not layers:
        return None
    parallel = vllm_config.parallel_config
    rank = parallel.data_parallel_rank * parallel.world_size + parallel.rank
    return WorkerCounters(str(vllm_config.instance_id), rank, layers)


def _write_often(counters: weakref.ref[WorkerCounters], stop: threading.Event) -> None:
    while not stop.wait(WRITE_S):
        alive = counters()
        if alive is None:
            return
        try:
            alive.write()
        except Exception as error:  # a closed store at the process's end, a full disk
            logger.warning("counters are not written any more: %s", error)
            return
        del alive


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed workers left; a living one touches its file every second."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _end(stop: threading.Event, path: Path) -> None:
    stop.set()
    with contextlib.suppress(OSError):
        path.unlink()


def read_counters(instance_id: str) -> dict[str, dict[str, Any]]:
    """Returns the counters of an engine's workers on this host, by rank; what is not readable is left out."""
    found = {}
    stem = file_stem(instance_id)
    try:
        paths = sorted(counters_folder().glob(f"{stem}*.json"))
    except OSError:
        return {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_size <= FILE_BYTES_MAX:
                found[path.name.removeprefix(stem).removesuffix(".json")] = json.loads(path.read_text())
    return found
