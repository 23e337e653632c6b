"""Row ids made on the device are those of the host, up to the largest key and the largest row id."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu_inputs import KEY_MAX, native_block_of
from support.host_memory import POISON_INT64

from tierstore.kernels import reference
from tierstore.kernels.gpu import launching
from tierstore.kernels.gpu import row_ids as row_ids_module
from tierstore.kernels.gpu.row_ids import row_ids_of_keys

NATIVE_BLOCK = row_ids_module._ROWS_A_PROGRAM


def on_device(device: torch.device, keys: np.ndarray, moduli: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = torch.full((len(keys), len(moduli)), POISON_INT64, dtype=torch.int64, device=device)
    row_ids_of_keys(*(torch.from_numpy(array).to(device) for array in (keys, moduli, offsets)), out)
    return out.cpu().numpy()


def expected(keys: np.ndarray, moduli: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = np.full((keys.size, len(moduli) // keys.shape[1]), POISON_INT64)
    reference.row_ids_of_keys(keys.reshape(-1), None, moduli, offsets, out)
    return out.reshape(len(keys), len(moduli))


def batch(seed: int, num_tokens: int, orders: int, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, num_tokens, orders, heads])
    keys = rng.integers(0, KEY_MAX, (num_tokens, orders), endpoint=True)
    special = rng.random(keys.shape) < 0.3
    keys[special] = rng.choice([-1, 0, 1, 16_000_057, KEY_MAX], int(special.sum()))
    moduli = rng.integers(1, 2 ** rng.integers(1, 40, orders * heads), endpoint=True)
    offsets = np.concatenate([[0], np.cumsum(moduli)[:-1]])
    return keys, moduli, offsets


def test_the_largest_key_and_the_largest_row_id_are_exact(device: torch.device) -> None:
    keys = np.array([[KEY_MAX], [KEY_MAX - 1], [0], [-1], [-2], [-KEY_MAX]])
    moduli, offsets = np.array([KEY_MAX, 1, 2, 16_000_057]), np.array([0, KEY_MAX - 1, 5, 7])
    plain = [[key if key < 0 else key % m + o for m, o in zip(moduli.tolist(), offsets.tolist(), strict=True)]
             for key in keys[:, 0].tolist()]  # fmt: skip
    assert on_device(device, keys, moduli, offsets).tolist() == plain


@pytest.mark.parametrize("num_tokens", [0, 1, 2, NATIVE_BLOCK // 8 - 1, NATIVE_BLOCK // 8, NATIVE_BLOCK // 8 + 1, 700])
@pytest.mark.parametrize(("orders", "heads"), [(1, 1), (1, 8), (3, 8), (2, 5)])
@pytest.mark.parametrize("native", [False, True])
def test_row_ids_equal_the_references(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, num_tokens: int, orders: int, heads: int, native: bool
) -> None:
    if native:
        monkeypatch.setattr(launching, "block_of", native_block_of)
    given = batch(0, num_tokens, orders, heads)
    np.testing.assert_array_equal(on_device(device, *given), expected(*given))


@pytest.mark.parametrize("seed", range(10))
def test_row_ids_equal_the_references_over_random_shapes(device: torch.device, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = batch(seed, int(rng.integers(1, 300)), int(rng.integers(1, 6)), int(rng.integers(1, 17)))
    np.testing.assert_array_equal(on_device(device, *given), expected(*given))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    keys, moduli, offsets = (torch.from_numpy(array).to(device) for array in batch(0, 4, 3, 2))
    out = torch.zeros((4, 6), dtype=torch.int64, device=device)
    for arguments in (
        (keys.to(torch.int32), moduli, offsets, out),
        (keys.reshape(-1), moduli, offsets, out),
        (keys, moduli[:5], offsets[:5], out[:, :5].contiguous()),
        (keys, moduli[:0], offsets[:0], out[:, :0]),
        (keys[:, :0], moduli, offsets, out),
        (keys, moduli, offsets[:3], out),
        (keys, moduli, offsets, out[:3]),
        (keys, moduli, offsets, out.T.contiguous().T),
    ):
        with pytest.raises(ValueError, match=r"expected torch|as many for each order"):
            row_ids_of_keys(*arguments)
