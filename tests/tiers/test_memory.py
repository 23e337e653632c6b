"""How much memory there is: the machine's, or what a cgroup above this process leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tierstore.tiers.memory import CgroupLimit, allocate, available_memory, cgroup_limits


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
    ],
    ids=["v2 parent", "v2 container", "v2 none", "v1", "v1 none", "no cgroups"],
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


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5 << 20])
def test_memory_is_zeroed_writable_and_on_a_page(num_bytes: int) -> None:
    memory = allocate(num_bytes)
    assert memory.shape == (num_bytes,)
    assert not memory.any()
    memory[:] = 1
    assert np.count_nonzero(memory) == num_bytes
    assert num_bytes == 0 or memory.ctypes.data % 4096 == 0
