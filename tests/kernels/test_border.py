"""The border between Python and C++ is what its stub says, is required, and has one name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import REPOSITORY

from tierstore import kernels

STUB = ast.parse((REPOSITORY / "kernels" / "_cpu.pyi").read_text())
WITHOUT_EXTENSION = "import sys; sys.modules['tierstore.kernels._cpu'] = None; import tierstore"


def names_of(body: list[ast.stmt]) -> set[str]:
    """The public names that statements of a stub declare."""
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def failed_import(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_the_stub_declares_what_the_extension_has() -> None:
    module = sys.modules["tierstore.kernels._cpu"]
    assert names_of(STUB.body) == {name for name in dir(module) if not name.startswith("_")}
    classes = [node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    assert classes
    for node in classes:
        bound = {name for name in dir(getattr(module, node.name)) if not name.startswith("_")}
        assert names_of(node.body) == bound, node.name


@pytest.mark.parametrize(
    "node", [node for node in STUB.body if isinstance(node, ast.FunctionDef)], ids=lambda node: node.name
)
def test_the_stub_gives_functions_the_arguments_and_defaults_that_they_have(node: ast.FunctionDef) -> None:
    signature = str(getattr(kernels, node.name).__doc__).splitlines()[0]
    taken = signature[: signature.rindex(") -> ")]
    required = [None] * (len(node.args.args) - len(node.args.defaults))
    defaults = [*required, *node.args.defaults, *node.args.kw_defaults]
    arguments = [*node.args.args, *node.args.kwonlyargs]
    starts = [taken.find(f"{argument.arg}: ") for argument in arguments]
    assert -1 not in starts, signature
    assert starts == sorted(starts), signature
    assert taken.count(": ") == len(arguments), signature
    for default, start, end in zip(defaults, starts, [*starts, len(taken)][1:], strict=True):
        assert (" = " in taken[start:end]) == (default is not None), taken[start:end]


def test_types_of_records_have_the_sizes_that_c_plus_plus_gives() -> None:
    assert kernels.TRAILER.itemsize == kernels.PAGE_TRAILER_BYTES
    assert kernels.REPORT.itemsize * kernels.NUM_RING_REPORTS + 4096 == kernels.CLIENT_BLOCK_BYTES
    assert kernels.INDEX_BUCKET["keys"].shape == kernels.INDEX_BUCKET["places"].shape == (kernels.BUCKET_SLOTS,)
    assert kernels.INDEX_HEAD["bucket_start"].shape == kernels.INDEX_HEAD["num_buckets"].shape == (kernels.ORDERS_MAX,)


def test_without_the_extension_the_import_says_how_to_get_it(tmp_path: Path) -> None:
    message = failed_import(WITHOUT_EXTENSION, tmp_path)
    assert message.startswith("ImportError: tierstore's compiled extension")
    for remedy in ("gcc", "pip install --force-reinstall .", "make wheel", "pip install dist/*.whl"):
        assert remedy in message


def test_under_its_bare_name_the_package_is_refused() -> None:
    message = failed_import("import kernels", REPOSITORY)
    assert message.startswith("ImportError")
    assert "from tierstore import kernels" in message
