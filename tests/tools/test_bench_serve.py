"""`tierstore bench serve` at toy size: its record says what was measured. Times are never asserted,
what they are of is."""

from __future__ import annotations

import json
import subprocess
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.waiting import WAIT_S, eventually

import tierstore
from tierstore.errors import BudgetError, ConfigError, DaemonError
from tierstore.formats.catalog import read_catalog
from tierstore.tools.bench import stores
from tierstore.tools.bench.pairs import Options, Result
from tierstore.tools.bench.serve import changes as serve_changes
from tierstore.tools.bench.serve import clients as clients_module
from tierstore.tools.bench.serve import command as serve
from tierstore.tools.bench.serve import remote
from tierstore.tools.bench.serve.clients import Clients
from tierstore.tools.bench.serve.launcher import Served, proportional_bytes
from tierstore.tools.bench.stores import MadeStore, find_store, fresh_keys, make_store
from tierstore.tools.cli import cli

ROWS = 60_000  # 15 MiB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def made(folder: Path) -> MadeStore:
    return make_store(folder, ROWS)


@pytest.fixture(scope="module")
def keys_file(folder: Path) -> Path:
    np.save(folder / "keys.npy", fresh_keys(np.random.default_rng(2), 100))
    return folder / "keys.npy"


@pytest.fixture
def few_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer lookups and clients than a figure needs: here only what is recorded counts."""
    for module, sizes in {
        serve: {"ONE_TOKEN_LOOKUPS": 50, "CLIENTS": 3, "MANY_CLIENTS": 4, "STRETCH_S": 0.05, "MANY_STRETCH_S": 0.05},
        remote: {"ROUNDS": 2, "ONES": 10, "BATCHES": 2},
        serve_changes: {"QUIET_S": 0.1, "SHIFT_TOKENS": 5000},
    }.items():  # fmt: skip
        for name, value in sizes.items():
            assert getattr(module, name) > value
            monkeypatch.setattr(module, name, value)


def case(record: dict[str, Any], words: str) -> dict[str, Any]:
    """The one comparison or figure whose case has `words` in it."""
    (found,) = [part for part in record["comparisons"] + record["figures"] if words in part["case"]]
    return found


@pytest.mark.usefixtures("few_of_everything")
def test_serve_has_every_case_with_its_target(folder: Path, made: MadeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FILL_ROUNDS_MAX", round(WAIT_S / serve.FILL_PAUSE_S))
    file = folder / "figures.json"
    options = ["--folder", folder, "--size", ROWS * stores.ROW_BYTES, "--tokens", 40, "--pairs", 2, "--json", file]
    outcome = CliRunner().invoke(cli, ["bench", "serve", *map(str, options)])
    words = "".join(traceback.format_exception(outcome.exception)) if outcome.exception else ""
    assert outcome.exit_code == 0, f"{outcome.output}\n{words}"
    record = json.loads(file.read_text())["serve"]
    for words, rows in {"one token, p50": 24, "40 tokens": 8 * 40 * 24}.items():
        compared = next(part for part in record["comparisons"] if part["case"].startswith(words))
        assert compared["work"] == rows
        assert (compared["subject"], compared["targets"]) == ("attached", {"in process": 0.9})
    for words, rows in {"one token, all processes": 24, "40 tokens, all processes": 40 * 24}.items():
        compared = case(record, words)
        assert compared["work"] == rows
        assert compared["subject"] == "3 attached processes"
        assert list(compared["targets"].values()) == [0.9]
    assert all(len(s) == 2 and min(s) > 0 for part in record["comparisons"] for s in part["seconds"].values())
    for words, bound, at_least in (
        ("part of one budget", 100.0, False),
        ("gRPC over the loopback: one token, p50", 1000.0, False),
        ("gRPC over the loopback: batches of", 600.0, True),
        ("gRPC over the loopback: one token, time to", 1.5, False),
        ("gRPC over the loopback: batches, rate to", 0.8, True),
        ("after one replan, part", 90.0, True),
        ("after two replans, part", 90.0, True),
    ):
        figure = case(record, words)
        assert (figure["bound"], figure["at_least"]) == (bound, at_least)
        assert min(figure["values"]) > 0
    slowest = case(record, "the slowest, part of their mean")
    assert (slowest["bound"], slowest["at_least"]) == (0.5, True)
    assert all(0 <= share <= 1 for share in slowest["values"])  # 0: a busy machine gave one client no turn
    for words in ("first answer", "warming", "a step of a replan", "until all clients moved", "attached again"):
        assert min(case(record, words)["values"]) > 0
    for change in ("a replan", "a swap", "a rollback", "the daemon's absence and return"):
        slowest, p99 = case(record, f"during {change}, slowest"), case(record, f"during {change}, p99")
        assert all(most >= usual > 0 for most, usual in zip(slowest["values"], p99["values"], strict=True))
    assert len(case(record, "until all clients moved")["values"]) == 2
    assert record["facts"]["keys that missed in runs of all processes together"] == 0
    assert read_catalog(made.path).placements == {}  # the next run begins without
    assert not list(folder.glob("tierstore-bench-*"))


@pytest.mark.usefixtures("few_of_everything")
def test_a_client_that_is_left_behind_misses_the_target(
    made: MadeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lookups = [100, 100, 100, 30]

    class Uneven:
        __init__ = __exit__ = lambda *_, **__: None
        __enter__ = lambda self: self  # noqa: E731
        stretch = lambda *_: [{"lookups": count} for count in lookups]  # noqa: E731

    monkeypatch.setattr(serve, "Clients", Uneven)
    keys = fresh_keys(np.random.default_rng(4), 5)
    setting = serve.Setting(made, made, keys, 1 << 20, tmp_path, Options(pairs=2))
    served = SimpleNamespace(socket=tmp_path / "s.sock")
    for least, reached in ((30, False), (90, True)):
        lookups[3] = least
        result = Result("t")
        serve._measure_many(setting, served, keys, result)  # type: ignore[arg-type]
        slowest, together = result.figures
        assert slowest.reached is reached
        assert slowest.median == pytest.approx(least / ((300 + least) / 4))
        assert together.median == pytest.approx((300 + least) / serve.MANY_STRETCH_S)
    lookups[:] = [0, 0, 0, 0]
    result = Result("t")
    serve._measure_many(setting, served, keys, result)  # type: ignore[arg-type]
    assert [figure.median for figure in result.figures] == [0, 0]


def all_had_turns(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What clients say of a stretch; nothing if one of them had no turn in it, as on a busy machine."""
    return answers if all(answer["lookups"] for answer in answers) else []


