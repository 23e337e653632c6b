"""Profile, plan and place as a library: dataclasses in and out, on a store of keys; what was planned is what opens."""

from __future__ import annotations

import gc
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from support.stores import Model, make_model
from support.versions import make_versions

import tierstore
from tierstore.decisions.budget import overlay_bytes
from tierstore.errors import BudgetError, ConfigError, FingerprintMismatchError, FormatError, StoreNotReadyError
from tierstore.formats.catalog import read_catalog
from tierstore.formats.profile import ProfileReader
from tierstore.formats.trace import TokenTraceWriter
from tierstore.offline import profile as profiling

DRAM = 500 << 10
TABLE = "layers.1"
NUM_TOKENS = 3000
Report = tuple[str, int, int | None]


def write_key_trace(store: Path, path: Path, seed: int = 0) -> Path:
    """Records skewed lookups of one table, all keys of them."""
    keys = np.random.default_rng(seed).zipf(1.3, (NUM_TOKENS, 3)).astype(np.int64)
    with tierstore.open(store, dram="8MiB", placement="none") as opened:
        opened.start_trace(path, share=1.0)
        for start in range(0, NUM_TOKENS, 20):
            opened[TABLE].lookup(keys[start : start + 20])
        opened.stop_trace()
    return path


@pytest.fixture(scope="module")
def trace(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key_trace(built, tmp_path_factory.mktemp("trace") / "keys.trace")


@pytest.fixture(scope="module")
def made(built: Path, trace: Path) -> tierstore.Profile:
    return tierstore.profile(built, trace)


def test_what_is_planned_and_placed_is_what_the_store_opens_with(own_store: Path, trace: Path) -> None:
    profile = tierstore.profile(own_store, [trace], held_out=0.3)
    plan = tierstore.plan(own_store, profile, dram=DRAM, nvme_entries="256KiB")
    (group,) = (group for group in plan.groups if TABLE in group.tables)
    assert group.static_entries > 0
    assert sum(group.hits_by_tier.values()) == pytest.approx(1)
    assert group.hits_by_tier["dram"] == pytest.approx(group.hit_rate["all"], abs=1e-6)
    low, high = group.interval(plan.interval_tokens)
    assert 0 <= low["all"] <= group.hit_rate["all"] <= high["all"] <= 1
    assert plan.bytes_by_tier["hbm"] == 0
    assert 0 < plan.bytes_by_tier["dram"] <= DRAM
    assert 0 < plan.bytes_by_tier["nvme"] <= 256 << 10
    assert tierstore.place(own_store, plan) == 1
    with tierstore.open(own_store, dram=DRAM) as store:
        placed = store.stats()["placement"]
    assert placed["epoch"] == 1
    assert placed["static_entries"][TABLE] == pytest.approx(group.static_entries, abs=0.01 * group.static_entries + 1)
    assert tierstore.place(own_store, plan) == 2, "a plan may be placed again"


def test_a_plan_leaves_room_for_the_index_of_the_rows_of_versions(model: Model, own_store: Path, trace: Path) -> None:
    profile = tierstore.profile(own_store, [trace], held_out=0.3)
    before, _ = (tierstore.plan(own_store, profile, dram=DRAM), make_versions(model, own_store, 1, part=0.3))
    plan = tierstore.plan(own_store, profile, dram=DRAM)
    (group,), (without,) = ([group for group in each.groups if TABLE in group.tables] for each in (plan, before))
    index_bytes = overlay_bytes(read_catalog(own_store).at_version(None).touched[TABLE])
    assert plan.bytes_by_tier["dram"] <= before.bytes_by_tier["dram"] - index_bytes // 2
    assert 0 < group.static_entries < 0.95 * without.static_entries
    tierstore.place(own_store, plan)
    with tierstore.open(own_store, dram=DRAM) as store:
        placed = store.stats()["placement"]
    assert placed["static_entries"][TABLE] == pytest.approx(group.static_entries, abs=0.01 * group.static_entries + 1)


def test_results_say_what_their_files_and_the_commands_say_and_cannot_be_changed(
    built: Path, trace: Path, tmp_path: Path
) -> None:
    profile = tierstore.profile(built, trace, output=tmp_path / "p.profile")
    opened = tierstore.open_profile(tmp_path / "p.profile")
    assert profile.path == opened.path == tmp_path / "p.profile"
    assert (profile.header, profile.counts, profile.curves) == (opened.header, opened.counts, opened.curves)
    assert profile.counts.tokens == NUM_TOKENS / 20, "of keys, a token is a lookup"
    assert 0 < profile.counts.held_out_documents < profile.counts.documents
    assert profile.recommended in profile.curves[0].recommended
    with ProfileReader(tmp_path / "p.profile") as reader:
        assert opened.to_dict() == reader.footer
    plans = [tierstore.plan(built, each, dram=DRAM).to_dict() for each in (profile, opened, tmp_path / "p.profile")]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["held_out_tokens"] == profile.counts.held_out_tokens
    for frozen in (profile, profile.counts, profile.curves[0], profile.curves[0].points[0]):
        with pytest.raises(FrozenInstanceError):
            frozen.path = None  # type: ignore[misc]


def test_every_job_reports_its_phases(own_store: Path, trace: Path) -> None:
    reports: list[Report] = []

    def report(*args: object) -> None:
        reports.append(args)  # type: ignore[arg-type]

    def phases() -> list[str]:
        seen = list(dict.fromkeys(phase for phase, _, _ in reports))
        reports.clear()
        return seen

    profile = tierstore.profile(own_store, trace, on_progress=report)
    assert [each for each in reports if each[0] == "counting"][-1] == ("counting", 150, 150)
    assert phases() == ["counting", "merging", "sorting", "replaying", "intervals", "decoding", "checking", "writing"]
    plan = tierstore.plan(own_store, profile, dram=DRAM, on_progress=report)
    assert phases() == ["trying"], "what was just counted is not read again"
    tierstore.plan(own_store, tierstore.open_profile(profile.path), dram=DRAM, on_progress=report)
    assert phases() == ["reading", "sorting", "trying"]
    tierstore.place(own_store, plan, on_progress=report)
    assert phases() == ["choosing", "placing"]


def test_several_plans_read_the_held_out_documents_once(
    built: Path, made: tierstore.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, reads = tierstore.open_profile(made.path), []
    read_groups = profiling.read_groups
    monkeypatch.setattr(profiling, "read_groups", lambda *args: (reads.append(args), read_groups(*args))[1])
    for dram in (DRAM, DRAM + (100 << 10), None):
        tierstore.plan(built, opened, dram=dram)
    assert len(reads) == 1


def test_without_an_output_the_file_goes_with_the_last_that_needs_it(built: Path, trace: Path) -> None:
    profile = tierstore.profile(built, trace)
    path = profile.path
    plan = tierstore.plan(built, profile, dram=DRAM)
    del profile
    gc.collect()
    assert path.exists(), "place reads it"
    del plan
    gc.collect()
    assert not path.parent.exists()


def test_a_forked_child_leaves_its_parents_file(built: Path, trace: Path) -> None:
    profile = tierstore.profile(built, trace)
    path = profile.path
    child = os.fork()
    if child == 0:
        try:
            del profile
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()


def test_parts_merge_to_the_profile_of_all(built: Path, trace: Path, tmp_path: Path) -> None:
    other = write_key_trace(built, tmp_path / "other.trace", seed=1)
    parts = [tierstore.profile(built, each, held_out=0.3) for each in (trace, other)]
    merged = tierstore.merge_profiles(built, parts, output=tmp_path / "merged.profile")
    assert merged.counts.documents == sum(part.counts.documents for part in parts)
    assert tierstore.open_profile(tmp_path / "merged.profile").curves == merged.curves


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("phase", ["counting", "merging", "sorting", "replaying", "writing"])
def test_an_interrupt_leaves_no_file(built: Path, trace: Path, tmp_path: Path, phase: str) -> None:
    def interrupt(name: str, _done: int, _total: int | None) -> None:
        if name == phase:
            raise Interrupt

    for output in (tmp_path / "p.profile", None):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(profiling.tempfile, "tempdir", str(tmp_path))
            with pytest.raises(Interrupt):
                tierstore.profile(built, trace, output=output, on_progress=interrupt)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", ["choosing", "placing"])
def test_an_interrupt_while_placing_keeps_the_epoch(own_store: Path, trace: Path, phase: str) -> None:
    plan = tierstore.plan(own_store, tierstore.profile(own_store, trace), dram=DRAM)
    tierstore.place(own_store, plan)

    def interrupt(name: str, _done: int, _total: int | None) -> None:
        if name == phase:
            raise Interrupt

    with pytest.raises(Interrupt):
        tierstore.place(own_store, plan, on_progress=interrupt)
    assert read_catalog(own_store).epoch == 1
    assert tierstore.place(own_store, plan) == 2


def test_what_cannot_be_done_is_named(built: Path, trace: Path, made: tierstore.Profile, tmp_path: Path) -> None:
    with TokenTraceWriter(tmp_path / "tokens.trace", vocab_size=None, source="a test") as writer:
        writer.add_document(np.arange(10))
        writer.finish()
    with pytest.raises(StoreNotReadyError, match="none"):
        tierstore.profile(tmp_path / "none", trace)
    with pytest.raises(ConfigError, match="no trace"):
        tierstore.profile(built, [])
    with pytest.raises(FormatError, match="is a profile, expected a trace"):
        tierstore.profile(built, made.path)
    with pytest.raises(FormatError, match="a trace of tokens, expected one of keys"):
        tierstore.profile(built, tmp_path / "tokens.trace")
    with pytest.raises(ValueError, match=r"held_out: 1\.0"):
        tierstore.profile(built, trace, held_out=1.0)
    with pytest.raises(StoreNotReadyError, match="none"):
        tierstore.plan(tmp_path / "none", made)
    with pytest.raises(BudgetError, match="10240 bytes"):
        tierstore.plan(built, made, dram="10KiB")
    with pytest.raises(ConfigError, match="hbm: -1 bytes"):
        tierstore.plan(built, made, hbm=-1)
    with pytest.raises(ConfigError, match="gone: No such file"):
        tierstore.plan(built, tmp_path / "gone")


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same tables by name, whose fingerprints are others."""
    folder = tmp_path_factory.mktemp("other")
    model = make_model(folder / "checkpoint", plain=False)
    sources = [replace(each, spec=replace(each.spec, fingerprint=f"{7:064x}")) for each in model.sources]
    Model(model.folder, model.checkpoint, tuple(sources), model.rows).build(folder / "store")
    return folder / "store"


def test_another_stores_traces_profiles_and_plans_are_refused(
    built: Path, other_store: Path, trace: Path, made: tierstore.Profile
) -> None:
    with pytest.raises(FingerprintMismatchError, match=r"keys.trace: recorded of table layers.1 with fingerprint"):
        tierstore.profile(other_store, trace)
    with pytest.raises(FingerprintMismatchError, match=r"the profile's keys are of table layers.1 with fingerprint"):
        tierstore.plan(other_store, made, dram=DRAM)
    plan = tierstore.plan(built, made, dram=DRAM)
    with pytest.raises(FingerprintMismatchError, match=r"the profile's keys are of table layers.1 with fingerprint"):
        tierstore.place(other_store, plan)
    assert read_catalog(other_store).epoch is None


def test_a_file_that_was_replaced_since_it_was_opened_is_refused(built: Path, trace: Path, tmp_path: Path) -> None:
    profile = tierstore.profile(built, trace, output=tmp_path / "p.profile")
    plan = tierstore.plan(built, profile, dram=DRAM)
    tierstore.profile(built, trace, held_out=0.5, output=tmp_path / "p.profile")
    with pytest.raises(ConfigError, match=r"p\.profile is another profile than the one that was opened"):
        tierstore.place(built, plan)
