"""Rows by id from the device are the host's, bit for bit, into buffers of any strides; on a GPU, or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys

import tierstore
from tierstore.tiers.hbm import row_launches

NAME = "layers.1"


def open_hbm(path: Path, **options: Any) -> tierstore.Store:
    return tierstore.open(path, **({"dram": "500KiB", "hbm": "256KiB", "device": DEVICE} | options))


KINDS: dict[str, dict[str, Any]] = {
    "slots, records and the host": {},
    "rows in DRAM that the device reads": {"dram": "64MiB"},
    "no placement": {"placement": "none"},
}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, placed: Path) -> Iterator[tierstore.Store]:
    with open_hbm(placed, **KINDS[request.param]) as store:
        yield store


def whole_tokens(model: Model, num_tokens: int, seed: int = 1) -> np.ndarray:
    """Row ids of tokens, of which slots, records and nobody hold some."""
    return model.row_ids(NAME, random_keys(np.random.default_rng(seed), 700)[:num_tokens])


def from_device(rows: Any, ids: np.ndarray | torch.Tensor, out: torch.Tensor) -> np.ndarray:
    given = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(ids).to(DEVICE)
    rows.look_up(given, out)
    rows.check()
    return out.cpu().numpy()


def poisoned(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=torch.uint8, device=DEVICE)


STRIDES: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[[torch.Tensor], torch.Tensor]]] = {
    "together": (lambda n: (n, HEADS, ROW_BYTES), lambda a: a),
    "rows of a wider buffer": (lambda n: (n, HEADS, ROW_BYTES + 9), lambda a: a[:, :, 4:-5]),
    "heads of every other token": (lambda n: (2 * n, HEADS + 3, ROW_BYTES), lambda a: a[::2, 2:-1]),
    "heads outermost": (lambda n: (HEADS, n, ROW_BYTES), lambda a: a.transpose(0, 1)),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_rows_from_the_device_are_the_hosts_in_buffers_of_any_strides(
    store: tierstore.Store, model: Model, strides: str
) -> None:
    num_rows = len(model.rows[NAME])
    for within in (None, (700, 4321)):
        rows = store.open_rows(NAME, 40, within=within)
        for num_tokens in (40, 0):
            ids = whole_tokens(model, num_tokens)
            shape, view = STRIDES[strides]
            whole = poisoned(shape(num_tokens))
            found = from_device(rows, ids, view(whole))
            np.testing.assert_array_equal(found, store[NAME].rows(ids, within=within or (0, num_rows)))
            view(whole).fill_(POISON)
            assert (whole == POISON).all()


def test_row_ids_on_the_device_may_have_any_strides(store: tierstore.Store, model: Model) -> None:
    ids = whole_tokens(model, 30)
    rows, expected = store.open_rows(NAME, 30), store[NAME].rows(ids)
    wide = torch.full((60, 2 * HEADS + 1), -77, device=DEVICE)
    wide[::2, 1::2] = torch.from_numpy(ids).to(DEVICE)
    columns = torch.from_numpy(ids.T.copy()).to(DEVICE).T
    for given in (wide[::2, 1::2], columns):
        np.testing.assert_array_equal(from_device(rows, given, poisoned(expected.shape)), expected)


def test_stale_ids_of_padded_tokens_give_zero_rows_and_no_error(store: tierstore.Store, model: Model) -> None:
    ids, num_rows = whole_tokens(model, 20), len(model.rows[NAME])
    stale = np.array([-2, -(2**63), 2**63 - 1, num_rows, -1])
    ids[12:] = stale[np.random.default_rng(3).integers(0, len(stale), ids[12:].shape)]
    rows = store.open_rows(NAME, 20)
    found = from_device(rows, ids, poisoned((20, HEADS, ROW_BYTES)))
    np.testing.assert_array_equal(found, store[NAME].rows(ids, within=(0, num_rows)))
    assert not found[12:].any()


@pytest.mark.parametrize("within", [None, (300, 6000)])
def test_ids_that_are_those_of_no_token_are_exact_too(
    store: tierstore.Store, model: Model, within: tuple[int, int] | None
) -> None:
    rng, num_rows = np.random.default_rng(4), len(model.rows[NAME])
    ids = whole_tokens(model, 40)
    loose = rng.random(ids.shape) < 0.03
    ids[loose] = rng.integers(-1, num_rows, int(loose.sum()))
    ids[30:33] = 0  # as a buffer is at first
    ids[35] = rng.integers(0, num_rows, HEADS)
    rows = store.open_rows(NAME, 40, within=within)
    for _ in range(2):
        found = from_device(rows, ids, poisoned((40, HEADS, ROW_BYTES)))
        np.testing.assert_array_equal(found, store[NAME].rows(ids, within=within or (0, num_rows)))


def test_the_rows_of_all_ranks_together_are_all_rows(store: tierstore.Store, model: Model) -> None:
    ids, num_rows = whole_tokens(model, 25), len(model.rows[NAME])
    bounds = np.linspace(0, num_rows, 4).astype(int).tolist()
    summed = np.zeros((25, HEADS, ROW_BYTES), dtype=np.uint8)
    for within in pairwise(bounds):
        rows = store.open_rows(NAME, 25, within=within)
        found = from_device(rows, ids, poisoned(summed.shape))
        np.testing.assert_array_equal(found, store[NAME].rows(ids, within=within))
        summed |= found
    np.testing.assert_array_equal(summed, store[NAME].rows(ids))


@pytest.mark.parametrize("strided", [False, True])
def test_more_tokens_than_the_buffers_hold_go_in_parts(
    store: tierstore.Store, model: Model, monkeypatch: pytest.MonkeyPatch, strided: bool
) -> None:
    monkeypatch.setattr(row_launches, "STAGING_BYTES_MAX", 5 * HEADS * ROW_BYTES)
    ids = whole_tokens(model, 37)
    rows = store.open_rows(NAME, 8, within=(300, 6000))
    whole = poisoned((37, HEADS, ROW_BYTES + strided))
    found = from_device(rows, ids, whole[:, :, :ROW_BYTES])
    np.testing.assert_array_equal(found, store[NAME].rows(ids, within=(300, 6000)))


def test_a_started_lookup_is_finished_by_the_next_one(store: tierstore.Store, model: Model) -> None:
    rows = store.open_rows(NAME, 8)
    batches = [torch.from_numpy(whole_tokens(model, 12, seed)).to(DEVICE) for seed in (1, 2, 3)]
    outs = [poisoned((12, HEADS, ROW_BYTES)) for _ in batches]
    for ids, out in zip(batches, outs, strict=True):
        rows.start(ids, out)
    rows.finish()
    rows.finish()  # nothing is left
    rows.check()
    for ids, out in zip(batches, outs, strict=True):
        np.testing.assert_array_equal(out.cpu().numpy(), store[NAME].rows(ids.cpu().numpy()))


def test_plain_tables_are_looked_up_by_row_id(store: tierstore.Store) -> None:
    ids = torch.tensor([[0], [32], [-1], [5], [33], [-9]], device=DEVICE)
    found = from_device(store.open_rows("plain", 6), ids, poisoned((6, 1, 24)))
    np.testing.assert_array_equal(found[:4, 0], store["plain"].rows(np.array([0, 32, -1, 5])))
    assert not found[4:].any()


def test_what_does_not_fit_is_refused_by_name(store: tierstore.Store, placed: Path, model: Model) -> None:
    rows = store.open_rows(NAME, 4)
    ids = torch.from_numpy(whole_tokens(model, 4)).to(DEVICE)
    out = poisoned((4, HEADS, ROW_BYTES))
    for bad in (ids.int(), ids[:, 1:], ids.reshape(-1)):
        with pytest.raises(ValueError, match=r"row_ids are torch.*expected torch.int64 \[any, 24\]"):
            rows.start(bad, out)
    for buffer in (out[1:], out.to(torch.int8), out[:, :, :-1], poisoned((4, HEADS, 2 * ROW_BYTES))[:, :, ::2]):
        with pytest.raises(ValueError, match="the bytes of a row side by side"):
            rows.start(ids, buffer)
    with pytest.raises(ValueError, match="within is 5 to 4"):
        store.open_rows(NAME, 4, within=(5, 4))
    with pytest.raises(KeyError, match="no table"):
        store.open_rows("layers.2", 4)
    with tierstore.open(placed, dram="500KiB") as other, pytest.raises(tierstore.StoreNotReadyError, match="no hbm"):
        other.open_rows(NAME, 4)
    store.close()
    with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
        rows.look_up(ids, out)
    with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
        store.open_rows(NAME, 4)
