"""Pages that another process serves: the readers' contract, and every way in which a server can fail, by name."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.reader_contract import ReaderContract
from support.shard_server import Answers, ShardServer, from_shards
from support.stores import Model, random_keys

import tierstore
from tierstore.errors import ConfigError, CorruptPageError, StoreNotReadyError
from tierstore.formats.catalog import CATALOG_FILE
from tierstore.tiers import mooncake_worker, served

DRAM = "600KiB"
WAIT_S = 0.5


class TestServed(ReaderContract):
    """Pages over a Unix socket and shared memory."""

    def open_store(self, path: Path, dram: str = DRAM) -> tierstore.Store:
        return ShardServer(path).open(path, dram=dram)


def keys_of(seed: int, num_tokens: int = 40) -> np.ndarray:
    return random_keys(np.random.default_rng(seed), num_tokens)


@pytest.mark.parametrize("dram", [DRAM, "4MiB"], ids=["by page", "resident"])
@pytest.mark.parametrize("which", ["built", "placed"])
def test_a_store_whose_folder_has_no_shards_serves_them(
    request: pytest.FixtureRequest, model: Model, tmp_path: Path, which: str, dram: str
) -> None:
    path: Path = request.getfixturevalue(which)
    bare = tmp_path / "bare"
    shutil.copytree(path, bare, ignore=shutil.ignore_patterns("*.shard"))
    assert (bare / CATALOG_FILE).exists()
    with ShardServer(path).open(bare, dram=dram) as store:
        assert store.stats()["io"] == "served"
        assert store.stats()["memory"]["dram_bytes"] <= tierstore.units.parse_bytes(dram, "dram")
        for name in ("layers.1", "layers.14"):
            keys = keys_of(0)
            np.testing.assert_array_equal(store[name].lookup(keys), model.expected(name, keys))


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        ((b"", errno.ENOENT), CorruptPageError, "there is no such object; put it again"),
        ((b"", served.CUT_SHORT), CorruptPageError, "the object ends before it; put it again"),
        ((bytes(4096), 0), CorruptPageError, "put it again"),
        ((b"", errno.EHOSTDOWN), StoreNotReadyError, "its master does not answer"),
        ((b"", errno.EHOSTUNREACH), StoreNotReadyError, "whoever holds the object does not answer"),
        ((b"", errno.ETIMEDOUT), TimeoutError, "no answer within 20 s"),
        ((b"", errno.EREMOTEIO), StoreNotReadyError, "Remote I/O error"),
    ],
)
def test_what_a_server_cannot_give_is_named_and_the_next_lookup_right(
    built: Path, model: Model, answer: tuple[bytes, int], error: type[Exception], text: str
) -> None:
    server = ShardServer(built)
    with server.open(built, dram=DRAM) as store:
        server.answers = lambda *_: answer
        with pytest.raises(error, match=rf"^page \d+ of table layers.1, in object 0/\d+/0 of server://test: .*{text}"):
            store["layers.1"].lookup(keys_of(1))
        server.answers = from_shards
        np.testing.assert_array_equal(store["layers.1"].lookup(keys_of(1)), model.expected("layers.1", keys_of(1)))


def test_pages_of_another_place_are_noticed(built: Path) -> None:
    """Each is whole, and its checksum right for where it was."""
    server = ShardServer(built)
    with server.open(built, dram=DRAM) as store:
        pages: list[bytes] = []

        def one_behind(_: Any, found: bytes) -> tuple[bytes, int]:
            pages.append(found)
            return pages[max(0, len(pages) - 2)], 0

        server.answers = one_behind
        with pytest.raises(CorruptPageError, match=r"belongs to another table|another page's number"):
            store["layers.1"].lookup(keys_of(1))


def test_a_server_that_says_nothing_is_given_up_within_the_limit(built: Path, model: Model) -> None:
    server = ShardServer(built, wait_s=WAIT_S)
    with server.open(built, dram=DRAM) as store:
        server.answers = lambda *_: None
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
            store["layers.1"].lookup(keys_of(1))
        assert WAIT_S < time.monotonic() - started < 20 * WAIT_S
        server.answers = from_shards
        np.testing.assert_array_equal(store["layers.1"].lookup(keys_of(1)), model.expected("layers.1", keys_of(1)))


def test_a_server_that_dies_between_reads_costs_nothing_and_within_one_that_read(built: Path, model: Model) -> None:
    server = ShardServer(built)
    with server.open(built, dram=DRAM) as store:
        for seed in range(3):
            server.drop()
            np.testing.assert_array_equal(
                store["layers.1"].lookup(keys_of(seed)), model.expected("layers.1", keys_of(seed))
            )

        def die(*_: object) -> None:
            server.answers = from_shards  # once: what it still has of the old connection must not end the next one
            server.drop()

        server.answers = die
        with pytest.raises(StoreNotReadyError, match="has ended, and starts anew"):
            store["layers.1"].lookup(keys_of(5))
        np.testing.assert_array_equal(store["layers.1"].lookup(keys_of(5)), model.expected("layers.1", keys_of(5)))


ANOTHER_SLOT = np.array([(1 << 31, 0)], dtype=served.REPLY).tobytes()


def answering(server: ShardServer, message: bytes) -> Answers:
    """What has a server send a message instead of an answer."""

    def answer(*_: object) -> None:
        for connection in server.connections[-1:]:  # none, once the store is closed
            connection.send(message)

    return answer


@pytest.mark.parametrize("message", [ANOTHER_SLOT, b"x", ANOTHER_SLOT[:4] * 3], ids=["slot", "short", "uneven"])
def test_replies_that_nobody_asked_for_are_refused(built: Path, message: bytes) -> None:
    server = ShardServer(built)
    with server.open(built, dram=DRAM) as store:
        server.answers = answering(server, message)
        with pytest.raises(StoreNotReadyError, match="Protocol error"):
            store["layers.1"].lookup(keys_of(5))


@pytest.mark.parametrize("message", [ANOTHER_SLOT, b"x"], ids=["slot", "short"])
def test_such_replies_are_refused_while_a_store_is_opened(built: Path, message: bytes) -> None:
    server = ShardServer(built)
    server.answers = answering(server, message)
    with pytest.raises(StoreNotReadyError, match="Protocol error"):
        server.open(built, dram="4MiB")
    server.close()


def test_a_forked_child_reads_over_connections_of_its_own(built: Path, model: Model) -> None:
    with ShardServer(built).open(built, dram=DRAM) as store:
        store["layers.1"].lookup(keys_of(0))
        child = os.fork()
        if child == 0:
            right = np.array_equal(store["layers.1"].lookup(keys_of(1)), model.expected("layers.1", keys_of(1)))
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_array_equal(store["layers.1"].lookup(keys_of(2)), model.expected("layers.1", keys_of(2)))


def test_rows_that_lie_in_a_checkpoints_files_are_not_served(in_place_built: Path) -> None:
    with pytest.raises(ConfigError, match="lie in the checkpoint's files"):
        ShardServer(in_place_built).open(in_place_built, dram=DRAM)


def test_the_worker_that_imports_nothing_of_ours_speaks_the_same_protocol() -> None:
    for name in ("MAGIC", "REQUEST", "REPLY", "CUT_SHORT", "READS", "WRITES", "REPLACES"):
        assert getattr(mooncake_worker, name) == getattr(served, name)
    assert mooncake_worker.HELLO.format == served.HELLO.format
    assert served.REQUESTS_MAX * served.REQUEST.itemsize <= mooncake_worker.MESSAGE_BYTES
