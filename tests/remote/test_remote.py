"""A store reached by gRPC keeps the contract of stores, and what only it promises: restarts, forks, limits,
new versions."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from contract.store_contract import StoreContract
from support.remote_servers import serving, serving_process
from support.repository import SUPPORT
from support.served import serving as serving_daemon
from support.shapes import ENTRY_BYTES, HEADS, POISON, ROW_BYTES
from support.stores import Model, make_model, random_keys

import tierstore
from tierstore.remote import answers as remote_answers
from tierstore.remote import engine as remote_engine
from tierstore.remote import limits as remote_limits
from tierstore.remote import messages
from tierstore.remote import requests as remote_requests
from tierstore.remote.client import connect_remote
from tierstore.remote.limits import Deadlines, InFlight, Rates, Refusal
from tierstore.remote.messages import SERVICE
from tierstore.remote.server import RemoteServer
from tierstore.remote.wire import decode, encode

FORKING = SUPPORT / "forking_client.py"


class RemoteStore(StoreContract):
    """A server in this process for each test, around an embedded store."""

    dram = "600KiB"
    sources_are_exact = False  # asked for before the lookup, in requests of their own

    @pytest.fixture(autouse=True)
    def servers(self) -> Iterator[None]:
        self._servers: dict[Path, RemoteServer] = {}
        with contextlib.ExitStack() as self._stack:
            yield

    def open_store(self, path: Path) -> tierstore.Store:
        if path not in self._servers:
            self._servers[path] = self._stack.enter_context(serving(path, dram=self.dram))
        return connect_remote(f"grpc://{self._servers[path].address}")

    def test_single_pairs_get_their_own_entries(self, store) -> None:
        pairs = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int32), np.zeros((1, ENTRY_BYTES), dtype=np.uint8)
        with pytest.raises(tierstore.ConfigError, match="a GPU needs a store on its own host"):
            store._engine.submit_pairs(0, *pairs)

    test_single_pairs_keep_their_own_keys_and_need_no_wait = None  # they are refused
    test_a_closed_store_takes_no_single_pairs = None


@pytest.mark.slow
class TestRemoteInPlace(RemoteStore):
    """Around a store in place."""

    @pytest.fixture
    def built(self, in_place_built: Path) -> Path:
        return in_place_built


class TestRemote(RemoteStore):
    """Small lookups as they come: one message each way."""


class TestRemoteStreamed(RemoteStore):
    """Every lookup cut into requests of few tokens, and streamed in parts of few rows."""

    @pytest.fixture(autouse=True)
    def cuts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote_requests, "UNARY_BYTES_MAX", 0)
        monkeypatch.setattr(remote_answers, "CHUNK_BYTES", 5000)
        monkeypatch.setattr(remote_requests, "HEAD_BYTES", 0)

    def open_store(self, path: Path) -> tierstore.Store:
        store = super().open_store(path)
        store._engine._asked.requests.tokens_max = 97
        return store


class TestRemotePlaced(RemoteStore):
    """With a placement on the server, part of it in DRAM and part in its file."""

    dram = "400KiB"

    @pytest.fixture
    def built(self, placed: Path) -> Path:
        return placed


@contextlib.contextmanager
def connected(path: Path, **options: object) -> Iterator[tuple[tierstore.Store, RemoteServer]]:
    with serving(path, **options) as server, connect_remote(f"grpc://{server.address}") as store:
        yield store, server


def call(address: str, method: str, request: bytes, timeout: float | None = 20.0) -> bytes:
    """One call of a method of one answer, as any gRPC client makes it."""
    with grpc.insecure_channel(address) as channel:
        return channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=timeout)


def test_streamed_batches_of_many_parts_equal_the_store(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(0), 5000, distinct=300)
    with connected(built, tokens_max=2000) as (store, server):
        out = np.full((5000, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        assert store["layers.1"].lookup(keys, out) is out
        np.testing.assert_array_equal(out, model.expected("layers.1", keys))
        record = server.record()
    assert out.nbytes <= record["bytes_sent"] <= out.nbytes * 1.01
    assert record["calls"] == 1 + 3  # Describe, and three requests of 2,000 tokens at most
    assert (record["errors"], record["in_flight"]) == (0, 0)


def test_hits_are_counted_by_the_tier_that_answered_on_the_server(built: Path) -> None:
    keys = random_keys(np.random.default_rng(1), 20)
    with connected(built) as (store, _):
        store["layers.1"].lookup(keys)
        store["layers.1"].lookup(keys)
        stats = store.stats()
    valid = int((keys >= 0).sum())
    assert (
        stats["hits"]["dram"] >= valid > stats["hits"]["nvme"] > 0
        or stats["hits"]["dram"] == stats["hits"]["nvme"] == valid
    )
    assert stats["zero_miss_batches"] == 1
    assert stats["server"]["version"] == 0  # of a store that no daemon serves


def test_explain_says_what_the_server_would_do(built: Path) -> None:
    keys = random_keys(np.random.default_rng(2), 30)
    with connected(built) as (store, _):
        before = store["layers.1"].explain(keys)
        assert set(before[keys >= 0]) == {"pages"}
        assert set(before[keys < 0]) <= {"none"}
        store["layers.1"].lookup(keys)
        assert (store["layers.1"].explain(keys)[keys >= 0] == "recency").mean() > 0.5


def test_a_method_of_one_answer_can_be_asked_as_a_stream_of_one(built: Path) -> None:
    with connected(built) as (store, _):
        connection, data = store._engine._asked.connection, request(store, 2)
        until = time.monotonic() + 60
        answer = connection.unary("Lookup", data, until)
        taken: list[bytes] = []
        connection.stream("Lookup", data, until, taken.append)
        assert (
            decode(messages.LookupReply, taken[0]).parts[0].rows == decode(messages.LookupReply, answer).parts[0].rows
        )
        assert len(taken) == 1


def test_a_damaged_page_is_the_same_error_as_on_the_server(own_store: Path) -> None:
    for shard in own_store.rglob("*.shard"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with connected(own_store) as (store, server):
        for tokens in (1, 700):
            with pytest.raises(tierstore.CorruptPageError, match=r"page \d+ of table layers\.1"):
                store["layers.1"].lookup(random_keys(np.random.default_rng(3), tokens))
        assert server.record()["errors"] == 2


def test_a_server_whose_store_was_closed_says_so(built: Path) -> None:
    with tierstore.open(built, dram="600KiB") as opened:
        server = RemoteServer(opened, "127.0.0.1:0")
        with connect_remote(f"grpc://{server.address}") as store:
            opened.close()
            with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
                store["layers.1"].lookup(np.ones((1, 3), dtype=np.int64))
        server.close(5)


def test_submit_does_not_wait_for_the_network(built: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    look_up = remote_engine.RemoteEngine._look_up

    def held(self: remote_engine.RemoteEngine, requests: object, until: float) -> None:
        assert go_on.wait(60)
        look_up(self, requests, until)

    monkeypatch.setattr(remote_engine.RemoteEngine, "_look_up", held)
    keys = random_keys(np.random.default_rng(4), 9)
    with connected(built) as (store, _):
        out = np.full((9, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        expected = model.expected("layers.1", keys)
        ticket = store.submit({"layers.1": (keys, out)})
        with pytest.raises(TimeoutError, match="wait again"):
            ticket.wait(timeout_s=0.01)
        keys[:] = 0  # a ticket has its own
        go_on.set()
        ticket.wait(timeout_s=60)
    np.testing.assert_array_equal(out, expected)


def test_tickets_beyond_the_limit_wait_for_earlier_ones(built: Path, model: Model, monkeypatch) -> None:
    monkeypatch.setattr(remote_engine, "TICKETS_MAX", 1)
    keys = random_keys(np.random.default_rng(5), 9)
    with connected(built) as (store, _):
        outs = [np.full((9, HEADS, ROW_BYTES), POISON, dtype=np.uint8) for _ in range(10)]
        for out in outs:
            store.submit({"layers.1": (keys, out)})
            assert len(store._engine._tickets) <= 1
    for out in outs:
        np.testing.assert_array_equal(out, model.expected("layers.1", keys))


# Restarts and changes.


def test_a_server_that_nobody_started_is_named_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(tierstore.DaemonError, match=r"127\.0\.0\.1:1 cannot be reached: Connection refused; check"):
        connect_remote("grpc://127.0.0.1:1", timeout_s=20)
    assert time.monotonic() - started < 10


def test_a_client_goes_on_by_itself_after_a_restart(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(6), 40)
    expected = model.expected("layers.1", keys)
    with serving(built) as server:
        address = server.address
        store = connect_remote(f"grpc://{address}", timeout_s=60)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), expected)
    with store:
        out = np.full((40, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        ticket = store.submit({"layers.1": (keys, out)})  # waits while nobody is there
        with serving(built, address):
            ticket.wait(timeout_s=60)
            np.testing.assert_array_equal(out, expected)
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), expected)


def test_a_server_that_is_gone_is_named_within_the_timeout(built: Path) -> None:
    with serving(built) as server:
        store = connect_remote(f"grpc://{server.address}", timeout_s=1)
    started = time.monotonic()
    with store, pytest.raises(tierstore.DaemonError, match="Connection refused"):
        store["layers.1"].lookup(np.ones((1, 3), dtype=np.int64))
    assert time.monotonic() - started < 10


def test_a_killed_server_in_the_middle_of_lookups_is_a_pause(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(7), 300)
    expected = model.expected("layers.1", keys)
    faults, done = [], threading.Event()
    with contextlib.ExitStack() as stack:
        with serving_process(built) as address:
            store = stack.enter_context(connect_remote(f"grpc://{address}", timeout_s=60))

            def work() -> None:
                while not done.is_set():
                    if not np.array_equal(store["layers.1"].lookup(keys), expected):
                        faults.append("rows")

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            while store.stats()["batches"] < 10:
                time.sleep(0)
        batches = store.stats()["batches"]
        with serving_process(built, address):
            deadline = time.monotonic() + 60
            while store.stats()["batches"] < batches + 10 and time.monotonic() < deadline:
                time.sleep(0)
            done.set()
            for thread in threads:
                thread.join(timeout=60)
                assert not thread.is_alive()
    assert not faults
    assert store.stats()["batches"] >= batches + 10


def test_other_tables_after_a_reconnect_are_refused_never_wrong_rows(built: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "checkpoint", seed=1, heads=4)
    other.build(tmp_path / "store")
    with serving(built) as server:
        address = server.address
        store = connect_remote(f"grpc://{address}", timeout_s=60)
    keys = np.ones((2, 3), dtype=np.int64)
    with store, serving(tmp_path / "store", address):
        for ask in (store["layers.1"].lookup, store["layers.1"].explain):
            with pytest.raises(tierstore.FingerprintMismatchError, match="other tables are served now; connect again"):
                ask(keys)
        with pytest.raises(tierstore.FingerprintMismatchError):
            store["layers.1"].rows(np.arange(5))


def test_a_lookup_has_the_rows_of_one_version_only(built: Path, model: Model, tmp_path: Path) -> None:
    """The store changes after the second part of the first request: what was begun is asked for again."""
    changed = make_model(tmp_path / "checkpoint", seed=5)
    changed.build(tmp_path / "store")
    keys = random_keys(np.random.default_rng(8), 400)
    with tierstore.open(built, dram="600KiB") as first, tierstore.open(tmp_path / "store", dram="600KiB") as second:
        served = [first]
        server = RemoteServer(lambda: served[0], "127.0.0.1:0", tokens_max=100)
        with connect_remote(f"grpc://{server.address}") as store:
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
            number, asked = store.version, []
            lookup = type(first["layers.1"]).lookup

            def counted(table: tierstore.Table, *arguments: Any, **named: Any) -> np.ndarray:
                asked.append(table)
                if len(asked) == 2:
                    served[0] = second
                    first.close()
                return lookup(table, *arguments, **named)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(first["layers.1"]), "lookup", counted)
                out = np.full((400, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
                store._engine.lookup(0, keys, out)
            np.testing.assert_array_equal(out, changed.expected("layers.1", keys))
            assert store.version > number
        server.close(5)
    assert len(asked) > 4


# Forks.


@pytest.mark.parametrize("late", [False, True], ids=["", "grpc was loaded before"])
def test_a_store_works_on_both_sides_of_a_fork_or_says_why_not(built: Path, late: bool) -> None:
    """In a process of its own: grpc's server, which other tests have in this one, does not survive forks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    with serving_process(built) as address:
        command = [sys.executable, "-W", "ignore", str(FORKING), f"grpc://{address}", "2" if late else "15"]
        subprocess.run(command + ["late"] * late, check=True, timeout=120, env=environment)


