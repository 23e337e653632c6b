"""A table as it lies in a checkpoint: which tensors give which bytes of a row, and a reader of row ranges.

Input: `StoredTensor`s. Output: rows, straight into the caller's buffer, so that memory does not grow with the
checkpoint. Errors: `ConfigError` for tensors that do not make the table,
`FormatError` for files that change while they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..causes import Fault, allow_open_files, named, naming
from ..durable import read_exactly
from ..errors import ConfigError, FormatError
from ..spec import TableSpec
from .stored_tensor import StoredTensor, check_identity, first_hole, sampled

_COPY = Fault(ConfigError, "copy it again")


@dataclass(frozen=True)
class Plane:
    """The bytes that one part of a row comes from: `width_bytes` of each row, in tensors stacked by rows."""

    width_bytes: int
    tensors: tuple[StoredTensor, ...]

    def __post_init__(self) -> None:
        """Takes a tensor that lies in several places as its pieces, so that readers see one place each."""
        places = tuple(place for tensor in self.tensors for place in tensor.places)
        object.__setattr__(self, "tensors", places)


@dataclass(frozen=True)
class TableSource:
    """A table as it lies in a checkpoint: row r of the table is row r of every plane, side by side, in this order.

    Of a slice, planes have its rows only, and readers count from its first row.
    """

    spec: TableSpec
    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        width_bytes = sum(plane.width_bytes for plane in self.planes)
        if width_bytes != self.spec.row_bytes:
            raise ConfigError(
                f"table {self.spec.name}: its planes give {width_bytes} bytes a row, "
                f"its codec needs {self.spec.row_bytes}"
            )
        for plane in self.planes:
            num_bytes = sum(tensor.num_bytes for tensor in plane.tensors)
            names = ", ".join(tensor.name for tensor in plane.tensors[:3])
            if num_bytes != plane.width_bytes * self.spec.own_rows:
                raise ConfigError(
                    f"table {self.spec.name}: tensors {names} hold {num_bytes / max(plane.width_bytes, 1):g} rows of "
                    f"{plane.width_bytes} bytes, the table has {self.spec.own_rows} rows; "
                    f"config.json does not belong to these tensors, or a file is missing"
                )
            for tensor in plane.tensors:
                if tensor.num_bytes % max(plane.width_bytes, 1):
                    raise ConfigError(
                        f"tensor {tensor.name}: {tensor.num_bytes} bytes are not whole rows of {plane.width_bytes} "
                        "bytes"
                    )

    def cut(self, spec: TableSpec) -> TableSource:
        """Returns the source of a slice of the table, whose readers read bytes of its rows only. spec: the slice's."""
        planes = []
        for plane in self.planes:
            pieces = _pieces(plane, spec.row_start, spec.row_end)
            planes.append(Plane(plane.width_bytes, tuple(_cut_tensor(plane, *piece) for piece in pieces)))
        return TableSource(spec, tuple(planes))

    def open_reader(self) -> PlaneReader:
        """Opens its files; returns what reads its rows, to be closed."""
        return PlaneReader(self)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of all planes."""
        return tuple(tensor for plane in self.planes for tensor in plane.tensors)


def cut_sources(sources: Sequence[TableSource], index: int, num_slices: int) -> tuple[TableSource, ...]:
    """Returns the sources of slice `index` of `num_slices` of every table; raises as `slices.slice_bounds`."""
    return tuple(source.cut(source.spec.cut_slice(index, num_slices)) for source in sources)


def source_of_slice(source: TableSource, spec: TableSpec) -> TableSource:
    """Returns what a store with a slice was built from, of the whole table's source; spec: the store's. Else itself."""
    return source.cut(spec) if spec.is_slice and source.spec == spec.whole else source


def _cut_tensor(plane: Plane, tensor: StoredTensor, byte_start: int, start: int, end: int) -> StoredTensor:
    is_whole_rows = bool(tensor.shape) and tensor.shape[0] * plane.width_bytes == tensor.num_bytes
    shape = (end - start, *(tensor.shape[1:] if is_whole_rows else (plane.width_bytes,)))
    num_bytes = (end - start) * plane.width_bytes
    return replace(tensor, byte_start=byte_start, num_bytes=num_bytes, shape=shape)


def find_hole(sources: Sequence[TableSource]) -> str | None:
    """Returns, naming file and bytes, which part of a table was never written to its file and so reads as zeros."""
    for tensor in (tensor for source in sources for tensor in source.tensors):
        hole = first_hole(tensor)
        if hole is not None:
            return (
                f"{tensor.path}: bytes {hole[0]} to {hole[1]}, of tensor {tensor.name}, were never written: its "
                f"download has not finished"
            )
    return None


class PlaneReader:
    """Reads row ranges of a table's planes. Holds one descriptor a file; any number of threads may read at once.

    `check_unchanged` says, before and after the reads, whether the files are still those whose headers were read.
    """

    def __init__(self, source: TableSource) -> None:
        self.source_row_bytes = source.spec.row_bytes  # that are read for a row
        self._source = source
        self._fds: dict[Path, int] = {}
        self._tensors: dict[Path, list[StoredTensor]] = {}
        allow_open_files(len({tensor.path for tensor in source.tensors}))
        self._samples: str | None = None
        try:
            for tensor in source.tensors:
                if tensor.path not in self._fds:
                    self._fds[tensor.path] = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
                self._tensors.setdefault(tensor.path, []).append(tensor)
        except OSError as error:
            self.close()
            raise named(error, f"cannot open checkpoint file {error.filename}", error.filename, fault=_COPY) from error

    def read(self, row_start: int, row_end: int) -> list[np.ndarray]:
        """Returns for each plane the rows [row_start, row_end) as uint8 [rows, width_bytes]. Blocks on the disk.

        Raises `FormatError` if the file has become shorter than its header says, `ConfigError` if the disk fails.
        """
        assert 0 <= row_start <= row_end <= self._source.spec.own_rows
        planes = []
        for plane in self._source.planes:
            out = np.empty((row_end - row_start, plane.width_bytes), dtype=np.uint8)
            for tensor, byte_start, start, end in _pieces(plane, row_start, row_end):
                what = f"rows {start} to {end} of tensor {tensor.name} in {tensor.path}"
                with naming(what, tensor.path):
                    read_exactly(self._fds[tensor.path], out[start - row_start : end - row_start], byte_start, what)
            planes.append(out)
        return planes

    def will_read(self, row_start: int, row_end: int) -> None:
        """Has the system read rows [row_start, row_end) ahead. Does not wait for the disk, and raises nothing."""
        for plane in self._source.planes:
            for tensor, byte_start, start, end in _pieces(plane, row_start, row_end):
                self._read_ahead(tensor, byte_start, (end - start) * plane.width_bytes)

    def _read_ahead(self, tensor: StoredTensor, byte_start: int, num_bytes: int) -> None:
        with contextlib.suppress(OSError):  # `read` says what is wrong
            os.posix_fadvise(self._fds[tensor.path], byte_start, num_bytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raises `FormatError` if a file was changed, replaced or removed since its header was read.

        Reads samples of the tensors too, and compares them with those of the call before.
        """
        self._check_identities()
        samples = self._digest_samples()
        if self._samples not in (None, samples):
            names = ", ".join(path.name for path in self._fds)
            raise FormatError(
                f"the rows in {names} changed while they were read: they may be of two checkpoints; let whoever writes "
                f"them finish, and run again"
            )
        self._samples = samples

    def _check_identities(self) -> None:
        for path, fd in self._fds.items():
            identity = self._tensors[path][0].identity
            if identity is not None:
                check_identity(path, os.fstat(fd), identity)
                try:
                    check_identity(path, path.stat(), identity)  # another file may have taken its name
                except FileNotFoundError:
                    raise FormatError(
                        f"{path} was removed or renamed while it was read; put it back and run again"
                    ) from None

    def _digest_samples(self) -> str:
        digest = hashlib.sha256()
        for path, tensors in self._tensors.items():
            for part in sampled(self._fds[path], tensors):
                digest.update(part)
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> PlaneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(plane: Plane, row_start: int, row_end: int) -> Iterator[tuple[StoredTensor, int, int, int]]:
    """Yields where rows [row_start, row_end) of a plane lie: tensor, first byte in its file, first row, row after the
    last."""
    tensor_row_start = 0
    for tensor in plane.tensors:
        tensor_row_end = tensor_row_start + tensor.num_bytes // plane.width_bytes
        start, end = max(row_start, tensor_row_start), min(row_end, tensor_row_end)
        if start < end:
            yield tensor, tensor.byte_start + (start - tensor_row_start) * plane.width_bytes, start, end
        tensor_row_start = tensor_row_end
