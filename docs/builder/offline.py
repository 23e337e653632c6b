"""Whether a built site loads anything from another host: it must not, so that it can be read without a network.

Input: a folder of HTML, CSS and JavaScript. Output: each load of something that does not lie in the folder, as text.
A link that a reader may click loads nothing. Errors: none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# By tag, the attributes that a browser loads without being asked to.
LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "input": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "form": ("action",),
}
HARMLESS_RELATIONS = {"author", "canonical", "index", "license", "next", "prev", "search", "top", "up"}
ABROAD = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.I)
CSS_LOAD = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)|@import\s+['\"]((?:https?:)?//[^'\"]+)", re.I)
JS_LOAD = re.compile(
    r"(?:fetch|import|importScripts|Worker|EventSource|WebSocket|open|sendBeacon)\(\s*[^)]{0,40}?['\"`]"
    r"((?:https?:|wss?:)?//[^'\"`]+)|\.(?:src|href)\s*=\s*['\"`]((?:https?:)?//[^'\"`]+)"
)


def loads_from_abroad(folder: Path) -> Iterator[str]:
    """Yields what pages, styles and scripts would load from another host, with the file that does."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".html":
            parser = _Loads()
            parser.feed(path.read_text(encoding="utf-8"))
            yield from (f"{name}: {load}" for load in parser.found)
        elif path.suffix in (".css", ".js", ".svg"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield from (f"{name}: {load}" for load in _of_text(text, path.suffix))


def _of_text(text: str, suffix: str) -> Iterator[str]:
    for match in (JS_LOAD if suffix == ".js" else CSS_LOAD).finditer(text):
        yield next(group for group in match.groups() if group)


class _Loads(HTMLParser):
    """Collects what a page loads from another host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._inside = tag
        values = [given.get(name, "") for name in LOADS.get(tag, ())]
        if tag == "link" and not set(given.get("rel", "").lower().split()) & HARMLESS_RELATIONS:
            values.append(given.get("href", ""))
        if tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            values.append(given.get("content", "").partition("=")[2])
        self.found += [f"<{tag}> {value}" for value in values if any(map(ABROAD.match, re.split(r",\s*", value)))]
        self.found += [f"style of <{tag}> {load}" for load in _of_text(given.get("style", ""), ".css")]

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.found += [
                f"<{self._inside}> {load}" for load in _of_text(data, {"style": ".css"}.get(self._inside, ".js"))
            ]

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""
