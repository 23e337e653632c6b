"""The words of a report: what each figure says, in plain language; a glossary; and the style of the page.

Input: the record of `GroupCurves.to_dict`. Output: HTML text without markup that needs escaping. Errors: none.
"""

from __future__ import annotations

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

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2330; --soft: #566070; --grid: #d7dce3; --card: #f3f5f8;
  --a: #1766ad; --b: #177245; --c: #c05200; --d: #7a5195; --e: #a3284b; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e8ecf2; --soft: #a4afbd; --grid: #3a4350;
  --card: #1f2630;
  --a: #68b3f0; --b: #5fd39a; --c: #ffa35c; --d: #c9a1e8; --e: #ff8fa8; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 2.2rem; margin: 0.5rem 0; } h2 { font-size: 1.35rem; margin: 2.6rem 0 0.4rem; }
.lead { font-size: 1.15rem; } p { max-width: 46rem; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.card { flex: 1 1 14rem; background: var(--card); border-radius: 0.6rem; padding: 0.8rem 1.1rem; }
.card h3 { margin: 0; font-size: 1rem; color: var(--soft); font-weight: 600; }
.card p { margin: 0.2rem 0; font-size: 0.95rem; }
.card .number { font-size: 1.9rem; font-weight: 700; color: var(--a); }
figure { margin: 0.8rem 0; } svg { width: 100%; height: auto; display: block; }
summary { cursor: pointer; color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.28rem 0.8rem 0.28rem 0; border-bottom: 1px solid var(--grid);
  text-align: right; white-space: nowrap; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, th.text { text-align: left; }
th.text { padding-left: 0.8rem; }
td.text { text-align: left; white-space: normal; min-width: 14rem; padding-left: 0.8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.4rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
code { font-size: 0.95em; overflow-wrap: anywhere; } .note { color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.85rem; }
"""


def words_of_figures(record: Record) -> dict[str, str]:
    """Returns what stands above each figure, by its name; the record has a budget that holds entries."""
    last = cached_points(record)[-1]
    most = short_bytes(last["dram_bytes"])
    orders = list(dict.fromkeys(map(str, record["orders"])))
    ceilings = ", ".join(f"{percent(1 - record['first_touch'][order])} for order {order}" for order in orders)
    cost = record["cost"]
    star = ", the star the one that holds the tables whole" if whole_bytes(record) else ""
    return {
        "policies": "Every curve rises to the right: more memory, more accesses answered from it. The mixed policy is "
        "the one that the store uses; the band is its 95 % interval. Static alone knows only what was counted, recency "
        "alone and LRU only what has come by since they began empty. "
        "Dotted uprights mark the recommended budgets" + star + ".",
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
        "start reads as soon as tokens are known.",
    }


def _beyond(record: Record) -> str:
    whole = whole_bytes(record)
    return f"; {short_bytes(whole)} holds the tables whole, which answers every access" if whole else ""
