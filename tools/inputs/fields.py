"""Which column, field or member of a file with several holds its documents: one rule for every container.

Input: the names that there are, and what each holds; the name that the user gave. Output: a `Field`.
Errors: none; a file without such a field is `NoField`, which says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TEXT, IDS, CHAT = "text", "ids", "chat"  # what a field holds: a text, a list of token ids, a list of messages
NAMES = {  # taken if nobody names a field, the first that there is
    TEXT: ("text", "content"),
    IDS: ("input_ids", "token_ids", "tokens", "ids"),
    CHAT: ("messages", "conversations"),
}
WHAT = {TEXT: "text", IDS: "token ids", CHAT: "chat messages"}
NAMED_MAX = 8


@dataclass(frozen=True)
class Field:
    """What of each row or line is a document. name: None if the row itself is; sort: TEXT, IDS or CHAT."""

    name: str | None
    sort: str

    @property
    def is_ids(self) -> bool:
        """Whether it holds token ids; if not, it needs a tokenizer."""
        return self.sort == IDS


@dataclass(frozen=True)
class MemberField(Field):
    """A field of the members of an archive. extension: of the members that hold it; name None: they are the field."""

    extension: str = ""


@dataclass(frozen=True)
class NoField:
    """why: what there is instead, for a message."""

    why: str


def choose_field(sorts: Mapping[str, str | None], wanted: str | None, of: str) -> Field | NoField:
    """Returns the field of documents.

    Args:
        sorts: Of each name TEXT, IDS, CHAT, or None for anything else.
        wanted: The name that the user gave; None: by NAMES.
        of: What has these names, for messages: "its first line", "it".
    """
    if wanted is not None:
        sort = sorts.get(wanted)
        if sort is not None:
            return Field(wanted, sort)
        return NoField(f"{of} has no text or token ids in a field {wanted}; it has: {_listed(sorts)}")
    for sort, names in NAMES.items():
        for name in names:
            if sorts.get(name) == sort:
                return Field(name, sort)
    return NoField(f"{of} has no field text, nor one of token ids; it has: {_listed(sorts)}")


def _listed(sorts: Mapping[str, str | None]) -> str:
    more = ", .." if len(sorts) > NAMED_MAX else ""
    return ", ".join(list(sorts)[:NAMED_MAX]) + more
