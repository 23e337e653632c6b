"""Why the operating system refused something, and what helps: the one place that distinguishes causes.

Input: an `OSError` (or a library's error that carries the system's words), what failed, and where.
Output: an error of tierstore's own classes. Its message says what, where, the numbers and the remedy of that very
cause, and never the name of a temporary file. Also raises the soft limit of open files for those who open many.
Errors: only those that it returns or that `naming` raises.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import BudgetError, ConfigError, FormatError, TierStoreError
from .units import format_bytes

logger = logging.getLogger("tierstore")

NEW_SUFFIX = ".new"  # of files that are not finished; people know only the final name
OPEN_FILES_SPARE = 64  # descriptors beside those asked for: sockets, rings, the interpreter's own
OPEN_FILES_RAISED_TO = 1 << 16  # programs that walk all possible descriptors are slow beyond
FULL = (errno.ENOSPC, errno.EDQUOT)

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_LESS = "ask for less (--dram), or raise the limit of the machine or the cgroup"
_OWN_ERRNO = {code: os.strerror(code) for code in errno.errorcode}


@dataclass(frozen=True)
class Fault:
    """What the caller knows: the class and the remedy if the file itself is at fault (missing, unreadable)."""

    kind: type[TierStoreError]
    remedy: str


@dataclass(frozen=True)
class Cause:
    """Why it failed, with numbers; what helps; and the class of the error that says so."""

    facts: str
    remedy: str
    kind: type[TierStoreError]


@dataclass(frozen=True)
class _Use:
    path: Path | None
    writing: bool
    needed_bytes: int | None
    fault: Fault | None

    def at_fault(self, otherwise: str) -> tuple[str, type[TierStoreError]]:
        """Returns what helps if the file itself is at fault, and the class."""
        return (self.fault.remedy, self.fault.kind) if self.fault else (otherwise, ConfigError)


def named(
    error: OSError,
    what: object = None,
    path: _Path | None = None,
    *,
    writing: bool = False,
    needed_bytes: int | None = None,
    fault: Fault | None = None,
    kind: type[TierStoreError] | None = None,
    note: str = "",
) -> TierStoreError:
    """Returns the error that names the cause of `error` and the remedy that follows from it.

    Args:
        error: What the system refused.
        what: What failed, as the message begins; by default the file that `error` names, or its folder.
        path: The file or folder that was used, by its final name; by default `what` if that is a path.
        writing: Whether it was to be written.
        needed_bytes: How many bytes were to be written or taken, if that is known.
        fault: The class and the remedy for causes that lie in the file itself.
        kind: The class of the error, whatever the cause.
        note: The end of the message: what is kept, what to run again.
    """
    cause = cause_of(
        error,
        path if path is not None or not isinstance(what, os.PathLike) else what,
        writing=writing,
        needed_bytes=needed_bytes,
        fault=fault,
    )
    begin = what if what is not None else _shown(_named_path(error)) or "the operating system"
    message = f"{begin}: {cause.facts}; {cause.remedy}"
    return (kind or cause.kind)(f"{message}; {note}" if note else message)


def cause_of(
    error: OSError,
    path: _Path | None = None,
    *,
    writing: bool = False,
    needed_bytes: int | None = None,
    fault: Fault | None = None,
) -> Cause:
    """Returns the cause of an `OSError`. Arguments as of `named`."""
    found = Path(os.fsdecode(path)) if path is not None else _named_path(error)
    use = _Use(found, writing, needed_bytes, fault)
    words = error.strerror or str(error)
    facts, remedy, kind = _CAUSES.get(error.errno or 0, _unknown)(use)
    return Cause(f"{words}: {facts}" if facts else words, remedy, kind)


def named_memory(error: OSError, what: str, needed_bytes: int) -> TierStoreError:
    """Returns what `named` does for shared memory, a file without a disk: if that is full, memory is."""
    is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    if error.errno in FULL or (error.errno == errno.EFBIG and not is_limited):
        error = OSError(errno.ENOMEM, error.strerror)
    return named(error, what, needed_bytes=needed_bytes, fault=Fault(BudgetError, _LESS), kind=BudgetError)


@contextlib.contextmanager
def naming(
    what: object = None,
    path: _Path | None = None,
    *,
    writing: bool = False,
    needed_bytes: int | None = None,
    fault: Fault | None = None,
    kind: type[TierStoreError] | None = None,
    note: str = "",
) -> Iterator[None]:
    """Raises what `named` returns for an `OSError` of the body. Arguments as of `named`.

    `TimeoutError` without a number of the system, and a closed pipe, pass: they are not refusals.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno == errno.EPIPE:
            raise
        raise named(
            error, what, path, writing=writing, needed_bytes=needed_bytes, fault=fault, kind=kind, note=note
        ) from error


