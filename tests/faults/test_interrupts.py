"""Ctrl-C, SIGTERM, SIGHUP and alarms at any moment: a command ends soon and quietly, leaves nothing unfinished,
and runs again.

The default run tries a few moments of each; TIERSTORE_SOAK=1 (`make soak`) many, and prints how long an interrupt took.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.marks import slow_but
from support.text_store import TextStore, good, write_trace

import tierstore
from tierstore.offline.verify import verify_store
from tierstore.tools.cli import run

SOAK = os.environ.get("TIERSTORE_SOAK") == "1"
ALARMS = 100 if SOAK else 3
SIGNALS = 60 if SOAK else 2
DOCUMENTS = 1000 if SOAK else 20  # of the text, that are profiled
TAKES_S = 0.2  # what an interrupt may take; printed beside what it took
TAKES_MAX_S = 5.0  # and what fails a test: the machine may be busy
ENDS_WITHIN_S = 120.0
UNFINISHED = (".new", ".tmp", "work-")

# What a user starts, by its name, as the installed script does it. It says when Python itself is up: a signal before
# that is the interpreter's.
SCRIPT = """
import sys
sys.stdout.write("up\\n")
sys.stdout.flush()
from tierstore.tools.cli import main
sys.exit(main())
"""
UP_S = 0.02  # from there to the first line of ours


class Alarm(BaseException):
    """What a caller's own signal handler raises."""


@dataclass(frozen=True)
class Place:
    """What commands work on, and a folder of their own."""

    text: TextStore
    folder: Path

    @property
    def model(self) -> Path:
        return self.text.store.parent / "model"

    def unfinished(self) -> list[str]:
        """Names of files and folders that only running commands have."""
        names = (path.name for root in (self.folder, self.text.store) for path in root.rglob("*"))
        return [name for name in names if name.endswith(UNFINISHED[:2]) or name.startswith(UNFINISHED[2])]


@pytest.fixture
def place(text: TextStore, tmp_path: Path) -> Place:
    np.save(tmp_path / "ids.npy", np.tile(np.concatenate(text.documents), 4) % 1000)
    text.copy(tmp_path / "own.tier")
    write_trace(tmp_path / "own.trace", text.documents[:DOCUMENTS])
    return Place(text, tmp_path)


def build(place: Place) -> list[object]:
    return ["build", place.model, place.folder / "built.tier", "--shard-bytes", "2MiB", "--jobs", "2"]


def verify(place: Place) -> list[object]:
    return ["verify", place.text.store, "--source", place.model]


def trace(place: Place) -> list[object]:
    return ["trace", place.folder / "ids.npy", "-o", place.folder / "out.trace"]


def trace_text(place: Place) -> list[object]:
    library = Path(os.__file__).parent / "asyncio"
    return ["trace", library, "-o", place.folder / "text.trace", "--tokenizer", place.model / "tokenizer.json"]


def profile(place: Place) -> list[object]:
    return ["profile", place.text.store, place.folder / "own.trace", "-o", place.folder / "out.profile"]


def profile_report(place: Place) -> list[object]:
    return [*profile(place), "--report", place.folder / "page.html"]


def plan(place: Place) -> list[object]:
    return ["plan", place.folder / "own.tier", place.text.profile, "--dram", "24MiB"]


def synth(place: Place) -> list[object]:
    return ["synth", place.folder / "made", "--family", "engram", "--size", "16MiB"]


def inspect(place: Place) -> list[object]:
    return ["inspect", place.text.store]


def epochs(place: Place) -> list[object]:
    return ["epochs", place.folder / "own.tier", "--prune", "--keep", "0"]


def doctor(place: Place) -> list[object]:
    return ["doctor", place.folder]


IN_PROCESS = [build, verify, trace, profile, plan]
COMMANDS = [build, verify, trace, trace_text, profile, profile_report, plan, synth, inspect, epochs, doctor]
Command = Callable[[Place], list[object]]


def fresh(place: Place) -> None:
    """Takes away what a command made, so that the next one has all of its work before it."""
    for name in ("built.tier", "made"):
        shutil.rmtree(place.folder / name, ignore_errors=True)


def seconds_after(delay_s: float, act: Callable[[], object]) -> float | None:
    """Has an alarm ring after delay_s while `act` runs; returns how long it took to get out,
    None if `act` had ended."""

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, delay_s)
        act()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        return time.monotonic() - started - delay_s
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


def say(what: str, took: list[float], trials: int) -> None:
    if took:
        within = sum(seconds <= TAKES_S for seconds in took)
        print(
            f"{what}: {trials} alarms, {len(took)} hit; {within} took at most {TAKES_S} s, "
            f"median {np.median(took):.3f} s, longest {max(took):.3f} s"
        )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an alarm may ring in a finalizer