def test_a_ticket_of_the_parent_fails_in_the_child_by_name(built: Path) -> None:
    with connected(built) as (store, _):
        keys, out = np.ones((1, 3), dtype=np.int64), np.empty((1, HEADS, ROW_BYTES), dtype=np.uint8)
        ticket = store.submit({"layers.1": (keys, out)})
        ticket.wait(timeout_s=60)
        ticket._pending._process = (-1, 0)  # as in another process
        ticket._pending._future = type(ticket._pending._future)()
        with pytest.raises(tierstore.StoreNotReadyError, match="when this process forked"):
            ticket.wait()


# Limits.


def request(store: tierstore.Store, num_tokens: int) -> bytes:
    keys = np.ones((num_tokens, 3), dtype="<i8").tobytes()
    return encode(
        messages.LookupRequest(
            store._engine._asked.requests.identity, [messages.TableKeys("layers.1", num_tokens, keys)]
        )
    )


def refused(address: str, method: str, data: bytes, code: grpc.StatusCode) -> str:
    """The words of a call that must fail with a status."""
    with pytest.raises(grpc.RpcError) as caught:
        call(address, method, data)
    assert caught.value.code() is code, caught.value
    return caught.value.details()


def test_requests_beyond_the_limits_are_refused_with_both_numbers(built: Path) -> None:
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    with connected(built, tokens_max=50, message_bytes_max=20_000) as (store, server):
        words = refused(server.address, "Lookup", request(store, 51), exhausted)
        assert words == "51 tokens in one request, at most 50 may be; ask in several"
        words = refused(server.address, "Lookup", request(store, 49), exhausted)
        assert "47040 bytes, one message holds 15904; call LookupStream" in words
        words = refused(server.address, "Lookup", request(store, 1000), exhausted)
        assert "larger than max" in words
        rows = encode(messages.RowsRequest(store._engine._asked.requests.identity, "layers.1", bytes(8 * 24 * 51)))
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match="51 tokens"):
            next(channel.unary_stream(f"/{SERVICE}/Rows")(rows, timeout=20))
        assert store["layers.1"].lookup(np.ones((400, 3), dtype=np.int64)).shape == (400, HEADS, ROW_BYTES)


