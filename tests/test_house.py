"""The house keeps its floors: a module imports only from lower ones, and nothing imports what it must not."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import REPOSITORY

# Modules by floor. Everything under a folder's name is on that folder's floor.
FLOORS = {
    "tierstore.kernels": -1,
    "tierstore.version": 0,
    "tierstore.errors": 0,
    "tierstore.lazy": 0,
    "tierstore.process.interrupts": 0,
    "tierstore.process.workers": 0,
    "tierstore.process.forks": 0.5,
    "tierstore.printable": 0,
    "tierstore.units": 0.5,  # of the same floor, but above errors
    "tierstore.extras": 0.5,
    "tierstore.causes": 0.7,  # names errors, with sizes in words
    "tierstore.file_systems": 0.7,
    "tierstore.spec": 0.5,
    "tierstore.formats": 1,
    "tierstore.decisions": 2,
    "tierstore.stats": 2.5,  # pure arithmetic too, that tiers count with
    "tierstore.tiers": 3,
    "tierstore.offline.build": 3,
    "tierstore.offline.profile": 3.5,
    "tierstore.offline.place": 3.5,  # of the same floor: uses tiers and the build's lock
    "tierstore.offline.count": 3,
    "tierstore.verify": 3.5,
    "tierstore.offline.placed_choice": 3.6,  # what a repair reads of a damaged placement
    "tierstore.offline.repair": 3.7,  # of the same floor: uses build, place and verify
    "tierstore.store.recorder": 3.5,  # of the same floor, but above the tiers
    "tierstore.store.backing": 3.5,
    "tierstore.store.table": 3.8,
    "tierstore.store.store": 4,
    "tierstore.store.embedded": 4.5,
    "tierstore.daemon": 5,
    "tierstore": 6,
    "engram_adapter": 7,
    "tierstore.tools": 8,
}
HEAVY = {"torch", "triton", "transformers", "matplotlib"}
ON_THE_GPU = ("tierstore.kernels.gpu", "tierstore.tiers.hbm")  # load torch and triton, and are loaded by who uses a GPU
SOURCES = sorted(
    path
    for folder in ("tierstore", "kernels", "tools", "engram_adapter")
    for path in (REPOSITORY / folder).rglob("*.py")
    if not any(part in ("kernels", "tools") for part in path.relative_to(REPOSITORY).parts[1:-1])
)


def module_of(path: Path) -> str:
    parts = list(path.relative_to(REPOSITORY).with_suffix("").parts)
    if parts[0] in ("kernels", "tools"):
        parts.insert(0, "tierstore")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return module


def imports_of(path: Path, *, top_level_only: bool) -> set[str]:
    """Names of imported modules, relative imports resolved; of `from a import b`, a.b where that is a module, else a."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                if node.level
                else node.module
            )
            for alias in node.names:
                named = f"{base}.{alias.name}"
                found.add(named if named in MODULES else base)
    return found


MODULES = {module_of(path) for path in SOURCES}


def test_there_are_modules_to_look_at() -> None:
    assert {
        "tierstore.store.store",
        "tierstore.kernels.reference",
        "engram_adapter.hash_spec",
        "tierstore.tools.cli",
    } <= MODULES


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    module = module_of(path)
    for name in imports_of(path, top_level_only=False):
        if name.split(".")[0] not in ("tierstore", "engram_adapter"):
            continue
        room, imported = room_of(module), room_of(name)
        assert room == imported or FLOORS[imported] < FLOORS[room], f"{module} imports {name} from its floor or above"


STORE = [
    path
    for path in SOURCES
    if module_of(path).startswith("tierstore")
    and room_of(module_of(path)) != "tierstore.tools"
    and not module_of(path).startswith(ON_THE_GPU)
]


@pytest.mark.parametrize("path", STORE, ids=module_of)
def test_the_store_loads_neither_torch_nor_triton_when_imported(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports_of(path, top_level_only=True)} & HEAVY
    assert not heavy


@pytest.mark.parametrize("path", STORE, ids=module_of)
def test_what_needs_a_gpu_is_imported_when_it_is_used(path: Path) -> None:
    assert not {name for name in imports_of(path, top_level_only=True) if name.startswith(ON_THE_GPU)}


def test_the_commands_load_neither_torch_nor_triton_when_imported() -> None:
    code = (
        "import importlib, sys, tierstore, engram_adapter; from tierstore.tools.cli import COMMANDS\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(module)\n"
        f"assert not {HEAVY!r} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_module_is_called_by_a_name_that_says_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}


def test_the_lookup_path_does_not_touch_lmdb() -> None:
    users = {module_of(path) for path in SOURCES if "lmdb" in imports_of(path, top_level_only=False)}
    assert users == {"tierstore.formats.catalog"}


def test_decisions_are_pure() -> None:
    for path in SOURCES:
        if module_of(path).startswith("tierstore.decisions"):
            assert not imports_of(path, top_level_only=False) & {
                "os",
                "time",
                "random",
                "pathlib",
                "io",
                "socket",
                "threading",
            }


def test_every_named_place_of_the_house_is_there() -> None:
    for name in (
        "README.md",
        "ARCHITECTURE.md",
        "FORMAT.md",
        "BENCHMARKS.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        ".ci/run",
    ):
        assert (REPOSITORY / name).is_file(), name