@pytest.mark.parametrize("command", IN_PROCESS, ids=lambda command: command.__name__)
def test_an_alarm_that_raises_ends_a_job_soon_and_the_next_one_works(place: Place, command: Command) -> None:
    arguments = [str(argument) for argument in command(place)]
    started = time.monotonic()
    assert run(arguments) == 0
    whole_s = time.monotonic() - started
    rng = random.Random(command.__name__)
    took = []
    for _ in range(ALARMS):
        fresh(place)
        seconds = seconds_after(rng.uniform(0.001, whole_s), lambda: run(arguments))
        if seconds is not None:
            took.append(seconds)
        assert place.unfinished() == []
    say(command.__name__, took, ALARMS)
    assert run(arguments) == 0
    assert max(took, default=0.0) < TAKES_MAX_S
    assert place.unfinished() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("dram", ["24MiB", "100MiB"], ids=["placed", "resident"])
def test_an_alarm_that_raises_ends_an_opening_soon_and_the_store_opens_after_it(place: Place, dram: str) -> None:
    path = place.folder / "own.tier"
    good("plan", path, place.text.profile, "--dram", "24MiB")
    opened: list[tierstore.Store] = []
    started = time.monotonic()
    tierstore.open(path, dram=dram).close()
    whole_s = time.monotonic() - started
    rng, took = random.Random(dram), []
    for _ in range(ALARMS):
        seconds = seconds_after(rng.uniform(0.0005, whole_s), lambda: opened.append(tierstore.open(path, dram=dram)))
        took += [] if seconds is None else [seconds]
        while opened:
            opened.pop().close()
    say(f"open with {dram}", took, ALARMS)
    assert max(took, default=0.0) < TAKES_MAX_S
    row_ids = np.arange(50, dtype=np.int64)
    with tierstore.open(path, dram=dram) as store, tierstore.open(path, dram="4MiB", placement="none") as other:
        np.testing.assert_array_equal(store["layers.1"].rows(row_ids), other["layers.1"].rows(row_ids))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bin") / "tierstore"
    file.write_text(SCRIPT)
    return file


@dataclass
class Ended:
    """What became of a process that got a signal."""

    status: int
    errors: str
    took_s: float


def started(script: Path, arguments: list[object]) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def ended_by(process: subprocess.Popen[str], number: int, delay_s: float) -> Ended:
    time.sleep(UP_S + delay_s)  # the moment of the signal, not a wait for anything
    process.send_signal(number)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=ENDS_WITHIN_S)
    return Ended(process.returncode, errors, time.monotonic() - sent)


def statuses(number: int) -> tuple[int, ...]:
    """What a command may end with: it was done before the signal came, or it ended by it.

    While the interpreter itself begins or ends, Ctrl-C kills it, which shells show as 130 too.
    """
    return (0, 130, -signal.SIGINT) if number == signal.SIGINT else (0, -number)


def moments(name: str, whole_s: float) -> Iterator[float]:
    rng = random.Random(name)
    for _ in range(SIGNALS):
        yield rng.uniform(0, whole_s)


@pytest.mark.parametrize("command", slow_but([build, profile, plan], COMMANDS), ids=lambda command: command.__name__)
def test_a_signal_at_any_moment_ends_a_command_quietly_and_leaves_nothing_unfinished(
    place: Place, script: Path, command: Command
) -> None:
    began = time.monotonic()
    process = started(script, command(place))
    _, errors = process.communicate(timeout=ENDS_WITHIN_S)
    assert process.returncode == 0, errors
    whole_s = time.monotonic() - began
    rng, took = random.Random(command.__name__), []
    for delay_s in moments(command.__name__, whole_s):
        fresh(place)
        number = rng.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        ended = ended_by(started(script, command(place)), number, delay_s)
        assert ended.status in statuses(number), (number, ended)
        assert "Traceback" not in ended.errors, (number, ended)
        assert place.unfinished() == []
        if ended.status:
            took.append(ended.took_s)
    say(f"{command.__name__} in a process", took, SIGNALS)
    assert max(took, default=0.0) < TAKES_MAX_S
    fresh(place)  # the last signal may have come when all was done
    assert run([str(argument) for argument in command(place)]) == 0
    assert verify_store(place.text.store).faults == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_command_was_started_to_ignore_stays_ignored(
    place: Place, script: Path, number: signal.Signals
) -> None:
    """As `nohup` and `&` in a script have it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        process = started(script, build(place))
    finally:
        signal.signal(number, before)
    ended = ended_by(process, number, 0.3)
    assert ended.status == 0, ended
    assert verify_store(place.folder / "built.tier").faults == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_of_a_daemons_start_ends_it_quietly(
    place: Place, script: Path, number: signal.Signals
) -> None:
    socket = place.folder / "socket"
    arguments = ["serve", place.folder / "own.tier", "--socket", socket, "--dram", "100MiB"]
    for delay_s in moments(number.name, 2.5):
        ended = ended_by(started(script, arguments), number, delay_s)
        assert ended.status in statuses(number), ended
        assert "Traceback" not in ended.errors, ended
        assert not socket.exists()
