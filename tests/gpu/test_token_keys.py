"""Row ids give back the host's keys on the device, whatever ids come in, and of any strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu_inputs import KEY_MAX, native_block_of
from support.host_memory import POISON_INT64
from support.stores import PRIMES

from tierstore.kernels.gpu import launching
from tierstore.kernels.gpu.token_keys import NO_KEY, DeviceAddressMap, keys_of_row_ids
from tierstore.spec import TableSpec

# Primes near 2^24, as models have them: three residues give a key, and their product overflows 64 bits.
LARGE = [16777259, 16777289, 16777291, 16777331, 16777333, 16777337, 16777381, 16777421]


def spec_of(orders: int, heads: int, primes: list[int]) -> TableSpec:
    moduli = (primes * 8)[: orders * heads] if primes is LARGE else primes[: orders * heads]
    offsets = [sum(moduli[:i]) for i in range(len(moduli))]
    return TableSpec(
        "t", sum(moduli), 8, tuple(range(2, 2 + orders)), heads, tuple(moduli), tuple(offsets), "raw", 8, "0" * 64
    )


SPECS = {
    "three orders of large primes": spec_of(3, 8, LARGE),
    "two orders of small primes": spec_of(2, 9, PRIMES),
    "plain": TableSpec.plain("t", 1000, 8, "raw", 8),
}


def on_device(
    spec: TableSpec, ids: torch.Tensor, within: tuple[int, int], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    assert spec.residues is not None
    address_map = DeviceAddressMap(
        *(torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (spec.moduli, spec.offsets)),
        *(torch.from_numpy(numbers.copy()).to(device) for numbers in spec.residues),
    )
    keys = torch.full((len(ids), len(spec.orders)), POISON_INT64, device=device)
    wanted = torch.full(ids.shape, POISON_INT64, device=device)
    keys_of_row_ids(ids, address_map, within, keys, wanted)
    alone = torch.full_like(keys, POISON_INT64)
    keys_of_row_ids(ids, address_map, within, alone)
    assert torch.equal(alone, keys)
    return keys.cpu().numpy(), wanted.cpu().numpy()


def expected(spec: TableSpec, ids: np.ndarray, within: tuple[int, int]) -> np.ndarray:
    """Order by order, in Python integers: the Chinese remainder theorem over all heads at once."""
    out = np.full((len(ids), len(spec.orders)), -1, dtype=np.int64)
    for n, token in enumerate(ids.tolist()):
        for order in range(len(spec.orders)):
            heads = range(order * spec.rows_per_key, (order + 1) * spec.rows_per_key)
            if not any(within[0] <= token[h] < within[1] for h in heads):
                continue
            key, product = 0, 1
            for h in heads:
                residue, modulus = token[h] - spec.offsets[h], spec.moduli[h]
                key += (residue - key) * pow(product, -1, modulus) % modulus * product
                product *= modulus
            good = 0 <= key <= KEY_MAX and all(key % spec.moduli[h] + spec.offsets[h] == token[h] for h in heads)
            out[n, order] = key if good else NO_KEY
    return out


def some_ids(spec: TableSpec, seed: int, num_tokens: int) -> np.ndarray:
    """Ids of keys, the least and the largest among them; some tokens are damaged, some stale, some -1."""
    rng = np.random.default_rng(seed)
    keys_end = spec.num_rows if spec.is_plain else KEY_MAX
    keys = rng.integers(0, keys_end, (num_tokens, len(spec.orders)))
    special = rng.random(keys.shape) < 0.2
    keys[special] = rng.choice([-1, 0, 1, keys_end - 1], int(special.sum()))
    ids = spec.row_ids(keys)
    damaged = rng.random(ids.shape) < 0.01
    ids[damaged] = rng.integers(-3, spec.num_rows + 3, int(damaged.sum()))
    stale = rng.random(num_tokens) < 0.1
    ids[stale] = rng.choice([-2, -(2**63), KEY_MAX, spec.num_rows, 0], (int(stale.sum()), ids.shape[1]))
    return ids


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 11, 200])
@pytest.mark.parametrize("which", SPECS)
def test_keys_of_row_ids_are_those_of_plain_arithmetic(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, which: str, num_tokens: int, native: bool
) -> None:
    if native:
        monkeypatch.setattr(launching, "block_of", native_block_of)
    spec = SPECS[which]
    ids = some_ids(spec, 1, num_tokens)
    for within in ((0, spec.num_rows), (spec.num_rows // 3, spec.num_rows // 2), (5, 5)):
        keys, wanted = on_device(spec, torch.from_numpy(ids).to(device), within, device)
        np.testing.assert_array_equal(keys, expected(spec, ids, within))
        np.testing.assert_array_equal(wanted, np.where((ids >= within[0]) & (ids < within[1]), ids, -1))
        if num_tokens == 200 and within[0] == 0:
            assert {-1, NO_KEY} <= set(keys.reshape(-1).tolist()) or spec.is_plain


def test_keys_are_those_that_the_host_finds(device: torch.device) -> None:
    for spec in SPECS.values():
        ids = some_ids(spec, 2, 300)
        keys, _ = on_device(spec, torch.from_numpy(ids).to(device), (0, spec.num_rows), device)
        of_host, is_whole = spec.keys_of_row_ids(ids, (0, spec.num_rows))
        np.testing.assert_array_equal((keys != NO_KEY).all(axis=1), is_whole)
        np.testing.assert_array_equal(keys[is_whole], of_host[is_whole])


def test_row_ids_may_have_any_strides(device: torch.device) -> None:
    spec = SPECS["three orders of large primes"]
    ids = some_ids(spec, 3, 40)
    right, _ = on_device(spec, torch.from_numpy(ids).to(device), (0, spec.num_rows), device)
    wide = torch.full((80, 2 * ids.shape[1] + 1), -77, device=device)
    wide[::2, 1::2] = torch.from_numpy(ids).to(device)
    columns = torch.from_numpy(ids.T.copy()).to(device).T
    one = torch.from_numpy(ids[:1].copy()).to(device).expand(40, -1)
    for given, keys in ((wide[::2, 1::2], right), (columns, right), (one, np.repeat(right[:1], 40, axis=0))):
        np.testing.assert_array_equal(on_device(spec, given, (0, spec.num_rows), device)[0], keys)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    spec = SPECS["two orders of small primes"]
    ids = torch.from_numpy(some_ids(spec, 4, 3)).to(device)
    for bad in (ids.to(torch.int32), ids[:, 1:], ids[0]):
        with pytest.raises(ValueError, match=r"expected torch.int64 \[any, 18\]"):
            on_device(spec, bad, (0, 5), device)
    with pytest.raises(ValueError, match="within is 5 to 4"):
        on_device(spec, ids, (5, 4), device)
