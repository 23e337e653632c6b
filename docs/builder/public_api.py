"""The reference of the public API, from names, signatures and docstrings.

Input: `__all__` of `tierstore` and of `engram_adapter`. Output: Markdown, one section a name, one below it for each
public method. Sections of a Google docstring (Args, Returns, Raises, Yields) become lists. Errors: `ValueError` for a
public name without a docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

SECTIONS = ("Args", "Returns", "Yields", "Raises", "Example", "Examples")
SIGNATURE_COLUMNS = 88


def of_tierstore() -> str:
    """Returns the reference of `tierstore`."""
    import tierstore

    return reference(tierstore, [name for name in tierstore.__all__ if not name.startswith("_")])


def of_engram_adapter() -> str:
    """Returns the reference of `engram_adapter`."""
    import engram_adapter

    return reference(engram_adapter, [*engram_adapter.__all__, "CommitCallback"])


def reference(module: ModuleType, names: list[str]) -> str:
    """Returns the reference of a module's names: functions, then classes, then errors."""
    objects = {name: getattr(module, name) for name in names}
    ordered = sorted(objects, key=lambda name: (_kind(objects[name]), name.lower()))
    lines = [f"| `{module.__name__}` | what it is |", "|---|---|"]
    for name in ordered:
        title = _title(objects[name], name, module)
        lines.append(f"| [`{title}`](#{title.lower().replace('.', '')}) | {_first_sentence(objects[name], name)} |")
    return "\n".join([*lines, "", *(line for name in ordered for line in _section(objects[name], name, module))])


def _title(found: Any, name: str, module: ModuleType) -> str:
    """A function's full name, a class's own: `tierstore.plan` and `Plan` have anchors of their own."""
    return name if inspect.isclass(found) else f"{module.__name__}.{name}"


def _kind(found: Any) -> int:
    if inspect.isclass(found):
        return 2 if issubclass(found, BaseException) else 1
    return 0


def _first_sentence(found: Any, name: str) -> str:
    text = " ".join(_doc(found, name).partition("\n\n")[0].split())
    return _escaped(re.split(r"(?<=\.)\s", text, maxsplit=1)[0]).replace("|", "\\|")


def _doc(found: Any, name: str) -> str:
    text = inspect.getdoc(found)
    if not text:
        raise ValueError(f"{name} is public and has no docstring")
    return re.sub(rf";(?: also)? `\w+\.{name}`", "", text)  # where it is to be had: here


def _section(found: Any, name: str, module: ModuleType) -> Iterator[str]:
    yield f"\n## {_title(found, name, module)}\n"
    if not inspect.isclass(found):
        yield from _signature(f"{module.__name__}.{name}", found)
        yield from prose(_doc(found, name), _parameters(found))
        return
    if issubclass(found, BaseException):
        yield from prose(_doc(found, name))
        return
    init = inspect.getdoc(found.__init__) if "__init__" in vars(found) and not is_dataclass(found) else None
    if init or is_dataclass(found):
        yield from _signature(f"{module.__name__}.{name}", found)
    yield from prose(_doc(found, name))
    if init:
        yield from prose(init, _parameters(found.__init__))
    for below, member in _members(found):
        yield f"\n### {name}.{below}\n"
        if isinstance(member, property):
            yield from _property(below, member)
        else:
            yield from _signature(below, member)
        yield from prose(_doc(member, f"{name}.{below}"), _parameters(member))


def _members(found: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class and of its bases of ours, in the order in which they are written."""
    seen = {each.name for each in fields(found)} if is_dataclass(found) else set()
    for base in found.__mro__:
        if not base.__module__.startswith(("tierstore", "engram_adapter")):
            continue
        for name, member in vars(base).items():
            plain = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            if name.startswith("_") or name in seen or not (isinstance(plain, property) or callable(plain)):
                continue
            seen.add(name)
            if inspect.getdoc(plain):
                yield name, plain


def _property(name: str, member: property) -> Iterator[str]:
    returns = getattr(member.fget, "__annotations__", {}).get("return", "")
    yield f"```python\n{name}" + (f": {_annotation(returns)}" if returns else "") + "  # a property\n```\n"


def _signature(name: str, found: Any) -> Iterator[str]:
    try:
        signature = inspect.signature(found)
    except ValueError:
        return
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    shown = [_parameter(each) for each in parameters]
    for place, each in enumerate(parameters):
        if each.kind is each.KEYWORD_ONLY and not any(p.kind in (p.VAR_POSITIONAL,) for p in parameters[:place]):
            shown.insert(place, "*")
            break
    result = signature.return_annotation
    arrow = "" if inspect.isclass(found) or result is signature.empty else f" -> {_annotation(result)}"
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) > SIGNATURE_COLUMNS:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){arrow}"
    yield f"```python\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = prefix + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        default = repr(parameter.default)
        text += (" = " if ":" in text else "=") + (default if len(default) < 40 and "<" not in default else "...")
    return text


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def _parameters(found: Any) -> list[str]:
    try:
        return list(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # a property
        return []


def prose(text: str, parameters: Sequence[str] = ()) -> Iterator[str]:
    """A Google docstring as Markdown: its sections become lists of definitions.

    So do paragraphs that begin with a parameter: `name: what it is. other: what that is.`
    """
    lines, name, block = text.splitlines(), "", list[str]()
    for line in [*lines, "."]:
        heading = line[:-1] if line.endswith(":") and line[:-1] in SECTIONS else ""
        if heading or line == ".":
            yield from _block(name, block, parameters)
            name, block = heading, []
        elif name and line and not line.startswith(" "):  # text again behind a section
            yield from _block(name, block, parameters)
            name, block = "", [line]
        else:
            block.append(line)


def _block(name: str, lines: list[str], parameters: Sequence[str]) -> Iterator[str]:
    text = inspect.cleandoc("\n".join(lines)) if name else "\n".join(lines).strip()
    if not text:
        return
    if name in ("Args", "Raises"):
        yield f"**{name}**\n"
        yield from map(_definition, _items(text))
    elif name:
        yield f"**{name}**: {_escaped(' '.join(text.split()))}\n"
    else:
        for paragraph in re.split(r"\n\s*\n", text):
            yield from _paragraph(paragraph, parameters)


def _paragraph(text: str, parameters: Sequence[str]) -> Iterator[str]:
    begins = rf"(?:{'|'.join(map(re.escape, parameters))}):\s"
    if parameters and re.match(begins, text):
        yield from map(_definition, re.split(rf"(?<=\.)\s+(?={begins})", text))
    else:
        yield _escaped(text) + "\n"


def _definition(item: str) -> str:
    term, _, meaning = item.partition(":")
    text = " ".join(meaning.split())
    return f"`{term.strip()}`\n: {_escaped(text[:1].upper() + text[1:])}\n"


def _items(text: str) -> Iterator[str]:
    """The items of a section: each begins at the margin."""
    item: list[str] = []
    for line in text.splitlines():
        if line and not line.startswith(" ") and item:
            yield "\n".join(item)
            item = []
        item.append(line)
    if item:
        yield "\n".join(item)


def _escaped(text: str) -> str:
    """Text whose brackets and stars mean nothing in Markdown; code in backticks and indented blocks stay."""
    parts = re.split(r"(`[^`]*`|^    .*$)", text, flags=re.M)
    return "".join(
        part if part.startswith(("`", "    ")) else re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts
    )
