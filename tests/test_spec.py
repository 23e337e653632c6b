"""Address maps against plain Python integers, and specs that contradict themselves."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from support.stores import PRIMES, random_keys

from tierstore import FormatError
from tierstore.spec import TableSpec, codec_row_bytes, codec_scale

V41_PRIMES = [16000057, 16000073, 16000079, 16000087, 16000117, 16000141, 16000151, 16000169]
SMALL = PRIMES[:24]


def spec_of(moduli: list[int], orders: tuple[int, ...]) -> TableSpec:
    offsets = tuple(sum(moduli[:i]) for i in range(len(moduli)))
    return TableSpec(
        "t", sum(moduli), 264, orders, len(moduli) // len(orders), tuple(moduli), offsets, "raw", 1, "a" * 64
    )


SPECS = {
    "small": spec_of(SMALL, (2, 3, 4)),
    "large": spec_of(V41_PRIMES * 2, (2, 3)),
    "one head": spec_of([97, 101], (2, 3)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", [0, 1])
def test_row_ids_equal_integer_arithmetic(name: str, seed: int) -> None:
    spec = SPECS[name]
    keys = random_keys(np.random.default_rng(seed), 200, len(spec.orders))
    expected = [
        [
            -1 if key < 0 else key % spec.moduli[o * spec.rows_per_key + h] + spec.offsets[o * spec.rows_per_key + h]
            for o, key in enumerate(token)
            for h in range(spec.rows_per_key)
        ]
        for token in keys.tolist()
    ]
    assert spec.row_ids(keys).tolist() == expected


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_row_ids_of_whole_tokens_give_the_keys_back(name: str, seed: int) -> None:
    spec = SPECS[name]
    keys = random_keys(np.random.default_rng(seed), 500, len(spec.orders))
    keys[:5] = np.array([[0], [1], [2**63 - 1], [2**62], [-1]])
    found, whole = spec.keys_of_row_ids(spec.row_ids(keys))
    assert whole.all()
    np.testing.assert_array_equal(found, keys)


@pytest.mark.parametrize("seed", range(5))
def test_row_ids_that_no_key_gives_are_not_taken_for_a_token(seed: int) -> None:
    spec = SPECS["large"]
    rng = np.random.default_rng(seed)
    ids = spec.row_ids(random_keys(rng, 300, 2))
    damaged = ids.copy()
    tokens = np.arange(0, 300, 3)
    heads = rng.integers(0, 16, len(tokens))
    damaged[tokens, heads] = (damaged[tokens, heads] + 1 + rng.integers(0, 200, len(tokens))) % spec.num_rows
    changed = (damaged != ids).any(axis=1)
    keys, whole = spec.keys_of_row_ids(damaged)
    assert not whole[changed].any()
    assert whole[~changed].all()
    np.testing.assert_array_equal(spec.row_ids(keys[whole]), damaged[whole])


def test_random_row_ids_are_never_taken_for_a_token() -> None:
    for spec in (spec for spec in SPECS.values() if spec.rows_per_key > 1):
        ids = np.random.default_rng(0).integers(-1, spec.num_rows, (2000, spec.num_heads))
        keys, whole = spec.keys_of_row_ids(ids)
        np.testing.assert_array_equal(spec.row_ids(keys[whole]), ids[whole])
        assert whole.sum() == 0


def test_moduli_too_small_for_the_key_have_no_whole_tokens() -> None:
    few = dataclasses.replace(
        SPECS["one head"], orders=(2,), rows_per_key=2, moduli=(97, 89), offsets=(0, 97), num_rows=186
    )
    _, whole = few.keys_of_row_ids(few.row_ids(np.array([[5]])))
    assert not whole.any()


def test_with_one_row_a_key_every_row_id_of_its_head_has_the_smallest_key_that_gives_it() -> None:
    spec = SPECS["one head"]
    keys, whole = spec.keys_of_row_ids(spec.row_ids(np.array([[5, 6], [5 + 3 * spec.moduli[0], -1]])))
    assert whole.all()
    assert keys.tolist() == [[5, 6], [5, -1]]
    outside = [[spec.offsets[1], 0], [spec.num_rows, spec.offsets[1]], [-2, spec.offsets[1]]]
    assert not spec.keys_of_row_ids(np.array(outside))[1].any()


def test_a_spec_survives_its_record() -> None:
    for spec in SPECS.values():
        assert TableSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "x" * 201},
        {"num_rows": 0},
        {"num_rows": 100},
        {"row_bytes": 0},
        {"row_bytes": 10**6},
        {"orders": ()},
        {"rows_per_key": 7},
        {"moduli": tuple(SMALL[:-1])},
        {"moduli": (0, *SMALL[1:])},
        {"offsets": (-1, *range(23))},
        {"codec": "bf17"},
        {"codec": "bf16", "dim": 5},
        {"fingerprint": "A" * 64},
        {"fingerprint": "a"},
    ],
    ids=str,
)
def test_a_spec_that_contradicts_itself_is_refused(change: dict) -> None:
    with pytest.raises(FormatError):
        dataclasses.replace(SPECS["small"], **change)


@pytest.mark.parametrize("field", list(SPECS["small"].to_dict()))
def test_a_record_without_a_field_or_with_nonsense_is_refused(field: str) -> None:
    record = SPECS["small"].to_dict()
    for damaged in ({k: v for k, v in record.items() if k != field}, record | {field: {"x": 1}}):
        with pytest.raises(FormatError):
            TableSpec.from_dict(damaged)


def test_codecs_say_their_row_bytes_and_scale() -> None:
    assert codec_row_bytes("fp8_e4m3_e8m0x32", 256) == 264
    assert codec_row_bytes("bf16", 160) == 320
    assert codec_row_bytes("fp8_e4m3*0x1.8p-7", 160) == 160
    assert codec_row_bytes("fp32", 64) == 256
    assert codec_row_bytes("raw", 5) is None
    assert codec_scale("fp8_e4m3*0x1.8p-7") == 0.01171875
    assert codec_scale("fp8_e4m3") == 1.0
    for bad in ("fp8_e4m3*x", "fp8_e4m3*inf", "fp8_e4m3*0x1p128", "bf16*0x1p0", ""):
        with pytest.raises(FormatError):
            codec_row_bytes(bad, 32)
    with pytest.raises(FormatError, match="40"):
        codec_row_bytes("fp8_e4m3_e8m0x32", 40)


@pytest.mark.parametrize(
    ("codec", "row_bytes"),
    [
        ("fp4_e2m1_e4m3x16*0x1.8p-7", 128 + 16),
        ("fp4_e2m1_e4m3x16/0x1.8p+7", 128 + 16),
        ("fp4_e2m1_e8m0x32", 128 + 8),
        ("fp8_e4m3_fp32", 256 + 4),
        ("int8_fp32", 256 + 4),
        ("int8_bf16x128", 256 + 4),
        ("uint8b128_fp16x32", 256 + 16),
        ("uint4b8_bf16x128", 128 + 4),
        ("nf4_fp32x64", 128 + 16),
        ("gguf_q8_0", 8 * 34),
        ("gguf_q4_0", 8 * 18),
        ("gguf_q4_k", 144),
        ("gguf_iq4_nl", 8 * 18),
    ],
)
def test_a_quantized_row_is_its_values_and_its_scales(codec: str, row_bytes: int) -> None:
    assert codec_row_bytes(codec, 256) == row_bytes


@pytest.mark.parametrize(
    ("codec", "dim"),
    [
        ("fp4_e2m1_e4m3x16", 40),
        ("fp4_e2m1_e8m0x32", 16),
        ("int8_fp32x128", 192),
        ("uint4b8_fp32", 33),  # half a byte is left
        ("uint4b8_fp32x3", 33),
        ("nf4_fp32x64", 160),
        ("gguf_q4_k", 160),
        ("gguf_q8_0", 0),
    ],
)
def test_rows_that_end_within_a_block_are_refused(codec: str, dim: int) -> None:
    with pytest.raises(FormatError, match=f"{codec}.*{dim} values a row are not whole blocks"):
        codec_row_bytes(codec, dim)


@pytest.mark.parametrize(
    "codec",
    [
        *("int8", "nf4", "int8_e8m0x32", "fp4_e2m1_e8m0", "fp4_e2m1_e4m3x32", "int8_fp32*0x1p0", "int8_fp32x0"),
        *("int8_fp32x08", "fp8_e4m3/0x1p0", "fp4_e2m1_e4m3x16/0x0p0", "gguf_q8_0*0x1p0", "gguf_q6_k"),
        "int8_fp32x9999999999999999",
    ],
)
def test_names_that_no_rows_have_are_refused(codec: str) -> None:
    with pytest.raises(FormatError, match="codec"):
        codec_row_bytes(codec, 256)
