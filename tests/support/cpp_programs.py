"""The C++ test programs, compiled once: `make programs` runs this file, tests compile what is still missing.

Input: the sources of `kernels/cpu` and `tests/kernels/cpp`, the environment's CXX (may be several words, "ccache g++")
and TIERSTORE_TEST_CXXFLAGS. Output: programs below `build/cpp`. The name of an object or a program holds a hash of all
that it is made of (compiler, flags, sources, headers): what is there is right, and what has changed is compiled again.
Errors: CalledProcessError, with the compiler's words; NoCompilerError.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]  # not from repository.py: this file is also run as a program
CPU = REPOSITORY / "kernels" / "cpu"
SOURCES = REPOSITORY / "tests" / "kernels" / "cpp"
BUILD = REPOSITORY / "build" / "cpp"
BINDINGS = "module.cpp"  # the files that are the Python face, by the end of their name
FLAGS = shlex.split(os.environ.get("TIERSTORE_TEST_CXXFLAGS", "-O1"))
FLOATS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")  # as setup.py has them
COMPILE_S = 600.0
LOOKUP_PATH = tuple(sorted(path for path in CPU.glob("*.cpp") if not path.name.endswith(BINDINGS)))
PROGRAMS = {  # each with the product's files that it is linked with
    "lookup_path_test": LOOKUP_PATH,
    "mailbox_test": LOOKUP_PATH,
    "scarcity_test": LOOKUP_PATH,
    "reports_test": (CPU / "reports.cpp", CPU / "key_counts.cpp"),
}


class NoCompilerError(Exception):
    """This machine has no C++ compiler."""


def compiler() -> list[str]:
    """The command of the C++ compiler, as words."""
    named = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not shutil.which(named[0]):
        raise NoCompilerError("there is no C++ compiler: install g++, or name one by CXX")
    return [*named, "-std=c++17", "-g", *FLAGS, *FLOATS, f"-I{CPU}", "-pthread"]


def digest(command: Iterable[str], files: Iterable[Path]) -> str:
    """A hash of a command and of what its files hold."""
    summed = hashlib.sha256("\0".join(command).encode())
    for path in files:
        summed.update(path.name.encode() + b"\0" + path.read_bytes())
    return summed.hexdigest()[:16]


def compile_file(source: Path) -> Path:
    """The object of a source, compiled now if it is not there. Blocks, for seconds."""
    command = compiler()
    headers = sorted([*CPU.glob("*.h"), *SOURCES.glob("*.h")])
    return made(f"{source.stem}-{digest(command, [source, *headers])}.o", [*command, "-c", str(source)])


def program(name: str) -> Path:
    """A test program, compiled and linked now if it is not there. Blocks, up to minutes; safe from any process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_file, (SOURCES / f"{name}.cpp", *PROGRAMS[name])))
    command = compiler()
    return made(f"{name}-{digest([*command, *(part.name for part in objects)], ())}", [*command, *map(str, objects)])


def made(name: str, command: list[str]) -> Path:
    """A file of BUILD, made by a command if it is not there; it appears whole, so that two processes may make it."""
    path = BUILD / name
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        new = BUILD / f"{name}.{os.getpid()}.new"
        subprocess.run([*command, "-o", str(new)], check=True, timeout=COMPILE_S)
        new.replace(path)
    return path


if __name__ == "__main__":
    for each in PROGRAMS:
        print(program(each).relative_to(REPOSITORY))
