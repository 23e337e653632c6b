"""`tierstore serve` as an operator has it: a process with a log, signals, a service manager,
and commands to talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket as sockets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.served import MIB, ServeProcess, request
from support.stores import Model, place_some, random_keys
from support.waiting import WAIT_S, eventually

import tierstore
from tierstore.attached.backing import attach
from tierstore.daemon import remote_lookups
from tierstore.daemon.daemon import Daemon
from tierstore.daemon.remote_lookups import Remote
from tierstore.tools.cli import cli, run

pytestmark = pytest.mark.usefixtures("logging_as_before")
NAME = "layers.1"
DRAM = ("--dram", "900KiB")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture(scope="module")
def shared_daemon(placed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A daemon for tests that only ask."""
    with ServeProcess(placed, tmp_path_factory.mktemp("serve") / "socket", *DRAM, "--replan", "off") as daemon:
        yield daemon


def event_of(line: str) -> dict[str, str]:
    """A line of the log, as logfmt has it."""
    return {
        name: json.loads(value) if value[0] == '"' else value
        for name, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_ready_serves_and_ends_cleanly_on_a_signal(
    placed: Path, socket: Path, model: Model, number: signal.Signals
) -> None:
    keys = random_keys(np.random.default_rng(0), 50)
    with ServeProcess(placed, socket, *DRAM) as daemon:
        ready = event_of(daemon.line("event=ready"))
        assert (ready["socket"], ready["store"], ready["level"]) == (str(socket), str(placed), "info")
        assert ready["dram"].endswith("KiB")
        assert any("warming" in line for line in daemon.lines)
        with tierstore.connect(socket) as store:
            np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
            daemon.line("event=attached")
            assert daemon.end(number) == 0
            ended = event_of(daemon.line("event=ended"))
            assert ended["cleanly"].lower() == "true"
            assert event_of(daemon.line("event=draining"))["signal"] == number.name
            assert not socket.exists()
            np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
        assert "Traceback" not in daemon.text


def test_its_log_can_be_json(placed: Path, socket: Path) -> None:
    with ServeProcess(placed, socket, *DRAM, "--log-format", "json", ready=False) as daemon:
        ready = json.loads(daemon.line('"event": "ready"'))
        assert ready["socket"] == str(socket)
        assert daemon.end() == 0


def test_a_signal_while_it_warms_ends_it_at_once(built: Path, socket: Path) -> None:
    with ServeProcess(built, socket, "--dram", "3GiB" if memory_left() > 8 << 30 else "1GiB", ready=False) as daemon:
        eventually(socket.exists)  # taken before anything is warm
        status = daemon.end(signal.SIGINT)
        assert status in (0, 130), daemon.text
        assert "event=ready" not in daemon.text or status == 0
        assert "Traceback" not in daemon.text
        assert not socket.exists()


def memory_left() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_hangup_takes_the_placement_that_was_made_meanwhile(own_store: Path, socket: Path) -> None:
    with ServeProcess(own_store, socket, *DRAM, "--replan", "off") as daemon, tierstore.connect(socket) as store:
        chosen = place_some(own_store)[NAME]
        hottest = np.full((1, 3), -1, dtype=np.int64)
        hottest[0, chosen.order_index[0]] = chosen.keys[0]
        assert "static" not in store[NAME].explain(hottest)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.line("event=placement_adopted")
        assert "static" in store[NAME].explain(hottest)
        os.rename(own_store / "catalog.mdb", own_store / "gone.mdb")
        daemon.process.send_signal(signal.SIGHUP)
        assert "catalog" in daemon.line("event=reload_failed") or "no store" in daemon.line("event=reload_failed")
        assert store[NAME].lookup(hottest).any()  # and it goes on
        assert daemon.end() == 0


def test_a_service_manager_hears_of_it(built: Path, tmp_path: Path, socket: Path) -> None:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as manager:
        manager.settimeout(WAIT_S)
        manager.bind(str(tmp_path / "notify"))
        variables = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
        with ServeProcess(built, socket, *DRAM, **variables) as daemon:
            heard = [manager.recv(4096).decode().splitlines()]
            while "READY=1" not in heard[-1]:
                heard.append(manager.recv(4096).decode().splitlines())
            assert heard[0] == ["STATUS=warming"]
            assert any(line.startswith(f"STATUS=serving {built}") for line in heard[-1])
            assert manager.recv(4096) == b"WATCHDOG=1"
            daemon.process.send_signal(signal.SIGHUP)
            while (said := manager.recv(4096)) == b"WATCHDOG=1":
                continue
            assert said.startswith(b"RELOADING=1")
            while (said := manager.recv(4096)) == b"WATCHDOG=1":
                continue
            assert said.startswith(b"READY=1")
            assert daemon.end() == 0
            while not (said := manager.recv(4096)).startswith(b"STOPPING=1"):
                assert said == b"WATCHDOG=1"


def test_a_second_daemon_on_a_socket_is_refused_and_a_stale_socket_replaced(built: Path, socket: Path) -> None:
    with ServeProcess(built, socket, *DRAM) as daemon:
        with ServeProcess(built, socket, *DRAM, ready=False) as second:
            assert second.process.wait(WAIT_S) == 1
        assert second.text.startswith("error: ")
        assert str(socket) in second.text
        assert str(daemon.pid) in second.text or "another daemon" in second.text
        assert request(socket, "stat")["daemon"]["pid"] == daemon.pid
        assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    assert socket.exists()
    with ServeProcess(built, socket, *DRAM) as daemon:
        assert request(socket, "stat")["daemon"]["pid"] == daemon.pid


def test_stat_and_top_show_it(shared_daemon: ServeProcess) -> None:
    shown = invoke("stat", shared_daemon.socket)
    assert shown.exit_code == 0, shown.output
    assert NAME in shown.output
    record = json.loads(invoke("stat", shared_daemon.socket, "--json").output)
    assert record["daemon"]["state"] == "serving"
    assert record["daemon"]["pid"] == shared_daemon.pid
    assert set(record["store"]["tables"]) == {"layers.1", "layers.14", "plain"}
    top = invoke("top", shared_daemon.socket, "--count", 1)
    assert top.exit_code == 0, top.output
    assert NAME in top.output


def test_replan_and_swap_are_asked_for_by_command(placed: Path, socket: Path, tmp_path: Path, model: Model) -> None:
    model.build(tmp_path / "newer")
    with ServeProcess(placed, socket, *DRAM, "--replan", "off") as daemon:
        said = invoke("replan", socket)
        assert said.exit_code == 0, said.output
        assert re.match(r"[\d,]+ entries became static and [\d,]+ made way, in \d+ steps and \d+\.\d s\n", said.output)
        said = invoke("swap", socket, tmp_path / "newer")
        assert said.exit_code == 0, said.output
        assert said.output.startswith(f"generation 2 is {tmp_path / 'newer'}: ")
        assert invoke("swap", socket, "--rollback").output.startswith(f"generation 3 is {placed}: ")
        record = json.loads(invoke("swap", socket, tmp_path / "newer", "--json").output)
        assert (record["version"], record["store"]) == (4, str(tmp_path / "newer"))
        assert set(record) == {"version", "store", "warmed", "filled", "seconds"}
        daemon.line("event=version_published")
        for arguments in ([], [tmp_path / "newer", "--rollback"]):
            with pytest.raises(tierstore.ConfigError, match="not both"):
                CliRunner().invoke(cli, ["swap", *map(str, [socket, *arguments])], catch_exceptions=False)
        with pytest.raises(tierstore.StoreNotReadyError, match="no store"):
            CliRunner().invoke(cli, ["swap", str(socket), str(tmp_path / "none")], catch_exceptions=False)


@pytest.mark.parametrize("command", ["serve", "stat", "top", "replan", "swap"])
def test_each_has_help_that_says_what_it_takes(command: str) -> None:
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    for word in {
        "serve": ["STORE", "--socket", "--dram", "--replan", "--listen", "--allow-user", "2GiB"],
        "stat": ["SOCKET", "--json"],
        "top": ["SOCKET", "--count"],
        "replan": ["SOCKET"],
        "swap": ["SOCKET", "STORE", "--rollback"],
    }[command]:
        assert word in shown.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dram", "1KiB"], r"dram: 1024 bytes .*below the \d+ bytes .*--dram"),
        (["--dram", "much"], r"--dram"),
        (["--placement", "new"], r"--placement new: give an epoch's number, or 'none'"),
        (["--placement", "9"], r"epoch 9 does not exist"),
        (["--replan", "0.5"], r"--replan 0.5: give seconds, 1 at least, or 'off'"),
        (["--replan", "nan"], r"--replan nan: give seconds"),
        (["--token-file", "t"], r"--listen HOST:PORT, which is missing"),
        (["--threads", "2"], r"--threads, --readers are of --listen HOST:PORT, which is missing"),
        (["--readers", "2"], r"--listen HOST:PORT, which is missing"),
        (["--listen", "127.0.0.1:0", "--threads", "0"], r"threads: 0 is no number from 1 to 1,024"),
        (["--listen", "127.0.0.1:0", "--readers", "999"], r"readers: 999 is no number from 1 to 256"),
        (["--metrics", "nowhere"], r"nowhere"),
        (["--listen", "nowhere"], r"nowhere"),
        (["--listen", "0.0.0.0:0"], r"lookups need TLS \(--tls-cert and --tls-key\) and a token"),
        (["--listen", "127.0.0.1:0", "--token-file", "/nowhere/token"], r"/nowhere/token"),
        (["--listen", "127.0.0.1:0", "--tls-cert", "/nowhere/cert"], r"TLS needs both"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(
    built: Path, socket: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    status = run(["serve", str(built), "--socket", str(socket), *(DRAM if "--dram" not in options else ()), *options])
    error = capsys.readouterr().err
    assert status == 1
    assert re.search(r"error: .*" + named, error, re.DOTALL), error
    assert "Traceback" not in error
    assert "warming" not in error  # that takes minutes where a store is large
    assert not socket.exists()


def test_threads_and_readers_are_those_of_lookups_by_grpc(
    placed: Path, socket: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc")
    asked = []
    monkeypatch.setattr(remote_lookups, "attach", lambda *_, **options: asked.append(options) or attach(*_, **options))
    daemon = Daemon(placed, socket, 900 << 10, replan_s=None)
    try:
        daemon.start(remote=Remote("127.0.0.1:0", None, None, None, threads=3, readers=2))
        keys = random_keys(np.random.default_rng(3), 400)
        with tierstore.connect(f"grpc://{daemon.remote_address}") as store:
            np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
    finally:
        assert daemon.close()
    assert [(options["threads"], options["readers"]) for options in asked] == [(3, 2)]


@pytest.mark.parametrize("option", ["--metrics", "--listen"])
def test_a_taken_port_is_named_before_the_tiers_are_warmed(
    built: Path, socket: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with sockets.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert run(["serve", str(built), "--socket", str(socket), *DRAM, option, address]) == 1
    error = capsys.readouterr().err
    assert (
        f"error: {option} {address}: it cannot be listened at: Address already in use: "
        "the port is taken by another program; " in error
    )
    assert "ss -ltnp" in error
    assert "warming" not in error
    assert not socket.exists()


def test_one_port_for_two_things_is_named(built: Path, socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sockets.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
    assert run(["serve", str(built), "--socket", str(socket), *DRAM, "--metrics", address, "--listen", address]) == 1
    assert (
        f"error: --listen {address}: it cannot be listened at: Address already in use: the port is taken"
        in capsys.readouterr().err
    )


def test_a_store_that_is_none_is_refused(tmp_path: Path, socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path / "none"), "--socket", str(socket)]) == 1
    assert "error: there is no store at" in capsys.readouterr().err
    assert not socket.exists()


def test_it_takes_little_more_than_its_budget_and_loads_nothing_heavy(built: Path, socket: Path) -> None:
    with ServeProcess(built, socket, "--dram", "256MiB") as daemon, tierstore.connect(socket) as store:
        store[NAME].lookup(random_keys(np.random.default_rng(0), 500))
        memory = request(socket, "stat")["memory"]
        assert memory["used_bytes"] <= memory["budget_bytes"] == 256 * MIB
        assert memory["process_bytes"] <= 256 * MIB + 100 * MIB
        libraries = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert "_cpu" in libraries
        for heavy in ("torch", "triton", "grpc", "cygrpc"):
            assert f"/{heavy}/" not in libraries


def test_a_budget_is_filled_as_it_warms(placed: Path, socket: Path) -> None:
    with ServeProcess(placed, socket, *DRAM) as daemon:
        warming = [line for line in daemon.lines if "warming" in line]
        assert warming
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())[1]) << 10
        assert resident >= request(socket, "stat")["memory"]["static_bytes"]


def test_serving_from_python_without_the_command_line_loads_no_command(tmp_path: Path) -> None:
    code = "import sys, tierstore.daemon.daemon; assert not {'tierstore.tools', 'click'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
