"""What an operator reads of a daemon is what its record says, by arithmetic that is checked apart from the words."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from support.remote_servers import serving
from support.stat_record import BOUNDS_NS, STARTED_AT, changed, client, stat_record, table_counts

from tierstore.daemon.counts import Counts, expected_rate
from tierstore.daemon.record import FeedInfo, StatRecord, TableCounts, TierHits, missed_bytes, read_amplification
from tierstore.errors import DaemonError
from tierstore.ipc.messages import StatRequest, from_json, to_json
from tierstore.remote.client import connect_remote
from tierstore.tools.cli import console, run
from tierstore.tools.stat.lines import concerns, summary
from tierstore.tools.stat.rates import Rates, quantile_ns, rates_between
from tierstore.tools.stat.tables import page_of
from tierstore.tools.stat.words import duration, latency_text, share_text, short_count

NOW = STARTED_AT + 86_500


def later_record(**changes: Any) -> StatRecord:
    """The record after some more lookups: 10,000 hits and 900 misses times the order, in each order of each table."""
    record = stat_record()
    tables = {
        name: TableCounts(
            table.hits,
            {
                order: TierHits(hits.hbm, hits.dram + 10_000, hits.nvme + 900 * order)
                for order, hits in table.orders.items()
            },
            {order: static + 8_000 for order, static in table.static_hits.items()},
        )
        for name, table in record.counters.tables.items()
    }
    first, second, third = record.clients.list
    counts = list(record.latency.counts)
    counts[3] += 50
    return changed(
        record,
        counters={
            "batches": record.counters.batches + 500,
            "pages_read": record.counters.pages_read + 40_000,
            "entries_read": record.counters.entries_read + 2_000,
            "bytes_read": record.counters.bytes_read + 170_000_000,
            "tables": tables,
        },
        latency={"counts": tuple(counts)},
        clients={"list": (first, second, changed(third, keys=third.keys + 50_000))},
        **changes,
    )


def with_hits(record: StatRecord, table: str, order: int, hits: TierHits) -> StatRecord:
    """The record with other hits of one order of a table."""
    counts = record.counters.tables[table]
    tables = dict(record.counters.tables)
    tables[table] = TableCounts(counts.hits, counts.orders | {order: hits}, counts.static_hits)
    return changed(record, counters={"tables": tables})


def renamed(record: StatRecord, before: str, now: str) -> StatRecord:
    """The record with another name for a table, in both places that name it."""
    counts, shapes = dict(record.counters.tables), dict(record.store.tables)
    counts[now], shapes[now] = counts.pop(before), shapes.pop(before)
    return changed(record, counters={"tables": counts}, store={"tables": shapes})


def rates_of(seconds: float = 2.0) -> Rates:
    rates = rates_between(stat_record(), later_record(), seconds)
    assert rates is not None
    return rates


def text_of(record: StatRecord, rates: Rates | None = None, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(page_of(record, rates, NOW))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str, *begin: str) -> list[str]:
    """The cells of the line that begins with some."""
    (line,) = [line for line in text.splitlines() if line.split()[: len(begin)] == list(begin)]
    return line.split()[len(begin) :]


def test_rates_are_differences_by_the_seconds_between() -> None:
    rates = rates_of(2.0)
    assert rates.counts["layers.14", 3] == Counts(0, 8_000, 2_000, 2_700)
    assert rates.keys_s == (6 * 10_000 + 2 * 900 * 9) / 2
    assert rates.total.hit_rate == pytest.approx(60_000 / 76_200)
    assert (rates.batches_s, rates.reads_s, rates.read_bytes_s) == (250, 21_000, 85_000_000)
    assert sum(rates.latency_counts) == rates.latency_counts[3] == 50
    assert rates.client_keys_s == {1: 0, 2: 0, 4: 25_000}


def test_there_are_no_rates_over_a_restart_or_within_a_moment() -> None:
    restarted, other = stat_record(daemon={"started_at": STARTED_AT + 1}), stat_record(daemon={"pid": 4243})
    assert rates_between(stat_record(), restarted, 1.0) is None
    assert rates_between(stat_record(), other, 1.0) is None
    assert rates_between(stat_record(), stat_record(), 0.0) is None
    assert rates_between(stat_record(), stat_record(), 1.0) is not None


def test_tables_and_clients_that_came_in_between_count_from_nothing() -> None:
    record = stat_record()
    earlier = stat_record(counters={"tables": {"layers.1": record.counters.tables["layers.1"]}})
    later = stat_record(clients={"list": (*record.clients.list, client(7, 6000, 0.5, 2, 400, 100))})
    rates = rates_between(earlier, later, 2.0)
    assert rates is not None
    assert rates.counts["layers.14", 2].keys == 1_000_000
    assert rates.client_keys_s[7] == 200


def test_two_connections_of_one_process_have_rates_of_their_own() -> None:
    earlier = stat_record(clients={"list": (client(1, 5101, 9.0, 2, 1_000, 0), client(2, 5101, 9.0, 2, 8_000, 0))})
    later = stat_record(clients={"list": (client(1, 5101, 9.0, 2, 1_400, 0), client(2, 5101, 9.0, 2, 8_000, 0))})
    rates = rates_between(earlier, later, 2.0)
    assert rates is not None
    assert rates.client_keys_s == {1: 200, 2: 0}


def test_nothing_asked_has_no_hit_rate() -> None:
    rates = rates_between(stat_record(), stat_record(), 1.0)
    assert rates is not None
    assert math.isnan(rates.total.hit_rate)
    assert rates.keys_s == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_lies_in_the_bucket_where_the_sorted_times_have_it(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.lognormal(10, 2, size=500).clip(1, BOUNDS_NS[-1]))
    edges = [0, *BOUNDS_NS]
    counts = [int(((times > low) & (times <= high)).sum()) for low, high in itertools.pairwise(edges)]
    exact = times[math.ceil(share * len(times)) - 1]
    bucket = int(np.searchsorted(BOUNDS_NS, exact))
    assert edges[bucket] <= quantile_ns(BOUNDS_NS, [*counts, 0], share) <= edges[bucket + 1]


def test_quantiles_at_the_edges() -> None:
    assert math.isnan(quantile_ns([1000], [0, 0], 0.5))
    assert quantile_ns([1000, 2000], [0, 4, 0], 0.5) == 1500
    assert quantile_ns([1000, 2000], [4, 0, 0], 1.0) == 1000
    assert quantile_ns([1000, 2000], [1, 0, 1], 0.99) == math.inf
    assert quantile_ns([1000, 2000], [1, 0, 1], 0.5) == 1000


def test_missed_bytes_are_those_of_whole_entries() -> None:
    assert missed_bytes(stat_record()) == 1_840_000 * 8 * 264


def test_what_rows_by_id_read_is_no_amplification_of_what_keys_missed() -> None:
    before = read_amplification(stat_record())
    record = stat_record(counters={"bytes_read": 47_000_000_000, "row_bytes_read": 7_000_000_000})
    assert read_amplification(record) == before
    assert "10.3 times what was missed" in text_of(record)


def test_the_plans_hit_rate_is_weighted_by_what_was_asked_for() -> None:
    asked = {
        "layers.1": table_counts([300, 0, 0], [0] * 3, [0] * 3),
        "layers.14": table_counts([0] * 3, [0] * 3, [0, 0, 100]),
    }
    expected = expected_rate(stat_record(counters={"tables": asked}))
    assert expected is not None
    assert expected.expected == pytest.approx((300 * 0.95 + 100 * 0.52) / 400)
    assert expected.low == pytest.approx(expected.expected - 0.02)


def test_stat_says_what_the_plan_expected_beside_what_is_measured() -> None:
    text = text_of(stat_record())
    assert "plan   expected 72.3 % (70.3 % to 75.3 %) of epoch 3, measured 69.3 %" in text.splitlines()
    assert cells(text, "layers.1", "3")[4:6] == ["70.0", "%"]


def test_without_a_plan_nothing_is_said_of_it() -> None:
    record = stat_record(plan=None)
    assert expected_rate(record) is None
    text = text_of(record)
    assert "expected" not in text
    assert " plan " not in text


def test_stat_says_how_far_the_recency_cache_has_filled_until_it_is_full() -> None:
    record = stat_record()
    assert "the recency cache is 47.5 % full" in text_of(record)
    assert "570 k of 1.20 M entries" in text_of(record)
    assert "% full" not in text_of(stat_record(epochs={"recency_entries": record.epochs.recency_slots}))


def test_rows_read_by_id_are_shown_apart_from_keys() -> None:
    record = stat_record()
    assert "not among the keys" not in text_of(record)
    first, *others = record.clients.list
    clients = {"list": (changed(first, has_hbm=True), *others)}
    text = "\n".join(summary(stat_record(counters={"rows": 2_000_000, "rows_missed": 500_000}, clients=clients), None))
    assert "not among the keys: 2.00 M rows by their ids, 75.0 % from DRAM" in text
    assert "not among the keys: what the GPUs of 1 clients found: see their own stats()" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (7.5, "7.5"),
        (999, "999"),
        (1000, "1.00 k"),
        (48_211, "48.2 k"),
        (6e6, "6.00 M"),
        (2.5e11, "250 G"),
    ],
)
def test_counts_in_three_digits(number: float, text: str) -> None:
    assert short_count(number) == text


def test_an_unknown_value_is_shown_as_a_dash() -> None:
    assert [show(math.nan) for show in (short_count, share_text, latency_text)] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (7_260, "2 h 1 min"), (90_061, "1 d 1 h")]
)
def test_durations_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("ns", "text"), [(640, "640 ns"), (14_200, "14.2 us"), (3.2e6, "3.2 ms"), (2e9, "2 s")])
def test_latency_in_a_unit_that_people_read(ns: float, text: str) -> None:
    assert latency_text(ns) == text


def test_the_page_says_who_answered_by_table_and_order() -> None:
    text = text_of(stat_record())
    shares = ["68.0", "%", "70.0", "%", "42.0", "%", "26.0", "%", "32.0", "%"]  # hits, as planned, and by whom
    assert cells(text, "layers.1", "3") == ["1.00", "M", *shares]
    assert cells(text, "all")[:4] == ["6.00", "M", "69.3", "%"]
    assert "keys/s" not in text


def test_with_rates_the_page_says_what_goes_on_now() -> None:
    text = text_of(later_record(), rates_of(2.0))
    assert cells(text, "layers.1", "3")[:4] == ["6.35", "k", "78.7", "%"]
    assert cells(text, "now")[:4] == ["hit", "rate", "78.7", "%,"]
    assert "NVMe 21.0 k reads/s, 81.06 MiB/s" in text
    busiest = [line.split()[0] for line in text.splitlines() if " 1000 " in line]
    assert busiest == ["5230", "5101", "5102"]


def test_a_resident_table_is_called_so_and_hbm_is_shown_where_it_answers() -> None:
    shapes = stat_record().store.tables
    record = stat_record(store={"tables": shapes | {"layers.1": changed(shapes["layers.1"], resident=True)}})
    text = text_of(with_hits(record, "layers.14", 2, TierHits(1_000_000, 910_000, 90_000)))
    assert "resident" in cells(text, "layers.1", "3")
    assert cells(text, "layers.14", "2")[6:8] == ["50.0", "%"]
    assert " hbm " in text
    assert " hbm " not in text_of(stat_record())


@pytest.mark.parametrize("width", [40, 60, 70, 80, 100])
@pytest.mark.parametrize("rates", [None, rates_of()], ids=["stat", "top"])
@pytest.mark.parametrize("in_hbm", [0, 1_000_000])
def test_a_narrow_screen_costs_columns_and_never_digits(width: int, rates: Rates | None, in_hbm: int) -> None:
    record = with_hits(later_record(), "layers.14", 2, TierHits(in_hbm, 920_000, 91_800))
    text = text_of(record, rates, width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    found = cells(text, "layers.1", "4")
    assert found[-2:] == ["49.7", "%"] if width >= 80 else len(found) >= 2
    assert "68.0 %" in text_of(record, None, width) or width < 60


def test_at_80_columns_nothing_is_left_out_but_the_bars() -> None:
    text = text_of(stat_record(), None, width=80)
    head = next(line.split() for line in text.splitlines() if line.startswith("table"))
    assert head == ["table", "order", "keys", "hit", "rate", "plan", "static", "recency", "nvme"]
    assert "2.33 M of 2.50 M entries" in text


def test_a_table_of_a_long_name_is_named_in_full_and_keeps_its_digits() -> None:
    name = "model.language_model.layers.14.engram.embedding.table_of_many_rows"
    text = text_of(renamed(stat_record(), "layers.14", name), None, width=80)
    assert "…" not in text
    assert "48.0 %" in text
    letters = "".join(line.split()[0] for line in text.splitlines() if line.strip())
    assert name in letters or name in text


def test_names_with_brackets_are_printed_as_they_are() -> None:
    text = text_of(renamed(stat_record(store={"path": "/srv/[bold]"}), "layers.1", "x[red]y[/a]"))
    assert "x[red]y[/a]" in text
    assert "/srv/[bold]" in text


def test_many_clients_are_cut_to_those_that_ask_the_most() -> None:
    clients = tuple(client(index, 7000 + index, 1.0, 2, 1000 + index, 10) for index in range(40))
    text = text_of(stat_record(clients={"list": clients}))
    assert "28 not shown" in text
    assert "7039" in text
    assert "7027" not in text


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("memory", {"used_bytes": 9 << 30}, "1.00 GiB above the budget"),
        ("epochs", {"alive": 2, "waiting_for": (11, 12)}, "the old epoch waits for pid 11, 12"),
        ("feed", {"errors": 3}, "3 missed keys could not be read: run tierstore verify /srv/models/v41.tier"),
        ("feed", {"dropped_keys": 300_000}, "30.0 % of the missed keys were dropped"),
        ("feed", {"dropped_keys": 300_000}, "run 'tierstore replan /run/tierstore/v41.sock', or give it more --dram"),
        ("learning", {"reports_lost": 5_800_000}, "50.0 % of the reports were lost"),
        ("learning", {"reports_refused": 9}, "9 reports made no sense"),
        ("clients", {"attached": 64}, "all 64 clients that may attach are attached: more are refused"),
        ("remote", {"errors": 500}, "500 of 1,500 remote calls failed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_each_concern_is_named_at_the_top(section: str, changes: dict[str, Any], said: str) -> None:
    record = stat_record(epochs={"alive": 1, "waiting_for": ()})
    assert concerns(record) == []
    record = changed(record, **{section: changes})
    (concern,) = concerns(record)
    assert said in concern
    assert f"! {concern}" in text_of(record, width=400).splitlines()[2]


def test_many_dropped_keys_without_a_plan_call_for_one() -> None:
    record = stat_record(feed={"dropped_keys": 300_000}, plan=None)
    assert any("run 'tierstore profile' and 'tierstore plan'" in concern for concern in concerns(record))


def test_a_daemon_that_has_just_begun_is_shown_without_a_number_that_is_none() -> None:
    nothing = table_counts([0] * 3, [0] * 3, [0] * 3)
    counts = dict.fromkeys(("keys", "batches", "zero_miss_batches", "pages_read", "entries_read", "bytes_read"), 0)
    learning = {"reports": 0, "reports_lost": 0, "replans": 0, "last_replan": None, "next_replan_s": None}
    record = stat_record(
        counters=counts | {"tables": {"layers.1": nothing, "layers.14": nothing}},
        latency={"counts": (0,) * (len(BOUNDS_NS) + 1)},
        learning=learning,
        feed=FeedInfo(0, 0, 0, 0),
        epochs={"alive": 1, "waiting_for": ()},
        clients={"attached": 0, "list": ()},
        remote=None,
        store={"previous": None},
    )
    assert concerns(record) == []
    text = text_of(record, rates_between(record, record, 1.0))
    assert "nan" not in text
    assert "None" not in text
    assert "p50 -, p99 -" in text
    assert "re-plans 0, the next on request" in text
    assert "remote" not in text
    assert "clients: 0 of 64" in text


class StubbedDaemon:
    """Stands for `tierstore.ipc.client_socket.ask`: answers with a JSON text, or raises."""

    def __init__(self, answer: StatRecord | dict[str, Any] | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, object, float]] = []

    def ask(self, socket_path: str, request: object, kind: type[Any], timeout_s: float = 10.0) -> Any:
        self.calls.append((socket_path, request, timeout_s))
        if isinstance(self.answer, Exception):
            raise self.answer
        return from_json(to_json(self.answer), kind)


def serve(monkeypatch: pytest.MonkeyPatch, answer: StatRecord | dict[str, Any] | Exception) -> StubbedDaemon:
    stub = StubbedDaemon(answer)
    monkeypatch.setattr("tierstore.tools.stat.command.ask", stub.ask)
    return stub


def test_stat_asks_the_socket_once_and_prints_its_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = serve(monkeypatch, stat_record())
    assert run(["stat", "/run/tierstore/v41.sock"]) == 0
    assert stub.calls == [("/run/tierstore/v41.sock", StatRequest(), 10.0)]
    assert "generation 2, epoch 7, /srv/models/v41.tier" in capsys.readouterr().out


def test_each_number_of_a_version_has_a_word_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = stat_record()
    store = msgspec.structs.replace(record.store, published=31)
    serve(monkeypatch, msgspec.structs.replace(record, store=store))
    assert run(["stat", "x.sock"]) == 0
    shown = capsys.readouterr().out
    assert "generation 2, epoch 7, /srv/models/v41.tier, version 31 of its rows" in shown
    assert shown.count("version") == 1
    assert "generation" in shown[shown.index("clients: ") :]


def test_stat_gives_the_record_itself_to_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, stat_record())
    assert run(["stat", "x.sock", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(to_json(stat_record()))
    assert printed.startswith('{\n  "daemon": {\n    "pid": 4242,')


def test_a_record_with_more_than_this_release_knows_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, msgspec.to_builtins(stat_record(), str_keys=True) | {"more": {"to": "come"}})
    assert run(["stat", "x.sock"]) == 0
    assert "generation 2, epoch 7" in capsys.readouterr().out


def test_stat_of_no_daemon_is_one_line_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, DaemonError("x.sock: no daemon answers; start one"))
    assert run(["stat", "x.sock"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: x.sock: no daemon answers; start one\n")


def test_a_record_of_another_release_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = msgspec.to_builtins(stat_record(), str_keys=True)
    del record["feed"]["errors"]
    serve(monkeypatch, record)
    assert run(["stat", "x.sock"]) == 1
    assert "missing required field `errors` - at `$.feed`; is the sender of another release?" in capsys.readouterr().err


HOSTILE = "\x1b]0;owned\x07\x1b[2J"


def test_no_name_reaches_a_terminal_as_a_command_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = renamed(stat_record(store={"path": f"/srv/{HOSTILE}"}), "layers.1", f"x{HOSTILE}")
    for command in (["stat", "x.sock"], ["top", "x.sock", "--count", "1"]):
        serve(monkeypatch, record)
        assert run(command) == 0
        shown = capsys.readouterr().out
        assert not {"\x1b", "\x07"} & set(shown)
        assert r"\x1b]0;owned" in shown


def test_a_table_of_any_command_shows_names_and_does_not_act_on_them(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row("x\x1b[31my")
    table.add_row(Text("x\x1b[31my"))
    console().print(table)
    console().print("x\x1b[31my")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.count(r"x\x1b[31my") == 3


def test_an_error_reaches_no_terminal_as_a_command_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, DaemonError(f"{HOSTILE}: no\nsecond line"))
    assert run(["stat", "x.sock"]) == 1
    assert capsys.readouterr().err == "error: " + r"\x1b]0;owned\x07\x1b[2J: no" + "\nsecond line\n"


def test_options_of_a_url_are_refused_beside_a_socket(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stat", "x.sock", "--token-file", "t"]) == 1
    assert "--token-file and --ca-file are for a URL" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["top", "replan", "swap"])
def test_commands_that_need_the_socket_say_so_of_a_url(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "grpc://127.0.0.1:7443", *(["--rollback"] if command == "swap" else [])]) == 1
    assert "give the path of the daemon's socket, on the daemon's own host" in capsys.readouterr().err


def test_stat_of_a_url_says_what_it_serves_and_how_it_fares(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    with serving(built, token_file=token) as server:
        url = f"grpc://{server.address}"
        with connect_remote(url, token_file=token) as store:
            store["layers.1"].lookup(np.arange(30, dtype=np.int64).reshape(10, 3))
        assert run(["stat", url, "--token-file", str(token)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{url}: {built}, generation ")
        assert "layers.1, order 2: 10 keys, hit rate " in "\n".join(lines)
        assert run(["stat", url, "--token-file", str(token), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["keys"], record["server"]["store"]) == (30, str(built))
        assert record["remote"]["calls"] >= 3
        assert run(["stat", url]) == 1
        assert "wants a token" in capsys.readouterr().err
