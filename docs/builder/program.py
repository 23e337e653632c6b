"""The product's source as syntax trees: modules, their constants, functions and imports, to look names up in.

Input: the repository. Output: `Program`. Errors: `SyntaxError` of a file that is not Python.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tierstore", "kernels", "tools", "engram_adapter")  # the first has links to the next two
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One file: what it defines, and where its imported names come from."""

    name: str
    path: str
    tree: ast.Module
    constants: dict[str, ast.expr] = field(default_factory=dict)
    functions: dict[str, list[Function]] = field(default_factory=dict)  # methods too, by their bare names
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # of `from module import name as alias`
    calls: dict[str, list[tuple[Function | None, ast.Call]]] = field(default_factory=dict)  # by the called name

    def note(self, node: ast.AST, package: str, function: Function | None = None) -> None:
        """Notes what is defined, imported and called below a node; `function` is around it."""
        for child in ast.iter_child_nodes(node):
            around = function
            if isinstance(child, ast.Call):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                self.calls.setdefault(name, []).append((function, child))
            elif isinstance(child, Function):
                around = child
                self.functions.setdefault(child.name, []).append(child)
            elif isinstance(child, ast.ClassDef):
                self.classes[child.name] = child
            elif isinstance(child, ast.ImportFrom):
                dots = "." * child.level
                base = importlib.util.resolve_name(dots + (child.module or ""), package) if dots else child.module or ""
                for alias in child.names:
                    self.imports[alias.asname or alias.name] = base, alias.name
            if not isinstance(child, ast.Name | ast.Constant | ast.expr_context):  # most nodes: nothing is below them
                self.note(child, package, around)


class Program:
    """All modules of the product."""

    def __init__(self, root: Path = ROOT) -> None:
        self.modules: dict[str, Module] = {}
        for path in _files(root):
            module = _module(path, root)
            self.modules[module.name] = module
        self.error_classes = self._error_classes()
        self.importers: dict[tuple[str, str], list[tuple[Module, str]]] = {}  # by what is imported: where, as what
        for module in self.modules.values():
            for alias, source in module.imports.items():
                self.importers.setdefault(source, []).append((module, alias))
        self._assigned: dict[Function, dict[str, list[ast.expr]]] = {}
        self._appended: dict[Function, dict[str, list[ast.Call]]] = {}

    def assigned(self, function: Function) -> dict[str, list[ast.expr]]:
        """What a function assigns to its local names."""
        if function not in self._assigned:
            self._look_into(function)
        return self._assigned[function]

    def appended(self, function: Function) -> dict[str, list[ast.Call]]:
        """What a function appends to its local lists."""
        if function not in self._appended:
            self._look_into(function)
        return self._appended[function]

    def _look_into(self, function: Function) -> None:
        assigned = self._assigned.setdefault(function, {})
        appended = self._appended.setdefault(function, {})
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        assigned.setdefault(target.id, []).append(node.value)
            elif _appends(node):
                appended.setdefault(node.func.value.id, []).append(node)  # type: ignore[attr-defined, arg-type]

    def constant(self, module: Module, name: str) -> tuple[Module, ast.expr] | None:
        """The value of a module's constant, its own or imported, and the module that it is of."""
        owner, bare = self._owner(module, name)
        found = owner.constants.get(bare) if owner is not None else None
        return (owner, found) if owner is not None and found is not None else None

    def functions(self, module: Module, name: str) -> list[tuple[Module, Function]]:
        """The functions or methods that a name may mean in a module."""
        owner, bare = self._owner(module, name)
        return [(owner, each) for each in owner.functions.get(bare, [])] if owner is not None else []

    def _owner(self, module: Module, name: str) -> tuple[Module | None, str]:
        if name in module.imports and name not in module.functions:
            source, bare = module.imports[name]
            return self.modules.get(source), bare
        return module, name

    def _error_classes(self) -> dict[str, ast.ClassDef]:
        """Every class that derives from TierStoreError, by name."""
        classes = {name: each for module in self.modules.values() for name, each in module.classes.items()}
        found = {"TierStoreError"}
        while True:
            more = {name for name, each in classes.items() if found & {ast.unparse(base) for base in each.bases}}
            if more <= found:
                return {name: classes[name] for name in classes if name in found}
            found |= more


def _appends(node: ast.AST) -> bool:
    """Whether a node is `name.append(value)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr == "append" and isinstance(node.func.value, ast.Name) and bool(node.args)


def _files(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if not any(part in ("kernels", "tools") for part in path.relative_to(root).parts[1:-1]):
                yield path


def _module(path: Path, root: Path) -> Module:
    relative = path.relative_to(root)
    parts = list(relative.with_suffix("").parts)
    if parts[0] in ("kernels", "tools"):
        parts.insert(0, "tierstore")
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = Module(name, relative.as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(relative)))
    module.note(module.tree, name if path.name == "__init__.py" else name.rpartition(".")[0])
    for statement in module.tree.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            module.constants[target.id] = value
    return module
