"""The words of a report: its answer in one sentence, what each figure says in plain language, and a glossary.

Input: the record of `GroupCurves.to_dict`. Output: HTML text without markup that needs escaping. Errors: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tierstore.decisions.recommend import Recommendation, default_choice

from .tables import Record, cached_points, percent, short_bytes, whole_bytes

GLOSSARY = (
    ("token", "A piece of text as a language model sees it: a word, or part of one."),
    ("order", "How many of the latest tokens an entry belongs to. Order 2: the last two tokens taken together."),
    ("entry", "All rows that a table has for one combination of tokens, kept side by side: what caches hold."),
    ("access", "One look-up of one entry: every token makes one in each order."),
    ("hit", "An access that memory answers. The hit rate is the share of accesses that hit."),
    ("static set", "Entries chosen beforehand because they were counted most often. They stay where they are."),
    ("recency cache", "Entries that were used lately and often enough to stay. It adapts to what is being read now."),
    ("mixed", "Part of the memory for a static set, the rest for a recency cache: the best division that was tried."),
    ("LRU", "The usual cache: what was used longest ago gives way first. Here for comparison, of the same bytes."),
    ("packed entries", "Entries whose rows a placement keeps side by side on disk, so that one read brings the entry."),
    ("never seen before", "Neither in the text that was counted nor earlier in the text that was replayed."),
    ("whole tables", "Memory holds every row, so that nothing is read from disk, also not what was never seen before."),
    ("knee", "Where a curve bends: before it each doubling of memory brings more than behind it."),
    (
        "95 % interval",
        "Where another stream of the same kind of text will lie in 95 of 100 cases. "
        "Whole documents are redrawn for it.",
    ),
)


def answer(records: Sequence[Record]) -> tuple[str, str]:
    """Returns the budget to buy, and what it brings: "64 GiB", "it answers ...". The same that `plan` takes by default.

    Of several groups, whose tables share the budget: what the one says that asks for it.
    """
    record = max(records, key=knee_bytes)
    budget = knee_bytes(record)
    return _kept_together(short_bytes(budget)), _brings(record, budget)


def _kept_together(text: str) -> str:
    """A number and its unit on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def knee_bytes(record: Record) -> int:
    """Returns the budget that `plan` would take by default for a group by itself."""
    return default_choice([[Recommendation(**choice) for choice in record["recommended"]]]).dram_bytes


def name_of(choice: Mapping[str, Any], record: Record) -> str:
    """Returns a recommendation's name; of a frugal budget that is the knee too, the latter."""
    is_knee = choice["name"] == "frugal" and choice["dram_bytes"] == knee_bytes(record)
    return "knee" if is_knee else str(choice["name"])


def _brings(record: Record, budget: int) -> str:
    points = record["points"]
    index = next(index for index, point in enumerate(points) if point["dram_bytes"] == budget)
    here, larger = points[index], points[index + 1 :]
    if here.get("resident"):
        return "it holds the tables whole, so that every look-up is answered from memory"
    rate = here["mixed"]["hit_rate"]["all"]
    words = f"it answers {_kept_together(percent(rate))} of all look-ups from memory"
    if not larger:
        return f"{words}; nothing larger was tried"
    size = _kept_together(short_bytes(larger[0]["dram_bytes"]))
    if larger[0].get("resident"):
        return f"{words}; the next size, {size}, holds the tables whole"
    gain = 100 * (larger[0]["mixed"]["hit_rate"]["all"] - rate)
    return f"{words}, and {size} would add {gain:.1f} points"


def words_of_figures(record: Record) -> dict[str, str]:
    """Returns what stands above each figure, by its name; the record has a budget that holds entries."""
    last = cached_points(record)[-1]
    most = short_bytes(last["dram_bytes"])
    orders = list(dict.fromkeys(map(str, record["orders"])))
    ceilings = ", ".join(f"{percent(1 - record['first_touch'][order])} for order {order}" for order in orders)
    cost = record["cost"]
    return {
        "policies": "Every curve rises to the right: more memory, more accesses answered from it. The mixed policy is "
        "the one that the store uses; the band is its 95 % interval. Static alone knows only what was counted, recency "
        "alone and LRU only what has come by since they began empty. "
        "Rings mark the recommended budgets; the bold one is the knee, where the curve bends.",
        "orders": "Longer combinations of tokens are rarer, so that they repeat less and hit less. Dashed lines are "
        "ceilings: what is above them are accesses to entries never seen before, neither in the counted text nor "
        f"earlier in the replayed one. No cache passes them: {ceilings}. "
        f"Counting more text raises them{_beyond(record)}.",
        "split": f"Of 100 accesses, by memory. At {most} the static set answers "
        f"{percent(last['mixed']['static_share']['all'])}, the recency cache "
        f"{percent(last['mixed']['recency_share']['all'])}. {percent(record['first_touch']['all'])} are to entries "
        "never seen before, which a cache has to read from disk.",
        "reads": f"An entry that is not in memory costs {cost['reads']} reads, one for each of its rows. Where a "
        f"placement keeps its rows side by side on disk it costs {cost['packed_reads']}; "
        "entries that were counted but once are not kept there.",
        "steps": "A step decodes one token of each sequence, and waits for the slowest read of any of them. The more "
        "sequences are decoded side by side, the fewer steps need no read at all: "
        "start reads as soon as tokens are known. Each curve is a recommended budget.",
    }


def _beyond(record: Record) -> str:
    whole = whole_bytes(record)
    return f"; {short_bytes(whole)} holds the tables whole, which answers every access" if whole else ""
