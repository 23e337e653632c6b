"""`bench gpu` where there is no GPU: every check can fail, and every case that a GPU will run has run before,
in the interpreter.

Times are never looked at: the clock here stands in for a GPU's. On a machine with a GPU the command itself is the test.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tierstore.tiers.hbm.device import open_device
from tierstore.tools.bench import pairs
from tierstore.tools.bench.gpu import command as gpu
from tierstore.tools.cli import cli

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="there is a GPU: run tierstore bench gpu",
)
SEED = 7


class HostClock:
    """Runs what a GPU's clock would, once a launch, and says how long it took here."""

    def in_graph(self, launches: Sequence[Callable[[], None]], before: Callable[[], None] | None = None) -> Any:
        def timed() -> float:
            if before is not None:
                before()
            return self.in_turn(launches)()

        return timed

    def in_turn(self, launches: Sequence[Callable[[], None]]) -> Any:
        def timed() -> float:
            started = time.perf_counter()
            for launch in launches:
                launch()
            return (time.perf_counter() - started) / len(launches)

        return timed

    def on_host(self, work: Callable[[], None], before: Callable[[], None] | None = None) -> Any:
        return self.in_graph([work], before)

    def flush(self) -> None:
        pass

    def allocated_bytes(self) -> int:
        return 0


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    """The interpreter: set up before any of the kernels is imported."""
    return open_device("cpu")


@pytest.fixture
def scale() -> Any:
    """Every case, small."""
    from tierstore.tools.bench.gpu.cases import Scale

    return Scale(
        tokens=20, entries=200, records=70, inputs=2, copy_bytes=1 << 16, layers=2, decode_tokens=(1, 3), misses=(1, 4),
        table_bytes=15 << 20, dram="4MiB", hbm="512KiB", placed=150,
    )  # fmt: skip


