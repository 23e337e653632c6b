"""The stat record of a daemon for people: what `tierstore stat` prints and `tierstore top` keeps up to date.

Flows in: a record, and the rates since an earlier one where there is one. Flows out: things that rich prints, or plain lines
for a log. Nothing is fetched here. What needs the operator's eye comes first.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from tierstore.daemon.record import Record, missed_bytes, ratio
from tierstore.units import format_bytes

from .report_tables import percent
from .stat_rates import Counts, Rates, counts_of, quantile_ns, reads_of, total_of
from .stat_words import UNKNOWN, bytes_a_second, duration, latency_text, number_text, share_text, short_count

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

CLIENTS_SHOWN_MAX = 12  # those that ask the most
LOST_SHARE_MAX = 0.01  # of reports, missed keys, remote calls: what is below is counted, but needs no eye
BAR_COLUMNS = 30

# Parts of the budget: the name in the record, less `_bytes`, and what people read.
_PARTS = (
    ("static", "static set"),
    ("index", "its indexes"),
    ("recency", "recency cache"),
    ("resident", "resident tables"),
    ("staging", "staging of reads"),
    ("counts", "counts of keys"),
    ("work", "what it remembers of places"),
)


def page_of(record: Record, rates: Rates | None, now_s: float, problem: str | None = None) -> Group:
    """Returns all there is to see. now_s: Unix time, for how long ago things were. problem: why the record is an old one."""
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


def heading(record: Record, now_s: float) -> list[str]:
    """Returns who serves what."""
    daemon, store, epochs = record["daemon"], record["store"], record["epochs"]
    before = f" (before: {store['previous']})" if store["previous"] else ""
    return [
        f"tierstore {daemon['release']}, {daemon['state']}, pid {daemon['pid']}, "
        f"up {duration(now_s - daemon['started_at'])}, {daemon['socket']}",
        f"version {store['version']}, epoch {epochs['current']}, {store['path']}{before}",
    ]


def concerns(record: Record) -> list[str]:
    """Returns what an operator should look at, a line each; nothing on a healthy daemon."""
    epochs, learning, feed = record["epochs"], record["learning"], record["feed"]
    memory, clients, remote = record["memory"], record["clients"], record["remote"]
    found = []
    if memory["used_bytes"] > memory["budget_bytes"]:
        over = format_bytes(memory["used_bytes"] - memory["budget_bytes"])
        found.append(f"memory in use is {over} above the budget: please report this")
    if epochs["alive"] > 1 and epochs["waiting_for"]:
        pids = ", ".join(map(str, epochs["waiting_for"]))
        found.append(f"the old epoch waits for pid {pids}: a process leaves it at its next lookup, or when it ends")
    if feed["errors"]:
        found.append(
            f"{feed['errors']:,} missed keys could not be read: run tierstore verify {record['store']['path']}"
        )
    lost = ratio(learning["reports_lost"], learning["reports"] + learning["reports_lost"])
    if lost > LOST_SHARE_MAX:
        found.append(f"{percent(lost)} of the reports were lost: the daemon is short of processor time")
    dropped = ratio(feed["dropped_keys"], feed["read_keys"] + feed["dropped_keys"])
    if dropped > LOST_SHARE_MAX:
        found.append(
            f"{percent(dropped)} of the missed keys were dropped: misses come faster than the daemon reads them"
        )
    if learning["reports_refused"]:
        found.append(f"{learning['reports_refused']:,} reports made no sense: a client is broken, or hostile")
    if clients["attached"] >= clients["max"]:
        found.append(f"all {clients['max']} places for clients are taken: more are refused")
    if remote and ratio(remote["errors"], remote["calls"]) > LOST_SHARE_MAX:
        found.append(f"{remote['errors']:,} of {remote['calls']:,} remote calls failed; the log tells why")
    return found


def summary(record: Record, rates: Rates | None) -> list[str]:
    """Returns hit rate, lookups, latency and NVMe: now, where there are rates, and since the start."""
    counters = record["counters"]
    total = total_of(counts_of(record))
    amplification = number_text(ratio(counters["bytes_read"], missed_bytes(record)), "{:.1f}")
    untouched = share_text(ratio(counters["zero_miss_batches"], counters["batches"]))
    lines = []
    if rates is not None:
        lines += [
            f"now    hit rate {share_text(rates.total.hit_rate)}, {short_count(rates.keys_s)} keys/s in "
            f"{short_count(rates.batches_s)} lookups/s, {_quantiles(rates.latency_counts, record)}",
            f"       NVMe {short_count(rates.reads_s)} reads/s, {bytes_a_second(rates.read_bytes_s)}",
        ]
    by_row_id = f"; and {short_count(counters['rows'])} rows by their ids" if counters["rows"] else ""
    return [
        *lines,
        f"total  hit rate {share_text(total.hit_rate)}, {short_count(total.keys)} keys in "
        f"{short_count(counters['batches'])} lookups, {_quantiles(record['latency']['counts'], record)}{by_row_id}",
        f"       NVMe {short_count(reads_of(record))} reads, {format_bytes(counters['bytes_read'])}, "
        f"{amplification} times what was missed; {untouched} of lookups missed nothing",
    ]


def hits_table(record: Record, rates: Rates | None) -> Table:
    """Returns who answered, by table and order: shares of all keys since the start, and what goes on now."""
    from rich.text import Text

    counts = counts_of(record)
    total = total_of(counts)
    tables = record["store"]["tables"]
    with_hbm = total.hbm > 0
    now = ["keys/s", "hit now"] if rates is not None else []
    columns = ["table", "order", *now, "keys", "hit rate", *(["hbm"] if with_hbm else []), "static", "recency", "nvme"]
    table = _table("hits since start, as shares of the keys" + (", and now" if now else ""), *columns)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, order: str, since: Counts, lately: Counts | None, *, resident: bool) -> None:
        cells = [] if rates is None else [UNKNOWN, UNKNOWN]
        if rates is not None and lately is not None:
            cells = [short_count(lately.keys / rates.seconds), share_text(lately.hit_rate)]
        shares = [since.hbm] if with_hbm else []
        cells += [short_count(since.keys), share_text(since.hit_rate)]
        cells += [share_text(ratio(part, since.keys)) for part in (*shares, since.static, since.other, since.nvme)]
        if resident:
            cells[-2] = "resident"
        table.add_row(Text(name), order, *cells)

    for (name, order), since in counts.items():
        lately = rates.counts.get((name, order)) if rates is not None else None
        add(name, order, since, lately, resident=tables.get(name, {}).get("resident", False))
    table.add_section()
    add("all", "", total, rates.total if rates is not None else None, resident=False)
    return table


def memory_table(record: Record) -> Table:
    """Returns the budget and its parts."""
    from rich.progress_bar import ProgressBar

    memory, epochs = record["memory"], record["epochs"]
    budget, used = memory["budget_bytes"], memory["used_bytes"]
    entries, slots = (sum(epochs[name].values()) for name in ("static_entries", "static_slots"))
    notes = {"static": f"{short_count(entries)} entries, {short_count(slots)} places"}
    notes["counts"] = f"{short_count(record['learning']['tracked_keys'])} keys"
    title = (
        f"DRAM: {format_bytes(used)} of {format_bytes(budget)} ({share_text(ratio(used, budget))}); "
        f"the process holds {format_bytes(memory['process_bytes'])}"
    )
    table = _table(title, "part", "bytes", "of the budget", "", "")
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, words in _PARTS:
        num_bytes = memory[f"{part}_bytes"]
        if num_bytes:
            bar = ProgressBar(total=max(budget, 1), completed=min(num_bytes, budget), width=BAR_COLUMNS)
            table.add_row(
                words, format_bytes(num_bytes), share_text(ratio(num_bytes, budget)), bar, notes.get(part, "")
            )
    return table


def learning_lines(record: Record, now_s: float) -> list[str]:
    """Returns how the daemon learns: reports, keys that it reads, re-plans; and what is served to other hosts."""
    learning, feed, remote, epochs = record["learning"], record["feed"], record["remote"], record["epochs"]
    last, next_s = learning["last_replan"], learning["next_replan_s"]
    replans = f"re-plans {learning['replans']:,}"
    if last is not None:
        replans += (
            f", the last {duration(now_s - last['at'])} ago: {last['entered']:,} entries in, {last['left']:,} out, "
            f"{last['steps']} steps, {last['seconds']:.1f} s"
        )
    lines = [
        f"learning  reports {short_count(learning['reports'])}, lost {learning['reports_lost']:,}, "
        f"refused {learning['reports_refused']:,}; {short_count(learning['tracked_keys'])} keys counted",
        f"          missed keys read {short_count(feed['read_keys'])}, waiting {feed['queued_keys']:,}, "
        f"dropped {feed['dropped_keys']:,}, failed {feed['errors']:,}",
        f"          {replans}",
        f"          next re-plan {'on request' if next_s is None else f'in {duration(next_s)}'}; "
        f"epochs alive {epochs['alive']}, changes {epochs['changes']:,}",
    ]
    if remote is not None:
        lines.append(
            f"remote    {remote['address']}: {remote['calls']:,} calls, {remote['in_flight']:,} under way, "
            f"{remote['errors']:,} failed, {format_bytes(remote['bytes_sent'])} sent"
        )
    return lines


def clients_table(record: Record, rates: Rates | None) -> Table:
    """Returns the clients, those that ask the most first."""
    clients, version = record["clients"], record["store"]["version"]
    key_rates = {} if rates is None else rates.client_keys_s
    ordered = sorted(clients["list"], key=lambda one: (-key_rates.get(one["pid"], 0.0), -one["keys"], one["pid"]))
    hidden = len(ordered) - CLIENTS_SHOWN_MAX
    title = f"clients: {clients['attached']} of {clients['max']}, {clients['refused']:,} refused"
    title += f", {hidden} not shown" if hidden > 0 else ""
    columns = [
        "pid",
        "uid",
        "attached",
        "version",
        *([] if rates is None else ["keys/s"]),
        "keys",
        "hit rate",
        "lookups",
    ]
    table = _table(title, *columns)
    for column in table.columns:
        column.justify = "right"
    for client in ordered[:CLIENTS_SHOWN_MAX]:
        held = client["version"]
        table.add_row(
            str(client["pid"]),
            str(client["uid"]),
            duration(client["attached_s"]),
            f"{held}" if held == version else f"{held} (old)",
            *([] if rates is None else [short_count(key_rates.get(client["pid"], math.nan))]),
            short_count(client["keys"]),
            share_text(ratio(client["keys"] - client["nvme_hits"], client["keys"])),
            short_count(client["batches"]),
        )
    return table


def plain_lines(record: Record, rates: Rates | None, now_s: float, problem: str | None = None) -> list[str]:
    """Returns one refresh for a log: a line for all, one for each table and order, one for what needs an eye."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now_s))
    if problem:
        return [f"{stamp}  ! {problem}"]
    memory = record["memory"]
    keys_s = reads_s = bytes_s = math.nan
    rate_now, latency_counts = math.nan, [0] * len(record["latency"]["counts"])
    if rates is not None:
        keys_s, reads_s, bytes_s = rates.keys_s, rates.reads_s, rates.read_bytes_s
        rate_now, latency_counts = rates.total.hit_rate, rates.latency_counts
    lines = [
        f"{stamp}  {record['daemon']['state']}  {short_count(keys_s)} keys/s  hit rate {share_text(rate_now)}"
        f" (since start {share_text(total_of(counts_of(record)).hit_rate)})"
        f"  NVMe {short_count(reads_s)} reads/s, {bytes_a_second(bytes_s)}  {_quantiles(latency_counts, record)}"
        f"  DRAM {format_bytes(memory['used_bytes'])} of {format_bytes(memory['budget_bytes'])}"
        f"  epoch {record['epochs']['current']}  clients {record['clients']['attached']}"
    ]
    for (name, order), since in counts_of(record).items():
        lately = rates.counts.get((name, order)) if rates is not None else None
        now = UNKNOWN
        if rates is not None and lately is not None:
            now = f"{share_text(lately.hit_rate)} of {short_count(lately.keys / rates.seconds)} keys/s"
        lines.append(f"{stamp}    {name} order {order}  hit rate {now} (since start {share_text(since.hit_rate)})")
    return lines + [f"{stamp}  ! {concern}" for concern in concerns(record)]


def _table(title: str, *columns: str) -> Table:
    """Returns a table that takes few lines: a screen has not many."""
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    table.columns[0].no_wrap = True
    return table


def _quantiles(counts: list[int], record: Record) -> str:
    bounds = record["latency"]["bounds_ns"]
    texts = []
    for share in (0.5, 0.99):
        ns = quantile_ns(bounds, counts, share)
        texts.append(f"above {latency_text(bounds[-1])}" if math.isinf(ns) else latency_text(ns))
    return f"p50 {texts[0]}, p99 {texts[1]}"
