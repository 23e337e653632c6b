"""The pages as Sphinx reads them: docs/ and the documents of the root in one folder, links and generated parts set in.

Input: the repository. Output: a folder of Markdown in the site's layout. `<!-- generated: NAME -->` in a page is
replaced by what that generator writes. A link to another page of the repository is turned into one to where that page
lies in the site, and a link to any other file into a download. So the same links work on a code host and in the site.
Errors: `BrokenLinkError` with page and line for a link to a file that is not there, `KeyError` for an unknown
generator.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

DOCS = "docs"
BUILDER = f"{DOCS}/builder"
ROOT_PAGES = {  # documents of the repository's root, and where they lie in the site
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "internals/architecture.md",
    "FORMAT.md": "reference/format.md",
    "BENCHMARKS.md": "project/benchmarks.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "findings/README.md": "project/findings.md",
}
GENERATED = re.compile(r"^<!-- generated: ([a-z_-]+) -->$", re.M)
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=(?:\s+\"[^\"]*\")?\))|(?<=^\[)[^\]\n]+\]:\s+(\S+)", re.M)
CODE = re.compile(  # blocks, then code within a paragraph
    r"^(?P<block>`{3,}|~{3,})[^\n]*\n.*?^(?P=block)[ ]*$|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)*?(?<!`)(?P=ticks)(?!`)",
    re.M | re.S,
)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|/")
FILES = "files"  # where files of the repository lie that pages link to


class BrokenLinkError(Exception):
    """A link of a page leads nowhere: correct it."""


def pages_of(root: Path) -> dict[str, str]:
    """Returns each page of the site by its path in the repository, and its path in the site."""
    docs = sorted(path for path in (root / DOCS).rglob("*.md") if not path.is_relative_to(root / BUILDER))
    pages = {path.relative_to(root).as_posix(): path.relative_to(root / DOCS).as_posix() for path in docs}
    return pages | {path: page for path, page in ROOT_PAGES.items() if (root / path).is_file()}


def stage(root: Path, source: Path, generators: Mapping[str, Callable[[], str]]) -> int:
    """Fills the folder `source`, which it empties first; returns the number of pages.

    Args:
        root: the repository.
        source: the folder that Sphinx will read.
        generators: writers of generated parts, by name.
    """
    shutil.rmtree(source, ignore_errors=True)
    pages = pages_of(root)
    for path, page in pages.items():
        text = (root / path).read_text(encoding="utf-8")
        text = relinked(text, path, root, pages, source)
        text = generated(text, generators)
        target = source / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return len(pages)


def relinked(text: str, path: str, root: Path, pages: Mapping[str, str], source: Path | None) -> str:
    """Returns a page's text with its links as they are in the site; copies files that it links to below `source`."""
    here = posixpath.dirname(pages[path])
    parts, done = [], 0
    for start, end, link in links_of(text):
        parts += [text[done:start], _target(link, path, root, pages, here, source, text.count("\n", 0, start) + 1)]
        done = end
    return "".join([*parts, text[done:]])


def generated(text: str, generators: Mapping[str, Callable[[], str]]) -> str:
    """Returns a page's text with its generated parts; those that stand in code are examples."""
    hidden = _code_of(text)

    def written(match: re.Match[str]) -> str:
        return match[0] if _is_within(match.start(), hidden) else generators[match[1]]()

    return GENERATED.sub(written, text)


def links_of(text: str) -> Iterator[tuple[int, int, str]]:
    """The relative links of a page outside code: start, end, target."""
    hidden = _code_of(text)
    for match in LINK.finditer(text):
        group = 1 if match[1] is not None else 2
        start, end = match.span(group)
        if not ELSEWHERE.match(match[group]) and not _is_within(start, hidden):
            yield start, end, match[group]


def _code_of(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in CODE.finditer(text)]


def _is_within(place: int, spans: list[tuple[int, int]]) -> bool:
    return any(first <= place < last for first, last in spans)


def _target(
    link: str, path: str, root: Path, pages: Mapping[str, str], here: str, source: Path | None, line: int
) -> str:
    name, _, anchor = link.partition("#")
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    if linked in pages:
        return posixpath.relpath(pages[linked], here or ".") + (f"#{anchor}" if anchor else "")
    if not (root / linked).is_file() or PurePosixPath(linked).parts[0] == "..":
        what = "a folder; name a file in it" if (root / linked).is_dir() else "not there"
        raise BrokenLinkError(f"{path}:{line}: the link to {link} leads to {linked}, which is {what}")
    if source is not None:
        copy = source / FILES / linked
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(os.path.realpath(root / linked), copy)
    return posixpath.relpath(f"{FILES}/{linked}", here or ".")
