"""The reference of the metrics, from the code that makes them.

Input: the families of a full stat record (`tests/support/stat_record.py`), and the constructors in the engines'
plug-ins, read by `ast` since the engines are not installed. Output: Markdown tables of names, types, meanings and
labels. Errors: `ValueError` if a plug-in makes metrics in a way that this does not read.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric

from tierstore.daemon.families import families_of

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "support" / "stat_record.py"
ENGINES = ROOT / "engram_adapter" / "engines"
HEAD = ["{.metrics}", "| metric | type | what it is |", "|---|---|---|"]


def reference() -> str:
    """Returns the tables: the daemon's metrics, then the engines'."""
    daemon = sorted(families_of(_full_record()), key=lambda family: family.name)
    lines = ["## Of a daemon\n", "`tierstore serve --metrics HOST:PORT` serves them at `/metrics`.\n", *HEAD]
    lines += [_row(_name(each), each.type, _labels(each), each.documentation) for each in daemon]
    lines += ["\n## Of an engine\n", "The plug-ins add them to the metrics page of vLLM and SGLang.\n", *HEAD]
    return "\n".join([*lines, *_rows_of_engines(), ""])


def _full_record() -> Any:
    spec = importlib.util.spec_from_file_location("stat_record", RECORD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stat_record()


def _name(family: Metric) -> str:
    """The name that a query uses."""
    return family.name + {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")


def _labels(family: Metric) -> list[str]:
    return list(dict.fromkeys(name for sample in family.samples for name in sample.labels))


def _row(name: str, kind: str, labels: list[str], text: str) -> str:
    named = f" Labels: {', '.join(f'`{each}`' for each in labels)}." if labels else ""
    return f"| `{name}` | {kind} | {text.rstrip('.')}.{named} |"


def _rows_of_engines() -> list[str]:
    """One row a counter, of all plug-ins together; they make the same ones."""
    rows: dict[str, str] = {}
    for path in sorted(ENGINES.rglob("*.py")):
        for name, text, labels in _counters_of(ast.parse(path.read_text(encoding="utf-8")), path):
            rows.setdefault(name, _row(f"{name}_total", "counter", labels, text))
    return [rows[name] for name in sorted(rows)]


def _counters_of(tree: ast.Module, path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, text and labels of each counter that a file makes, whole or for each of a tuple of names and texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("Counter"):
            names, texts = node.args[0] if node.args else None, node.args[1] if len(node.args) > 1 else None
            labels = next((each.value for each in node.keywords if each.arg == "labels"), (node.args[2:] or [None])[0])
            if isinstance(names, ast.Constant) and isinstance(texts, ast.Constant) and labels is not None:
                yield str(names.value), str(texts.value), list(ast.literal_eval(labels))
            elif isinstance(names, ast.JoinedStr) and labels is not None:
                pairs = list(_pairs(tree))
                if not pairs:
                    raise ValueError(f"{path}:{node.lineno}: no tuple of names and texts is made into counters here")
                for name, text in pairs:
                    yield f"tierstore_engine_{name}", text, list(ast.literal_eval(labels))


def _pairs(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple) and len(node.elts) >= 2:
            first, second = node.elts[:2]
            if all(isinstance(each, ast.Constant) and isinstance(each.value, str) for each in (first, second)):
                name, text = first.value, second.value  # type: ignore[attr-defined]
                if name.isidentifier() and " " in text:
                    yield name.replace("wait_ns", "wait_seconds"), text
