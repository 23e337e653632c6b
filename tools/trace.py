"""`tierstore trace`: token ids, or text through a tokenizer, into a trace that profiles are made of.

Input: files and folders that `token_inputs` reads. Output: one trace of tokens, documents in the order of the inputs.
Errors: those of the inputs, and a usage error for options that do not go together.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import Tokenizer

from engram_adapter.token_map import load_tokenizer
from tierstore.errors import ConfigError
from tierstore.formats.trace import TokenTraceInfo, TokenTraceWriter
from tierstore.process.progress import OnProgress
from tierstore.units import format_bytes

from .cli import Progress
from .inputs.ids import RAW_DTYPES, Piece, read_lengths
from .inputs.sources import LeftOut, TokenInput, find_inputs, id_pieces, text_parts
from .inputs.text import text_pieces

SOURCES_NAMED_MAX = 3
KINDS_NAMED_MAX = 5


@dataclass(frozen=True)
class TraceReport:
    """What was written, from how many inputs, what was found in folders and left out, and how often --eos was found."""

    info: TokenTraceInfo
    num_inputs: int
    left_out: list[LeftOut]
    trace_bytes: int
    seconds: float
    num_eos: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it for JSON."""
        info = self.info
        return {
            "trace": str(info.path),
            "tokens": info.num_tokens,
            "documents": info.num_documents,
            "vocab_size": info.vocab_size,
            "token_id_max": info.token_id_max,
            "source": info.source,
            "inputs": self.num_inputs,
            "left_out": [{"path": str(path), "why": why} for path, why in self.left_out],
            "bytes": self.trace_bytes,
            "seconds": self.seconds,
            "eos_found": self.num_eos,
        }


def write_trace(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    doclens: str | os.PathLike[str] | None = None,
    bos: int | None = None,
    eos: int | None = None,
    field: str | None = None,
    vocab_size: int | None = None,
    on_progress: OnProgress | None = None,
) -> TraceReport:
    """Writes the trace of `inputs`, files or folders, at `output`. Blocks until it is durable; memory stays bounded.

    Args:
        tokenizer: tokenizer.json for text.
        dtype: one of RAW_DTYPES, of files that neither their content nor their name says it of.
        doclens: .npy with the tokens of each document of the only input.
        bos: id before each document of text.
        eos: id that ends a document of ids, and belongs to it.
        field: of JSON lines, by default the usual names of texts and of lists of ids.
        vocab_size: ids are below it; by default the tokenizer's, if there is one.
        on_progress: gets (bytes done, bytes in all).

    Raises `ConfigError`, `FormatError`, `OSError`, and `ValueError` for an id outside the vocabulary.
    """
    started = time.perf_counter()
    besides = [Path(path) for path in (tokenizer, doclens) if path is not None]
    found, left_out = find_inputs([Path(path) for path in inputs], dtype, field, besides)
    _check_options(found, left_out, tokenizer is not None, doclens is not None, bos is not None, eos is not None)
    lengths = None if doclens is None else read_lengths(Path(doclens))
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None:
        loaded.no_truncation()  # some tokenizers come with a length to cut at, and one to fill up to
        loaded.no_padding()
        vocab_size = vocab_size or 1 + max(loaded.get_vocab(with_added_tokens=True).values())
    for option, value in (("--bos", bos), ("--eos", eos)):
        if value is not None and vocab_size is not None and not 0 <= value < vocab_size:
            raise ConfigError(f"{option} {value} is outside the vocabulary of {vocab_size} ids; give one of its ids")
    done_bytes, total_bytes, num_eos = 0, sum(source.num_bytes for source in found), 0
    with TokenTraceWriter(output, vocab_size=vocab_size, source=_source_text(found)) as writer:
        for piece, is_text in _pieces(found, loaded, vocab_size, lengths, bos):
            ends = piece.document_ends
            if eos is not None and not is_text:
                eos_ends = np.flatnonzero(piece.token_ids == eos) + 1
                num_eos += len(eos_ends)
                ends = np.union1d(np.asarray(ends, dtype=np.int64), eos_ends)
            writer.add(piece.token_ids, ends)
            done_bytes += piece.input_bytes
            if on_progress is not None:
                on_progress(min(done_bytes, total_bytes), total_bytes)
        info = writer.finish()
    if on_progress is not None:
        on_progress(total_bytes, total_bytes)  # what follows the last token, such as a checksum, counts too
    seconds = time.perf_counter() - started
    return TraceReport(info, len(found), left_out, info.path.stat().st_size, seconds, None if eos is None else num_eos)


