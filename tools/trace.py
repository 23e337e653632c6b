"""`tierstore trace`: token ids, or text through a tokenizer, into a trace that profiles are made of.

Flows in: files and folders that `token_inputs` reads. Flows out: one trace of tokens, documents in the order of the inputs.
Refuses what those refuse, and options that do not go together.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from tokenizers import Tokenizer

from engram_adapter.token_map import load_tokenizer
from tierstore.errors import ConfigError
from tierstore.formats.trace import TokenTraceInfo, TokenTraceWriter
from tierstore.units import format_bytes

from .cli import Progress
from .token_inputs import RAW_DTYPES, Piece, TokenInput, find_inputs, pieces_of_ids, pieces_of_text, read_lengths

SOURCES_NAMED_MAX = 3


@dataclass(frozen=True)
class TraceReport:
    """What was written, from how many inputs, and what was found in folders and left out, empty or no text."""

    info: TokenTraceInfo
    num_inputs: int
    left_out: list[Path]
    trace_bytes: int
    seconds: float


def write_trace(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    doclens: str | os.PathLike[str] | None = None,
    bos: int | None = None,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TraceReport:
    """Writes the trace of `inputs`, files or folders, at `output`. Blocks until it is durable; memory stays bounded.

    tokenizer: tokenizer.json for text. dtype: one of RAW_DTYPES, of files whose names do not say it. doclens: .npy with the
    tokens of each document of the only input. bos: id before each document of text. vocab_size: ids are below it; by default
    the tokenizer's, if there is one. on_progress(bytes done, bytes in all). Raises `ConfigError`, `FormatError`, `OSError`,
    and `ValueError` for an id outside the vocabulary.
    """
    started = time.perf_counter()
    found, left_out = find_inputs([Path(path) for path in inputs], dtype)
    _check_options(found, tokenizer is not None, doclens is not None, bos is not None)
    lengths = None if doclens is None else read_lengths(Path(doclens))
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None:
        loaded.no_truncation()  # some tokenizers come with a length to cut at, and one to fill up to
        loaded.no_padding()
        vocab_size = vocab_size or 1 + max(loaded.get_vocab(with_added_tokens=True).values())
    if bos is not None and vocab_size is not None and not 0 <= bos < vocab_size:
        raise ConfigError(f"--bos {bos} is outside the vocabulary of {vocab_size} ids; give an id of the tokenizer's")
    done_bytes, total_bytes = 0, sum(source.num_bytes for source in found)
    with TokenTraceWriter(output, vocab_size=vocab_size, source=_source_text(found)) as writer:
        for piece in _pieces(found, loaded, vocab_size, lengths, bos):
            writer.add(piece.token_ids, piece.document_ends)
            done_bytes += piece.input_bytes
            if on_progress is not None:
                on_progress(min(done_bytes, total_bytes), total_bytes)
        info = writer.finish()
    return TraceReport(info, len(found), left_out, info.path.stat().st_size, time.perf_counter() - started)


def _check_options(found: Sequence[TokenInput], has_tokenizer: bool, has_doclens: bool, has_bos: bool) -> None:
    texts = [source.path for source in found if source.kind == "text"]
    if not found:
        raise ConfigError("the inputs are folders without text or token ids; give others")
    if texts and not has_tokenizer:
        raise ConfigError(f"{texts[0]} is text; give --tokenizer tokenizer.json, or --dtype where it holds token ids")
    if has_doclens and (len(found) != 1 or texts):
        raise ConfigError(f"--doclens is for one input of token ids, there are {len(found)}; write a trace of each")
    if has_bos and not texts:
        raise ConfigError("--bos is for text, and the inputs are token ids, which hold their own; leave it out")


def _source_text(found: Sequence[TokenInput]) -> str:
    names = [os.fsencode(source.path.name).decode(errors="replace") for source in found[:SOURCES_NAMED_MAX]]
    more = f" and {len(found) - SOURCES_NAMED_MAX} more files" if len(found) > SOURCES_NAMED_MAX else ""
    return ", ".join(names) + more


def _pieces(
    found: Sequence[TokenInput],
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    lengths: np.ndarray | None,
    bos: int | None,
) -> Iterator[Piece]:
    for is_text, group in itertools.groupby(found, key=lambda source: source.kind == "text"):
        if is_text:
            assert tokenizer is not None
            yield from pieces_of_text(list(group), tokenizer, bos)
        else:
            for source in group:
                yield from pieces_of_ids(source, vocab_size, lengths)


@click.command("trace")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="T.trace", help="The trace.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), metavar="FILE", help="tokenizer.json that text goes through."
)
@click.option("--dtype", type=click.Choice(list(RAW_DTYPES)), help="Integers of files whose names do not say it.")
@click.option(
    "--doclens", type=click.Path(path_type=Path), metavar="FILE.npy", help="Tokens of each document of the one input."
)
@click.option("--bos", type=click.IntRange(min=0), metavar="ID", help="Token to put before each document of text.")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Refuse ids of N and more.  [default: the tokenizer's]",
)
def command(
    inputs: tuple[Path, ...],
    output: Path,
    tokenizer: Path | None,
    dtype: str | None,
    doclens: Path | None,
    bos: int | None,
    vocab_size: int | None,
) -> None:
    """Write the token trace of INPUT...: text, .npy (1-D, or a document a row), or raw integers; folders are walked.

    Raw integers are .i32, .i64, .u16, .u32, or of --dtype, and may be compressed (.zst). A file is one document,
    unless --doclens or a 2-D array says otherwise.

    \b
    Example: tierstore trace corpus/ -o corpus.trace --tokenizer model/tokenizer.json --bos 0
    """
    with Progress("tracing") as on_progress:
        report = write_trace(
            inputs,
            output,
            tokenizer=tokenizer,
            dtype=dtype,
            doclens=doclens,
            bos=bos,
            vocab_size=vocab_size,
            on_progress=on_progress,
        )
    info = report.info
    each = report.trace_bytes / max(1, info.num_tokens)
    click.echo(
        f"{output}: {info.num_tokens:,} tokens of {info.num_documents:,} documents in {report.num_inputs:,} files, "
        f"{format_bytes(report.trace_bytes)} ({each:.2f} bytes a token), "
        f"{info.num_tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    )
    if report.left_out:
        click.echo(f"left out, empty or no text: {len(report.left_out):,} files, the first {report.left_out[0]}")