@contextlib.contextmanager
def naming_panics(what: object, remedy: str) -> Iterator[None]:
    """Raises `FormatError` for a panic of a library in Rust, which is a BaseException and would end the program.

    what: the file that the library was given, and what it is; remedy: what to do about that file.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{what}: the library that reads it gave up ({error}); {remedy}") from error


def system_error(error: BaseException, path: _Path | None = None) -> OSError | None:
    """Returns the `OSError` that a library's error names in words ("No space left on device"), or None."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    number = re.search(r"os error (\d+)", text)  # as libraries in Rust say it
    codes = [int(number[1])] if number else [code for code, words in _OWN_ERRNO.items() if words in text]
    if not codes:
        return None
    code = max(codes, key=lambda code: len(os.strerror(code)))  # "Invalid cross-device link" and not a part of it
    return OSError(code, os.strerror(code), os.fspath(path)) if path is not None else OSError(code, os.strerror(code))


def short_of_something(what: str) -> TierStoreError:
    """Returns the error for page readers that could not be made, if the native side does not know why."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and _num_open_files(soft) + OPEN_FILES_SPARE > soft:
        return named(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), what)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return BudgetError(
        f"{what}: no page reader can be made; this process may lock {_limit(soft, _bytes)} of memory, its hard limit "
        f"is {_limit(hard, _bytes)}: raise it (ulimit -l unlimited, LimitMEMLOCK=infinity of a service), or free memory"
    )


def allow_open_files(num_files: int) -> None:
    """Makes room for `num_files` more open files: raises the soft limit if they do not fit,
    as far as the hard one allows.

    Whatever does not fit then fails when it is opened; `named` says so with both numbers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _num_open_files(soft) + num_files + OPEN_FILES_SPARE
    if soft == resource.RLIM_INFINITY or soft == hard or needed <= soft:
        return
    wanted = max(needed, OPEN_FILES_RAISED_TO)
    raised = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError) as error:  # a sandbox forbids it
        logger.warning("the limit of open files stays at %d, %d are needed: %s", soft, needed, error)
        return
    logger.info("the soft limit of open files was %d, %d are needed: it is %d now", soft, needed, raised)


def _num_open_files(otherwise: int) -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # no /proc; or no descriptor left to look with
        return otherwise


def _named_path(error: OSError) -> Path | None:
    name = error.filename
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes, os.PathLike)) else None


def _shown(path: Path | None) -> str:
    """Returns the path as people know it: without NEW_SUFFIX; of a file without a name, its folder."""
    if path is None:
        return ""
    if path.name.endswith(NEW_SUFFIX):
        return str(path.with_name(path.name.removesuffix(NEW_SUFFIX)))
    if re.fullmatch(rf"{tempfile.gettempprefix()}[a-z0-9_]{{8}}", path.name):
        return str(path.parent)
    return str(path)


def _existing(path: Path | None) -> Path:
    """Returns `path`, or the nearest folder or file above it that is there. Raises nothing."""
    found = Path() if path is None else path.absolute()
    while not os.path.lexists(found) and found != found.parent:
        found = found.parent
    return found


def _folder(path: Path | None) -> Path:
    found = _existing(path)
    return found if os.path.isdir(found) else found.parent


