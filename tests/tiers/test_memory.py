"""How much memory there is: the machine's, or what a cgroup above this process leaves."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tierstore.tiers import memory
from tierstore.tiers.memory import CgroupLimit, allocate, available_memory, cgroup_limits, total_memory


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "500", "memory.max": "900"}, (500, "a/memory.max")),
        ("0::/a\n", {"memory.max": "700"}, (700, "memory.max")),
        ("0::/\n", {"memory.max": "max"}, None),
        (
            "5:cpu,cpuacct:/x\n4:memory:/x\n0::/x\n",
            {"memory/x/memory.limit_in_bytes": "300", "memory/memory.limit_in_bytes": "9223372036854771712"},
            (300, "memory/x/memory.limit_in_bytes"),
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("", {}, None),
        ("", {"memory.max": "600"}, (600, "memory.max")),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.high": "400"}, (400, "a/b/memory.high")),
        ("0::/a/b\n", {"a/b/memory.max": "500", "memory.high": "300", "a/memory.max": "max"}, (300, "memory.high")),
        ("0::/a\n", {"a/memory.max": "500", "a/memory.high": "600"}, (500, "a/memory.max")),
        ("4:memory:/\n0::/a\n", {"unified/a/memory.high": "200"}, (200, "unified/a/memory.high")),
        ("0::/../../other\n", {"memory.max": "700"}, (700, "memory.max")),
    ],
    ids=[
        "v2 parent",
        "v2 container",
        "v2 none",
        "v1",
        "v1 none",
        "no cgroups",
        "membership hidden",
        "v2 high",
        "v2 high of a parent",
        "v2 max below high",
        "hybrid",
        "path outside the namespace",
    ],
)
def test_the_least_limit_of_the_cgroups_above_is_found(
    tmp_path: Path, membership: str, files: dict[str, str], expected: tuple[int, str] | None
) -> None:
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(membership)
    found = cgroup_limits(tmp_path / "root", tmp_path / "cgroup")
    least = found[0] if found else None
    assert (least and (least.limit_bytes, least.file)) == (expected and (expected[0], tmp_path / "root" / expected[1]))


def test_page_cache_that_can_be_dropped_is_not_counted_as_used(tmp_path: Path) -> None:
    group = tmp_path / "root" / "a"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000")
    (group / "memory.current").write_text("900")
    (group / "memory.stat").write_text("anon 300\nactive_file 250\ninactive_file 350\n")
    (tmp_path / "cgroup").write_text("0::/a\n")
    (limit,) = cgroup_limits(tmp_path / "root", tmp_path / "cgroup")
    assert limit.used_bytes == 300
    assert available_memory([limit]) == (700, "cgroup")


def test_the_machine_limits_where_no_cgroup_leaves_less() -> None:
    assert available_memory([])[1] == "machine"
    assert available_memory([CgroupLimit(1 << 60, 0, Path())])[1] == "machine"


def test_without_meminfo_the_machine_has_what_sysconf_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = total_memory()
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    memory._warn_once.cache_clear()
    assert abs(total_memory() - expected) <= expected // 100
    for _ in range(2):
        assert available_memory([]) == (total_memory(), "machine")
    assert [record.getMessage()[:35] for record in caplog.records] == ["how much memory is free is not known"[:35]]
    assert available_memory([CgroupLimit(1000, 300, Path())]) == (700, "cgroup")


def test_a_limit_of_addresses_counts_less_what_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "statm").write_text("10 5 3 1 0 4 0\n")
    assert memory._addresses_left(resource.RLIM_INFINITY, tmp_path / "statm") is None
    assert memory._addresses_left(100_000, tmp_path / "statm") == 100_000 - 10 * mmap.PAGESIZE
    assert memory._addresses_left(4096, tmp_path / "statm") == 0
    assert memory._addresses_left(4096, tmp_path / "hidden") == 4096


def test_the_budget_of_a_process_with_few_addresses_is_refused_by_that_name() -> None:
    code = (
        "import resource; from tierstore.store.embedded import check_available\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try: check_available(4 << 30)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("BudgetError dram: 4.00 GiB (4294967296 bytes) would be used, the ")
    assert "the limit of addresses (ulimit -v) has " in done.stdout or "the machine has" in done.stdout


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5 << 20])
def test_memory_is_zeroed_writable_and_on_a_page(num_bytes: int) -> None:
    memory = allocate(num_bytes)
    assert memory.shape == (num_bytes,)
    assert not memory.any()
    memory[:] = 1
    assert np.count_nonzero(memory) == num_bytes
    assert num_bytes == 0 or memory.ctypes.data % 4096 == 0