def run_command(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Runs the command; returns what it printed and its JSON."""
    file = folder / "figures.json"
    result = CliRunner().invoke(cli, ["bench", "gpu", "--folder", str(folder), "--json", str(file)])
    return result, json.loads(file.read_text())["gpu"]


def measured(device: torch.device, scale: Any, folder: Path) -> tuple[dict[str, list[pairs.Figure]], dict[str, Any]]:
    """Figures by case, and the facts that came with them."""
    facts: dict[str, Any] = {}
    groups = gpu.cases_of(device, HostClock(), scale, SEED, folder, 2, facts)
    return {name: figures for group in groups.values() for name, figures in group}, facts


def test_without_a_gpu_the_checks_run_and_the_figures_are_left_open(tmp_path: Path) -> None:
    result, record = run_command(tmp_path)
    assert result.exit_code == 0, result.output
    assert record["figures"] is None
    assert record["device"] == "cpu (interpreted)"
    assert record["failed"] is None
    assert {check["kernel"] for check in record["checks"]} >= {"lookup_entries", "keys_of_tokens", "gather_rows"}
    assert all(check["wrong"] is None for check in record["checks"])
    assert "tierstore bench gpu" in record["facts"]["not measured"]
    assert "tierstore bench overlap" in record["facts"]["next"]
    assert str(record["facts"]["seed"]) in result.output
    assert not [line for line in result.output.splitlines() if "GB/s" in line or " us " in line]


def test_every_run_draws_other_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.tools.bench.gpu import checks as gpu_checks

    monkeypatch.setattr(gpu_checks, "CHECKS", {"find_entries": gpu_checks.check_find})
    seeds = [run_command(tmp_path)[1]["facts"]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def damaged(original: Callable[..., None], which: str, damage: Callable[[Any], None]) -> Callable[..., None]:
    """A launcher that does its work and then damages one of its arguments, by its name."""
    signature = inspect.signature(original)

    def launch(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        damage(signature.bind(*args, **kwargs).arguments[which])

    return launch


def last_byte(out: torch.Tensor) -> None:
    """Leaves the last byte of an output as if nobody had written it, or flips it where that is what it was."""
    out.view(-1)[-1:].view(torch.uint8)[-1] ^= 1


BREAKS = {
    "keys_of_tokens": ("keys", "keys_of_tokens", "out", last_byte),
    "row_ids_of_keys": ("row_ids", "row_ids_of_keys", "out", last_byte),
    "find_entries": ("probe", "find_entries", "places", last_byte),
    "gather_entries": ("gather", "gather_entries", "out", last_byte),
    "lookup_entries": ("lookup", "lookup_entries", "out", last_byte),
    "lookup_entries, its counts": ("lookup", "lookup_entries", "counts", last_byte),
    "lookup_entries, its list": ("lookup", "lookup_entries", "misses", lambda misses: misses.count.add_(1)),
    "collect_misses": ("misses", "collect_misses", "misses", lambda misses: misses.count.add_(1)),
    "post_misses and await_answer": ("misses", "post_misses", "state", lambda state: state.step.add_(1)),
    "post_misses and await_answer, its wait": (
        "await_answer",
        "await_answer",
        "state",
        lambda state: state.ready.add_(1),
    ),
    "scatter_entries": ("scatter", "scatter_entries", "out", last_byte),
    "gather_rows": ("rows", "gather_rows", "out", last_byte),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_check_can_fail(device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.tools.bench.gpu import checks as gpu_checks

    module_name, function, argument, damage = BREAKS[name]
    module = importlib.import_module(f"tierstore.kernels.gpu.{module_name}")
    kernel = name.partition(",")[0]
    assert gpu_checks.failure_of(kernel, device, SEED, 2) is None
    monkeypatch.setattr(module, function, damaged(getattr(module, function), argument, damage))
    wrong = gpu_checks.failure_of(kernel, device, SEED, 2)
    assert wrong is not None
    assert " wrong, the first at " in wrong or "were given" in wrong or "behind" in wrong


def test_there_is_a_way_to_fail_for_every_check() -> None:
    from tierstore.tools.bench.gpu import checks as gpu_checks

    assert {name.partition(",")[0] for name in BREAKS} == set(gpu_checks.CHECKS)


def test_a_wrong_kernel_is_named_and_leaves_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.kernels.gpu import scatter
    from tierstore.tools.bench.gpu import checks as gpu_checks

    monkeypatch.setattr(scatter, "scatter_entries", damaged(scatter.scatter_entries, "out", last_byte))
    monkeypatch.setattr(gpu_checks, "SIZES_INTERPRETED", (2,))
    result, record = run_command(tmp_path)
    assert result.exit_code == 1
    assert {check["kernel"] for check in record["checks"] if check["wrong"]} == {"scatter_entries"}
    assert "scatter_entries is wrong with 2 tokens" in record["failed"]
    assert "scatter_entries" in result.output.splitlines()[-1]
    assert record["figures"] is None


def test_a_kernel_that_raises_has_failed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.tools.bench.gpu import checks as gpu_checks

    def no_such_launch(*_: Any) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(gpu_checks.probe, "find_entries", no_such_launch)
    assert gpu_checks.failure_of("find_entries", device, SEED, 2) == "RuntimeError: out of resources"


def test_all_cases_run_and_say_what_bound_they_have(device: torch.device, scale: Any, tmp_path: Path) -> None:
    figures, facts = measured(device, scale, tmp_path)
    assert len(figures) == 10
    every = [figure for group in figures.values() for figure in group]
    assert all(np.isfinite(figure.values).all() for figure in every)
    by_kind = {name: [figure.bound for figure in group if figure.bound is not None] for name, group in figures.items()}
    assert by_kind["raw bytes from HBM"] == [0.7]
    assert by_kind["values from HBM"] == [0.6]
    assert by_kind["raw bytes from pinned DRAM"] == [0.8]
    assert by_kind["decoding in a replayed graph"] == [10.0, 10.0, 0]
    assert len(figures["misses by mailbox"]) == 4
    asked = next(figure for figure in every if "requests to the host" in figure.case)
    assert asked.values == [0]
    assert asked.reached
    assert facts["of 4 misses, in the recency cache"] == 1.0
    assert not list(tmp_path.iterdir())


def test_the_bytes_of_hbm_are_held_against_what_stats_says(
    device: torch.device, scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.tools.bench.gpu.store_cases import StoreCases

    taken = iter([1000, 1000 + (300 << 10)])
    monkeypatch.setattr(HostClock, "allocated_bytes", lambda _: next(taken))
    cases = StoreCases(device, HostClock(), scale, np.random.default_rng(SEED), 1, {}).figures(tmp_path)
    name, (taken_bytes, difference) = next(cases)
    cases.close()
    assert name == "bytes of HBM"
    assert taken_bytes.values == [300 << 10]
    assert taken_bytes.bound == 512 << 10
    assert difference.reached is (difference.values == [0])


def test_a_wrong_row_in_a_case_is_noticed_before_it_is_timed(
    device: torch.device, scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.kernels.gpu import lookup
    from tierstore.tools.bench.gpu.tables import CheckError

    monkeypatch.setattr(lookup, "lookup_entries", damaged(lookup.lookup_entries, "out", last_byte))
    with pytest.raises(CheckError, match="lookup_entries"):
        measured(device, scale, tmp_path)


def test_a_late_run_says_which_cases_it_left_out(
    device: torch.device, scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.tools.bench.gpu import cases as gpu_cases
    from tierstore.tools.bench.gpu import clock as gpu_clock

    def say(_: float, text: str) -> None:
        if text == "measured raw bytes from HBM":
            monkeypatch.setattr(gpu, "LIMIT_S", -1.0)

    monkeypatch.setattr(gpu_cases, "Scale", lambda: scale)
    monkeypatch.setattr(gpu_clock, "DeviceClock", lambda _: HostClock())
    monkeypatch.setattr(gpu, "_say", say)
    result = gpu.GpuResult("GPU")
    gpu._measure(result, device, SEED, tmp_path, pairs.Options(pairs=1), time.monotonic())
    assert set(result.skipped) == {"what comes after raw bytes from HBM", "a store"}
    assert result.failed is None
    assert [figure.bound for figure in result.figures if figure.bound is not None] == [0.7]


def test_what_was_measured_stands_when_a_later_case_fails(
    device: torch.device, scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.tools.bench.gpu import cases as gpu_cases
    from tierstore.tools.bench.gpu import clock as gpu_clock

    def fails(*_: Any) -> list[pairs.Figure]:
        raise RuntimeError("no such graph")

    monkeypatch.setattr(gpu_cases, "Scale", lambda: scale)
    monkeypatch.setattr(gpu_clock, "DeviceClock", lambda _: HostClock())
    monkeypatch.setattr(gpu_cases.KernelCases, "_bus_copies", fails)
    result = gpu.GpuResult("GPU")
    gpu._measure(result, device, SEED, tmp_path, pairs.Options(pairs=1), time.monotonic())
    assert result.failed == "RuntimeError: no such graph"
    cases = [figure.case for figure in result.figures]
    assert any("all in" in case and "of HBM" in case for case in cases)
    assert any("decoding" in case for case in cases)
    assert not any("pinned DRAM" in case for case in cases)
    assert len(result.to_dict()["figures"]) == len(cases)


class FakeCuda:
    """As much of torch.cuda as the clock uses: graphs replay what ran while they were captured,
    events are of its own time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms, self.log, self.captured = 0.0, list[str](), list[Callable[[], None]]()
        self.capturing = False
        signature = inspect.signature(torch.cuda.graph)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(wait_stream=lambda _: None))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))

        @contextlib.contextmanager
        def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
            signature.bind(*args, **kwargs)
            self.capturing = True
            yield
            self.capturing = False

        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: self.Event(self))

    class Event:
        def __init__(self, cuda: FakeCuda) -> None:
            self.cuda, self.at_ms = cuda, 0.0

        def record(self) -> None:
            self.at_ms = self.cuda.now_ms

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return float(end.at_ms - self.at_ms)

    def launch(self, name: str, cost_ms: float) -> Callable[[], None]:
        def run() -> None:
            if self.capturing:
                self.captured.append(run)
            else:
                self.log.append(name)
                self.now_ms += cost_ms

        return run

    def replay(self) -> None:
        for launch in self.captured:
            launch()


def test_the_clock_of_a_gpu_times_replays_and_not_what_comes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.tools.bench.gpu.clock import REPLAYS, DeviceClock

    cuda, clock = FakeCuda(monkeypatch), DeviceClock(torch.device("cpu"))
    timed = clock.in_graph([cuda.launch("a", 2.0), cuda.launch("b", 4.0)], cuda.launch("before", 100.0))
    assert cuda.log == ["before", "a", "b"]  # compiled, then captured
    assert timed() == pytest.approx(3e-3)
    assert cuda.log == ["before", "a", "b"] * (2 + REPLAYS)
    assert clock.in_turn([cuda.launch("c", 1.0), cuda.launch("d", 2.0)])() == pytest.approx(1.5e-3)
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert clock.on_host(cuda.launch("e", 1.0), cuda.launch("before", 1.0))() == 1
    clock.flush()
