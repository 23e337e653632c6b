"""The doctor's findings on machines that this one is not: what it reads is faked, what it says is checked."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.committed import Committed
from support.held import open_files
from support.stores import make_model
from support.versions import make_versions

from tierstore import SGD
from tierstore.extras import EXTRAS, install_command
from tierstore.formats.catalog import read_catalog
from tierstore.tiers.memory import CgroupLimit
from tierstore.tools import doctor
from tierstore.tools.doctor_path import Finding, existing_folder

GIB = 1 << 30


def test_every_finding_that_is_not_ok_has_a_remedy(tmp_path: Path) -> None:
    for finding in doctor.examine(tmp_path):
        assert finding.state in ("ok", "warn", "fail")
        assert finding.fact
        assert finding.state == "ok" or finding.remedy, finding


def test_a_path_that_is_not_there_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    findings = {finding.what: finding for finding in doctor.examine(tmp_path / "not" / "yet")}
    assert f"{tmp_path} is on " in findings["file system"].fact
    assert not list(tmp_path.iterdir())


def what_is_found(path: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in doctor.examine(path)}


def test_a_path_that_is_not_there_is_told_and_so_is_one_that_is_a_file(tmp_path: Path) -> None:
    found = what_is_found(tmp_path / "not" / "yet")["path"]
    assert (found.state, f"{tmp_path}/not/yet does not exist" in found.fact) == ("warn", True)
    (tmp_path / "file").touch()
    assert what_is_found(tmp_path / "file")["path"].fact == f"{tmp_path}/file is a file"
    assert "path" not in what_is_found(tmp_path)


def test_a_path_that_this_user_may_not_look_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    _, found = existing_folder(tmp_path / "locked" / "store")
    assert found is not None
    assert found.fact.startswith(f"{tmp_path}/locked/store: Permission denied")


def test_a_store_is_looked_into(built: Path, own_store: Path) -> None:
    found = what_is_found(built)
    assert re.fullmatch(r"\d+ tables, [\d,]+ rows, .* [KM]iB, no placement", found["store"].fact)
    assert found["store's files"].state == "ok"
    (shard, *_) = sorted(own_store.rglob("*.shard"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found = what_is_found(own_store)
    assert found["store"].state == "ok"
    assert found["store's files"].state == "fail"
    assert str(shard) in found["store's files"].fact
    assert f"tierstore verify {own_store} --repair --source CHECKPOINT" in found["store's files"].remedy
    (own_store / "catalog.mdb").write_bytes(b"no catalog")
    assert what_is_found(own_store)["store"].state == "fail"


def test_versions_and_a_training_are_looked_into(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    model.build(tmp_path / "store")
    assert {"versions", "training"}.isdisjoint(what_is_found(tmp_path / "store"))
    versions = make_versions(model, tmp_path / "store", 2)
    made = Committed(versions.store, SGD(lr=0.1))
    assert what_is_found(versions.store)["training"].fact == "sgd, no commit yet"
    made.write("layers.1", 40)
    made.commit(step=1200)
    found = what_is_found(versions.store)
    touched = sum(int(versions.touched(name, 2).sum()) for name in model.rows)
    assert found["versions"].state == found["training"].state == "ok"
    assert found["versions"].fact.startswith(f"readers open version 2; {touched:,} rows are newer than the base's, ")
    assert found["training"].fact.startswith("sgd, commit 1 of step 1,200 is the newest of 1; 1 runs, ")
    (run,) = (versions.store / "training").glob("*.run")
    run.unlink()
    (versions.store / "versions" / "00000002-layers.1.rows").unlink()
    found = what_is_found(versions.store)
    assert (found["versions"].state, found["training"].state) == ("fail", "fail")
    assert "00000002-layers.1.rows" in found["versions"].fact
    assert f"1 files are missing: training/{run.name}" in found["training"].fact
    assert "tierstore commits" in found["training"].remedy


def test_a_build_that_has_not_finished_is_told(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = replace(read_catalog(own_store), ready=False)
    monkeypatch.setattr("tierstore.tools.doctor_path.read_catalog", lambda *_, **__: image)
    found = what_is_found(own_store)
    assert (found["store"].state, found["store"].remedy) == ("fail", "run the same tierstore build again")
    assert "store's files" not in found


@pytest.mark.parametrize(
    "source",
    [
        "check_direct_io", "check_file_system", "check_disk", "check_huge_pages", "check_memlock", "check_memory",
        "check_open_files", "check_processor", "check_gpu", "check_store",
    ],
)  # fmt: skip
def test_one_missing_source_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    def refuse(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/gone")

    whole = what_is_found(tmp_path)
    monkeypatch.setattr(doctor, source, refuse)
    found = what_is_found(tmp_path)
    assert whole.keys() <= found.keys()
    unknown = [finding for finding in found.values() if finding.fact.startswith("not known: /proc/gone: No such file")]
    assert len(unknown) == 1
    assert unknown[0].remedy


def test_without_meminfo_and_cpuinfo_all_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "none"))
    assert what_is_found(tmp_path).keys() == {
        "compiled kernels", "io_uring", "process_madvise", "O_DIRECT", "file "
                                                                       "system", "free disk", "huge pages", "memlock",
        "memory", "open files", "processor", "GPU", *(f"extra {name}" for name in EXTRAS),
    }  # fmt: skip
    finding = doctor.check_processor(tmp_path / "none", "x86_64")
    assert (finding.state, "CRC32C by" in finding.fact) == ("ok", True)


def test_extras_are_listed_with_the_command_that_installs_each() -> None:
    for name in EXTRAS:
        finding = doctor.check_extra(name, lambda _: None)
        assert finding.state == "ok", "a store works without"
        assert finding.remedy == f"if you need it: {install_command(name)}"
        assert EXTRAS[name].purpose in finding.fact
        assert doctor.check_extra(name, lambda module: module).remedy == ""


@pytest.mark.parametrize(
    ("code", "setting", "state", "remedy"),
    [
        (0, "0", "ok", ""),
        (0, None, "ok", ""),
        (errno.EPERM, "2", "warn", "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, "1", "warn", "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, "0", "warn", "seccomp"),
        (errno.EPERM, None, "warn", "seccomp"),
        (errno.ENOSYS, None, "warn", "5.11"),
    ],
)
def test_io_uring_is_told_by_what_the_kernel_answers(
    tmp_path: Path, code: int, setting: str | None, state: str, remedy: str
) -> None:
    if setting is not None:
        (tmp_path / "disabled").write_text(f"{setting}\n")
    finding = doctor.check_io_uring(lambda: code, tmp_path / "disabled")
    assert finding.state == state
    assert remedy in finding.remedy
    assert code == 0 or errno.errorcode[code] in finding.fact


@pytest.mark.parametrize(("code", "state"), [(0, "ok"), (errno.EPERM, "warn"), (errno.ENOSYS, "warn")])
def test_process_madvise_is_told_by_what_the_kernel_answers(code: int, state: str) -> None:
    finding = doctor.check_process_madvise(lambda: code)
    assert finding.state == state
    assert errno.errorcode.get(code, "allowed") in finding.fact
    assert bool(finding.remedy) == (code != 0)


def test_the_probe_of_io_uring_leaves_no_descriptor_open() -> None:
    before = open_files()
    doctor.check_io_uring()
    assert open_files() <= before


def test_a_file_system_without_direct_io_warns_and_leaves_no_file(tmp_path: Path) -> None:
    def refuse(name: str, flags: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(errno.EINVAL, "Invalid argument", name)

    finding = doctor.check_direct_io(tmp_path, refuse)
    assert (finding.state, "Invalid argument" in finding.fact) == ("warn", True)
    assert not list(tmp_path.iterdir())


def test_direct_io_on_a_path_that_cannot_be_written_is_not_known(tmp_path: Path) -> None:
    finding = doctor.check_direct_io(tmp_path / "none")
    assert finding.state == "warn"
    assert "not known" in finding.fact


@pytest.mark.parametrize(("kind", "state"), [("ext4", "ok"), ("xfs", "ok"), ("nfs4", "warn"), ("cifs", "warn")])
def test_network_file_systems_warn(tmp_path: Path, kind: str, state: str) -> None:
    finding = doctor.check_file_system(tmp_path, kind)
    assert finding.state == state
    assert kind in finding.fact


@pytest.mark.parametrize(
    ("free", "state"), [(0, "fail"), (64 << 20, "fail"), ((64 << 20) + 1, "warn"), (GIB - 1, "warn"), (GIB, "ok")]
)
def test_a_disk_without_room_fails_and_a_tight_one_warns(tmp_path: Path, free: int, state: str) -> None:
    assert doctor.check_disk(tmp_path, free).state == state


@pytest.mark.parametrize(
    ("enabled", "collapsed", "state"),
    [
        ("always [madvise] never", 0.0, "ok"),
        ("[always] madvise never", 1.0, "ok"),
        ("always madvise [never]", 0.0, "warn"),
        ("always madvise [never]", 0.75, "ok"),  # in the background, while a store is open
        (None, 0.0, "warn"),
    ],
)
def test_huge_pages_are_told_as_the_kernel_marks_and_gives_them(
    tmp_path: Path, enabled: str | None, collapsed: float, state: str
) -> None:
    if enabled:
        (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "shmem_enabled").write_text("always within_size [advise] never deny force")
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nHugePages_Total:      12\nHugePages_Free: 3\n")
    finding = doctor.check_huge_pages(tmp_path, tmp_path / "meminfo", collapsed)
    assert finding.state == state
    assert f"in shared memory: advise; reserved: 12; of small pages in use, {collapsed:.0%} of 8.00 MiB" in finding.fact


def test_whether_the_kernel_collapses_small_pages_is_tried() -> None:
    assert doctor.check_huge_pages().fact.count("% of 8.00 MiB became huge when asked to") == 1


@pytest.mark.parametrize(
    ("check", "limits", "state"),
    [
        (doctor.check_memlock, (8 << 20, 8 << 20), "warn"),
        (doctor.check_memlock, (GIB, GIB), "ok"),
        (doctor.check_memlock, (resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok"),
        (doctor.check_open_files, (1023, 1023), "warn"),
        (doctor.check_open_files, (64, 4096), "ok"),
        (doctor.check_open_files, (1024, 4096), "ok"),
    ],
)
def test_limits_are_judged_at_their_edges(
    check: Callable[[tuple[int, int]], Finding], limits: tuple[int, int], state: str
) -> None:
    assert check(limits).state == state


def test_too_little_memory_fails_and_the_cgroup_is_named() -> None:
    limit = CgroupLimit(2 * GIB, GIB, Path("/sys/fs/cgroup/a/memory.max"))
    finding = doctor.check_memory((63 << 20, "cgroup"), [limit], 8 * GIB)
    assert finding.state == "fail"
    assert finding.fact == (
        "63.00 MiB available of 8.00 GiB, limited by the cgroup; cgroup limit 2.00 GiB (/sys/fs/cgroup/a/memory.max)"
    )
    assert doctor.check_memory((64 << 20, "machine"), [], 8 * GIB).state == "ok"


@pytest.mark.parametrize(
    ("machine", "flags", "state"),
    [
        ("x86_64", "flags : fpu sse4_1 sse4_2 avx2", "ok"),
        ("x86_64", "flags : fpu sse4_1 avx2", "warn"),
        ("aarch64", "Features : fp asimd crc32 sha2", "ok"),
        ("aarch64", "Features : fp asimd", "warn"),
        ("riscv64", "isa : rv64", "warn"),
    ],
)
def test_processors_without_crc32c_in_hardware_warn(tmp_path: Path, machine: str, flags: str, state: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert doctor.check_processor(tmp_path / "cpuinfo", machine).state == state


@pytest.mark.parametrize(
    ("has_gpu", "packages", "state"),
    [(True, {"torch", "triton"}, "ok"), (True, {"torch"}, "warn"), (True, set(), "warn"), (False, set(), "ok")],
)
def test_a_gpu_without_triton_warns_and_no_gpu_is_fine(
    tmp_path: Path, has_gpu: bool, packages: set[str], state: str
) -> None:
    device = tmp_path / "nvidia0"
    if has_gpu:
        device.touch()
    finding = doctor.check_gpu((device,), lambda name: name in packages or None)
    assert finding.state == state
    assert bool(re.search("triton", finding.fact))
