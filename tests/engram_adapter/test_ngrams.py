"""N-grams packed into 128-bit items give each layer the keys that the hash gives the tokens themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from engram_adapter import HashSpec, build_token_map
from engram_adapter.ngrams import keys_of_windows, ngram_windows, window_bits
from tests.engram_adapter.test_hash_spec import FOLDED_MAP, MAKERS, PUBLISHED, QWEN, V41, Case
from tierstore.errors import ConfigError

WORD = 2**64
BITS = {"v41": 17, "published": 17, "qwen": 18, "tiny_qwen": 4, "tiny_published": 5}
BITS |= {"longcat": 17, "longcat_2": 18, "tiny_longcat": 4}


@pytest.fixture(scope="module", params=list(MAKERS))
def case(request: pytest.FixtureRequest) -> Case:
    return MAKERS[request.param]()


def shifted(windows: np.ndarray, bits: int) -> np.ndarray:
    values = [(high * WORD + low) >> bits for high, low in windows.tolist()]
    return np.array([divmod(value, WORD) for value in values], dtype=np.uint64).reshape(-1, 2)


def check_every_order_and_layer(spec: HashSpec, tokens: np.ndarray) -> None:
    windows, bits = ngram_windows(spec, tokens), window_bits(spec)
    for layer in spec.layers:
        expected = spec.keys(tokens[None], layer)[0]
        for column, order in enumerate(spec.orders):
            ngrams = shifted(windows, bits * (spec.orders[-1] - order))
            np.testing.assert_array_equal(keys_of_windows(spec, ngrams, column, layer), expected[:, column])


@pytest.mark.parametrize("name", MAKERS)
def test_an_id_takes_the_fewest_bits_that_hold_all_mapped_ids_and_the_pad(name: str) -> None:
    assert window_bits(MAKERS[name]().spec) == BITS[name]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 400])
def test_windows_of_each_order_give_the_keys_of_the_tokens(case: Case, seed: int, num_tokens: int) -> None:
    tokens = case.sequences(seed, 2, max(1, num_tokens)).reshape(-1)[:num_tokens]
    check_every_order_and_layer(case.spec, tokens)


def test_windows_of_real_text_give_the_keys_of_the_tokens(shared_data: Path) -> None:
    spec = HashSpec.from_config({"text_config": V41}, build_token_map(shared_data / "deepseek_v3_tokenizer.json"))
    with (shared_data / "trace_test.i32.zst").open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read(20_000 * 4)
    check_every_order_and_layer(spec, np.frombuffer(data, "<i4"))


def test_ids_that_hash_alike_give_the_same_windows() -> None:
    spec = MAKERS["tiny_published"]().spec
    np.testing.assert_array_equal(
        ngram_windows(spec, np.array([0, 18, 40])), ngram_windows(spec, np.array([34, 1, 23]))
    )


def test_integers_of_any_signed_type_or_layout_give_the_same_windows(case: Case) -> None:
    tokens = case.sequences(3, 1, 60)[0] % 120 % case.spec.vocab_size
    expected = ngram_windows(case.spec, tokens)
    for given in (tokens.astype(np.int32), tokens.astype(np.uint8), tokens.tolist(), np.repeat(tokens, 2)[::2]):
        np.testing.assert_array_equal(ngram_windows(case.spec, given), expected)


def test_ids_outside_the_vocabulary_raise_value_error_with_number_and_place(case: Case) -> None:
    for bad in (case.spec.vocab_size, -1, -(2**62), 2**62):
        with pytest.raises(ValueError, match=rf"token id {bad} of the document, position 2 .*{case.spec.vocab_size}"):
            ngram_windows(case.spec, np.array([0, 1, bad, 0]))


def test_arguments_of_other_types_or_shapes_are_refused(case: Case) -> None:
    for tokens in (np.zeros(2), np.zeros(2, dtype=bool), np.zeros(2, dtype=np.uint64), ["a"]):
        with pytest.raises(TypeError, match="expected integers"):
            ngram_windows(case.spec, tokens)
    for tokens in ([[1, 2]], 3):
        with pytest.raises(ValueError, match="one document"):
            ngram_windows(case.spec, np.array(tokens))


def test_orders_and_layers_that_the_model_lacks_are_refused(case: Case) -> None:
    windows, spec = np.zeros((3, 2), dtype=np.uint64), case.spec
    for order_index in (-1, len(spec.orders)):
        with pytest.raises(ValueError, match=f"order {order_index} of {len(spec.orders)}"):
            keys_of_windows(spec, windows, order_index, spec.layers[0])
    with pytest.raises(KeyError, match="layer 99"):
        keys_of_windows(spec, windows, 0, 99)
    with pytest.raises(ValueError, match=r"below 2|more than the"):
        keys_of_windows(spec, windows + np.uint64(2**63), 0, spec.layers[0])


def test_a_spec_without_its_token_map_is_refused() -> None:
    for ask in (window_bits, lambda spec: ngram_windows(spec, [1]), lambda spec: keys_of_windows(spec, [[0, 0]], 2, 1)):
        with pytest.raises(ConfigError, match="build_token_map"):
            ask(HashSpec.from_config({"text_config": V41}))


LONG: list[tuple[dict[str, Any], np.ndarray | None, str]] = [
    (PUBLISHED | {"engram_vocab_size": [646_400] * 7, "max_ngram_size": 8}, FOLDED_MAP, "17 bits take 136 bits"),
    (QWEN | {"ngram_size": 9}, None, "18 bits take 162 bits"),
]


@pytest.mark.parametrize(("config", "token_map", "message"), LONG, ids=["engram", "qwen"])
def test_n_grams_that_have_no_room_are_refused(
    config: dict[str, Any], token_map: np.ndarray | None, message: str
) -> None:
    spec = HashSpec.from_config(config, token_map)
    with pytest.raises(ConfigError, match=message):
        ngram_windows(spec, np.array([1]))
