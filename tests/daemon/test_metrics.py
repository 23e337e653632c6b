"""The daemon's record for Prometheus: every number of it under one name, over a server that no client can make hang."""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from support.held import running_threads
from support.stat_record import BOUNDS_NS, changed, stat_record
from support.waiting import eventually

from tierstore.daemon import http as web
from tierstore.daemon.metrics import MetricsServer, StatCollector
from tierstore.daemon.record import Latency, StatRecord, TableCounts, TierHits
from tierstore.errors import ConfigError


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and labels, read by prometheus_client's own parser."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            identity = sample.name, frozenset(sample.labels.items())
            assert identity not in found
            found[identity] = sample.value
    return found


def exported(record: StatRecord) -> Callable[..., float | None]:
    """Returns value(name, **labels) of what is exported for a record; None if there is no such sample."""
    registry = CollectorRegistry()
    registry.register(StatCollector(lambda: record))
    samples = samples_of(generate_latest(registry).decode())
    return lambda name, **labels: samples.get((f"tierstore_{name}", frozenset(labels.items())))


def numbers_of(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_of(part)]
    return [value] if isinstance(value, int | float) else []


def test_keys_and_static_hits_are_counted_by_table_order_and_tier() -> None:
    value = exported(stat_record())
    assert value("keys_total", table="layers.1", order="3", tier="dram") == 680_000
    assert value("keys_total", table="layers.14", order="4", tier="nvme") == 520_000
    assert value("keys_total", table="layers.1", order="2", tier="hbm") == 0
    assert value("static_hits_total", table="layers.1", order="4") == 210_000


def test_hit_rate_and_read_amplification_are_what_their_words_say() -> None:
    value = exported(stat_record())
    assert value("hit_rate") == pytest.approx(4_160_000 / 6_000_000)
    assert value("missed_bytes_total") == 1_840_000 * 8 * 264
    assert value("read_amplification") == pytest.approx(40e9 / (1_840_000 * 2112))


def test_before_the_first_lookup_the_ratios_are_unknown_and_not_zero() -> None:
    nothing = {"keys": 0, "hits": TierHits(0, 0, 0), "bytes_read": 0, "tables": dict[str, TableCounts]()}
    value = exported(stat_record(counters=nothing, plan=None))
    for name in ("hit_rate", "read_amplification"):
        number = value(name)
        assert number is not None
        assert math.isnan(number)


def test_rows_by_id_are_no_part_of_read_amplification() -> None:
    before = exported(stat_record())("read_amplification")
    record = stat_record(counters={"bytes_read": 47_000_000_000, "row_bytes_read": 7_000_000_000})
    assert exported(record)("read_amplification") == before
    assert exported(record)("row_read_bytes_total") == 7e9


def test_what_the_plan_expected_is_exported_with_its_bounds() -> None:
    value = exported(stat_record())
    bounds = {bound: value("plan_hit_rate", table="layers.1", order="3", bound=bound) for bound in ("low", "expected")}
    assert bounds == pytest.approx({"low": 0.68, "expected": 0.70})


def test_latency_is_a_cumulative_histogram_of_seconds_for_all_lookups() -> None:
    latency = Latency(bounds_ns=(1000, 2000), counts=(3, 4, 5), sum_ns=40_000, share=0.125)
    value = exported(stat_record(latency=latency))
    buckets = [value("lookup_seconds_bucket", le=le) for le in ("1e-06", "2e-06", "+Inf")]
    assert buckets == [24, 56, 96]
    assert value("lookup_seconds_count") == 96
    assert value("lookup_seconds_sum") == pytest.approx(40e-6 * 8)


