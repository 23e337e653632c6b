"""Rows go to buffers of any strides, zeros where they are not wanted, and nothing beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.gpu_inputs import native_block_of

from tierstore.kernels.gpu import launching
from tierstore.kernels.gpu.put_rows import put_rows

POISON = 0x5A
N, K = 7, 5
# (the array's shape for rows of so many bytes, the view of it)
STRIDES: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[[torch.Tensor], torch.Tensor]]] = {
    "together": (lambda b: (N, K, b), lambda a: a),
    "rows of a wider buffer": (lambda b: (N, K, b + 9), lambda a: a[:, :, 4:-5]),
    "every other token, some heads": (lambda b: (2 * N, K + 3, b), lambda a: a[::2, 2:-1]),
    "heads outermost": (lambda b: (K, N, b), lambda a: a.transpose(0, 1)),
}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("row_bytes", [1, 33, 40, 264, 5000])
@pytest.mark.parametrize("strides", STRIDES)
def test_rows_go_where_they_belong_and_nowhere_else(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, strides: str, row_bytes: int, in_place: bool, native: bool
) -> None:
    if native:
        monkeypatch.setattr(launching, "block_of", native_block_of)
    rng = np.random.default_rng(row_bytes)
    rows = torch.from_numpy(rng.integers(0, 256, (N, K, row_bytes), dtype=np.uint8)).to(device)
    ids = torch.from_numpy(rng.integers(-3, 40, (N, 2 * K))).to(device)[:, ::2]
    shape, view = STRIDES[strides]
    whole = torch.full(shape(row_bytes), POISON, dtype=torch.uint8, device=device)
    out = view(whole)
    if in_place:
        out.copy_(rows)
    put_rows(ids, (5, 30), None if in_place else rows, out)
    is_wanted = (ids >= 5) & (ids < 30)
    assert torch.equal(out, torch.where(is_wanted[..., None], rows, 0))
    out.fill_(POISON)
    assert (whole == POISON).all()


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    ids = torch.zeros((N, K), dtype=torch.int64, device=device)
    out = torch.zeros((N, K, 8), dtype=torch.uint8, device=device)
    torn = torch.zeros((N, K, 16), dtype=torch.uint8, device=device)[:, :, ::2]
    for arguments in (
        (ids.int(), (0, 5), None, out),
        (ids, (0, 5), None, out[1:]),
        (ids, (0, 5), None, torn),
        (ids, (0, 5), None, out.to(torch.int8)),
        (ids, (0, 5), out[:, :, 1:], out),
        (ids, (0, 5), torn, out),
    ):
        with pytest.raises(ValueError, match="expected torch"):
            put_rows(*arguments)
