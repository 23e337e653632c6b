"""What traces and profiles hold, for `tierstore inspect`: by their heads and footers, without reading their data.

Input: a path. Output: a JSON-able dict with stable keys, sizes in bytes, and lines for people. Errors: `FormatError`
for files that are neither, or damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tierstore.errors import FormatError
from tierstore.formats.key_trace import read_key_trace_info
from tierstore.formats.profile import KIND as PROFILE_KIND
from tierstore.formats.profile import NGRAMS
from tierstore.formats.trace import KEYS, TRACE_KIND, read_token_trace_info, sort_of_trace
from tierstore.offline.profile import open_profile
from tierstore.units import count_text, format_bytes

_MAGIC = b"TIERCOLS"
_KIND_AT = struct.Struct("<24x16s")  # behind magic, version and two lengths


def kind_of_file(path: Path) -> str | None:
    """Returns TRACE_KIND or PROFILE_KIND if a file begins like one; None for folders and all other files."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(_KIND_AT.size)
    if len(head) < _KIND_AT.size or not head.startswith(_MAGIC):
        return None
    kind = _KIND_AT.unpack(head)[0].rstrip(b"\0").decode(errors="replace")
    if kind not in (TRACE_KIND, PROFILE_KIND):
        raise FormatError(f"{path} is a file of columns of kind {kind!r}, this tierstore knows traces and profiles")
    return str(kind)


def file_record(path: Path, kind: str) -> dict[str, Any]:
    """Returns what a trace or a profile is about. kind: of `kind_of_file`."""
    common = {"path": str(path), "kind": kind, "bytes": path.stat().st_size}
    if kind == PROFILE_KIND:
        return common | _profile_record(path)
    if sort_of_trace(path) == KEYS:
        keys = read_key_trace_info(path)
        return common | {
            "trace": "keys",
            "accesses": keys.num_accesses,
            "lookups": keys.num_batches,
            "dropped": keys.num_dropped,
            "sample_rate": keys.sample_rate,
            "tables": [_table_record(table.name, table.fingerprint, table.orders) for table in keys.tables],
        }
    tokens = read_token_trace_info(path)
    return common | {
        "trace": "tokens",
        "tokens": tokens.num_tokens,
        "documents": tokens.num_documents,
        "vocab_size": tokens.vocab_size,
        "token_id_max": tokens.token_id_max,
        "source": tokens.source,
    }


def _profile_record(path: Path) -> dict[str, Any]:
    found = open_profile(path)
    recommended = found.recommended
    return {
        "profile": found.header.kind,
        **found.to_dict()["counts"],
        "sample_rate": found.header.sample_rate,
        "held_out": found.header.held_out,
        "tables": [_table_record(*table) for table in found.header.tables],
        "recommended_dram_bytes": None if recommended is None else recommended.dram_bytes,
    }


def _table_record(name: str, fingerprint: str, orders: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "fingerprint": fingerprint, "orders": list(orders)}


def lines_of(record: dict[str, Any]) -> Iterator[str]:
    """Yields what a `file_record` says, for people."""
    size = format_bytes(record["bytes"])
    if record.get("trace") == "tokens":
        vocabulary = "unknown" if record["vocab_size"] is None else f"{record['vocab_size']:,} ids"
        documents = count_text(record["documents"], "document")
        yield f"{record['path']}: a trace of {count_text(record['tokens'], 'token')} of {documents}, {size}"
        yield f"vocabulary: {vocabulary}, the largest id {record['token_id_max']:,}; made by {record['source']}"
        return
    if record["kind"] == TRACE_KIND:
        yield (
            f"{record['path']}: a trace of {count_text(record['accesses'], 'key')} of "
            f"{count_text(record['lookups'], 'lookup')}, "
            f"{100 * record['sample_rate']:g} % of all keys, {record['dropped']:,} dropped, {size}"
        )
    else:
        what = "token" if record["profile"] == NGRAMS else "lookup"
        yield (
            f"{record['path']}: a profile of {count_text(record['tokens'], what)} of "
            f"{count_text(record['documents'], 'document')}, "
            f"{record['held_out_tokens']:,} of {record['held_out_documents']:,} held out, {size}"
        )
        if record["recommended_dram_bytes"] is not None:
            yield f"recommended: --dram {format_bytes(record['recommended_dram_bytes'])}"
    for table in record["tables"]:
        yield f"table {table['name']}, orders {', '.join(map(str, table['orders']))}: {table['fingerprint']}"
