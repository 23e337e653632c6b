"""Whether a checkpoint is the one that a store was built from. Pure.

Input: the catalog's record of the checkpoint (`origin`), today's record, and the tables' sources. Output: yes or no,
and the files that have changed since. Errors: none.

Two questions, because files are copied and touched without being changed, and changed between the samples that a digest
covers. `same_checkpoint` asks what the files say about themselves; if it says yes, `changed_files` names those whose
rows must be read again before anybody relies on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .table_source import TableSource

_CONTENT = ("bytes", "header_sha256", "samples_sha256")


def same_checkpoint(recorded: dict[str, Any], found: dict[str, Any], sources: Sequence[TableSource]) -> bool:
    """Returns whether two records are of one checkpoint, as far as headers and samples show.

    The digests are equal, or those of every file that the tables lie in: of a checkpoint the other files may not have
    been downloaded then, or be gone now. Older records have one digest of all files together, and no time or inode.
    """
    if recorded.get("digest") == found["digest"]:
        return True
    then, now, names = _by_name(recorded), _by_name(found), _file_names(sources)
    return bool(names) and all(
        name in then
        and name in now
        and all(key in then[name] and then[name][key] == now[name][key] for key in _CONTENT)
        for name in names
    )


def changed_files(recorded: dict[str, Any], sources: Sequence[TableSource]) -> list[str]:
    """Returns the names of the tables' files whose length, time or inode is not the recorded one,
    or was not recorded."""
    then = _by_name(recorded)
    changed = set()
    for source in sources:
        for tensor in source.tensors:
            entry = then.get(tensor.path.name, {})
            if tensor.identity != (entry.get("bytes"), entry.get("mtime_ns"), entry.get("inode")):
                changed.add(tensor.path.name)
    return sorted(changed)


def _by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    files = record.get("files")
    return (
        {str(entry.get("name")): entry for entry in files if isinstance(entry, dict)} if isinstance(files, list) else {}
    )


def _file_names(sources: Sequence[TableSource]) -> set[str]:
    return {tensor.path.name for source in sources for tensor in source.tensors}
