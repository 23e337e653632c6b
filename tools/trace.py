"""`tierstore trace`: token ids, or text through a tokenizer, into a trace that profiles are made of.

Input: files and folders that `token_inputs` reads. Output: one trace of tokens, documents in the order of the inputs.
Errors: those of the inputs, and a usage error for options that do not go together.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer

from engram_adapter.token_map import load_tokenizer
from tierstore.errors import ConfigError
from tierstore.formats.trace import TokenTraceInfo, TokenTraceWriter
from tierstore.process.progress import OnProgress
from tierstore.units import count_text, format_bytes

from .cli import Progress
from .inputs.chat import ChatTemplate
from .inputs.columns import ColumnReader
from .inputs.ids import RAW_DTYPES, read_lengths
from .inputs.reading import Reader
from .inputs.sampling import Sample
from .inputs.sources import Finder
from .inputs.spool import Spool
from .inputs.token_input import LeftOut, TokenInput
from .inputs.tokenizing import JOBS_MAX
from .inputs.tracing import Settings, Tracing

SOURCE = "tierstore trace"
PACKING_THREADS = 2  # of the trace, while the next pieces are read
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
    sample: float | None = None,
    seed: int = 0,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> TraceReport:
    """Writes the trace of `inputs` at `output`: files, folders, or - for standard input. Blocks until it is durable.

    Args:
        tokenizer: tokenizer.json for text, or its folder.
        dtype: one of RAW_DTYPES, of files that neither their content nor their name says it of.
        doclens: .npy with the tokens of each document of the only input.
        bos: id before each document of text.
        eos: id that ends a document of ids, and belongs to it.
        field: of lines, columns, samples or members, by default the usual names of texts and of lists of ids.
        vocab_size: ids are below it; by default the tokenizer's, if there is one.
        sample: the fraction of the documents to trace, each drawn by its number and `seed`; None: all.
        jobs: processes that tokenize; None: none for little text, else one for each processor.
        on_progress: gets (bytes done, bytes in all).

    Raises `ConfigError`, `FormatError`, `BudgetError`, `OSError`, and `ValueError` for an id outside the vocabulary.
    """
    started = time.perf_counter()
    if sample is not None and not 0 < sample <= 1:
        raise ConfigError(f"--sample {sample} is outside 0 to 1; give the fraction of the documents to trace")
    besides = [Path(path) for path in (tokenizer, doclens) if path is not None]
    chat = ChatTemplate(None if tokenizer is None else Path(tokenizer))
    with Spool(Path(output).absolute().parent) as spool, spool.naming_sources(), ColumnReader() as columns, chat:
        found, left_out = Finder(columns, spool, dtype, field).find([Path(path) for path in inputs], besides)
        _check_options(found, left_out, tokenizer is not None, doclens is not None, bos is not None, eos is not None)
        loaded = None if tokenizer is None else _tokenizer(tokenizer)
        if loaded is not None:
            vocab_size = vocab_size or 1 + max(loaded.get_vocab(with_added_tokens=True).values())
        for option, value in (("--bos", bos), ("--eos", eos)):
            if value is not None and vocab_size is not None and not 0 <= value < vocab_size:
                raise ConfigError(
                    f"{option} {value} is outside the vocabulary of {vocab_size} ids; give one of its ids"
                )
        settings = Settings(
            tokenizer=loaded,
            tokenizer_path=None if tokenizer is None else Path(tokenizer),
            vocab_size=vocab_size,
            lengths=None if doclens is None else read_lengths(Path(doclens)),
            bos=bos,
            eos=eos,
            jobs=jobs,
        )
        tracing = Tracing(Reader(columns, chat, spool), settings, None if sample is None else Sample(sample, seed))
        info = _write(tracing, found, output, vocab_size, on_progress)
    seconds = time.perf_counter() - started
    num_eos = None if eos is None else tracing.num_eos
    return TraceReport(info, len(found), left_out, info.path.stat().st_size, seconds, num_eos)


def _tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    loaded = load_tokenizer(path)
    loaded.no_truncation()  # some tokenizers come with a length to cut at, and one to fill up to
    loaded.no_padding()
    return loaded


def _write(
    tracing: Tracing,
    found: Sequence[TokenInput],
    output: str | os.PathLike[str],
    vocab_size: int | None,
    on_progress: OnProgress | None,
) -> TokenTraceInfo:
    done_bytes, total_bytes = 0, sum(source.num_bytes for source in found)
    # No input is named: the same documents are the same trace, byte for byte, whatever container they come from.
    with (
        TokenTraceWriter(output, vocab_size=vocab_size, source=SOURCE, threads=PACKING_THREADS) as writer,
        contextlib.closing(tracing.pieces(found)) as pieces,  # ends its workers, also if this is interrupted
    ):
        for piece in pieces:
            writer.add(piece.token_ids, piece.document_ends)
            done_bytes += piece.input_bytes
            if on_progress is not None:
                on_progress(min(done_bytes, total_bytes), total_bytes)
        info = writer.finish()
    if on_progress is not None:
        on_progress(total_bytes, total_bytes)  # what follows the last token, such as a checksum, counts too
    return info


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
    if has_bos and (chats := [source.path for source in found if source.is_chat]):
        raise ConfigError(f"{chats[0]} holds chats, and the chat template writes their first token; leave --bos out")
    if has_eos and len(texts) == len(found):
        raise ConfigError("--eos is for token ids, and the inputs are text, a document a file (or line); leave it out")


@click.command("trace")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="T.trace", help="The trace.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), metavar="FILE", help="tokenizer.json that text goes through."
)
@click.option(
    "--dtype", type=click.Choice(list(RAW_DTYPES)), help="Integers of raw files (.bin) that do not say it themselves."
)
@click.option(
    "--field", metavar="NAME", help="Field, column or member with the documents.  [default: text; or input_ids, tokens]"
)
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
@click.option(
    "--sample",
    type=click.FloatRange(min=0, min_open=True, max=1),
    metavar="F",
    help="Trace a fraction of the documents, such as 0.1, drawn by --seed.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of --sample.")
@click.option(
    "--jobs",
    type=click.IntRange(1, JOBS_MAX),
    metavar="N",
    help="Processes that tokenize, about 150 MB each.  [default: for much text one a processor, at most 16]",
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
    sample: float | None,
    seed: int,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Write the token trace of INPUT...: text or token ids, in whatever holds them; folders are walked.

    \b
    Text: a file is a document. Or .txt and .json members of a tar (webdataset).
    JSON lines: a line is a document, its text, list of ids or chat in --field.
    Parquet, Arrow, save_to_disk folders and snapshots of the Hugging Face cache:
      a row is a document, its text, list of ids or chat in column --field.
    Mosaic (MDS) and litdata folders: a sample is a document.
    .npy: 1-D, or a document a row.
    Raw integers: .i32 .i64 .u16 .u32, or --dtype. Token files of llm.c and
      modded-nanogpt, and .bin with .idx of Megatron, say their type.
    Any single file may be compressed: zstd, gzip, xz, bzip2. - is standard input.

    A file of ids is one document unless it says otherwise, or --eos or --doclens does.

    \b
    Example: tierstore trace corpus/ -o corpus.trace --tokenizer model/tokenizer.json --bos 0
    Example: tierstore trace train.bin -o train.trace --dtype uint16 --eos 50256
    Example: tierstore trace data/*.parquet -o ids.trace --field input_ids --sample 0.1
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
            sample=sample,
            seed=seed,
            jobs=jobs,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    info = report.info
    each = report.trace_bytes / max(1, info.num_tokens)
    click.echo(
        f"{output}: {count_text(info.num_tokens, 'token')} of {count_text(info.num_documents, 'document')} in "
        f"{count_text(report.num_inputs, 'file')}, "
        f"{format_bytes(report.trace_bytes)} ({each:.2f} bytes a token), "
        f"{info.num_tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    )
    if report.num_eos == 0:
        click.echo(f"note: --eos {eos} is none of the tokens; documents end as they would without it")
    if report.left_out:
        kinds = Counter(why for _, why in report.left_out)
        words = ", ".join(f"{count:,} {why}" for why, count in kinds.most_common(KINDS_NAMED_MAX))
        more = ", .." if len(kinds) > KINDS_NAMED_MAX else ""
        files = count_text(len(report.left_out), "file")
        click.echo(f"left out: {files} ({words}{more}), the first {report.left_out[0].path}")
