"""The house keeps its floors: a file imports only from its own folder and from those below, and nothing it must not."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from support.repository import REPOSITORY

# Folders from the lowest floor to the highest, and what each holds; ARCHITECTURE.md has the same table. Folders in one
# tuple share a floor, and do not import each other. The root's files are two: the ground, and the face.
GROUND = (
    "errors causes units version codec address_map slices spec layout stats lazy durable extras file_systems printable"
)
FACE = "__init__ connecting"
FLOORS = (
    {"kernels": "C++ and Triton for what is done to every row, and NumPy references of the same"},
    {f"tierstore: {GROUND.replace(' ', ', ')}": "the ground: words that every file needs"},
    {"tierstore/process": "what happens to the process: interrupts, forks, worker threads"},
    {"tierstore/formats": "bytes at rest"},
    {"tierstore/decisions": "pure choices: budgets, profile analysis, plans, replans"},
    {"tierstore/tiers": "the engine contract, its native implementation, nvme, static set, hbm"},
    {"tierstore/store": "the open store", "tierstore/offline": "build, verify, repair, count, profile, plan, place"},
    {"tierstore/training": "rows that change: row cache, optimizers, runs, commits, versions"},
    {"tierstore/ipc": "between the processes of one host"},
    {"tierstore/attached": "the local client of a daemon"},
    {"tierstore/remote": "gRPC, both ends"},
    {"tierstore/daemon": "the daemon: shared tiers, epochs, versions, learning, server, metrics"},
    {f"tierstore: {FACE.replace(' ', ', ')}": "the public face"},
    {"engram_adapter": "the model's side: token map, hashing, embeddings, one file a model family"},
    {"engram_adapter/engines": "plug-ins of vLLM and SGLang, models of transformers: rows from a store"},
    {"engram_adapter: __init__": "the public face of the model's side"},
    {"tools": "one file a command; bench, demo, inputs, report and stat in folders"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "triton", "transformers", "matplotlib"}
ON_THE_GPU = (  # load torch and triton, and are loaded only if a GPU is used
    "tierstore.kernels.gpu",
    "tierstore.tiers.hbm",
    "tierstore.attached.hbm",
    "tierstore.attached.static_pin",
)
LARGEST_FRACTION = 0.2  # of the package's lines, in one folder
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


MODULES = {module_of(path): path for path in SOURCES}


def room_of(module: str) -> str:
    """The key of FLOOR_OF that a module belongs to."""
    parts = module.split(".")
    if module == "engram_adapter":
        return "engram_adapter: __init__"
    if (room := "/".join(parts[:2])) in FLOOR_OF:
        return room
    if parts[0] != "tierstore":
        return parts[0]
    if len(parts) > 1 and parts[1] in ("kernels", "tools"):
        return parts[1]
    name = parts[1] if len(parts) > 1 else "__init__"
    assert name in f"{GROUND} {FACE}".split(), f"{module} has no floor; give it one in FLOORS"
    return next(room for room in FLOOR_OF if ": " in room and name in room.partition(": ")[2].split(", "))


@functools.cache
def imports_of(path: Path, *, top_level_only: bool) -> frozenset[str]:
    """Names of imported modules, relative imports resolved; of `from a import b`, a.b if that is a module, else a."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            base = importlib.util.resolve_name(dots + (node.module or ""), package) if dots else node.module or ""
            for alias in node.names:
                named = f"{base}.{alias.name}"
                found.add(named if named in MODULES else base)
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    """The files of ours that a file imports, at its top or within a function."""
    return {name for name in imports_of(MODULES[module], top_level_only=False) if name in MODULES} - {module}


def test_there_are_modules_to_look_at() -> None:
    some = {"tierstore.store.store", "tierstore.kernels.reference", "engram_adapter.hash_spec", "tierstore.tools.cli"}
    assert some <= set(MODULES)


def test_a_file_imports_only_from_its_own_folder_and_from_floors_below() -> None:
    for module in MODULES:
        for imported in own_imports(module):
            here, there = room_of(module), room_of(imported)
            assert here == there or FLOOR_OF[there] < FLOOR_OF[here], f"{module} imports {imported} from above"


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for imported in sorted(own_imports(module)):
                visit(imported, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def reached_from(module: str) -> set[str]:
    """All modules, ours and others', that a file's imports lead to, followed file by file."""
    found, waiting = set[str](), [module]
    while waiting:
        for name in imports_of(MODULES[waiting.pop()], top_level_only=False) - found:
            found.add(name)
            if name in MODULES:
                waiting.append(name)
    return found


def test_decisions_are_pure_and_reach_no_lmdb() -> None:
    for module in MODULES:
        if module.startswith("tierstore.decisions"):
            impure = {"os", "time", "random", "pathlib", "io", "socket", "threading"}
            assert not imports_of(MODULES[module], top_level_only=False) & impure, module
            assert "lmdb" not in reached_from(module), module


def test_lmdb_is_known_to_the_catalog_alone() -> None:
    users = {module for module, path in MODULES.items() if "lmdb" in imports_of(path, top_level_only=False)}
    assert users == {"tierstore.formats.catalog_records"}


def test_the_store_loads_neither_torch_nor_triton_when_imported() -> None:
    for module, path in MODULES.items():
        if module.startswith("tierstore") and room_of(module) != "tools" and not module.startswith(ON_THE_GPU):
            imports = imports_of(path, top_level_only=True)
            assert not {name.split(".")[0] for name in imports} & HEAVY, module
            assert not {name for name in imports if name.startswith(ON_THE_GPU)}, module


def test_the_commands_load_neither_torch_nor_triton_when_imported() -> None:
    code = (
        "import importlib, sys, tierstore, engram_adapter; from tierstore.tools.cli import COMMANDS\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(module)\n"
        f"assert not {HEAVY!r} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_no_module_is_called_by_a_name_that_says_nothing() -> None:
    assert not {path.stem for path in SOURCES} & {"utils", "util", "common", "helpers", "misc"}


def test_no_folder_holds_more_than_a_fifth_of_the_package() -> None:
    lines: dict[str, int] = {}
    for path in (path for path in SOURCES if path.relative_to(REPOSITORY).parts[0] == "tierstore"):
        room = room_of(module_of(path))
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    total = sum(lines.values())
    assert {room: count for room, count in lines.items() if count > LARGEST_FRACTION * total} == {}, total


def test_architecture_has_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| (.+) \|$", (REPOSITORY / "ARCHITECTURE.md").read_text(), re.M)
    assert [(int(floor), room, holds) for floor, room, holds in rows] == [
        (number, room, holds) for number, rooms in enumerate(FLOORS) for room, holds in rooms.items()
    ]


def test_every_named_place_of_the_house_is_there() -> None:
    names = "README.md ARCHITECTURE.md FORMAT.md BENCHMARKS.md CHANGELOG.md CONTRIBUTING.md LICENSE Makefile .ci/run"
    assert not [name for name in names.split() if not (REPOSITORY / name).is_file()]
