"""Every benchmark at toy size: its record says what it measured. Times are never asserted;
what they were taken of is."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.shapes import HEADS, ROW_BYTES

import tierstore
from tierstore.errors import ConfigError
from tierstore.file_systems import file_system_of
from tierstore.formats.trace import TokenTraceWriter
from tierstore.offline.verify import verify_store
from tierstore.tiers.huge_pages import share_collapsed
from tierstore.tools.bench import (
    BENCHMARKS,
    codecs,
    cold,
    decode,
    decoded,
    module_of,
    page_cache,
    placed,
    real_text,
    stores,
    trace,
    warm,
)
from tierstore.tools.bench.bare import fio, page_cached
from tierstore.tools.bench.bare import loops as bare
from tierstore.tools.bench.bare.loops import BareLoop
from tierstore.tools.bench.huge_pages_off import huge_pages_off
from tierstore.tools.bench.pairs import Comparison, Figure, Options, Result, interleave
from tierstore.tools.bench.peers import command as peers
from tierstore.tools.bench.peers.stores import MissingPeerError, PeerRows, opened
from tierstore.tools.bench.stores import MadeStore, fresh_keys, make_store, rows_buffer
from tierstore.tools.bench.working_set import WorkingSet
from tierstore.tools.cli import cli

ROWS = 60_000  # 15 MiB
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, bare.COMPILERS)), reason="no C compiler is there to make the bare loop"
)


@pytest.fixture(autouse=True)
def few_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer lookups than a figure needs: here only what is recorded counts."""
    for module, sizes in {
        cold: {"ONE_TOKEN_LOOKUPS": 8},
        page_cached: {"ROWS": 30_000, "TOKENS": 100},
        decode: {"WARM_LOOKUPS": 100, "COLD_LOOKUPS": 20, "WAIT_TOKENS": 20, "LOOKUPS_TOGETHER": 640},
        decoded: {"TOKENS": 50},
        trace: {"PREFILL_TOKENS": 500, "BARE_ENTRIES": 3000},
        warm: {"ONE_TOKEN_LOOKUPS": 100},
    }.items():
        for name, value in sizes.items():
            assert getattr(module, name) > value
            monkeypatch.setattr(module, name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def made(folder: Path) -> MadeStore:
    return make_store(folder, ROWS)


@pytest.fixture
def keys() -> np.ndarray:
    return fresh_keys(np.random.default_rng(3), 50)


def bench(folder: Path, *arguments: object) -> dict[str, Any]:
    """Runs `tierstore bench` and returns its JSON."""
    file = folder / "figures.json"
    shared = ["--folder", folder, "--pairs", 2, "--json", file]
    result = CliRunner().invoke(cli, ["bench", *map(str, [*arguments, *shared])])
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


def case(record: dict[str, Any], words: str) -> dict[str, Any]:
    """The one comparison or figure whose case has `words` in it."""
    (found,) = [part for part in record["comparisons"] + record["figures"] if words in part["case"]]
    return found


def check_rounds(record: dict[str, Any], pairs: int = 2) -> None:
    """Every side has a figure for every round, every ratio is the median of its rounds."""
    for comparison in record["comparisons"]:
        seconds = comparison["seconds"]
        assert {len(values) for values in seconds.values()} == {pairs}
        assert all(value > 0 for values in seconds.values() for value in values)
        own = np.array(seconds[comparison["subject"]])
        for side, ratio in comparison["ratios"].items():
            expected = np.array(seconds[side]) / own
            assert [ratio["lowest"], ratio["median"], ratio["highest"]] == pytest.approx(
                [expected.min(), np.median(expected), expected.max()]
            )
        assert set(comparison["targets"]) <= set(comparison["ratios"])


def test_every_side_runs_once_a_round_and_none_is_always_first() -> None:
    order: list[str] = []
    numbers = itertools.count(1)

    def side(name: str) -> float:
        order.append(name)
        return float(next(numbers))

    results = interleave({name: lambda name=name: side(name) for name in "abc"}, 3, warm_up_rounds=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * 4
    assert {names[0] for names in rounds[1:]} == {"a", "b", "c"}
    assert {len(values) for values in results.values()} == {3}
    assert min(min(values) for values in results.values()) > 3  # the warm-up round is not counted


def test_a_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    comparison = Comparison("c", "row", 10, {"tierstore": [1.0, 10.0, 2.0], "bare": [2.0, 5.0, 2.0]}, {"bare": 0.9})
    assert comparison.ratios("bare") == [2.0, 0.5, 1.0]
    assert comparison.ratio("bare") == 1.0
    assert comparison.ns("tierstore") == pytest.approx(2e8)
    assert comparison.rows()[1][-1] == "0.9 reached"
    assert Comparison("c", "row", 1, comparison.seconds, {"bare": 1.1}).rows()[1][-1] == "1.1 MISSED"
    assert Figure("f", "us", [1.0, 9.0, 8.0], bound=8.0).reached is True
    assert Figure("f", "us", [1.0, 9.0, 8.5], bound=8.0).reached is False
    assert Figure("f", "us", [1.0]).reached is None


@needs_compiler
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("depth", [1, 7, 128])
def test_the_bare_uring_loop_reads_the_pages_of_its_list(
    made: MadeStore, keys: np.ndarray, depth: int, direct: bool
) -> None:
    ranges = made.ranges(keys)
    with BareLoop.uring(made.files, depth, direct=direct) as loop:
        loop.load(ranges)
        assert len(loop.run()) == 1
        assert loop.output().tobytes() == expected_pages(made, ranges)
        loop.load(ranges[::-1][:5])
        assert len(loop.run(2)) == 3
        assert loop.output().tobytes() == expected_pages(made, ranges[::-1][:5])


@needs_compiler
@pytest.mark.parametrize("window", [1, 64])
def test_the_bare_willneed_loop_reads_the_pages_of_its_list(made: MadeStore, keys: np.ndarray, window: int) -> None:
    ranges = np.concatenate([made.ranges(keys)] * 2)  # more than one call of process_madvise
    assert len(ranges) > 1024
    with BareLoop.willneed(made.files, window) as loop:
        loop.load(ranges)
        loop.run()
        assert loop.output().tobytes() == expected_pages(made, ranges)


def expected_pages(made: MadeStore, ranges: np.ndarray) -> bytes:
    contents = [file.read_bytes() for file in made.files]
    return b"".join(contents[file][start : start + length] for file, start, length in ranges.tolist())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("entry_bytes", [8, 96, 2112])
def test_the_bare_table_gives_the_entries_of_its_keys(entry_bytes: int, threads: int) -> None:
    rng = np.random.default_rng(entry_bytes)
    pairs = np.stack([rng.integers(0, 3, 3000), rng.integers(0, 2**63 - 1, 3000)], axis=1)
    pairs[:3] = [[0, 0], [1, 0], [2, 0]]  # key 0 is a key, in every order
    asked = pairs[rng.integers(0, len(pairs), 1000)]
    with BareLoop.entries(entry_bytes, pairs, threads) as loop:
        loop.load(asked)
        loop.run()
        words = loop.output().view("<i8").reshape(len(asked), -1)
    expected = asked[:, 1:].view(np.uint64) + np.arange(entry_bytes // 8, dtype=np.uint64)
    assert np.array_equal(words.view(np.uint64), expected)


@needs_compiler
def test_the_bare_loop_names_what_it_cannot_do(made: MadeStore) -> None:
    with pytest.raises(ConfigError, match="bare loop: error"):
        BareLoop.uring([made.path / "missing"])
    with BareLoop.uring(made.files) as loop:
        loop.load(np.array([[0, made.files[0].stat().st_size, 4096]]))
        with pytest.raises(ConfigError, match="a read of the list"):
            loop.run()
    with BareLoop.entries(64, np.array([[0, 1]])) as loop:
        loop.load(np.array([[1, 1]]))
        with pytest.raises(ConfigError, match="a key of the list"):
            loop.run()


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt-get install gcc"):
        bare.compiled()


def test_a_made_table_verifies_is_used_again_and_gives_the_blocks_rows(made: MadeStore, keys: np.ndarray) -> None:
    stamps = [file.stat().st_mtime_ns for file in made.files]
    again = make_store(made.path.parents[1], ROWS)
    assert [file.stat().st_mtime_ns for file in again.files] == stamps
    assert verify_store(made.path).faults == []
    with tierstore.open(made.path, dram="4MiB") as store:
        rows = store[stores.TABLE].lookup(keys)
    made.check(keys, rows)
    rows[7, 3, 100] ^= 1
    with pytest.raises(ConfigError, match="other rows"):
        made.check(keys, rows)


def test_dropped_pages_are_counted_as_gone_and_read_ones_as_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        stream.write(b"x" * (1 << 20))
        stream.flush()
        os.fsync(stream.fileno())
    page_cache.bring_in([file])
    assert page_cache.residency([file]) == 1.0
    page_cache.drop([file])
    assert page_cache.residency([file]) == (1.0 if file_system_of(tmp_path) in ("tmpfs", "ramfs") else 0.0)


def test_a_working_set_never_misses(made: MadeStore) -> None:
    with WorkingSet(made, 2 << 20) as held:
        assert len(held.keys) == (2 << 20) // (24 * 264)
        before = held.misses()
        for _ in range(5):
            places = held.draw(64)
            rows = held.table.lookup(held.keys[places])
            made.check(held.keys[places], rows)
        assert held.misses() == before
        resident = held.resident_rows()
        assert np.array_equal(resident[held.resident_ids(places)], rows)


def test_a_budget_that_holds_the_table_is_no_working_set(made: MadeStore) -> None:
    with pytest.raises(ConfigError, match="holds the whole table"):
        WorkingSet(made, 1 << 20, dram_bytes=1 << 30)


@pytest.mark.parametrize("kind", peers.PEERS, ids=lambda kind: kind.name)
def test_a_peer_gives_the_rows_it_was_filled_with(kind: type, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 256, (HEADS * ROW_BYTES, 264), dtype=np.uint8)
    data = PeerRows(rows, 40)
    places = rng.integers(0, 40, 9)
    try:
        with opened(kind, tmp_path, data) as peer:
            assert peer.fetches
            for fetch in peer.fetches.values():
                out = rows_buffer(9)
                fetch(places, out)
                expected = np.array([[rows[h * 40 + n] for h in range(24)] for n in places])
                assert np.array_equal(out, expected)
    except MissingPeerError as error:
        pytest.skip(f"{kind.name}: {error}")


def test_a_file_system_without_o_direct_is_simulated_for_as_long_as_asked(made: MadeStore) -> None:
    with page_cached.without_o_direct():
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(made.files[0], os.O_RDONLY | os.O_DIRECT)
        os.close(os.open(made.files[0], os.O_RDONLY))
    os.close(os.open(made.files[0], os.O_RDONLY | os.O_DIRECT))


@needs_compiler
def test_cold_reads_everything_and_says_how_cold_it_was(folder: Path) -> None:
    record = bench(folder, "cold", "--size", "15MiB", "--tokens", 40)["cold"]
    check_rounds(record)
    for io in ("uring", "mmap", "pread"):
        assert case(record, f"{io}, 40 tokens")["work"] == 40 * 24
        assert record["facts"][f"{io}: keys that hit DRAM in all runs"] == 0
        assert 0 <= record["facts"][f"{io}: share of the shards in the page cache before runs, at most"] <= 1
    assert ("fio" in case(record, "uring, 40 tokens")["seconds"]) == fio.installed() != ("fio" in record["skipped"])
    buffered = case(record, "page-cached pages through buffered uring: CPU of one, lookup")
    assert min(buffered["values"]) > 0
    assert record["facts"]["page-cached pages: share in the page cache"] == 1.0
    assert "np.memmap, MADV_RANDOM" in case(record, "one token")["seconds"]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_warm_misses_nothing_and_has_equal_threads(folder: Path, threads: int) -> None:
    record = bench(folder, "warm", "--size", "15MiB", "--tokens", 40, "--threads", threads)["warm"]
    check_rounds(record)
    assert record["facts"]["keys that missed in measured runs"] == 0
    sides = {"tierstore", "bare loop", "NumPy take(out=, mode='clip')", "NumPy take of whole entries"}
    assert sides <= set(case(record, "40 tokens")["seconds"])
    assert case(record, "process growth")["unit"] == "MiB"


@needs_compiler
def test_huge_pages_are_off_in_a_run_that_says_so_and_on_again_after_it(folder: Path) -> None:
    record = bench(folder, "warm", "--size", "15MiB", "--tokens", 40, "--no-huge-pages")["warm"]
    assert record["facts"]["huge pages"] == "switched off"
    with huge_pages_off():
        assert share_collapsed(2 << 20) == 0
        assert "THP_enabled:\t0" in Path("/proc/self/status").read_text()
    assert "THP_enabled:\t1" in Path("/proc/self/status").read_text()


@needs_compiler
def test_decode_has_latencies_a_late_wait_and_many_threads(folder: Path) -> None:
    record = bench(folder, "decode", "--size", "15MiB")["decode"]
    check_rounds(record)
    for words in ("cold, one token (3 keys, 24 rows), p50", "warm, one token (3 keys, 24 rows), p99"):
        assert min(case(record, words)["values"]) > 0
    assert case(record, "wait after the reads")["bound"] == 5.0
    assert set(case(record, "all threads together")["seconds"]) == {"64 threads", "2 threads"}
    sides = {"tierstore", "F.embedding of fp8, dequantised", "F.embedding of bf16"}
    assert set(case(record, "50 tokens x 24 rows of 256 values")["seconds"]) == sides
    assert record["facts"]["keys that missed in decoded runs"] == 0


def test_codecs_are_measured_beside_the_libraries_that_are_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="requirements.txt installs it")
    for module in ("torchao", "torchao.prototype.mx_formats.nvfp4_tensor"):  # a test before may have loaded it
        monkeypatch.setitem(sys.modules, module, None)  # not installed
    cases = {name: codecs.CASES[name] for name in ("Q4_K", "Q8_0", "NVFP4 that multiplies")}
    monkeypatch.setattr(codecs, "CASES", cases)
    record = bench(folder, "codecs", "--tokens", "3")["codecs"]
    check_rounds(record)
    assert set(case(record, "Q4_K (gguf_q4_k), 3 tokens")["seconds"]) == {"tierstore", "gguf"}
    assert "its library cannot be loaded" in record["skipped"]["NVFP4 that multiplies"]


@needs_compiler
def test_trace_counts_hits_by_order_over_the_text_it_was_given(folder: Path) -> None:
    ids = np.tile(np.random.default_rng(1).integers(0, 500, 1000, dtype=np.int32), 8)
    np.save(folder / "ids.npy", ids)
    options = ["--size", "15MiB", "--dram", "1MiB", "--dram", "12MiB", "--trace-tokens", len(ids), "--tokens", 100]
    record = bench(folder, "trace", "--trace", folder / "ids.npy", *options)["trace"]
    check_rounds(record)
    small, large = record["grids"]
    assert [line[0] for line in large["lines"]] == [1000 * i for i in range(1, 9)]
    assert all(rate > 0.7 for rate in large["lines"][-1][1:4])  # it came round before, and fits
    assert large["lines"][0][3] < 0.1  # nothing had been seen
    assert small["lines"][-1][1] < large["lines"][-1][1]
    lowest, highest = record["facts"]["prefill: share of keys that hit, lowest and highest"]
    assert 0.2 < lowest <= highest < 0.8


def test_text_comes_from_this_machine_where_no_trace_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(real_text, "SHARED_DATA", tmp_path)
    monkeypatch.setattr(real_text, "CORPUS_FILES_MAX", 20)
    text = real_text.load(None, 1000)
    spec = stores.v41_hash(1000, text.token_map)
    keys = text.keys(spec, stores.LAYER, 1000)
    assert keys.shape == (1000, 3)
    assert np.array_equal(keys[:200], spec.keys(text.documents[0][None, :200], stores.LAYER)[0])


def test_text_comes_from_a_recorded_trace_of_tokens(tmp_path: Path) -> None:
    with TokenTraceWriter(tmp_path / "t.trace", vocab_size=300, source="a test") as writer:
        writer.add_document(np.arange(7))
        writer.add_document(np.arange(250, 260))
        writer.finish()
    text = real_text.load(tmp_path / "t.trace", 12)
    assert [document.tolist() for document in text.documents] == [list(range(7)), list(range(250, 255))]
    assert len(text.token_map) == 300
    assert text.keys(stores.v41_hash(1000, text.token_map), stores.LAYER, 30).shape == (30, 3)
    with TokenTraceWriter(tmp_path / "t.trace", vocab_size=300, source="nothing") as writer:
        writer.finish()
    with pytest.raises(ConfigError, match="0 tokens"):
        real_text.load(tmp_path / "t.trace", 12)


def test_a_trace_of_something_else_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.ones(5))
    np.save(tmp_path / "negative.npy", np.array([3, -1]))
    for name in ("floats", "negative"):
        with pytest.raises(ConfigError, match="no token ids"):
            real_text.load(tmp_path / f"{name}.npy", 5)


def test_scale_compares_the_smallest_table_with_the_others(folder: Path) -> None:
    record = bench(folder, "scale", "--rows", 50_000, "--rows", 20_000, "--tokens", 40)["scale"]
    check_rounds(record)
    for state in ("warm", "cold"):
        (comparison,) = [part for part in record["comparisons"] if part["case"] == state]
        smallest, largest = sorted(comparison["seconds"], key=lambda side: float(side.split()[0]))
        assert comparison["subject"] == smallest
        growth = np.array(comparison["seconds"][largest]) / np.array(comparison["seconds"][smallest])
        assert case(record, f"{state}: cost of a row")["median"] == pytest.approx(100 * (np.median(growth) - 1))
    assert record["facts"]["keys that missed in warm runs"] == 0


def test_peers_run_or_are_named_and_skipped(folder: Path) -> None:
    record = bench(folder, "peers", "--size", "15MiB", "--tokens", 16)["peers"]
    check_rounds(record)
    sides = {side for comparison in record["comparisons"] for side in comparison["seconds"]}
    assert {"NumPy fancy index", "np.memmap, default", "np.memmap, MADV_RANDOM"} <= sides
    assert {"LMDB, a value a row", "LMDB, a value a key"} <= sides
    for kind in peers.PEERS:
        assert any(side.startswith(kind.name) for side in sides) != (kind.name in record["skipped"])
    assert all(comparison["work"] == 16 * 24 for comparison in record["comparisons"])


def test_build_still_runs_and_all_figures_come_in_one_file(folder: Path) -> None:
    record = bench(folder, "build", "--size", "1MiB", "--pairs", 1, "--no-huge-pages")
    assert set(record) == {"build"}
    assert record["build"]["facts"] == {"huge pages": "switched off"}
    assert {len(values) for values in record["build"]["build_s"].values()} == {2}


@needs_compiler
def test_clean_removes_the_made_tables(tmp_path: Path) -> None:
    make_store(tmp_path, 10_000)
    assert (tmp_path / stores.FOLDER).is_dir()
    bench(tmp_path, "decode", "--size", "15MiB", "--clean")
    assert not (tmp_path / stores.FOLDER).exists()


def test_every_benchmark_is_a_module_that_takes_the_same_options() -> None:
    for name in BENCHMARKS:
        module = importlib.import_module(module_of(name))
        assert list(inspect.signature(module.run).parameters) == ["folder", "options"]
    assert Options().dram_bytes is None
    assert Options(budgets=(5, 6)).dram_bytes == 5
    assert Result("t").to_dict()["comparisons"] == []


def zipf_text(seed: int, num_documents: int, vocabulary: int) -> real_text.RealText:
    """Documents of words that follow each other by habit, so that n-grams come back."""
    rng = np.random.default_rng(seed)
    habits = rng.integers(0, vocabulary, (vocabulary, 3))
    documents = []
    for length in rng.integers(50, 400, num_documents):
        word, words = int(rng.integers(vocabulary)), []
        for _ in range(length):
            words.append(word)
            word = (
                int(habits[word, min(2, rng.geometric(0.6) - 1)])
                if rng.random() < 0.8
                else int(rng.zipf(1.3)) % vocabulary
            )
        documents.append(np.array(words, dtype=np.int64))
    return real_text.RealText(documents, np.arange(vocabulary, dtype=np.int32), "made up")


def test_placed_predicts_the_very_stream_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = zipf_text(0, 300, 500), zipf_text(0, 330, 500)
    texts[1].documents[:] = texts[1].documents[300:]
    monkeypatch.setattr(placed.real_text, "load_split", lambda: texts)
    monkeypatch.setattr(placed, "LRU_WARM_TOKENS", 5000)
    monkeypatch.setattr(placed, "BATCH_TOKENS", 64)
    result = Result("placed")
    placed.run_placed(tmp_path, Options(pairs=1, budgets=(4 << 20, 8 << 20)), 64 << 20, result)
    assert json.loads(json.dumps(result.to_dict()))["figures"]
    figures = {figure.case: figure for figure in result.figures}
    for budget in ("4 MiB", "8 MiB"):
        assert figures[f"{budget}: measured off predicted for the very stream"].median == 0
        assert figures[f"{budget}: placement beyond entries and index"].median < 5
    assert any(case.endswith(": fewer") for case in figures)
    rates = {(line[0], line[1]): line[-1] for line in result.grids[0].lines}
    assert 0 < rates["4 MiB", "measured"] < 1
    assert rates["4 MiB", "measured"] == rates["4 MiB", "predicted, this very stream"]
    assert result.comparisons[0].seconds.keys() == {placed.OPEN, placed.SEQUENTIAL}
    assert not list((tmp_path / "tierstore-bench").glob("*/placements/*.placement"))


@pytest.mark.slow
def test_traces_are_measured_beside_reading_and_copying(tmp_path: Path) -> None:
    record = bench(tmp_path, "streams", "--size", "1MiB", "--pairs", 1)["streams"]
    assert [set(comparison["seconds"]) for comparison in record["comparisons"]] == [
        {"tierstore", "pyarrow, its column"},
        {"tierstore", "cp and sync"},
        {"1 job", "2 jobs"},
    ]
    assert record["figures"][0]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
