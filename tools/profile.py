"""`tierstore profile`: token or key traces -> counts, and what each gigabyte of memory would buy.

Flows in: a store (its hash and sizes) and traces, or profiles to merge. Flows out: a profile, a table for people, JSON,
a page. The counting is `tierstore.offline.profile`'s, the model's side `engram_adapter.profiles`', the curves
`tierstore.decisions`'; here they meet. Refuses what those refuse.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_adapter.hash_spec import HashSpec
from engram_adapter.profiles import check_profile, profile_header, token_documents
from tierstore.decisions.budget import cache_set_bytes
from tierstore.decisions.curves import (
    DECODING,
    LADDER_BYTES_MIN,
    REPLAYING,
    Curves,
    EntryCost,
    OnPhase,
    build_curves,
    ladder,
)
from tierstore.decisions.plan import INDEX_ENTRY_BYTES, usable_bytes, whole_budget
from tierstore.decisions.ranking import Ranking
from tierstore.decisions.replay import simulate
from tierstore.decisions.tally import Group, OrderSplit
from tierstore.errors import BudgetError, ConfigError, FingerprintMismatchError
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.formats.key_trace import read_key_trace_info
from tierstore.formats.profile import KEYS, Profile, ProfileHeader
from tierstore.formats.trace import KEYS as KEY_TRACE
from tierstore.formats.trace import read_token_documents, read_token_trace_info, sort_of_trace
from tierstore.layout import TableLayout, record_bytes
from tierstore.offline.profile import (
    COUNTING,
    DOCUMENTS_MIN,
    MERGING,
    Document,
    document_limits,
    held_out_documents,
    held_out_share,
    key_documents,
    key_profile_header,
    make_profile,
    merge_profiles,
    stretch_accesses,
)
from tierstore.process.workers import Workers
from tierstore.units import format_bytes

from .cli import console
from .phases import Phases
from .report.about import about as about_profile

CURVE_ACCESSES = 2_000_000  # curves of more held-out accesses are drawn from a share of the items
STEP_TOKENS = 500_000  # of the held-out documents, over which steps are simulated, with all items
SIMULATIONS_AT_ONCE = 2
SMALL_LADDER_DOUBLINGS = 4  # of tables so small that budgets from 16 MiB on would say little
UNITS = {COUNTING: "tokens", MERGING: "n-grams", REPLAYING: "simulations", DECODING: "simulations"}
NEAR_WHOLE = 1.25
CHECKING, DRAWING = "checking", "drawing"


def profile_traces(
    image: CatalogImage, traces: list[Path], path: Path, held_out: float | None, on_progress: OnPhase | None = None
) -> dict[str, Any]:
    """Counts traces, all of tokens or all of keys, into the profile at `path`; returns its footer. Blocks."""
    counted = _open_traces(image, traces, held_out)

    def tell(phase: str, done: int, total: int | None) -> None:
        if on_progress:
            on_progress(phase, done, counted.num_tokens if phase == COUNTING else total)

    def analyse(groups: list[Group], counts: dict[str, int]) -> dict[str, Any]:
        return analysis(image, groups, counts, tell)

    return make_profile(path, counted.header, counted.documents, analyse, tell)


@dataclass(frozen=True)
class _Counted:
    """What is to be counted: how many tokens (or lookups) in all, and their documents."""

    header: ProfileHeader
    num_tokens: int
    documents: Iterator[Document]


def _open_traces(image: CatalogImage, traces: list[Path], held_out: float | None) -> _Counted:
    sorts = {sort_of_trace(trace) for trace in traces}
    if len(sorts) > 1:
        raise ConfigError(
            f"{', '.join(map(str, traces))} are traces of tokens and of keys; profile each sort by itself"
        )
    if sorts == {KEY_TRACE}:
        infos = [read_key_trace_info(trace) for trace in traces]
        total = sum(info.num_batches for info in infos)
        share = held_out_share(total) if held_out is None else held_out
        accesses = stretch_accesses(sum(info.num_accesses for info in infos))
        return _Counted(key_profile_header(infos, image.tables, share), total, key_documents(traces, accesses))
    spec = HashSpec.from_catalog(image)
    token_infos = [read_token_trace_info(trace) for trace in traces]
    for info in token_infos:  # before hours of counting
        if info.token_id_max >= spec.vocab_size:
            raise ValueError(
                f"{info.path}: token ids go up to {info.token_id_max}, the vocabulary of the store's model has "
                f"{spec.vocab_size}; profile with the store that the trace's tokenizer is of"
            )
    total = sum(info.num_tokens for info in token_infos)
    header = profile_header(spec, held_out_share(total) if held_out is None else held_out)
    limits = document_limits(total, sum(info.num_documents for info in token_infos))
    texts = (ids for trace in traces for ids in read_token_documents(trace, *limits))
    return _Counted(header, total, token_documents(spec, texts))


def stretch_note(traces: Sequence[Path]) -> str:
    """Returns what to say of traces whose documents are so few that they are cut; "" if they are not."""
    if any(sort_of_trace(trace) == KEY_TRACE for trace in traces):
        return ""
    infos = [read_token_trace_info(trace) for trace in traces]
    num_tokens, num_documents = (sum(getattr(info, name) for info in infos) for name in ("num_tokens", "num_documents"))
    stretch = document_limits(num_tokens, num_documents)[1]
    if num_documents >= DOCUMENTS_MIN or num_tokens <= stretch:
        return ""
    documents = "one document" if num_documents == 1 else f"{num_documents} documents"
    return (
        f"{num_tokens:,} tokens are {documents}, so they were cut into stretches of {stretch:,} tokens, some of them "
        "held out; a stretch resembles its neighbours more than another document would. If a token ends each "
        f"document, write the trace again with --eos ID (or --doclens)"
    )


def merge(image: CatalogImage, parts: list[Path], path: Path, on_progress: OnPhase | None = None) -> dict[str, Any]:
    """Merges profiles into the one at `path`; returns its footer. Blocks."""
    profiles = [Profile(part) for part in parts]
    try:
        for profile in profiles:
            check_header(image, profile.header)
        return merge_profiles(
            path,
            profiles,
            lambda profile: documents_of(image, profile),
            lambda groups, counts: analysis(image, groups, counts, on_progress),
            on_progress,
        )
    finally:
        for profile in profiles:
            profile.close()


def counts_of_order(profile: Profile, order_index: int) -> Iterator[np.ndarray]:
    """Yields how often each item of an order of the first table was counted in all, int64 [M], block by block."""
    split = OrderSplit(profile.header)
    for parts in itertools.chain((split.add(*block) for block in profile.items()), [None]):
        for table_index, order, _, sums in split.end() if parts is None else parts:
            if (table_index, order) == (0, order_index):
                yield sums.sum(axis=1)


def check_header(image: CatalogImage, header: ProfileHeader) -> None:
    """Raises `FingerprintMismatchError` where a profile is of other tables than the store's."""
    if header.kind != KEYS:
        check_profile(HashSpec.from_catalog(image), header)
        return
    for name, fingerprint, orders in header.tables:
        spec = image.tables[name].spec if name in image.tables else None
        if spec is None or (spec.fingerprint, spec.orders) != (fingerprint, orders):
            raise FingerprintMismatchError(
                f"the profile's keys are of table {name} with fingerprint {fingerprint}, the store has "
                f"{spec.fingerprint if spec else 'no such table'}; record its own keys"
            )