def test_bytes_and_calls_in_flight_are_limited_with_both_numbers() -> None:
    limits = InFlight(calls_max=1, bytes_max=100)
    with (
        limits.call(),
        pytest.raises(Refusal, match="1 calls are under way, at most 1 may be") as caught,
        limits.call(),
    ):
        pass
    assert caught.value.retry
    with limits.holding(60):
        words = "41 bytes, with the 60 that other calls hold, are more than the 100"
        with pytest.raises(Refusal, match=words) as caught, limits.holding(41):
            pass
        assert caught.value.retry
        with pytest.raises(Refusal, match="ask for less at once") as caught, limits.holding(101):
            pass
        assert not caught.value.retry
    with limits.call(), limits.holding(100):
        assert limits.num_calls == 1
    assert limits.num_calls == 0


def test_a_call_that_memory_is_missing_to_count_is_not_counted() -> None:
    class Full(dict[str, int]):
        def __setitem__(self, peer: str, number: int) -> None:
            raise MemoryError

    limits = InFlight(calls_max=1, bytes_max=100)
    limits._calls.by_peer = Full()
    with pytest.raises(MemoryError), limits.call("a"):
        pass
    assert limits.num_calls == 0


def test_a_busy_server_is_asked_again_until_it_has_time(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(11), 20)
    expected = model.expected("layers.1", keys)
    with connected(built, in_flight_max=1) as (store, server):
        outs = [np.full((20, HEADS, ROW_BYTES), POISON, dtype=np.uint8) for _ in range(40)]
        for ticket in [store.submit({"layers.1": (keys, out)}) for out in outs]:
            ticket.wait(timeout_s=60)
        assert server.record()["errors"] > 0
    for out in outs:
        np.testing.assert_array_equal(out, expected)