def _check_options(
    found: Sequence[TokenInput],
    left_out: Sequence[LeftOut],
    has_tokenizer: bool,
    has_doclens: bool,
    has_bos: bool,
    has_eos: bool,
) -> None:
    texts = [source.path for source in found if source.is_text]
    if not found:
        first = f"; {left_out[0].path} is {left_out[0].why}" if left_out else ""
        raise ConfigError(f"the inputs are folders without text or token ids{first}; give others")
    if texts and not has_tokenizer:
        raise ConfigError(f"{texts[0]} is text; give --tokenizer tokenizer.json")
    if has_doclens and (len(found) != 1 or texts):
        raise ConfigError(f"--doclens is for one input of token ids, there are {len(found)}; write a trace of each")
    if has_doclens and has_eos:
        raise ConfigError("--doclens and --eos both say where documents end; give one of them")
    if has_bos and not texts:
        raise ConfigError("--bos is for text, and the inputs are token ids, which hold their own; leave it out")
    if has_eos and len(texts) == len(found):
        raise ConfigError("--eos is for token ids, and the inputs are text, a document a file (or line); leave it out")


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
) -> Iterator[tuple[Piece, bool]]:
    """Yields (piece, whether it comes from text)."""
    for is_text, group in itertools.groupby(found, key=lambda source: source.is_text):
        if is_text:
            assert tokenizer is not None
            parts = (part for source in group for part in _unchanged(source, text_parts(source)))
            yield from ((piece, True) for piece in text_pieces(parts, tokenizer, bos))
        else:
            for source in group:
                pieces = _unchanged(source, id_pieces(source, vocab_size, lengths))
                yield from ((piece, False) for piece in pieces)


def _unchanged(source: TokenInput, parts: Iterator[Any]) -> Iterator[Any]:
    """Yields what was read of a file; raises `ConfigError` at its end if somebody wrote to the file meanwhile."""
    before = _identity(source.path)
    yield from parts
    if _identity(source.path) != before:
        raise ConfigError(f"{source.path} was changed while it was read; trace it again once it is whole")


def _identity(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@click.command("trace")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="T.trace", help="The trace.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), metavar="FILE", help="tokenizer.json that text goes through."
)
@click.option(
    "--dtype", type=click.Choice(list(RAW_DTYPES)), help="Integers of raw files (.bin) that do not say it themselves."
)
@click.option("--field", metavar="NAME", help="Field of JSON lines.  [default: text; or input_ids, tokens]")
@click.option(
    "--doclens", type=click.Path(path_type=Path), metavar="FILE.npy", help="Tokens of each document of the one input."
)
@click.option(
    "--eos", type=click.IntRange(min=0), metavar="ID", help="Token that ends each document, in one long file of ids."
)
@click.option("--bos", type=click.IntRange(min=0), metavar="ID", help="Token to put before each document of text.")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Refuse ids of N and more.  [default: the tokenizer's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    inputs: tuple[Path, ...],
    output: Path,
    tokenizer: Path | None,
    dtype: str | None,
    field: str | None,
    doclens: Path | None,
    eos: int | None,
    bos: int | None,
    vocab_size: int | None,
    as_json: bool,
) -> None:
    """Write the token trace of INPUT...: text, JSON lines, .npy, or raw token ids; folders are walked.

    \b
    Text: a file is a document.
    JSON lines (.jsonl): a line is a document, its text or list of ids in --field.
    .npy: 1-D, or a document a row.
    Raw integers: .i32 .i64 .u16 .u32, or --dtype. Token files of llm.c and
      modded-nanogpt, and .bin with .idx of Megatron, say their type.
    Text, lines and raw integers may be compressed: zstd, gzip, xz, bzip2.

    A file of ids is one document unless it says otherwise, or --eos or --doclens does.

    \b
    Example: tierstore trace corpus/ -o corpus.trace --tokenizer model/tokenizer.json --bos 0
    Example: tierstore trace train.bin -o train.trace --dtype uint16 --eos 50256
    """
    with Progress("tracing") as on_progress:
        report = write_trace(
            inputs,
            output,
            tokenizer=tokenizer,
            dtype=dtype,
            doclens=doclens,
            bos=bos,
            eos=eos,
            field=field,
            vocab_size=vocab_size,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    info = report.info
    each = report.trace_bytes / max(1, info.num_tokens)
    click.echo(
        f"{output}: {info.num_tokens:,} tokens of {info.num_documents:,} documents in {report.num_inputs:,} files, "
        f"{format_bytes(report.trace_bytes)} ({each:.2f} bytes a token), "
        f"{info.num_tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    )
    if report.num_eos == 0:
        click.echo(f"note: --eos {eos} is none of the tokens; documents end as they would without it")
    if report.left_out:
        kinds = Counter(why for _, why in report.left_out)
        words = ", ".join(f"{count:,} {why}" for why, count in kinds.most_common(KINDS_NAMED_MAX))
        more = ", .." if len(kinds) > KINDS_NAMED_MAX else ""
        click.echo(f"left out: {len(report.left_out):,} files ({words}{more}), the first {report.left_out[0].path}")
