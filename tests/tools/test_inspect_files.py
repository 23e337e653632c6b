"""`tierstore inspect` says what a trace holds without reading it, and refuses damaged ones by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tierstore.errors import FormatError
from tierstore.formats.key_trace import KeyBlock, KeyTraceWriter, TracedTable
from tierstore.formats.trace import TokenTraceWriter
from tierstore.tools.cli import cli
from tierstore.tools.inspect_files import kind_of_file


def shown(path: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["inspect", str(path), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_token_trace_is_shown_to_people_and_programs(tmp_path: Path) -> None:
    path = tmp_path / "t.trace"
    with TokenTraceWriter(path, vocab_size=50_257, source="a corpus") as writer:
        writer.add(np.array([1, 2, 3, 4000]), [2, 4])
        writer.finish()
    assert json.loads(shown(path, "--json")) == {
        "path": str(path),
        "kind": "trace",
        "bytes": path.stat().st_size,
        "trace": "tokens",
        "tokens": 4,
        "documents": 2,
        "vocab_size": 50_257,
        "token_id_max": 4000,
        "source": "a corpus",
    }
    text = shown(path)
    assert "a trace of 4 tokens of 2 documents" in text
    assert "vocabulary: 50,257 ids, the largest id 4,000; made by a corpus" in text


def test_a_key_trace_is_shown_with_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "k.trace"
    with KeyTraceWriter(path, tables=[TracedTable("layers.1", "f" * 16, (2, 3))], sample_rate=0.25) as writer:
        columns = [[0, 0, 0], [0, 1, 1], [5, 6, 7], [0, 0, 1]]
        dtypes = ["uint16", "uint8", "int64", "int64"]
        writer.add(KeyBlock(*(np.array(each, dtype) for each, dtype in zip(columns, dtypes, strict=True))))
        writer.finish(num_batches=2, num_dropped=9)
    record = json.loads(shown(path, "--json"))
    assert (record["trace"], record["accesses"], record["lookups"], record["dropped"]) == ("keys", 3, 2, 9)
    assert record["tables"] == [{"name": "layers.1", "fingerprint": "f" * 16, "orders": [2, 3]}]
    text = shown(path)
    assert "a trace of 3 keys of 2 lookups, 25 % of all keys, 9 dropped" in text
    assert "table layers.1, orders 2, 3: ffff" in text


def test_a_damaged_trace_is_refused_and_other_files_are_no_business_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "t.trace"
    with TokenTraceWriter(path, vocab_size=None, source="") as writer:
        writer.add_document(np.arange(9))
        writer.finish()
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    assert CliRunner().invoke(cli, ["inspect", str(path)]).exception is not None
    path.write_bytes(data[:24] + b"x" * 16 + data[40:])
    with pytest.raises(FormatError, match=r"t\.trace is a file of columns of kind 'x+', this tierstore knows"):
        kind_of_file(path)
    path.write_bytes(b"text")
    assert kind_of_file(path) is None
    assert kind_of_file(tmp_path) is None
