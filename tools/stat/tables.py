"""The stat record of a daemon for people: what `tierstore stat` prints and `tierstore top` keeps up to date.

Input: a record, and the rates since an earlier one if there is one. Output: things that rich prints; what needs the
operator's eye comes first. Errors: none; nothing is fetched here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from tierstore.daemon.counts import Counts, counts_of, expected_rate, total_of
from tierstore.daemon.record import Memory, StatRecord, ratio
from tierstore.units import format_bytes

from .lines import concerns, heading, learning_lines, summary
from .rates import Rates
from .words import UNKNOWN, duration, share_text, short_count

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
    from rich.table import Table

CLIENTS_SHOWN_MAX = 12  # those that ask the most
BAR_COLUMNS = 20
WIDTH_MAX = 10_000  # at which a table is measured: it takes what it needs
HEADLESS = ("bar", "holds")  # columns that say by themselves what they are
HIT_COLUMNS = (
    "table", "order", "keys/s", "hit now", "keys", "hit rate", "plan", "hbm", "static", "recency", "nvme",
)  # fmt: skip
HIT_COLUMNS_LEAST = ("keys", "hbm", "static", "recency", "plan", "nvme", "keys/s")  # in the order in which they go
CLIENT_COLUMNS = ("pid", "uid", "attached", "generation", "keys/s", "keys", "hit rate", "lookups")

# Parts of the budget: what people read, what the record says, and the short name by which a note is found.
_PARTS: tuple[tuple[str, str, Callable[[Memory], int]], ...] = (
    ("static", "static set", lambda memory: memory.static_bytes),
    ("index", "its indexes", lambda memory: memory.index_bytes),
    ("recency", "recency cache", lambda memory: memory.recency_bytes),
    ("resident", "resident tables", lambda memory: memory.resident_bytes),
    ("staging", "staging of reads", lambda memory: memory.staging_bytes),
    ("counts", "counts of keys", lambda memory: memory.counts_bytes),
    ("work", "bookkeeping of slots", lambda memory: memory.work_bytes),
)


def page_of(record: StatRecord, rates: Rates | None, now_s: float, problem: str | None = None) -> Group:
    """Returns all there is to see.

    now_s: Unix time, for how long ago things were. problem: why the record is an old one.
    """
    from rich.console import Group
    from rich.text import Text

    warnings = ([problem] if problem else []) + concerns(record)
    head: list[RenderableType] = [Text("\n".join(heading(record, now_s)))]
    head += [Text(f"! {warning}", style="bold red") for warning in warnings]
    sections: list[RenderableType] = [
        Text("\n".join(summary(record, rates))),
        hits_table(record, rates),
        memory_table(record),
        Text("\n".join(learning_lines(record, now_s))),
        clients_table(record, rates),
    ]
    return Group(*head, *(part for section in sections for part in (Text(), section)))


def hits_table(record: StatRecord, rates: Rates | None) -> FittingTable:
    """Returns who answered, by table and order: shares of all keys since the start, and what goes on now."""
    counts = counts_of(record)
    total = total_of(counts)
    plan = record.plan.hit_rates if record.plan else {}
    left_out = set() if total.hbm else {"hbm"}
    left_out |= set() if plan else {"plan"}
    left_out |= set() if rates is not None else {"keys/s", "hit now"}

    def cells_of(name: str, order: int | None, since: Counts, lately: Counts | None, expected: float) -> dict[str, str]:
        seconds = rates.seconds if rates is not None else math.nan
        resident = name in record.store.tables and record.store.tables[name].resident
        return {
            "table": name,
            "order": "" if order is None else str(order),
            "keys/s": UNKNOWN if lately is None else short_count(lately.keys / seconds),
            "hit now": UNKNOWN if lately is None else share_text(lately.hit_rate),
            "keys": short_count(since.keys),
            "hit rate": share_text(since.hit_rate),
            "plan": share_text(expected),
            "hbm": share_text(ratio(since.hbm, since.keys)),
            "static": share_text(ratio(since.static, since.keys)),
            "recency": "resident" if resident else share_text(ratio(since.other, since.keys)),
            "nvme": share_text(ratio(since.nvme, since.keys)),
        }

    rows = []
    for (name, order), since in counts.items():
        lately = rates.counts.get((name, order)) if rates is not None else None
        planned = plan.get(name, {}).get(str(order))
        rows.append(cells_of(name, order, since, lately, math.nan if planned is None else planned.expected))
    expected = expected_rate(record)
    rate = math.nan if expected is None else expected.expected
    last = cells_of("all", None, total, rates.total if rates is not None else None, rate)
    title = "hits since start, as shares of the keys" + (", and now" if rates is not None else "")
    return FittingTable(title, HIT_COLUMNS, rows, last, left_out=left_out, drop_first=HIT_COLUMNS_LEAST)


def memory_table(record: StatRecord) -> FittingTable:
    """Returns the budget and its parts."""
    memory, epochs = record.memory, record.epochs
    budget, used = memory.budget_bytes, memory.used_bytes
    notes = {"counts": f"{short_count(record.learning.tracked_keys)} keys"}
    for part, by_table, slots_by_table in (
        ("static", epochs.static_entries, epochs.static_slots),
        ("recency", epochs.recency_entries, epochs.recency_slots),
    ):
        entries, slots = sum(by_table.values()), sum(slots_by_table.values())
        notes[part] = f"{short_count(entries)} of {short_count(slots)} entries"
    title = (
        f"DRAM: {format_bytes(used)} of {format_bytes(budget)} ({share_text(ratio(used, budget))}); "
        f"the process holds {format_bytes(memory.process_bytes)}"
        + (
            f"; on huge pages {share_text(ratio(memory.huge_page_bytes, present))}"
            if (present := memory.present_bytes)
            else ""
        )
    )
    rows = [
        {
            "part": words,
            "bytes": format_bytes(num_bytes),
            "of budget": share_text(ratio(num_bytes, budget)),
            "bar": "━" * round(BAR_COLUMNS * min(1.0, ratio(num_bytes, budget or math.inf))),
            "holds": notes.get(part, ""),
        }
        for part, words, bytes_of in _PARTS
        if (num_bytes := bytes_of(memory))
    ]
    return FittingTable(title, ("part", "bytes", "of budget", "bar", "holds"), rows, drop_first=HEADLESS)


def clients_table(record: StatRecord, rates: Rates | None) -> FittingTable:
    """Returns the clients, those that ask the most first."""
    clients, generation = record.clients, record.store.version
    key_rates = {} if rates is None else rates.client_keys_s
    ordered = sorted(clients.list, key=lambda one: (-key_rates.get(one.id, 0.0), -one.keys, one.id))
    hidden = len(ordered) - CLIENTS_SHOWN_MAX
    title = f"clients: {clients.attached} of {clients.max}, {clients.refused:,} refused"
    title += f", {hidden} not shown" if hidden > 0 else ""
    rows = [
        {
            "pid": str(client.pid),
            "uid": str(client.uid),
            "attached": duration(client.attached_s),
            "generation": f"{client.version}" if client.version == generation else f"{client.version} (old)",
            "keys/s": short_count(key_rates.get(client.id, math.nan)),
            "keys": short_count(client.keys),
            "hit rate": share_text(ratio(client.keys - client.nvme_hits, client.keys)),
            "lookups": short_count(client.batches),
        }
        for client in ordered[:CLIENTS_SHOWN_MAX]
    ]
    left_out = () if rates is not None else ("keys/s",)
    return FittingTable(title, CLIENT_COLUMNS, rows, left_out=left_out, drop_first=("uid", "lookups", "attached"))


class FittingTable:
    """A table that takes few lines, and leaves out columns rather than digits on a narrow screen."""

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Mapping[str, str]],
        last: Mapping[str, str] | None = None,
        *,
        left_out: Collection[str] = (),
        drop_first: Sequence[str] = (),
    ) -> None:
        """rows: cells by column; last: a row of sums below a gap. left_out: columns that have nothing to say;
        drop_first: those that go if there is no room, in turn."""
        self._title, self._columns, self._rows, self._last = title, columns, rows, last
        self._left_out, self._drop_first = set(left_out), drop_first

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the widest table that fits."""
        for num_dropped in range(len(self._drop_first) + 1):
            table = self._table(self._left_out | set(self._drop_first[:num_dropped]))
            if table.__rich_measure__(console, options.update(max_width=WIDTH_MAX)).maximum <= options.max_width:
                break
        yield table

    def _table(self, left_out: Collection[str]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self._title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.show_edge = table.pad_edge = False
        names = [name for name in self._columns if name not in left_out]
        for column, name in enumerate(names):
            left = column == 0 or name in HEADLESS
            title = "" if name in HEADLESS else name  # a name that is too long all the same goes over several lines
            table.add_column(title, justify="left" if left else "right", no_wrap=column > 0, overflow="fold")
        for row in self._rows:
            table.add_row(*(Text(row[name]) for name in names))
        if self._last:
            table.add_section()
            table.add_row(*(Text(self._last[name]) for name in names))
        return table