def documents_of(image: CatalogImage, profile: Profile) -> Iterator[Document]:
    """Returns the held-out documents of a profile of this store."""
    if profile.header.kind == KEYS:
        return (Document.of_keys(columns) for columns in held_out_documents(profile))
    spec = HashSpec.from_catalog(image)
    return token_documents(spec, (columns["token_ids"] for columns in held_out_documents(profile)))


def analysis(
    image: CatalogImage, groups: list[Group], counts: dict[str, int], on_progress: OnPhase | None = None
) -> dict[str, Any]:
    """Returns what the profile's footer keeps: for each group of tables its curves, as `Curves.as_record` says.

    Budgets are of all tables of the store together, divided as the store will divide them.
    """
    with Workers(SIMULATIONS_AT_ONCE, "tierstore-simulate") as pool:
        return {
            "groups": [
                _group_record(image, group, counts, pool, on_progress) for group in groups if len(group.replay.items)
            ]
        }


def _group_record(
    image: CatalogImage,
    group: Group,
    counts: dict[str, int],
    pool: Workers,
    on_progress: OnPhase | None,
) -> dict[str, Any]:
    layout = image.tables[group.tables[0]]
    ranking = Ranking(group.sampled(CURVE_ACCESSES))
    steps_ranking = Ranking(group.truncated(STEP_TOKENS))
    cost = entry_cost(layout, len(image.tables), len(group.tables))
    budgets, usable, whole_bytes = _budgets(image, group, ranking, cost)
    curves = build_curves(
        ranking,
        cost,
        budgets,
        counts["held_out_tokens"],
        np.random.default_rng(0),
        steps_ranking=steps_ranking,
        usable_bytes=usable,
        whole_bytes=whole_bytes,
        map_over=pool.map,
        on_progress=on_progress,
    )
    record: dict[str, Any] = {"tables": list(group.tables)} | curves.as_record()
    record["distinct"] = dict(zip(map(str, group.orders), group.distinct, strict=True))
    if on_progress:
        on_progress(CHECKING, 0, None)
    record["sampling"] = _sampling(group, ranking, curves)
    record["source"] = {
        "tables": ", ".join(group.tables),
        "documents": f"{counts['documents']:,}, {counts['held_out_documents']:,} of them held out",
        "tokens": f"{counts['tokens']:,}, {counts['held_out_tokens']:,} of them held out",
        "distinct n-grams": ", ".join(f"{count:,} of order {order}" for order, count in record["distinct"].items()),
        "curves": _words_of_sampling(record["sampling"]),
    }
    return record


