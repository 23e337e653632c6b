"""The benchmark of lookups by gRPC measures the right rows, beside bare gRPC."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tierstore.errors import ConfigError
from tierstore.tools.bench import stores
from tierstore.tools.bench.serve import remote


def test_a_served_store_is_checked_and_measured_beside_bare_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ROUNDS", 1)
    monkeypatch.setattr(remote, "ONES", 5)
    monkeypatch.setattr(remote, "BATCHES", 2)
    with stores.temporary_store(tmp_path, 20_000) as made, remote.serving(made) as (url, bare):
        remote.check(url, made)
        figures = remote.measure(url, tokens=100, bare=bare)
        assert set(figures) == {
            "one_token_p50_us",
            "streamed_mb_per_s",
            "bare_one_token_p50_us",
            "bare_streamed_mb_per_s",
            "one_token_to_bare",
            "streamed_to_bare",
        }
        assert figures["one_token_to_bare"] == figures["one_token_p50_us"] / figures["bare_one_token_p50_us"]
        assert figures["streamed_to_bare"] == figures["streamed_mb_per_s"] / figures["bare_streamed_mb_per_s"]
        assert min(figures.values()) > 0
        monkeypatch.setattr(stores, "BLOCK_ROWS", 1000)
        with pytest.raises(ConfigError, match="other rows than were built"):
            remote.check(url, made)


def test_the_bare_side_receives_as_many_bytes() -> None:
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(remote.serving_bare())
        look_up = stack.enter_context(remote._bare_side(bare, 6336))
        assert look_up(500) == 500 * 6336
        assert len(look_up(1)) == 6336
