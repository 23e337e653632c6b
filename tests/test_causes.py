"""Every cause that the operating system gives has its own words, numbers and remedy."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tierstore import BudgetError, ConfigError, FormatError, TierStoreError
from tierstore.causes import Fault, allow_open_files, named, naming, naming_panics, system_error


def refused(code: int, path: Path | None = None) -> OSError:
    return OSError(code, os.strerror(code), None if path is None else str(path))


@pytest.mark.parametrize(
    ("code", "kind", "expected"),
    [
        (errno.EMFILE, ConfigError, ["Too many open files", "hard limit"]),
        (errno.ENFILE, ConfigError, ["whole machine", "fs.file-max"]),
        (errno.ENOSPC, BudgetError, ["No space left", "7 bytes) are needed", "are free on the disk of", "free some"]),
        (errno.EDQUOT, BudgetError, ["quota exceeded", "have the quota raised"]),
        (errno.EFBIG, ConfigError, ["File too large", "another file system"]),
        (errno.EROFS, ConfigError, ["Read-only file system", "mount / for writing"]),
        (errno.EACCES, ConfigError, ["Permission denied", "readable and writable for this user"]),
        (errno.EPERM, ConfigError, ["not permitted", "readable and writable for this user"]),
        (errno.EIO, ConfigError, ["Input/output error", "dmesg"]),
        (errno.ENODEV, ConfigError, ["cannot map files", "local disk"]),
        (errno.ENOMEM, BudgetError, ["Cannot allocate memory", "7 bytes) are needed", "ask for less"]),
        (errno.EADDRINUSE, ConfigError, ["already in use", "port 0 for a free one"]),
        (errno.EADDRNOTAVAIL, ConfigError, ["address of this host"]),
        (errno.EISDIR, ConfigError, ["Is a directory", "name of a file"]),
        (errno.ENAMETOOLONG, ConfigError, ["shorter path"]),
        (errno.ELOOP, ConfigError, ["in a circle"]),
        (errno.ESTALE, ConfigError, ["mount the network file system again"]),
    ],
)
def test_each_cause_has_its_own_remedy(code: int, kind: type[TierStoreError], expected: list[str]) -> None:
    error = named(refused(code), "shard 3", Path("/store.shard"), writing=True, needed_bytes=7)
    assert type(error) is kind
    assert str(error).startswith(f"shard 3: {os.strerror(code)}")
    for part in expected:
        assert part in str(error)


def test_a_cause_that_lies_in_the_file_gets_the_callers_class_and_remedy(tmp_path: Path) -> None:
    fault = Fault(FormatError, "copy it again or rebuild")
    for code in (errno.ENOENT, errno.EIO, errno.EINVAL):
        error = named(refused(code), "shard 0", tmp_path / "0.shard", fault=fault)
        assert isinstance(error, FormatError)
        assert str(error).endswith("copy it again or rebuild")
    for code in (errno.EMFILE, errno.EACCES, errno.ENOMEM):
        error = named(refused(code), "shard 0", tmp_path / "0.shard", fault=fault)
        assert not isinstance(error, FormatError)
        assert "rebuild" not in str(error)


def test_a_missing_folder_is_named_and_the_temporary_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "deeper" / "x.trace"
    with pytest.raises(ConfigError) as caught, naming(path, writing=True):
        (path.parent / "x.trace.new").touch()
    assert f"there is no folder {path.parent}; make it (mkdir -p {path.parent})" in str(caught.value)
    assert ".new" not in str(caught.value)


def test_a_path_through_a_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"Not a directory: {tmp_path}/file is a file"), naming():
        (tmp_path / "file" / "x").read_bytes()


def test_without_a_name_of_ours_the_final_name_of_the_file_is_said(tmp_path: Path) -> None:
    assert str(named(refused(errno.EIO, tmp_path / "x.profile.new"))).startswith(f"{tmp_path}/x.profile: Input/output")
    assert str(named(refused(errno.EIO, tmp_path / "tmpab3d_x9q"))).startswith(f"{tmp_path}: Input/output")
    assert str(named(refused(errno.EIO))).startswith("the operating system: Input/output")


def test_the_note_of_what_is_kept_comes_last() -> None:
    assert str(named(refused(errno.EIO), "x", note="finished shards are kept")).endswith("; finished shards are kept")


def test_a_timeout_of_ours_and_a_closed_pipe_pass_unchanged() -> None:
    for error in (TimeoutError("no page came within 3 s"), BrokenPipeError(errno.EPIPE, "Broken pipe")):
        with pytest.raises(type(error)) as caught, naming("x"):
            raise error
        assert caught.value is error


def test_a_users_rights_are_told_with_owner_and_mode(request: pytest.FixtureRequest) -> None:
    """In a process of user 65534, because root may do all."""
    code = (
        "import os, sys; from tierstore.causes import named\n"
        "os.geteuid() or os.setuid(65534)\n"
        "for path, flags in zip(sys.argv[1:], (os.O_RDONLY, os.O_CREAT | os.O_WRONLY, os.O_RDONLY)):\n"
        "    try: os.open(path, flags)\n"
        "    except OSError as error: print(named(error, 'it', path, writing=bool(flags)))\n"
    )
    open_to_all = Path(tempfile.mkdtemp())  # the folders above `tmp_path` are closed to others
    request.addfinalizer(lambda: shutil.rmtree(open_to_all))
    open_to_all.chmod(0o755)
    closed = open_to_all / "closed"
    closed.mkdir(mode=0o700)
    (open_to_all / "secret").touch(mode=0o000)
    closed.chmod(0o600 if os.geteuid() else 0o700)
    arguments = [open_to_all / "secret", open_to_all / "new.trace", closed / "inside"]
    if os.geteuid():
        arguments[1] = Path("/new.trace")
    said = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert f"may not read {open_to_all}/secret (owner {os.geteuid()}, mode 0); make it readable" in said[0]
    assert f"may not write in {arguments[1].parent} (owner 0, mode" in said[1]
    assert f"may not enter {closed} (owner" in said[2]


def test_a_limit_of_file_sizes_is_told_with_both_numbers(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from tierstore.causes import naming\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 8192))\n"
        "with naming('it', writing=True, needed_bytes=10000): open(sys.argv[1], 'wb', buffering=0).write(bytes(10000)) "
        "and open(sys.argv[1], 'ab', buffering=0).write(bytes(1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stderr.splitlines()[-1]
    assert "ConfigError: it: File too large: 9.77 KiB (10000 bytes) are needed" in said
    assert "files of 4.00 KiB (4096 bytes), its hard limit is 8.00 KiB (8192 bytes); raise the limit" in said


OPENING = """
import resource, sys
from tierstore.causes import allow_open_files, naming
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
allow_open_files(100)
with naming('it'):
    files = [open('/dev/null') for _ in range(100)]
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_the_soft_limit_of_open_files_is_raised_when_many_are_opened() -> None:
    done = subprocess.run([sys.executable, "-c", OPENING, "1000"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1000\n", done.stderr


def test_a_hard_limit_of_open_files_that_is_too_low_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", OPENING, "80"], capture_output=True, text=True, timeout=60)
    said = done.stderr.splitlines()[-1]
    assert "ConfigError: it: Too many open files: this process may have 80 open, its hard limit is 80; raise" in said


def test_a_soft_limit_that_suffices_stays() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("mdb_txn_commit: No space left on device", errno.ENOSPC),
        ("I/O error: No such file or directory (os error 2)", errno.ENOENT),
        ("/x: Too many open files", errno.EMFILE),
        ("MDB_INVALID: File is not an LMDB file", None),
    ],
)
def test_a_librarys_words_are_taken_for_the_systems_where_they_are(text: str, code: int | None) -> None:
    found = system_error(RuntimeError(text))
    assert (found.errno if found else None) == code


def test_a_librarys_panic_becomes_a_named_error() -> None:
    class PanicException(BaseException):  # named as libraries in Rust have it
        pass

    with pytest.raises(FormatError, match=r"library that reads it gave up \(out of bounds\); copy it") as caught:
        with_panic(PanicException("out of bounds"))
    assert str(caught.value).startswith("x.json: ")
    with pytest.raises(KeyboardInterrupt):
        with_panic(KeyboardInterrupt())


def with_panic(error: BaseException) -> None:
    with naming_panics("x.json", "copy it again"):
        raise error
