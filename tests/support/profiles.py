"""Profiles of invented tables, which no store has: counted and merged as the library does it, with an analysis of the
test's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tierstore.decisions.item_statistics import TableGroup
from tierstore.formats.profile import ProfileHeader, ProfileReader, ProfileWriter
from tierstore.offline.count_documents import CountedText, count_documents, count_profiles
from tierstore.offline.documents import Document

Analyse = Callable[[list[TableGroup], dict[str, int]], dict[str, Any]]


@dataclass(frozen=True)
class Documents:
    """Gives the held-out documents of a profile: of an `ItemMapping`, all that counting uses."""

    documents: Callable[[ProfileReader], Iterator[Document]]


def make_profile(
    path: str | os.PathLike[str],
    header: ProfileHeader,
    documents: Iterable[Document],
    analyse: Analyse,
    **options: Any,
) -> dict[str, Any]:
    """Counts documents into a profile; returns its footer."""
    with ProfileWriter(path, header) as writer:
        return _finish(writer, count_documents(writer, documents, **options), analyse)


def merge_profiles(
    path: str | os.PathLike[str],
    parts: Sequence[ProfileReader],
    documents_of: Callable[[ProfileReader], Iterator[Document]],
    analyse: Analyse,
    **options: Any,
) -> dict[str, Any]:
    """Merges profiles; returns the footer of the result."""
    with ProfileWriter(path, parts[0].header) as writer:
        mapping: Any = Documents(documents_of)
        return _finish(writer, count_profiles(writer, parts, mapping, **options), analyse)


def _finish(writer: ProfileWriter, counted: CountedText, analyse: Analyse) -> dict[str, Any]:
    counts = asdict(counted.counts)
    footer = {"kind": writer.header.kind, "counts": counts, "analysis": analyse(counted.groups, counts)}
    writer.finish(footer)
    return footer
