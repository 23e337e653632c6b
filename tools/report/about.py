"""What a report is about, and what to do next: store, inputs, date, the next command, and what to know of the numbers.

Input: what `tierstore profile` was given, and the footer that it made. Output: a dict for JSON,
the terminal and the page.
"""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tierstore.decisions.recommend import Recommendation, default_choice
from tierstore.formats.trace import KEYS, read_token_trace_info, sort_of_trace
from tierstore.offline.documents import DOCUMENTS_MIN, document_limits
from tierstore.printable import printable
from tierstore.version import VERSION

from .tables import Record, exact_bytes

About = dict[str, Any]


def about(store: Path, inputs: Sequence[Path], profile: Path, footer: Mapping[str, Any], notes: Sequence[str]) -> About:
    """Returns {store, inputs, profile, made, tierstore, next, notes}: text each, inputs and notes lists of it.

    made: date and time in UTC. next: the command that plans with the default budget, "" if the profile cannot be
    planned with. notes: of the caller's own; those that follow from the footer come after them.
    """
    groups: Sequence[Record] = footer["analysis"]["groups"]
    counts = footer["counts"]
    command = ""
    if groups and counts["held_out_documents"] < counts["documents"]:
        choice = default_choice([[Recommendation(**each) for each in group["recommended"]] for group in groups])
        size = exact_bytes(choice.dram_bytes).replace(" ", "")
        command = shlex.join(["tierstore", "plan", str(store), str(profile), "--dram", size])
    return {
        "store": _shown(str(store)),
        "inputs": [_shown(str(path)) for path in inputs],
        "profile": _shown(str(profile)),
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "tierstore": VERSION,
        "next": _shown(command),
        "notes": [_shown(note) for note in (*notes, *_notes_of(counts)) if note],
    }


def stretch_note(traces: Sequence[Path]) -> str:
    """Returns what to say of traces whose documents are so few that they are cut; "" if they are not."""
    if any(sort_of_trace(trace) == KEYS for trace in traces):
        return ""
    infos = [read_token_trace_info(trace) for trace in traces]
    num_tokens, num_documents = (sum(getattr(info, name) for info in infos) for name in ("num_tokens", "num_documents"))
    stretch = document_limits(num_tokens, num_documents)[1]
    if num_documents >= DOCUMENTS_MIN or num_tokens <= stretch:
        return ""
    documents = "one document" if num_documents == 1 else f"{num_documents} documents"
    return (
        f"{num_tokens:,} tokens are {documents}, so they were cut into stretches of {stretch:,} tokens, some of them "
        f"held out; a stretch resembles its neighbours more than another document would. If a token ends each "
        f"document, write the trace again with --eos ID (or --doclens)"
    )


def _notes_of(counts: Mapping[str, int]) -> list[str]:
    documents, held_out = counts["documents"], counts["held_out_documents"]
    if not held_out:
        return ["no documents were held out: there is nothing to predict; give more text, or a larger --held-out"]
    if held_out == documents:
        return [
            f"all {documents:,} documents were held out, so that nothing was counted: the predictions are of an empty "
            f"static set, and there is nothing to place; give more text, or a smaller --held-out"
        ]
    if held_out == 1:
        return ["intervals are 0 to 100 %, because one document was held out; give more text, or a larger --held-out"]
    return []


def _shown(text: str) -> str:
    """A name from outside, for terminal and page: control characters escaped, bytes that are no UTF-8 replaced."""
    return printable(os.fsencode(text).decode(errors="replace"))