def _budgets(image: CatalogImage, group: Group, ranking: Ranking, cost: EntryCost) -> tuple[list[int], list[int], int]:
    """Returns the budgets to simulate, what each leaves to entries, and the one that holds the group's tables whole.

    The division is the one that opening the store makes, so that curves and plans agree.
    """
    whole_bytes = whole_budget(image.tables, group.tables)
    first_bytes = min(LADDER_BYTES_MIN, 1 << max(whole_bytes >> SMALL_LADDER_DOUBLINGS, 1).bit_length())
    budgets, usable = [], []
    for budget in ladder(ranking, cost, first_bytes=first_bytes):
        if (
            budget * NEAR_WHOLE < whole_bytes
        ):  # whoever has nearly as much takes a little more, and nothing is read at all
            with contextlib.suppress(BudgetError):  # too little to open the store with
                usable.append(usable_bytes(image.tables, group.tables, budget))
                budgets.append(budget)
    return budgets, usable, whole_bytes


def _sampling(group: Group, sampled: Ranking, curves: Curves) -> dict[str, Any] | None:
    """How far the curves' share of the items is off all of them, in hit rate, at one budget;
    None where it is all of them."""
    share = sampled.group.replay.sample_rate / group.replay.sample_rate
    if share == 1 or curves.points[0].resident:
        return None
    budget = curves.recommended[0].dram_bytes
    point = next(point for point in curves.points if point.dram_bytes == budget)
    static = Ranking(group).static(point.static_entries)
    exact = simulate(group.replay, static, point.recency_sets, 1).hit_rate
    return {"share": share, "dram_bytes": budget, "error": float(abs(exact - point.outcome.hit_rate).max())}