def test_every_number_of_the_record_is_exported() -> None:
    """Each number of the record, made distinct, is found among the values; sums,
    bounds and the list of clients apart."""
    record = msgspec.to_builtins(stat_record(clients={"list": ()}))
    del record["latency"], record["daemon"]["pid"]
    counter = iter(range(1_000_000, 9_000_000, 7))

    def distinct(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                distinct(value)
            elif type(value) in (int, float):
                part[key] = next(counter)

    distinct(record)
    latency = Latency(bounds_ns=BOUNDS_NS, counts=(0,) * (len(BOUNDS_NS) + 1), sum_ns=0, share=1)
    record |= {"latency": msgspec.to_builtins(latency), "daemon": record["daemon"] | {"pid": 1}}
    typed = msgspec.convert(record, StatRecord)
    registry = CollectorRegistry()
    registry.register(StatCollector(lambda: typed))
    values = set(samples_of(generate_latest(registry).decode()).values())
    left_out = {1, record["counters"]["keys"], *numbers_of(record["counters"]["hits"])}  # sums of those of the tables
    left_out |= {n for table in record["counters"]["tables"].values() for n in numbers_of(table["hits"])}
    left_out |= {n for table in record["store"]["tables"].values() for n in numbers_of(table)}
    left_out |= {record["learning"]["last_replan"]["steps"], record["plan"]["epoch"]}
    assert set(numbers_of({name: part for name, part in record.items() if name != "latency"})) - left_out <= values


def test_the_state_is_one_of_all_and_what_serves_is_named() -> None:
    value = exported(stat_record(daemon={"state": "changing"}))
    states = {state: value("state", state=state) for state in ("warming", "serving", "changing", "draining")}
    assert states == {"warming": 0, "serving": 0, "changing": 1, "draining": 0}
    assert value("info", release="0.5.0", store="/srv/models/v41.tier") == 1


def test_an_absent_quantity_exports_no_sample() -> None:
    value = exported(stat_record(remote=None, learning={"last_replan": None, "next_replan_s": None}))
    for name in ("remote_calls_total", "remote_in_flight", "last_replan_seconds", "next_replan_seconds"):
        assert value(name) is None
    assert value("epoch") == 7
    assert exported(stat_record())("remote_calls_total") == 1_500


def test_names_of_any_bytes_are_labels() -> None:
    record = stat_record(store={"path": 'a"b\\c\nd\udcff'})
    assert exported(record)("info", release="0.5.0", store='a"b\\c\nd\\udcff') == 1


@pytest.mark.parametrize("latency", [{"counts": (1,)}, {"share": 0}], ids=str)
def test_a_histogram_that_makes_no_sense_is_refused(latency: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="latency"):
        exported(stat_record(latency=latency))


def test_registering_asks_for_no_record() -> None:
    CollectorRegistry(auto_describe=True).register(StatCollector(lambda: pytest.fail("asked")))


class Daemon:
    """Where the server gets its record: one that a test may change, or an error that it may set."""

    def __init__(self) -> None:
        self.record = stat_record()
        self.error: Exception | None = None

    def stat(self) -> StatRecord:
        if self.error is not None:
            raise self.error
        return self.record


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def server(daemon: Daemon) -> Iterator[MetricsServer]:
    with MetricsServer("127.0.0.1:0", daemon.stat) as server:
        yield server


def fetch(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(server.address, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def connect(server: MetricsServer) -> socket.socket:
    host, port = server.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


def all_received(connection: socket.socket) -> bytes:
    """What comes until the other side closes, be it by a reset."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def test_metrics_are_served_in_prometheus_own_format(server: MetricsServer) -> None:
    status, body, headers = fetch(server, "/metrics?x=1")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    assert int(headers["Content-Length"]) == len(body.encode())
    assert samples_of(body)["tierstore_epoch", frozenset()] == 7


def test_two_servers_in_one_process_share_nothing(server: MetricsServer) -> None:
    other = Daemon()
    other.record = stat_record(epochs={"current": 8})
    with MetricsServer("127.0.0.1:0", other.stat) as second:
        assert second.address != server.address
        epochs = [samples_of(fetch(each, "/metrics")[1])["tierstore_epoch", frozenset()] for each in (server, second)]
    assert epochs == [7, 8]


@pytest.mark.parametrize(
    ("state", "status"), [("warming", 503), ("serving", 200), ("changing", 200), ("draining", 503)]
)
def test_a_daemon_is_healthy_while_it_serves(server: MetricsServer, daemon: Daemon, state: str, status: int) -> None:
    daemon.record = stat_record(daemon={"state": state})
    assert fetch(server, "/healthz")[:2] == (status, f"{state}\n")


def test_head_has_the_length_and_no_body(server: MetricsServer) -> None:
    status, body, headers = fetch(server, "/metrics", "HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/status", 404), ("GET", "/metrics/", 404), ("POST", "/metrics", 405), ("DELETE", "/healthz", 405)],
)
def test_nothing_else_is_served(server: MetricsServer, method: str, path: str, status: int) -> None:
    assert fetch(server, path, method)[0] == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics SPDY/3\r\n\r\n", 400),
        (b"\xff\xfe \x00 \x01\r\n\r\n", 400),
        (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"x" * (web.HEAD_BYTES_MAX - 5), 431),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_is_no_request_is_named_so(server: MetricsServer, sent: bytes, status: int) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        assert all_received(connection).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    "fault",
    [KeyError("daemon"), OSError(5, "Input/output error"), ZeroDivisionError()],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("path", ["/metrics", "/healthz"])
def test_a_broken_record_is_a_503_and_a_line_of_the_log_and_no_more(
    server: MetricsServer, daemon: Daemon, path: str, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.error = fault
    status, body, _ = fetch(server, path)
    assert status == 503
    assert "log" in body
    (record,) = caplog.records
    assert (record.levelno, record.event) == (logging.ERROR, "stat_failed")
    daemon.error = None
    assert fetch(server, path)[0] == 200


def test_a_fault_of_the_servers_own_costs_one_answer_and_no_more(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(server._server, "_handler", fails)
    for _ in range(2 * web.REQUESTS_MAX):  # none of them ends a thread
        assert fetch(server, "/metrics")[0] == 500
    assert "http_answer_failed" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(web, "ACCEPT_AGAIN_S", 0.01)
    monkeypatch.setattr(server._server, "_accept", fails)
    with connect(server):
        eventually(lambda: "http_failed" in caplog.text)
    monkeypatch.undo()
    assert fetch(server, "/healthz")[0] == 200


def test_clients_that_say_nothing_are_cut_off_and_the_others_answered_meanwhile(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [connect(server) for _ in range(3 * web.REQUESTS_MAX)]
    started = time.monotonic()
    assert fetch(server, "/healthz")[0] == 200
    assert time.monotonic() - started < web.RECEIVE_S_MAX / 2  # none of them holds a thread
    for connection in silent:
        connection.close()
    monkeypatch.setattr(web, "RECEIVE_S_MAX", 0.2)
    for connection in [connect(server) for _ in range(3 * web.REQUESTS_MAX)]:
        with connection:
            assert all_received(connection) == b""


def test_a_client_that_sends_byte_by_byte_has_no_longer_than_another(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "RECEIVE_S_MAX", 0.3)
    with connect(server) as connection:
        connection.settimeout(0.01)  # the pace: a byte each time that no answer came
        eventually(lambda: was_cut_off(connection))


def was_cut_off(connection: socket.socket) -> bool:
    """Sends one byte more; returns whether the other side has closed."""
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_client_that_does_not_read_is_cut_off(
    server: MetricsServer, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "SEND_S_MAX", 0.2)
    names = [f"table {index:05d} {'x' * 1000}" for index in range(8000)]  # far more than any socket's buffers hold
    daemon.record = changed(daemon.record, epochs={"static_entries": dict.fromkeys(names, 1)})
    with connect(server) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        for _ in range(web.REQUESTS_MAX):
            assert fetch(server, "/healthz")[0] == 200
        eventually(lambda: not server._server._connections)
        assert was_reset(connection)  # so that the system does not keep what was not read either


def was_reset(connection: socket.socket) -> bool:
    """Receives until the other side is done; returns whether that was by a reset."""
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionResetError:
        return True
    return False


def test_the_number_of_threads_and_of_connections_is_limited_under_any_load(server: MetricsServer) -> None:
    before = running_threads()
    connections = [connect(server) for _ in range(web.CONNECTIONS_MAX + 10)]
    for connection in connections[:10]:  # of too many, the oldest go
        assert all_received(connection) == b""
    assert fetch(server, "/healthz")[0] == 200
    assert len(server._server._connections) <= web.CONNECTIONS_MAX
    assert running_threads() <= before
    for connection in connections:
        connection.close()


def test_a_host_with_many_idle_connections_does_not_keep_another_out(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts of loopback stand for those of a network."""
    monkeypatch.setattr(web, "CONNECTIONS_MAX", 8)
    host, port = server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 30, source_address=("127.0.0.2", 0)) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        eventually(lambda: len(server._server._connections) == 1)
        flood = [connect(server) for _ in range(30)]
        for connection in flood[:20]:
            assert all_received(connection) == b""
        slow.sendall(b"\r\n")
        assert all_received(slow).startswith(b"HTTP/1.1 200 ")
    for connection in flood:
        connection.close()


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/html", "text/plain; version=0.0.4"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.0;q=0.3,text/plain;version=0.0.4;q=0.5", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3", "text/plain; version=1.0.0"),
        ("text/plain;version=1.0.0;q=0, text/plain;version=0.0.4", "text/plain; version=0.0.4"),
        ("text/plain;version=new", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.0;q=much", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5", "application/openmetrics-text"),
        ("application/openmetrics-text;q=0.3;version=1.0.0,text/plain;version=0.0.4", "text/plain; version=0.0.4"),
    ],
)
def test_the_format_is_the_one_that_is_wanted_most(
    server: MetricsServer, accept: str | None, content_type: str
) -> None:
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("GET", "/metrics", headers={} if accept is None else {"accept": accept})
    answer = connection.getresponse()
    body = answer.read().decode()
    assert answer.getheader("Content-Type", "").startswith(content_type)
    assert body.endswith("# EOF\n") == (content_type == "application/openmetrics-text")
    connection.close()