def test_rates_are_of_each_host_and_by_time() -> None:
    now = [0.0]
    rates = Rates(2, clock=lambda: now[0])
    for peer in ("ipv4:10.0.0.1", "ipv4:10.0.0.2"):
        rates.take(peer)
        rates.take(peer)
        with pytest.raises(Refusal, match=rf"more than 2 requests a second from {peer}"):
            rates.take(peer)
    now[0] = 0.5
    rates.take("ipv4:10.0.0.1")
    with pytest.raises(Refusal):
        rates.take("ipv4:10.0.0.1")
    for number in range(remote_limits.PEERS_MAX + 10):
        rates.take(f"ipv4:{number}")
    assert len(rates._buckets) == remote_limits.PEERS_MAX


def test_a_server_limits_the_rate_of_its_peers(built: Path) -> None:
    with serving(built, requests_per_second=0.001) as server:
        call(server.address, "Describe", b"")
        words = refused(server.address, "Describe", b"", grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert words == "more than 0.001 requests a second from 127.0.0.1; ask for more in each"


class Context:
    """What `Deadlines` needs of a call."""

    def __init__(self, remaining: float | None) -> None:
        self.remaining, self.cancelled = remaining, threading.Event()

    def time_remaining(self) -> float | None:
        return self.remaining

    def is_active(self) -> bool:
        return not self.cancelled.is_set()

    def cancel(self) -> None:
        self.cancelled.set()


def test_calls_are_cancelled_at_their_deadline_their_default_one_or_when_the_client_stalls(monkeypatch) -> None:
    monkeypatch.setattr(remote_limits, "POLL_S", 0.01)
    monkeypatch.setattr(remote_limits, "CALL_WAIT_S", 0.05)
    monkeypatch.setattr(remote_limits, "STALL_WAIT_S", 0.05)
    deadlines = Deadlines()
    with (
        deadlines.of(Context(None)) as without,
        deadlines.of(Context(9e9)) as unset,
        deadlines.of(Context(100)) as long,
    ):
        assert without.context.cancelled.wait(60)
        assert unset.context.cancelled.wait(60)
        assert without.is_over()
        assert not long.is_over()
        with long.waiting_for_client():
            assert long.context.cancelled.wait(60)
    assert not deadlines._calls
    deadlines.stop()


def test_a_stream_that_nobody_reads_is_given_up_and_holds_little(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_limits, "STALL_WAIT_S", 0.5)
    with connected(built) as (store, server):
        with grpc.insecure_channel(server.address, [("grpc.http2.bdp_probe", 0)]) as channel:
            replies = channel.unary_stream(f"/{SERVICE}/LookupStream")(request(store, 20_000), timeout=60)
            next(replies)
            deadline = time.monotonic() + 30
            while server.record()["in_flight"] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.record()["in_flight"] == 0
            sent = server.record()["bytes_sent"]
            with pytest.raises(grpc.RpcError):
                list(replies)
        assert sent < 20_000 * 960 / 2
        assert store["layers.1"].lookup(np.ones((1, 3), dtype=np.int64)).shape == (1, HEADS, ROW_BYTES)


def test_requests_that_contradict_themselves_are_value_errors(built: Path) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    with connected(built) as (store, server):
        identity = store._engine._asked.requests.identity
        for tables, words in (
            ([messages.TableKeys("layers.1", 2, bytes(24))], r"24 bytes, but [2, 3] int64 take 48"),
            ([messages.TableKeys("layers.1", 2**62, bytes(24))], "24 bytes, but"),
            ([messages.TableKeys("layers.2", 1, bytes(24))], "has no table 'layers.2'"),
            ([messages.TableKeys("layers.1", 1, b"\xfe" + b"\xff" * 7 + bytes(16))], "key -2 is below -1"),
            ([messages.TableKeys("plain", 1, b"\x21" + bytes(7))], "33"),
        ):
            assert words in refused(server.address, "Lookup", encode(messages.LookupRequest(identity, tables)), invalid)
        assert "identity none" in refused(
            server.address, "Lookup", encode(messages.LookupRequest()), grpc.StatusCode.FAILED_PRECONDITION
        )
        assert "is damaged" in refused(server.address, "Lookup", b"\x0b", invalid)


def test_a_call_without_a_request_is_refused(built: Path) -> None:
    with serving(built) as server, grpc.insecure_channel(server.address) as channel:
        for ask in (channel.stream_unary(f"/{SERVICE}/Lookup"), channel.stream_stream(f"/{SERVICE}/Rows")):
            with pytest.raises(grpc.RpcError, match="the call has no request; send one message"):
                list(ask(iter(()), timeout=20))


def test_keys_at_an_odd_place_of_a_message_are_read_all_the_same(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(12), 5)
    with connected(built) as (store, server):
        for name_bytes in range(8):
            data = encode(
                messages.LookupRequest(
                    store._engine._asked.requests.identity, [messages.TableKeys("layers.1", 5, keys.tobytes())]
                )
            )
            padding = b"\x7a" + bytes([name_bytes]) + bytes(name_bytes)  # field 15, which nobody knows
            reply = decode(messages.LookupReply, call(server.address, "Lookup", padding + data))
            assert bytes(reply.parts[0].rows) == model.expected("layers.1", keys).tobytes()


# The server itself.


def test_a_store_that_is_itself_reached_by_grpc_is_served(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(14), 40)
    with serving(built) as first, connect_remote(f"grpc://{first.address}") as between:
        second = RemoteServer(between, "127.0.0.1:0")
        with connect_remote(f"grpc://{second.address}") as store:
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
            np.testing.assert_array_equal(store["layers.1"].explain(keys), between["layers.1"].explain(keys))
        assert second.close(5)


def test_an_attached_store_is_served(built: Path, model: Model, tmp_path: Path) -> None:
    keys = random_keys(np.random.default_rng(15), 40)
    with serving_daemon(built, tmp_path / "s", 900 << 10), tierstore.connect(tmp_path / "s") as attached:
        server = RemoteServer(attached, "127.0.0.1:0")
        with connect_remote(f"grpc://{server.address}") as store:
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        assert server.close(5)


def test_closing_the_server_ends_its_threads_and_frees_its_port(built: Path) -> None:
    with tierstore.open(built, dram="600KiB") as opened:
        before = {thread.name for thread in threading.enumerate()}
        server = RemoteServer(opened, "127.0.0.1:0")
        with pytest.raises(
            tierstore.ConfigError, match="cannot be listened at: Address already in use: the port is taken"
        ):
            RemoteServer(opened, server.address)
        assert server.close(5)
        assert server.close(5)
        again = RemoteServer(opened, server.address)
        assert again.address == server.address
        assert again.close(5)
        assert not {t.name for t in threading.enumerate() if "deadlines" in t.name} - before


def test_closing_lets_calls_under_way_end(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(13), 5)
    entered, go_on = threading.Event(), threading.Event()
    with tierstore.open(built, dram="600KiB") as opened, pytest.MonkeyPatch.context() as patch:
        server = RemoteServer(opened, "127.0.0.1:0")
        store = connect_remote(f"grpc://{server.address}")
        lookup = tierstore.Table.lookup

        def slow(table: tierstore.Table, *arguments: Any, **named: Any) -> np.ndarray:
            entered.set()
            assert go_on.wait(60)
            return lookup(table, *arguments, **named)

        out = np.full((5, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        ticket = store.submit({"layers.1": (keys, out)})
        patch.setattr(tierstore.Table, "lookup", slow)
        ticket.wait(60) if not entered.wait(60) else None
        closed: list[bool] = []
        closing = threading.Thread(target=lambda: closed.append(server.close(60)))
        closing.start()
        go_on.set()
        ticket.wait(timeout_s=60)
        closing.join(timeout=60)
        assert closed == [True]
        np.testing.assert_array_equal(out, model.expected("layers.1", keys))
        store.close()


def test_stats_of_the_server_are_served(built: Path) -> None:
    import json

    with connected(built) as (store, server):
        store["layers.1"].lookup(np.ones((2, 3), dtype=np.int64))
        stats = json.loads(decode(messages.StatsReply, call(server.address, "Stats", b"")).json)
    assert stats["keys"] == 6
    assert stats["remote"]["address"] == server.address
    assert set(stats["remote"]) == {"address", "calls", "errors", "bytes_sent", "in_flight"}


def test_a_message_that_cannot_hold_a_token_is_refused(built: Path) -> None:
    words = r"message_bytes_max: a token's rows of table layers\.1 take 960 bytes"
    with pytest.raises(tierstore.ConfigError, match=words), serving(built, message_bytes_max=1000):
        pass


def test_importing_the_store_or_the_client_does_not_load_grpc() -> None:
    code = (
        "import sys, tierstore, tierstore.remote.client, tierstore.remote.server; "
        "assert not any(name.split('.')[0] == 'grpc' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_where_grpc_is_not_installed_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "import tierstore\n"
        "from tierstore.remote.client import connect_remote\n"
        "try: connect_remote('grpc://127.0.0.1:1')\n"
        "except tierstore.ConfigError as error: assert tierstore.extras.install_command('remote') in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
