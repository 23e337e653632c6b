"""`tierstore doctor`: what this machine allows, each with a number and, where something is amiss, its remedy.

Input: the path where a store is or will be, and what the kernel says of this process. Output: a table or JSON, and exit
status 1 where a store could not work at all. Nothing is changed but a temporary file under the path; torch is not
loaded.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import mmap
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from tierstore import kernels
from tierstore.causes import cause_of, named
from tierstore.extras import EXTRAS, install_command
from tierstore.file_systems import file_system_of, why_not_local
from tierstore.offline.build import SPARE_DISK_BYTES
from tierstore.tiers.huge_pages import share_collapsed
from tierstore.tiers.memory import CgroupLimit, available_memory, cgroup_limits, total_memory
from tierstore.units import format_bytes

from .cli import console
from .doctor_path import Finding, check_store, existing_folder

DIRECT_READ_BYTES = 4096
OPEN_FILES_MIN = 1024
MEMLOCK_WANTED = 1 << 30
DISK_WANTED = 1 << 30
MEMORY_MIN = 64 << 20
COLLAPSE_BYTES = 8 << 20  # what is tried to bring onto huge pages
_MARKS = {"ok": "green", "warn": "yellow", "fail": "red"}


def check_extension() -> Finding:
    """What was built into the compiled part? Without it, this module cannot be imported."""
    return Finding("compiled kernels", "ok", f"built; CRC32C by {kernels.crc32c_backend()}")


def check_io_uring(
    probe: Callable[[], int] = kernels.probe_uring, disabled_file: Path = Path("/proc/sys/kernel/io_uring_disabled")
) -> Finding:
    """May this process make an io_uring? `probe` returns 0 or an errno; the file says what the administrator allows."""
    code = probe()
    setting = _text(disabled_file)
    sysctl = f"kernel.io_uring_disabled={setting}" if setting else "no kernel.io_uring_disabled"
    if code == 0:
        return Finding("io_uring", "ok", f"allowed ({sysctl})")
    meanwhile = "; until then pages are read without it"
    if code == errno.ENOSYS:
        remedy = "boot a kernel of 5.11 or newer, built with it"
    elif setting in ("1", "2"):
        remedy = "allow it, as root: sysctl kernel.io_uring_disabled=0"
    else:
        remedy = "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
    return Finding("io_uring", "warn", f"refused: {errno.errorcode.get(code, code)} ({sysctl})", remedy + meanwhile)


def check_process_madvise(probe: Callable[[], int] = kernels.probe_process_madvise) -> Finding:
    """May this process ask for read-ahead in batches? Used where io_uring is not."""
    code = probe()
    if code == 0:
        return Finding("process_madvise", "ok", "allowed")
    remedy = (
        "allow pidfd_open and process_madvise in the container's seccomp profile, or boot a kernel of 5.10 or newer"
    )
    meanwhile = "; until then read-ahead is asked for page by page"
    return Finding("process_madvise", "warn", f"refused: {errno.errorcode.get(code, code)}", remedy + meanwhile)


def check_direct_io(path: Path, open_file: Callable[[str, int], int] = os.open) -> Finding:
    """Does the file system of `path` read past the page cache?"""
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file, mmap.mmap(-1, DIRECT_READ_BYTES) as page:
            file.write(bytes(DIRECT_READ_BYTES))
            file.flush()
            try:
                count = _read_direct(open_file, file.name, page)
            except OSError as error:
                remedy = "put the store on ext4, xfs or another local file system; here reads fill the page cache"
                return Finding("O_DIRECT", "warn", f"refused on {path}: {error.strerror}", remedy)
    except OSError as error:
        cause = cause_of(error, path, writing=True)
        return Finding("O_DIRECT", "warn", f"not known, {path} cannot be written: {cause.facts}", cause.remedy)
    return Finding("O_DIRECT", "ok", f"read {count} aligned bytes on {path}")


def _read_direct(open_file: Callable[[str, int], int], name: str, page: mmap.mmap) -> int:
    fd = open_file(name, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.preadv(fd, [page], 0)
    finally:
        os.close(fd)


def check_file_system(path: Path, kind: str | None = None) -> Finding:
    """Is `path` on a local disk?"""
    kind = kind or file_system_of(path)
    if reason := why_not_local(kind):
        remedy = "build on a local disk: LMDB's locks and memory maps do not hold over a network"
        return Finding("file system", "warn", f"{path} is on {reason}", remedy)
    return Finding("file system", "ok", f"{path} is on {kind}")


def check_disk(path: Path, free_bytes: int | None = None) -> Finding:
    """How much is free where the store is? A build leaves 64 MiB of it alone."""
    free_bytes = shutil.disk_usage(path).free if free_bytes is None else free_bytes
    fact = f"{format_bytes(free_bytes)} free on {path}"
    if free_bytes >= DISK_WANTED:
        return Finding("free disk", "ok", fact)
    state = "fail" if free_bytes <= SPARE_DISK_BYTES else "warn"
    return Finding("free disk", state, fact, "free some, or take a path on another disk")


def check_huge_pages(
    root: Path = Path("/sys/kernel/mm/transparent_hugepage"),
    meminfo: Path = Path("/proc/meminfo"),
    collapsed: float | None = None,
) -> Finding:
    """Will large buffers, private and shared, get huge pages: at the first touch, or collapsed later?"""
    private, shared = _chosen(root / "enabled"), _chosen(root / "shmem_enabled")
    reserved = re.search(r"^HugePages_Total:\s*(\d+)", _text(meminfo), re.MULTILINE)
    collapsed = share_collapsed(COLLAPSE_BYTES) if collapsed is None else collapsed
    fact = (
        f"transparent: {private}, in shared memory: {shared}; reserved: {reserved[1] if reserved else 'unknown'}; "
        f"of small pages in use, {collapsed:.0%} of {format_bytes(COLLAPSE_BYTES)} became huge when asked to"
    )
    if private in ("always", "madvise"):
        return Finding("huge pages", "ok", fact)
    if collapsed:
        return Finding("huge pages", "ok", f"{fact}, as DRAM does in the background while a store is open")
    return Finding("huge pages", "warn", fact, f"as root: echo madvise > {root / 'enabled'}")


def _chosen(file: Path) -> str:
    """Returns the word in brackets, by which the kernel marks the setting in force: "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", _text(file))
    return found[1] if found else "unknown"


