"""Entries are copied to the tokens that want them, wherever in a token's rows; bad places and shapes are refused."""

from __future__ import annotations

import numpy as np
import pytest

from tierstore import kernels


@pytest.mark.parametrize("width", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 200])
def test_every_token_gets_its_entry_and_nothing_else_is_touched(width: int, num_tokens: int) -> None:
    generator = np.random.default_rng(width)
    entries = generator.integers(0, 255, (50, width), dtype=np.uint8)
    places = generator.integers(-1, 50, num_tokens)
    out = np.full((num_tokens, width + 9), 255, dtype=np.uint8)
    kernels.place_entries(entries, places, out, 4)
    expected = np.where(places[:, None] < 0, 0, entries[places])
    np.testing.assert_array_equal(out[:, 4 : 4 + width], expected)
    assert (out[:, :4] == 255).all()
    assert (out[:, 4 + width :] == 255).all()


@pytest.mark.parametrize("place", [5, -2, 2**62, -(2**63)])
def test_a_place_outside_is_refused(place: int) -> None:
    for at in range(8):
        places = np.zeros(8, dtype=np.int64)
        places[at] = place
        with pytest.raises(ValueError, match="a place is outside"):
            kernels.place_entries(np.zeros((5, 16), dtype=np.uint8), places, np.zeros((8, 16), dtype=np.uint8))


def test_no_entries_serve_tokens_that_want_none() -> None:
    out = np.full((3, 4), 7, dtype=np.uint8)
    kernels.place_entries(np.empty((0, 4), dtype=np.uint8), np.full(3, -1), out)
    assert not out.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    entries, places, out = np.zeros((5, 16), np.uint8), np.zeros(3, np.int64), np.zeros((3, 20), np.uint8)
    for arguments in [
        (entries[0], places, out),
        (entries, places[:2], out),
        (entries, places, out, 5),
        (entries, places, out, 2**63),
        (entries, places, out[:, ::2]),
        (entries, places, out.astype(np.int8)),
    ]:
        with pytest.raises((ValueError, TypeError)):
            kernels.place_entries(*arguments)
