"""Without Mooncake's wheel, `bench exchange` says what to install instead of a row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tierstore.tools.bench import stores
from tierstore.tools.bench.exchange import mooncake_pages
from tierstore.tools.bench.pairs import Result
from tierstore.tools.bench.peers.stores import MissingPeerError


def test_without_the_wheel_the_row_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stores.make_store(tmp_path, 4096, part=(0, 2))
    monkeypatch.setitem(sys.modules, "mooncake", None)
    result = Result("")
    with pytest.raises(MissingPeerError, match=r"not installed .*pip install mooncake-transfer-engine-non-cuda"):
        mooncake_pages.measure(tmp_path, made.path, 1, result)
    assert result.comparisons == []