def check_memlock(limits: tuple[int, int] | None = None) -> Finding:
    """How much memory may be locked (pinned for a GPU, registered with io_uring)?"""
    soft, _ = limits or resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "unlimited")
    if soft >= MEMLOCK_WANTED:
        return Finding("memlock", "ok", format_bytes(soft))
    remedy = "needed to pin memory for a GPU: ulimit -l unlimited, or LimitMEMLOCK=infinity in the service's unit"
    return Finding("memlock", "warn", f"{format_bytes(soft)}, pinned tiers want {format_bytes(MEMLOCK_WANTED)}", remedy)


def check_memory(
    available: tuple[int, str] | None = None, limits: list[CgroupLimit] | None = None, total_bytes: int | None = None
) -> Finding:
    """How much DRAM could a budget take, and which cgroup bounds it?"""
    limits = cgroup_limits() if limits is None else limits
    available_bytes, limited_by = available or available_memory(limits)
    total_bytes = total_bytes or total_memory()
    fact = f"{format_bytes(available_bytes)} available of {format_bytes(total_bytes)}, limited by the {limited_by}"
    if limits:
        fact += f"; cgroup limit {format_bytes(limits[0].limit_bytes)} ({limits[0].file})"
    if available_bytes < MEMORY_MIN:
        return Finding("memory", "fail", fact, "end other processes, or raise the limit of the container")
    return Finding("memory", "ok", fact)


def check_open_files(limits: tuple[int, int] | None = None) -> Finding:
    """Are there descriptors for the shards of a large store (one each)?"""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES_MIN:
        return Finding("open files", "ok", f"{soft} allowed, {hard} at most")
    if hard >= OPEN_FILES_MIN:
        return Finding("open files", "ok", f"{soft} allowed, {hard} at most: raised when a store of many shards opens")
    remedy = "raise the hard limit: LimitNOFILE= of a service, --ulimit nofile= of a container, ulimit -Hn as root"
    return Finding("open files", "warn", f"{hard} at most; a large store opens one a shard, up to hundreds", remedy)


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str = platform.machine()) -> Finding:
    """How many processors, and do they compute CRC32C in hardware?"""
    fact = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable, {machine}"
    feature = {"x86_64": "sse4_2", "aarch64": "crc32"}.get(machine)
    if feature is None:
        return Finding("processor", "warn", f"{fact}; CRC32C by table", "checks run slower here; nothing to mend")
    flags = _text(cpuinfo)
    if feature in re.findall(r"\w+", flags):
        return Finding("processor", "ok", f"{fact}, with {feature}")
    if not flags:  # no /proc/cpuinfo: the compiled part asked the processor itself
        return Finding("processor", "ok", f"{fact}; CRC32C by {kernels.crc32c_backend()}")
    remedy = "checks run slower; let the virtual machine pass the host's processor through"
    return Finding("processor", "warn", f"{fact}, without {feature}", remedy)


