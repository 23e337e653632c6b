"""A small store in V4.1's layout, and real text of its vocabulary as a trace: what the planning commands are tried on.

The command line is called in process; what it prints is what a user sees.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from engram_adapter import build_checkpoint
from tierstore.formats.catalog import CATALOG_FILE
from tierstore.formats.trace import TokenTraceWriter
from tierstore.tools.cli import cli
from tierstore.tools.corpus import python_text_files, token_documents, train_tokenizer
from tierstore.tools.synth import write_checkpoint

TABLES = ["layers.1", "layers.14"]
ORDERS = ["2", "3", "4", "all"]
TABLE_BYTES = 64 << 20
FILE_STRIDE = 12  # of the library's files: some 300,000 tokens
BYTES_TRAINED = 1 << 20


@dataclass(frozen=True)
class TextStore:
    """A store, the tokens that its model's vocabulary has, documents, and the trace and the profile of them."""

    store: Path
    vocab_size: int
    documents: list[np.ndarray]
    trace: Path
    profile: Path

    def copy(self, folder: Path) -> Path:
        """Returns a store of the same shards, whose catalog and placements a test may change."""
        shutil.copytree(self.store, folder, copy_function=os.link)
        (folder / CATALOG_FILE).unlink()
        shutil.copyfile(self.store / CATALOG_FILE, folder / CATALOG_FILE)
        return folder


def make_text_store(folder: Path) -> TextStore:
    """Makes all of it. Blocks, five seconds or so."""
    files = python_text_files(documentation=())[::FILE_STRIDE]
    tokenizer = train_tokenizer(files, 1024, BYTES_TRAINED)
    documents = token_documents(tokenizer, files)
    write_checkpoint(folder / "model", "deepseek_v41", table_bytes=TABLE_BYTES, tokenizer=tokenizer)
    build_checkpoint(folder / "model", folder / "store")
    trace = write_trace(folder / "text.trace", documents)
    good("profile", folder / "store", trace, "-o", folder / "text.profile")
    return TextStore(folder / "store", tokenizer.get_vocab_size(), documents, trace, folder / "text.profile")


def write_trace(path: Path, documents: Sequence[np.ndarray]) -> Path:
    """Writes a trace that does not know its vocabulary."""
    with TokenTraceWriter(path, vocab_size=None, source="a test") as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def good(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def good_json(*arguments: object) -> Any:
    return json.loads(good(*arguments, "--json").stdout)