def _words_of_sampling(sampling: dict[str, Any] | None) -> str:
    if sampling is None:
        return "simulated access by access"
    return (
        f"from {100 * sampling['share']:.0f} % of the items (SHARDS); all of them give hit rates at most "
        f"{100 * sampling['error']:.1f} points off these, any order, at {format_bytes(sampling['dram_bytes'])}"
    )


def entry_cost(layout: TableLayout, num_tables: int, group_tables: int) -> EntryCost:
    """Returns what an entry costs, when every one of num_tables tables gets as much memory as this one.

    group_tables: those that the same access reads, whose NVMe reads it costs.
    """
    spec = layout.spec
    static_bytes = record_bytes(spec.entry_bytes) + INDEX_ENTRY_BYTES
    return EntryCost(
        round(static_bytes * num_tables),
        cache_set_bytes(layout) * num_tables,
        reads=spec.rows_per_key * group_tables,
        packed_reads=group_tables,
    )


@click.command("profile")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TRACE...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The profile to write.")
@click.option("--merge", "is_merge", is_flag=True, help="TRACE... are profiles of parts of the text: make one of them.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of documents to keep back for testing predictions. [default: 1/4, at most about 4 million tokens]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables; sizes are in bytes.")
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE.html", help="Also write a page with the curves."
)
def command(
    store: Path,
    inputs: tuple[Path, ...],
    output: Path,
    is_merge: bool,
    held_out: float | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Count the n-grams of TRACE... as the model of STORE looks them up, and say what each gigabyte would buy.

    Documents are kept back, by content, and predictions are made for them. Fewer than 8 documents, such as one long
    file of ids, are cut into stretches first; `tierstore trace --eos ID` cuts them where they end. Parts of a corpus
    may be counted anywhere, with the same --held-out, and merged.

    \b
    Example: tierstore profile v41.tier chats.trace -o chats.profile --report chats.html
    """
    from .report import page as pages

    if is_merge and held_out is not None:
        raise ConfigError(f"--held-out {held_out}: profiles to merge hold out what they hold out; leave it out")
    if report:
        pages.check_report(report)
    image = read_catalog(store)
    started = time.monotonic()
    with Phases(UNITS | ({COUNTING: "n-grams"} if is_merge else {})) as phases:
        if is_merge:
            footer = merge(image, list(inputs), output, phases)
        else:
            footer = profile_traces(image, list(inputs), output, held_out, phases)
        about = about_profile(store, inputs, output, footer, [] if is_merge else [stretch_note(inputs)])
        if report:
            phases(DRAWING, 0, None)
            pages.write_report(footer["analysis"]["groups"], report, about)
    if as_json:
        click.echo(json.dumps(footer | {"about": about}, indent=2))
    else:
        _print(footer, about, output, time.monotonic() - started)
    if report:
        click.echo(f"report: {report}", err=as_json)


def _print(footer: dict[str, Any], about: dict[str, Any], output: Path, seconds: float) -> None:
    from .report import page as pages

    groups, counts = footer["analysis"]["groups"], footer["counts"]
    for group in groups:
        for table in pages.profile_tables(group):
            console().print(table)
    click.echo(
        f"{output}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, {counts['held_out_tokens']:,} "
        f"held out, in {seconds:.1f} s"
    )
    for group in groups:
        click.echo(f"distinct n-grams: {group['source']['distinct n-grams']}")
        click.echo(f"curves: {group['source']['curves']}")
    if footer["kind"] == KEYS:
        click.echo("of recorded keys: each token above is a lookup")
    for name in ("store", "inputs", "made", "next"):
        if about[name]:
            click.echo(f"{name}: {', '.join(about[name]) if name == 'inputs' else about[name]}")
    for note in about["notes"]:
        click.echo(f"note: {note}")