def check_gpu(
    devices: tuple[Path, ...] = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version"), Path("/dev/kfd")),
    installed: Callable[[str], object] = importlib.util.find_spec,
) -> Finding:
    """Is there a GPU, and what would drive it? Packages are looked for, not loaded."""
    missing = [name for name in EXTRAS["gpu"].modules if not installed(name)]
    packages = f"without {' and '.join(missing)}" if missing else "torch and triton are installed"
    found = next((device for device in devices if device.exists()), None)
    if found is None:
        return Finding("GPU", "ok", f"none, {packages}; the DRAM and NVMe tiers need neither")
    if missing:
        return Finding("GPU", "warn", f"{found}, {packages}", install_command("gpu"))
    return Finding("GPU", "ok", f"{found}, {packages}")


def check_extra(name: str, installed: Callable[[str], object] = importlib.util.find_spec) -> Finding:
    """Is an optional part installed? A store works without any, so that none is a fault."""
    missing = [module for module in EXTRAS[name].modules if not installed(module)]
    if not missing:
        return Finding(f"extra {name}", "ok", f"{' and '.join(EXTRAS[name].modules)}: installed")
    fact = f"without {' and '.join(missing)}, for {EXTRAS[name].purpose}"
    return Finding(f"extra {name}", "ok", fact, f"if you need it: {install_command(name)}")


def _text(file: Path) -> str:
    """Returns what a file of /proc or /sys says, stripped; "" where this kernel or container does not have it."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def examine(path: Path) -> list[Finding]:
    """Returns all findings for this process and a store at `path`, which need not exist yet."""
    existing, in_the_way = existing_folder(path)
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("path", lambda: [in_the_way] if in_the_way else []),
        ("store", lambda: check_store(path)),
        ("compiled kernels", lambda: [check_extension()]),
        ("io_uring", lambda: [check_io_uring(), check_process_madvise()]),
        ("O_DIRECT", lambda: [check_direct_io(existing)]),
        ("file system", lambda: [check_file_system(existing)]),
        ("free disk", lambda: [check_disk(existing)]),
        ("huge pages", lambda: [check_huge_pages()]),
        ("memlock", lambda: [check_memlock()]),
        ("memory", lambda: [check_memory()]),
        ("open files", lambda: [check_open_files()]),
        ("processor", lambda: [check_processor()]),
        ("GPU", lambda: [check_gpu()]),
        ("extras", lambda: [check_extra(name) for name in EXTRAS]),
    ]
    return [finding for what, check in checks for finding in _of_check(what, check)]


def _of_check(what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Returns what a check finds; if its source is missing, that; all others still report."""
    try:
        return check()
    except OSError as error:
        cause = cause_of(error)
        return [Finding(what, "warn", f"not known: {named(error)}", cause.remedy)]


@click.command("doctor")
@click.argument("path", type=click.Path(path_type=Path), default=Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: Path, as_json: bool) -> None:
    """Say what this machine allows a store at PATH (here, by default), with a remedy for what it does not.

    Exit status 1 where a store could not work at all.

    \b
    Example: tierstore doctor /nvme
    """
    findings = examine(path)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_findings(findings)
    if any(finding.state == "fail" for finding in findings):
        click.get_current_context().exit(1)


def _print_findings(findings: list[Finding]) -> None:
    """Prints a line for each, and its remedy below, unbroken: a command can be copied as it stands."""
    from rich.text import Text

    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = Text(f"{finding.state:4}", style=_MARKS[finding.state])
        line = Text.assemble(mark, f"  {finding.what:{width}}  {finding.fact}")
        console().print(line, soft_wrap=True)
        if finding.remedy:
            console().print(Text(f"      -> {finding.remedy}"), soft_wrap=True)
