"""A store over several servers of which one answers garbage, or a byte now and then: its replica answers, or an error
names it in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.hostile_servers import Garbling, Trickling
from support.shapes import HEADS, POISON, ROW_BYTES
from support.sliced import build_slices, serving_all
from support.stores import Model, random_keys

import tierstore

KEYS = random_keys(np.random.default_rng(60), 80)
NAME = "layers.1"
GARBAGE = [
    b"\xff" * 40,
    grpc.StatusCode.INTERNAL,
    *(pytest.param(each, marks=pytest.mark.slow) for each in (b"", b"<html>", grpc.StatusCode.UNKNOWN)),
]


@pytest.fixture(scope="module")
def paths(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build_slices(model, tmp_path_factory.mktemp("slices"), 2, KEYS[:40])


@pytest.fixture
def urls(paths: list[Path]) -> Iterator[list[str]]:
    """Of the first slice's server, and of two replicas of the second."""
    with serving_all([paths[0], paths[1], paths[1]]) as urls:
        yield urls


@pytest.fixture
def garbling(urls: list[str]) -> Iterator[Garbling]:
    made = Garbling(urls[1].removeprefix("grpc://"))
    yield made
    made.close()


@pytest.fixture
def trickling(urls: list[str]) -> Iterator[Trickling]:
    made = Trickling(urls[1].removeprefix("grpc://"))
    yield made
    made.close()


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("spared", [(), ("Describe",)], ids=["all", "all but Describe"])
def test_a_replica_that_answers_garbage_is_passed_over(
    urls: list[str], model: Model, garbling: Garbling, garbage: bytes | grpc.StatusCode, spared: tuple[str, ...]
) -> None:
    expected, ids = model.expected(NAME, KEYS), np.arange(4765, 4900)
    out = np.full((80, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
    address = f"{garbling.url}|{urls[2]}"
    garbling.spared = spared
    with tierstore.connect([urls[0], address], timeout_s=60) as store:
        member = store._engine._asked.members[1]
        for act in (
            lambda: np.testing.assert_array_equal(store[NAME].lookup(KEYS, out), expected),
            lambda: np.testing.assert_array_equal(store[NAME].rows(ids), model.rows[NAME][ids]),
            lambda: store[NAME].explain(KEYS),
        ):
            member._current, before = 0, garbling.num_garbled
            garbling.garbage = garbage
            act()
            assert garbling.num_garbled > before
            assert member._current == 1
            garbling.garbage = None
    garbling.garbage = garbage
    with tierstore.connect([urls[0], address], timeout_s=60, dram="1MiB") as store:
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)


def test_replicas_that_all_answer_garbage_are_named_at_once(urls: list[str], model: Model, garbling: Garbling) -> None:
    other = Garbling(urls[2].removeprefix("grpc://"))
    try:
        address = f"{garbling.url}|{other.url}"
        with tierstore.connect([urls[0], address], timeout_s=600) as store:
            garbling.garbage = other.garbage = b"\xff" * 40
            with pytest.raises(tierstore.FormatError, match="answered what is no LookupReply"):
                store[NAME].lookup(KEYS)
            with pytest.raises(tierstore.FormatError, match=f"{garbling.url} answered what is no Description"):
                tierstore.connect([urls[0], address], timeout_s=600)
            garbling.garbage = other.garbage = None
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
    finally:
        other.close()


def test_a_server_that_trickles_bytes_is_named_when_the_time_is_up(urls: list[str], trickling: Trickling) -> None:
    with tierstore.connect([urls[0], trickling.url], timeout_s=1.5) as store:
        trickling.trickles.set()
        started = time.monotonic()
        with pytest.raises(tierstore.DaemonError, match=f"{trickling.url} (did not answer in time|cannot be)"):
            store[NAME].lookup(KEYS)
        with pytest.raises(tierstore.DaemonError, match=trickling.url):
            tierstore.connect([urls[0], trickling.url], timeout_s=1.5)
        assert trickling.num_trickled > 0
        assert time.monotonic() - started < 60  # a reply takes hours


def test_a_replica_that_trickles_bytes_is_passed_over(urls: list[str], model: Model, trickling: Trickling) -> None:
    with tierstore.connect([urls[0], f"{trickling.url}|{urls[2]}"], timeout_s=10) as store:
        trickling.trickles.set()
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
        assert store._engine._asked.members[1]._current == 1