def _limit(value: int, as_text: Callable[[int], str] = str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else as_text(value)


def _bytes(value: int) -> str:
    return f"{format_bytes(value)} ({value} bytes)"


_Answer = tuple[str, str, type[TierStoreError]]


def _open_files(_: _Use) -> _Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = f"this process may have {_limit(soft)} open, its hard limit is {_limit(hard)}"
    if soft != hard:
        return facts, f"raise the limit: ulimit -n {_limit(hard)}", ConfigError
    remedy = "raise the hard limit: LimitNOFILE= of a service, --ulimit nofile= of a container, ulimit -Hn as root"
    return facts, remedy, ConfigError


def _open_files_of_machine(_: _Use) -> _Answer:
    with contextlib.suppress(OSError, ValueError):
        num_open, _unused, most = map(int, Path("/proc/sys/fs/file-nr").read_text().split())
        facts = f"the whole machine has {num_open} open, its limit is {most}"
        return facts, f"end programs that hold many, or as root: sysctl fs.file-max={2 * most}", ConfigError
    return "of the whole machine", "end programs that hold many, or raise fs.file-max as root", ConfigError


def _full(use: _Use) -> _Answer:
    folder = _folder(use.path)
    facts = [] if use.needed_bytes is None else [f"{_bytes(use.needed_bytes)} are needed"]
    with contextlib.suppress(OSError):
        facts.append(f"{_bytes(shutil.disk_usage(folder).free)} are free on the disk of {folder}")
        if os.statvfs(folder).f_files and not os.statvfs(folder).f_favail:
            facts.append("no file can be added (0 inodes are free)")
    return ", ".join(facts), "free some, or give a path on another disk", BudgetError


def _quota(use: _Use) -> _Answer:
    facts, _, kind = _full(use)
    remedy = f"remove files of user {os.geteuid()}, have the quota raised, or give a path on another disk"
    return facts, remedy, kind


def _file_too_large(use: _Use) -> _Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return "more than this file system allows", "give a path on another file system, or smaller files", ConfigError
    needed = "" if use.needed_bytes is None else f"{_bytes(use.needed_bytes)} are needed, "
    facts = f"{needed}this process may write files of {_bytes(soft)}, its hard limit is {_limit(hard, _bytes)}"
    return facts, "raise the limit: ulimit -f unlimited, or LimitFSIZE=infinity of a service", ConfigError


def _read_only(use: _Use) -> _Answer:
    folder = _folder(use.path)
    while not os.path.ismount(folder):
        folder = folder.parent
    return f"{folder} is mounted so", f"mount {folder} for writing, or give a path elsewhere", ConfigError


def _denied(use: _Use) -> _Answer:
    act = "readable and writable" if use.writing else "readable"
    if use.path is None:
        return "", *use.at_fault(f"make it {act} for this user, or give another path")
    for folder in reversed(use.path.absolute().parents):
        if os.path.exists(folder) and not os.access(folder, os.X_OK):
            return _owned(folder, "enter"), f"let this user enter {folder}, or give another path", ConfigError
    found = _existing(use.path)
    if found != use.path.absolute() or os.path.isdir(found):
        if use.writing and not os.access(found, os.W_OK):
            return _owned(found, "write in"), f"make {found} writable for this user, or give another path", ConfigError
    elif not os.access(found, os.R_OK | (os.W_OK if use.writing else 0)):
        act_of = "write" if use.writing and os.access(found, os.R_OK) else "read"
        return _owned(found, act_of), f"make it {act} for this user, or give another path", ConfigError
    return "", f"make it {act} for this user, or give another path", ConfigError


def _owned(path: Path, act: str) -> str:
    with contextlib.suppress(OSError):
        found = path.stat()
        owner = f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
        return f"user {os.geteuid()} may not {act} {path} ({owner})"
    return f"user {os.geteuid()} may not {act} {path}"


def _missing(use: _Use) -> _Answer:
    if use.path is not None:
        folder = use.path.absolute().parent
        if not os.path.exists(folder):
            remedy = f"make it (mkdir -p {folder}), or give another path"
            if use.fault is not None and not use.writing:  # nobody reads from a folder that was just made
                return f"there is no folder {folder}", use.fault.remedy, ConfigError
            return f"there is no folder {folder}", remedy, ConfigError
        if use.writing:
            return "", f"something removed it from {folder} meanwhile; run it again", ConfigError
    return "", *use.at_fault("check the path")


def _not_a_folder(use: _Use) -> _Answer:
    found = _existing(use.path)
    return f"{found} is a file", "give a path whose folders are folders", ConfigError


def _disk_failed(use: _Use) -> _Answer:
    act = "written" if use.writing else "read"
    remedy, kind = use.at_fault("run it again")
    facts = "" if use.path is None else f"the disk of {_folder(use.path)} cannot be {act}"
    return facts, f"see the kernel's log (dmesg) and mend the disk; then {remedy}", kind


def _no_memory(use: _Use) -> _Answer:
    needed = [] if use.needed_bytes is None else [f"{_bytes(use.needed_bytes)} are needed"]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        facts = ", ".join([*needed, f"this process may have {_bytes(limit)} of addresses in all"])
        return facts, "raise the process's limit (ulimit -v unlimited), or ask for less", BudgetError
    return ", ".join(needed), _LESS, BudgetError


def _unknown(use: _Use) -> _Answer:
    return "", *use.at_fault("check the path, then run it again")


def _always(remedy: str, kind: type[TierStoreError] = ConfigError, facts: str = "") -> Callable[[_Use], _Answer]:
    return lambda _: (facts, remedy, kind)


_CAUSES: dict[int, Callable[[_Use], _Answer]] = {
    errno.EMFILE: _open_files,
    errno.ENFILE: _open_files_of_machine,
    errno.ENOSPC: _full,
    errno.EDQUOT: _quota,
    errno.EFBIG: _file_too_large,
    errno.EROFS: _read_only,
    errno.EACCES: _denied,
    errno.EPERM: _denied,
    errno.ENOENT: _missing,
    errno.ENOTDIR: _not_a_folder,
    errno.EISDIR: _always("give the name of a file"),
    errno.EIO: _disk_failed,
    errno.ENOMEM: _no_memory,
    errno.ENODEV: _always("copy it to a local disk", facts="its file system cannot map files into memory"),
    errno.ELOOP: _always("links on the way lead in a circle: give another path"),
    errno.ENAMETOOLONG: _always("give a shorter path"),
    errno.ESTALE: _always("mount the network file system again, or copy the files to a local disk"),
    errno.EADDRINUSE: _always(
        "stop it (ss -ltnp shows which it is), or give another port, or port 0 for a free one",
        facts="the port is taken by another program",
    ),
    errno.EADDRNOTAVAIL: _always("give an address of this host (ip addr shows them)"),
}
