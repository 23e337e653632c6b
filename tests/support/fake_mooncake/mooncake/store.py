"""Mooncake's client as `tiers.mooncake_worker` uses it, over files of the folder FAKE_MOONCAKE: an object is a file.

A file "hang" there makes every call wait for ever, "crash" ends the process in the next read, "refuse" makes `setup`
fail, "full" makes puts fail. Codes are those that the real client was seen to return.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_MOONCAKE"])


class ReplicateConfig:
    with_hard_pin = False
    replica_num = 1


class MooncakeDistributedStore:
    def setup(self, *_: object) -> int:
        self._call()
        return -1 if (FOLDER / "refuse").exists() else 0

    def _call(self) -> None:
        while (FOLDER / "hang").exists():
            time.sleep(0.01)

    def _file(self, key: str) -> Path:
        return FOLDER / key.replace("/", "|")

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        self._call()
        return [int(self._file(key).exists()) for key in keys]

    def remove(self, key: str, force: bool) -> int:
        assert force
        self._file(key).unlink()
        return 0

    def put_from(self, key: str, pointer: int, size: int, config: ReplicateConfig) -> int:
        assert config.with_hard_pin
        if (FOLDER / "full").exists():
            return -200
        if not self._file(key).exists():  # the real one keeps what is there, and returns 0 all the same
            self._file(key).write_bytes(ctypes.string_at(pointer, size))
        return 0

    def register_buffer(self, *_: int) -> int:
        return 0

    def unregister_buffer(self, _: int) -> int:
        return 0

    def get_into_ranges(
        self,
        pointers: list[int],
        all_keys: list[list[str]],
        all_to: list[list[list[int]]],
        all_starts: list[list[list[int]]],
        all_sizes: list[list[list[int]]],
    ) -> list[list[list[int]]]:
        if (FOLDER / "crash").exists():
            (FOLDER / "crash").unlink()
            os.kill(os.getpid(), signal.SIGSEGV)
        self._call()
        (pointer,), (keys,) = pointers, all_keys
        return [
            [
                self._read(key, pointer, *of)
                for key, *of in zip(keys, all_to[0], all_starts[0], all_sizes[0], strict=True)
            ]
        ]

    def _read(self, key: str, pointer: int, to: list[int], starts: list[int], sizes: list[int]) -> list[int]:
        if not self._file(key).exists():
            return [-704] * len(to)
        held = self._file(key).read_bytes()
        found = []
        for place, start, size in zip(to, starts, sizes, strict=True):
            if start + size > len(held):
                found.append(-600)
                continue
            ctypes.memmove(pointer + place, held[start : start + size], size)
            found.append(size)
        return found

    def close(self) -> int:
        return 0