def test_openmetrics_is_what_its_own_strict_parser_takes(server: MetricsServer) -> None:
    accept = (  # as Prometheus 3 sends it
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
        "application/openmetrics-text;version=0.0.1;q=0.4,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    )
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("GET", "/metrics", headers={"Accept": accept})
    answer = connection.getresponse()
    families = {family.name for family in openmetrics_families(answer.read().decode())}
    assert answer.getheader("Content-Type", "").startswith("application/openmetrics-text; version=1.0.0")
    assert {"tierstore_keys", "tierstore_lookup_seconds", "tierstore_epoch"} <= families
    connection.close()


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"this is plain HTTP, and you speak TLS: use http://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"lookups by gRPC have an address of their own (--listen)"),
    ],
)
def test_a_client_that_speaks_something_else_is_told_what(server: MetricsServer, sent: bytes, words: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        received = all_received(connection)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert words in received


def test_closing_ends_requests_under_way_at_once(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "RECEIVE_S_MAX", 120.0)  # on a busy machine, too, far more than a close takes
    server = MetricsServer("127.0.0.1:0", daemon.stat)
    with connect(server) as silent:
        eventually(lambda: bool(server._server._connections))
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < web.RECEIVE_S_MAX / 2
        assert all_received(silent) == b""
    assert not any(thread.is_alive() for thread in server._server._threads)
    with pytest.raises(ConnectionRefusedError):
        connect(server)
    server.close()


def test_closing_waits_no_longer_than_it_says_for_a_record_that_never_comes(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "CLOSE_S_MAX", 0.1)
    asked, release = threading.Event(), threading.Event()

    def stuck() -> StatRecord:
        asked.set()
        release.wait(60)
        return daemon.record

    server = MetricsServer("127.0.0.1:0", stuck)
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert asked.wait(30)
        server.close()
    assert "http_close_timed_out" in caplog.text
    release.set()
    for thread in server._server._threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_system_short_of_descriptors_is_logged_and_tried_again(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "ACCEPT_AGAIN_S", 0.01)
    accept, failed = server._server._listener.accept, threading.Event()

    class Listener:
        def accept(self) -> Any:
            if not failed.is_set():
                failed.set()
                raise OSError(24, "Too many open files")
            return accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

    listener, server._server._listener = server._server._listener, Listener()
    for _ in range(2 * web.REQUESTS_MAX):  # until each thread came back from the listener it had
        assert fetch(server, "/healthz")[0] == 200
    assert "http_accept_failed" in caplog.text


@pytest.mark.parametrize(
    "address", ["", "9464", "localhost", ":9464", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000", "::1:9464"]
)
def test_what_is_no_address_is_refused_with_one_that_is(address: str) -> None:
    with pytest.raises(ConfigError, match=r"metrics address .*: not an address; .* such as 127\.0\.0\.1:9464"):
        MetricsServer(address, stat_record)


def test_a_port_that_is_taken_is_named_with_the_remedy(server: MetricsServer) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"metrics address {server.address}: .*the port is taken by another program; .*port 0 for a free one",
    ):
        MetricsServer(server.address, stat_record)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300, "192.0.2.1"], ids=lambda host: host[:12])
def test_a_host_that_is_not_this_one_is_named_with_the_remedy(host: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be listened at: .* address of this host"):
        MetricsServer(f"{host}:0", stat_record)


def test_a_metrics_address_open_to_other_hosts_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with MetricsServer("127.0.0.1:0", stat_record):
        assert not caplog.records
    with MetricsServer("0.0.0.0:0", stat_record):
        assert [record.event for record in caplog.records] == ["metrics_open_to_others"]


def test_ipv6_is_written_in_brackets() -> None:
    try:
        server = MetricsServer("[::1]:0", stat_record)
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with server:
        assert server.address.startswith("[::1]:")
        assert fetch(server, "/healthz")[0] == 200