def test_clients_check_every_row_before_they_measure(made: MadeStore, keys_file: Path, folder: Path) -> None:
    with Clients(made.path, keys_file, 2, dram=4 << 20) as clients:
        assert clients.misses_when_warm == 0
        answers = eventually(lambda: all_had_turns(clients.stretch(3, 0.05)), "a lookup of each in a stretch")
        assert [(answer["late"], answer["misses"]) for answer in answers] == [(False, 0)] * 2
        assert all(0 < answer["p50_s"] <= answer["p99_s"] <= answer["max_s"] < 60 for answer in answers)
        with clients.watch() as watched:
            pass
        assert all(answer["lookups"] > 0 for answer in watched)
        assert min(proportional_bytes(clients.pids).values()) >= 0
    wrong = folder / "wrong"
    other = make_store(wrong, ROWS, seed=7)
    (other.path.parent / stores.BLOCK_FILE).write_bytes((made.path.parent / stores.BLOCK_FILE).read_bytes())
    with pytest.raises(DaemonError, match=r"client process \d+ ended"):
        Clients(other.path, keys_file, 1, dram=4 << 20)


def test_a_stretch_that_a_client_was_late_for_is_refused(
    made: MadeStore, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Clients(made.path, keys_file, 1, dram=4 << 20) as clients:
        monkeypatch.setattr(clients_module, "LEAD_S", -0.05)
        monkeypatch.setattr(clients_module, "STRETCHES_MAX", 2)
        with pytest.raises(DaemonError, match=r"was not ready .* 2 times"):
            clients.stretch(1, 0.06)


def test_a_stretch_that_a_client_was_late_for_is_measured_again_with_more_lead(
    made: MadeStore, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    say = Clients._say

    def say_late_once(clients: Clients, message: dict[str, Any]) -> None:
        starts.append(message["start"])
        say(clients, message | {"start": 0.0} if len(starts) == 1 else message)

    with Clients(made.path, keys_file, 1, dram=4 << 20) as clients:
        monkeypatch.setattr(clients, "_say", partial(say_late_once, clients))
        (answer,) = clients.stretch(1, 0.05)
    assert not answer["late"]
    assert len(starts) >= 2
    assert starts[1] - starts[0] > clients_module.LEAD_S


def test_a_daemon_that_cannot_serve_shows_its_last_words(made: MadeStore, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="staging, counts, indexes"):
        Served(made.path, tmp_path / "s.sock", 4096)


def test_memory_that_two_map_is_counted_once(made: MadeStore, keys_file: Path, tmp_path: Path) -> None:
    with Served(made.path, tmp_path / "s.sock", 8 << 20) as served:
        shared = []
        for count in (1, 3):
            with Clients(made.path, keys_file, count, socket=str(served.socket)) as clients:
                shared.append(proportional_bytes([served.pid, *clients.pids])["Pss_Shmem"])
    assert shared[0] <= 9 << 20
    assert shared[1] < 2 * shared[0]


def test_memory_of_a_process_that_ended_is_refused_by_name() -> None:
    ended = subprocess.Popen(["true"])
    assert ended.wait(WAIT_S) == 0
    with pytest.raises(DaemonError, match=f"process {ended.pid} ended while it was measured"):
        proportional_bytes([ended.pid])


def test_a_working_set_that_does_not_fit_is_refused(
    made: MadeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "FILL_PAUSE_S", 0.001)
    with pytest.raises((BudgetError, ConfigError), match=r"give more|ask for more"):
        serve.run(folder, Options(size_bytes=ROWS * stores.ROW_BYTES, pairs=1, budgets=(1 << 20,)))
    assert read_catalog(made.path).placements == {}


def test_versions_of_one_table_differ_in_their_rows_alone(made: MadeStore, folder: Path) -> None:
    second = make_store(folder / "other", ROWS, seed=1)
    assert find_store(made.path).spec == second.spec == made.spec
    assert read_catalog(second.path).identity != read_catalog(made.path).identity
    keys = fresh_keys(np.random.default_rng(1), 20)
    with tierstore.open(second.path, dram="4MiB") as store:
        rows = store[stores.TABLE].lookup(keys)
    second.check(keys, rows)
    with pytest.raises(ConfigError, match="other rows"):
        made.check(keys, rows)


def test_traffic_shifts_to_other_keys_and_is_counted_exactly(made: MadeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_changes, "SHIFT_TOKENS", 1000)
    traffic = serve_changes._Traffic(50)
    with tierstore.open(made.path, dram="4MiB") as store:
        first_batch = serve_changes.BATCH_TOKENS / 1000  # of which all miss, and of the rest next to none
        assert traffic.hit_rate(store) == pytest.approx(1 - first_batch, abs=0.03)
        before = traffic.counted()
        assert before.counts.sum() == 3000
        traffic.hit_rate(store)
        assert traffic.counted().counts.sum() == 6000
        traffic.shift()
        assert traffic.hit_rate(store) > 0.8  # nearly all were held before
        after = traffic.counted()
    hottest = [set(counted.keys[np.argsort(-counted.counts.astype(np.int64))[:15]]) for counted in (before, after)]
    assert after.counts.sum() == 3000
    assert set(before.keys) == set(after.keys)
    assert hottest[0] != hottest[1]
