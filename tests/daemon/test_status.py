"""The status page: what a browser gets, what it may load, and that it shows what the daemon says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from support.browsers import dumped, find_browser
from support.stat_record import STARTED_AT, changed, stat_record, table_counts

from tierstore.daemon.metrics import MetricsServer
from tierstore.daemon.record import StatRecord
from tierstore.daemon.status import FILES, HEADERS, PAGES, STATUS_PATH, StatusRecord, status_of
from tierstore.ipc.messages import from_json

from .test_metrics import Daemon, all_received, connect, fetch

NOW_S = STARTED_AT + 90_061


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def server(daemon: Daemon) -> Iterator[MetricsServer]:
    with MetricsServer("127.0.0.1:0", daemon.stat) as server:
        yield server


class References(HTMLParser):
    """All that a page loads or links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("path", [*FILES, STATUS_PATH])
def test_page_and_json_come_with_a_policy_that_refuses_all_from_elsewhere(server: MetricsServer, path: str) -> None:
    status, body, headers = fetch(server, path)
    assert status == 200
    assert body
    assert dict(HEADERS).items() <= dict(headers).items()
    directives = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    assert directives["default-src"] == "'none'"
    assert {value for name, value in directives.items() if name != "img-src"} == {"'none'", "'self'"}
    status, body, head = fetch(server, path, "HEAD")
    assert (status, body) == (200, "")
    assert int(head["Content-Length"]) > 500
    assert fetch(server, path, "POST")[0] == 405


def test_the_page_loads_its_own_files_only(server: MetricsServer) -> None:
    page = fetch(server, "/")[1]
    local = [each for each in References(page).found if not each.startswith("data:")]
    assert {"status.js", "status.css", "status.json", "metrics", "healthz"} == set(local)
    assert all(fetch(server, f"/{path}")[0] == 200 for path in local)
    for file in PAGES.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"//[a-z0-9]|@import|url\(", text.replace("// ", "")), f"{file.name} names another host"
        assert "innerHTML" not in text, "names from a store would be markup"
        assert not re.search(r'\bstyle="|\bon[a-z]+="', text), "the policy refuses it"


@pytest.mark.parametrize("path", ["/index.html", "/status", "/pages/status.js", "/../setup.cfg", "/status.py", "//"])
def test_other_paths_are_not_there(server: MetricsServer, path: str) -> None:
    assert fetch(server, path)[0] == 404


def test_the_json_has_no_paths_users_or_processes(server: MetricsServer, daemon: Daemon) -> None:
    text = fetch(server, STATUS_PATH)[1]
    record = daemon.record
    for secret in ("/srv", record.daemon.socket, "5101", "4242", "127.0.0.1", "uid", "pid"):
        assert secret not in text
    assert from_json(text.encode(), StatusRecord).store.name == "v41.tier"


def test_keys_by_tier_are_the_daemons_own_counts() -> None:
    status = status_of(stat_record(), NOW_S)
    assert (status.keys.hbm, status.keys.nvme) == (0, 1_840_000)
    assert status.keys.static + status.keys.recency == 4_160_000
    assert status.tables["layers.1"].orders[3].static == 420_000
    assert status.tables["layers.1"].orders[3].recency == 260_000
    assert status.tables["layers.1"].plan["3"] == 0.70
    assert (status.up_s, status.healthy, status.epochs.current) == (90_061, True, 7)
    memory = status.memory
    parts = memory.static_bytes + memory.recency_bytes + memory.resident_bytes + memory.other_bytes
    assert parts == memory.used_bytes == 8_400_000_000


def test_hits_of_a_table_in_memory_whole_are_not_the_recency_caches() -> None:
    record = stat_record()
    shapes = {name: changed(shape, resident=name == "layers.14") for name, shape in record.store.tables.items()}
    status = status_of(changed(record, store={"tables": shapes}), NOW_S)
    assert status.tables["layers.14"].keys.recency == 0
    assert status.tables["layers.14"].keys.resident == 650_000
    assert status.tables["layers.1"].keys.resident == 0


def test_a_table_of_an_earlier_version_is_shown_without_its_size() -> None:
    record = stat_record()
    tables = record.counters.tables | {"gone": table_counts([5, 5, 5], [1, 1, 1], [2, 2, 2])}
    status = status_of(changed(record, counters={"tables": tables}), NOW_S)
    assert (status.tables["gone"].table_bytes, status.tables["gone"].keys.nvme) == (0, 6)
    assert status.keys.nvme == 1_840_006


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"plan": None}, lambda status: status.plan is None and status.tables["layers.1"].plan == {}),
        ({"remote": None}, lambda status: status.remote is None),
        ({"daemon": {"state": "draining"}}, lambda status: not status.healthy),
        ({"store": {"path": "/srv/a\x1b[2J\udcff"}}, lambda status: status.store.name == "a\\x1b[2J\\udcff"),
        ({"counters": {"tables": {}}}, lambda status: status.keys.nvme == 0),
    ],
    ids=["no plan", "no remote", "draining", "a name of any bytes", "before the first lookup"],
)
def test_what_a_daemon_does_not_have_is_said_so(
    changes: dict[str, Any], seen: Callable[[StatusRecord], bool], server: MetricsServer, daemon: Daemon
) -> None:
    daemon.record = stat_record(**changes)
    assert seen(from_json(fetch(server, STATUS_PATH)[1].encode(), StatusRecord))


def test_a_broken_record_fails_the_json_and_not_the_page(server: MetricsServer, daemon: Daemon) -> None:
    daemon.error = KeyError("daemon")
    assert [fetch(server, path)[0] for path in ("/", "/status.js", STATUS_PATH)] == [200, 200, 503]


def test_an_old_browser_that_speaks_http_1_0_gets_the_page(server: MetricsServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"<title>tierstore</title>" in all_received(connection)


class Growing(Daemon):
    """A daemon whose counters rise with each look."""

    looks = 0

    def stat(self) -> StatRecord:
        self.looks += 1
        record = super().stat()
        hits = [900_000 * self.looks] * 3
        tables = record.counters.tables | {"<b>layers</b>": table_counts(hits, hits, [100_000 * self.looks] * 3)}
        return changed(record, counters={"tables": tables, "batches": 1000 * self.looks})


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_it_without_a_complaint(theme: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    profile = tmp_path_factory.mktemp("browser")
    browser = find_browser(profile)
    daemon = Growing()
    with MetricsServer("127.0.0.1:0", daemon.stat) as server:
        page, complaints = dumped(browser, f"http://{server.address}/", profile, dark=theme == "dark", seconds=15)
    assert not complaints
    assert daemon.looks > 3, "it polls"
    text = re.sub(r"<[^>]+>", " ", page)
    for shown in ("v41.tier", "serving", "7.82 GiB", "of 8.00 GiB", "90.0 %", "client 4", "epoch 7", "order 3"):
        assert shown in text
    assert "&lt;b&gt;layers&lt;/b&gt;" in page, "names are text"


@pytest.mark.slow
def test_a_browser_says_that_the_daemon_does_not_answer(tmp_path_factory: pytest.TempPathFactory) -> None:
    profile = tmp_path_factory.mktemp("browser")
    browser = find_browser(profile)
    daemon = Daemon()
    daemon.error = KeyError("daemon")
    with MetricsServer("127.0.0.1:0", daemon.stat) as server:
        page, _ = dumped(browser, f"http://{server.address}/", profile, seconds=5)
    assert "No answer from the daemon: 503" in page
    assert json.dumps("stale") in page
