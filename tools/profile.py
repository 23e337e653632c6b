"""`tierstore profile`: token or key traces -> counts, and what each gigabyte of memory would buy.

Input: a store and traces, or profiles to merge. Output: a profile, a table for people, JSON, a page. The work is done
by `tierstore.profile`, `engram_adapter.token_profile` and `tierstore.merge_profiles`. Errors: theirs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import engram_adapter
import tierstore
from tierstore.errors import ConfigError
from tierstore.formats.profile import KEYS
from tierstore.formats.trace import KEYS as KEY_TRACE
from tierstore.formats.trace import sort_of_trace
from tierstore.process.progress import COUNTING, PHASE_UNITS, OnPhase
from tierstore.units import count_text

from .cli import console
from .phases import Phases
from .report.about import about as about_profile
from .report.about import stretch_note

DRAWING = "drawing"  # a phase of this command


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
    started = time.monotonic()
    with Phases(PHASE_UNITS | ({COUNTING: "n-grams"} if is_merge else {})) as phases:
        if is_merge:
            parts = [engram_adapter.open_profile(store, part) for part in inputs]
            made = tierstore.merge_profiles(store, parts, output=output, on_progress=phases)
        else:
            made = _profile(store, inputs, output, held_out, phases)
        footer = made.to_dict()
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


def _profile(
    store: Path, traces: Sequence[Path], output: Path, held_out: float | None, on_progress: OnPhase
) -> tierstore.Profile:
    """Profiles traces, all of tokens or all of keys."""
    sorts = {sort_of_trace(trace) for trace in traces}
    if len(sorts) > 1:
        raise ConfigError(
            f"{', '.join(map(str, traces))} are traces of tokens and of keys; profile each sort by itself"
        )
    job = tierstore.profile if sorts == {KEY_TRACE} else engram_adapter.token_profile
    return job(store, traces, held_out, output=output, on_progress=on_progress)


def _print(footer: dict[str, Any], about: dict[str, Any], output: Path, seconds: float) -> None:
    from .report import page as pages

    groups, counts = footer["analysis"]["groups"], footer["counts"]
    for group in groups:
        for table in pages.profile_tables(group):
            console().print(table)
    click.echo(
        f"{output}: {count_text(counts['tokens'], 'token')} of {count_text(counts['documents'], 'document')}, "
        f"{counts['held_out_tokens']:,} held out, in {seconds:.1f} s"
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
