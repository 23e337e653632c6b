"""Keys and row ids of the families equal an oracle in plain Python integers, however a sequence is fed."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import plain_hash_oracle as oracle

from engram_adapter.hash_spec import HashSpec
from engram_adapter.token_map import build_token_map
from tierstore.errors import ConfigError, FormatError
from tierstore.spec import TableSpec

V41 = {
    "engram_layer_ids": [1, 14], "engram_num_embeddings": [384006168, 384016682], "engram_vocab_size": 16000000,
    "engram_max_ngram_size": 4, "engram_n_heads": 8, "engram_head_dim": 256, "engram_compressed_vocab_size": 99092,
    "engram_pad_token_id": 2, "vocab_size": 129280,
}  # fmt: skip
PUBLISHED = {
    "engram_vocab_size": [646400, 646400], "max_ngram_size": 3, "n_embed_per_ngram": 512, "n_head_per_ngram": 8,
    "layer_ids": [1, 15], "pad_id": 2, "seed": 0, "kernel_size": 4,
}  # fmt: skip
QWEN = {
    "ple_layer_ids": [2], "ple_embed_dim": 2560, "ngram_size": 3, "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20000000, "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128,
    "seed": 1234, "ple_conv_kernel_size": 4, "vocab_size": 248320, "eos_token_id": 248044,
}  # fmt: skip
LONGCAT_LITE = {
    "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4, "vocab_size": 131072, "eos_token_id": 2,
    "hidden_size": 3072,
}  # fmt: skip
LONGCAT_2 = {
    "oe_vocab_size_ratio": 100.567, "oe_neighbor_num": 5, "oe_split_num": 4, "vocab_size": 163840, "eos_token_id": 2,
    "hidden_size": 8192,
}  # fmt: skip
SEEDS = [0, 1, 2]
FOLDED_MAP = (np.arange(129_280) % 99_092).astype(np.int32)  # of the real sizes, for machines without the tokenizer


@dataclass
class Case:
    """A hash beside the oracle's numbers for it; `mapped` turns a token id into the id that is hashed."""

    spec: HashSpec
    numbers: dict[int, oracle.Numbers]
    mapped: Callable[[int], int]
    pad: int
    barrier: int | None = None

    def keys(self, tokens: list[int | None], layer: int) -> list[list[int]]:
        ids = [None if token is None else self.mapped(token) for token in tokens]
        return oracle.keys_of(ids, self.numbers[layer].multipliers, self.pad, self.barrier)

    def sequences(self, seed: int, batch: int, length: int) -> np.ndarray:
        """Random token ids; the first sequence starts with token 0, and some are the family's special tokens."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, self.spec.vocab_size, (batch, length))
        tokens[rng.random((batch, length)) < 0.15] = 2 if self.barrier is None else self.barrier
        tokens[rng.random((batch, length)) < 0.1] = 0
        tokens[0, 0] = 0
        tokens[-1, -1] = self.spec.vocab_size - 1
        return tokens


@dataclass
class LongcatCase(Case):
    """The keys of a hash whose heads share none."""

    splits: int = 4

    def keys(self, tokens: list[int | None], layer: int) -> list[list[int]]:
        moduli, barrier = self.numbers[layer].moduli, self.barrier
        assert barrier is not None
        return oracle.longcat_keys_of(tokens, moduli, self.spec.vocab_size, self.splits, barrier)


def v41_case(token_map: np.ndarray) -> Case:
    numbers = oracle.engram_numbers([1, 14], [16_000_000] * 3, 8, 99_092)
    table = token_map.tolist()
    return Case(HashSpec.from_config({"text_config": V41}, token_map), numbers, table.__getitem__, table[2])


def published_case(token_map: np.ndarray) -> Case:
    numbers = oracle.engram_numbers([1, 15], [646_400] * 2, 8, 99_092)
    table = token_map.tolist()
    return Case(HashSpec.from_config(PUBLISHED, token_map), numbers, table.__getitem__, table[2])


def qwen_case() -> Case:
    numbers = oracle.qwen_numbers([1], 20_000_000, 3, 8, 248_320, 1234)
    return Case(HashSpec.from_config({"text_config": QWEN}), numbers, int, 248_044, 248_044)


def tiny_qwen_case() -> Case:
    """Several layers, many EOS, orders up to 4."""
    config = QWEN | {"ple_layer_ids": [5, 1, 3], "ngram_size": 4, "vocab_size": 11, "eos_token_id": [3, 7]}
    numbers = oracle.qwen_numbers([0, 2, 4], 500, 4, 2, 11, 99)
    config |= {"heads_per_ngram": 2, "ngram_vocab_size_base": 500, "seed": 99}
    return Case(HashSpec.from_config(config), numbers, int, 3, 3)


def tiny_published_case() -> Case:
    """Bases of its own for each order, so near that runs of different orders meet; layers not ascending."""
    token_map = np.arange(50, dtype=np.int32) % 17
    config = PUBLISHED | {"engram_vocab_size": [300, 310, 300], "max_ngram_size": 4, "n_head_per_ngram": 3, "seed": 5}
    config |= {"layer_ids": [7, 2, 4], "pad_id": 20}
    numbers = oracle.engram_numbers([7, 2, 4], [300, 310, 300], 3, 17, seed=5)
    return Case(HashSpec.from_config(config, token_map), numbers, token_map.tolist().__getitem__, 3)


def longcat_case() -> Case:
    numbers = oracle.longcat_numbers(131_072, 78 * 131_072, 4, 4)
    return LongcatCase(HashSpec.from_config(LONGCAT_LITE), {0: numbers}, int, 0, 2)


def longcat_2_case() -> Case:
    """A ratio that is no whole number, even moduli, n-grams of 87 bits, as many heads as a table can have."""
    numbers = oracle.longcat_numbers(163_840, 16_476_897, 5, 4)
    return LongcatCase(HashSpec.from_config(LONGCAT_2), {0: numbers}, int, 0, 2)


def tiny_longcat_case() -> Case:
    """Many ends of text, fewer rows than n-grams."""
    config = LONGCAT_LITE | {"vocab_size": 11, "eos_token_id": [3, 7], "ngram_vocab_size_ratio": 4.7}
    numbers = oracle.longcat_numbers(11, 51, 4, 3)
    return LongcatCase(HashSpec.from_config(config | {"emb_split_num": 3}), {0: numbers}, int, 0, 3, splits=3)


MAKERS: dict[str, Callable[[], Case]] = {
    "v41": lambda: v41_case(FOLDED_MAP),
    "published": lambda: published_case(FOLDED_MAP),
    "qwen": qwen_case,
    "tiny_qwen": tiny_qwen_case,
    "tiny_published": tiny_published_case,
    "longcat": longcat_case,
    "longcat_2": longcat_2_case,
    "tiny_longcat": tiny_longcat_case,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def case(request: pytest.FixtureRequest) -> Case:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def real_map() -> np.ndarray:
    file = Path(__file__).resolve().parents[3] / "shared" / "data" / "deepseek_v3_tokenizer.json"
    if not file.is_file():
        pytest.skip("the optional deepseek_v3_tokenizer.json of shared/data beside the repository is not there")
    return build_token_map(file)


def check_against_oracle(case: Case, tokens: np.ndarray) -> None:
    for layer in case.spec.layers:
        keys = [case.keys(sequence, layer) for sequence in tokens.tolist()]
        row_ids = [oracle.row_ids_of(of_sequence, case.numbers[layer]) for of_sequence in keys]
        found = case.spec.keys(tokens, layer)
        assert found.dtype == np.int64
        assert found.min() >= 0
        assert found.tolist() == keys
        assert case.spec.row_ids(tokens, layer).tolist() == row_ids


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_and_row_ids_equal_plain_python(case: Case, seed: int) -> None:
    check_against_oracle(case, case.sequences(seed, 4, 40))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("make", [v41_case, published_case], ids=["v41", "published"])
def test_row_ids_with_the_real_tokenizers_map_equal_plain_python(
    make: Callable[[np.ndarray], Case], seed: int, real_map: np.ndarray
) -> None:
    assert real_map[0] == 0, "token 0 has compressed id 0: keys of its n-grams lack a factor, as they must"
    check_against_oracle(make(real_map), make(real_map).sequences(seed, 5, 60))


def test_key_zero_comes_out_of_token_zero_and_equal_keys_of_different_orders_occur() -> None:
    case = v41_case(FOLDED_MAP)
    config = V41 | {"engram_pad_token_id": 0}
    assert HashSpec.from_config(config, FOLDED_MAP).keys([[0, 0]], 1).tolist() == [[[0, 0, 0], [0, 0, 0]]]
    keys = case.spec.keys([[5, 0, 0, 7, 0, 0, 0, 9]], 1)[0, -1]
    assert keys[0] == keys[1] == keys[2]


def test_numbers_of_v41_are_the_published_ones() -> None:
    spec = HashSpec.from_config({"text_config": V41}, FOLDED_MAP)
    assert (spec.family, spec.layers, spec.orders, spec.heads) == ("deepseek_v41", (1, 14), (2, 3, 4), 8)
    assert spec.multipliers(1) == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert spec.multipliers(14) == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    assert (spec.moduli(1)[0], spec.moduli(1)[-1]) == (16000057, 16000463)
    assert (spec.moduli(14)[0], spec.moduli(14)[-1]) == (16000477, 16000889)
    assert (spec.num_rows(1), spec.num_rows(14)) == (384006168, 384016682)
    assert len(spec.moduli(1)) == len(spec.offsets(1)) == 24


def test_numbers_of_the_published_demonstration_are_its_own() -> None:
    spec = HashSpec.from_config(PUBLISHED, FOLDED_MAP)
    assert (spec.family, spec.layers, spec.orders, spec.heads) == ("engram", (1, 15), (2, 3), 8)
    assert (spec.num_rows(1), spec.num_rows(15)) == (10344164, 10348242)


def test_numbers_of_qwen_are_the_published_ones() -> None:
    spec = HashSpec.from_config({"text_config": QWEN})
    assert (spec.family, spec.layers, spec.orders, spec.heads) == ("qwen4_exp", (1,), (2, 3), 8)
    assert spec.multipliers(1) == (23703573157769, 20109073645365, 8052911324071)
    assert (spec.moduli(1)[0], spec.moduli(1)[-1], sum(spec.moduli(1))) == (20000003, 20000171, 320001446)
    assert spec.num_rows(1) == 320001536
    assert spec.token_map is None


def test_numbers_of_longcat_are_the_published_ones() -> None:
    spec = HashSpec.from_config(LONGCAT_LITE)
    assert (spec.family, spec.layers, spec.orders, spec.heads) == ("longcat", (0,), (2,) * 4 + (3,) * 4 + (4,) * 4, 1)
    assert (spec.moduli(0)[0], spec.moduli(0)[-1], spec.num_rows(0)) == (10223617, 10223639, 122683536)
    assert (spec.barrier_id, spec.history_tokens, spec.token_map) == (2, 3, None)
    second = HashSpec.from_config(LONGCAT_2)
    assert second.orders == (2,) * 4 + (3,) * 4 + (4,) * 4 + (5,) * 4
    assert (second.moduli(0)[0], second.moduli(0)[-1], second.num_rows(0)) == (16476898, 16476928, 263630608)


def test_every_number_equals_the_oracles(case: Case) -> None:
    for layer, numbers in case.numbers.items():
        assert case.spec.multipliers(layer) == tuple(numbers.multipliers)
        assert case.spec.moduli(layer) == tuple(numbers.moduli)
        assert case.spec.offsets(layer) == tuple(numbers.offsets)
    assert set(case.spec.layers) == set(case.numbers)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sequence_cut_anywhere_gives_the_keys_of_the_whole(case: Case, seed: int) -> None:
    tokens, reach = case.sequences(seed, 3, 12), case.spec.orders[-1] - 1
    for layer in case.spec.layers:
        whole = case.spec.keys(tokens, layer)
        for cut in range(13):
            head = case.spec.keys(tokens[:, :cut], layer)
            tail = case.spec.keys(tokens[:, cut:], layer, history=tokens[:, max(0, cut - reach) : cut])
            np.testing.assert_array_equal(np.concatenate([head, tail], axis=1), whole)


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_fed_in_random_pieces_with_dead_positions_give_the_keys_of_the_whole(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed + 100)
    tokens, reach, layer = case.sequences(seed, 3, 30), case.spec.orders[-1] - 1, case.spec.layers[-1]
    dead = rng.random(tokens.shape) < 0.2
    whole = case.spec.row_ids(tokens, layer, dead=dead)
    past, start, pieces = np.full((3, reach), -1), 0, []
    while start < 30:
        end = start + int(rng.integers(1, 5))
        part, gone = tokens[:, start:end], dead[:, start:end]
        pieces.append(case.spec.row_ids(part, layer, past, gone))
        past, start = np.concatenate([past, np.where(gone, -1, part)], axis=1)[:, -reach:], end
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_shorter_histories_are_padded_with_no_token_on_the_left(case: Case) -> None:
    tokens, reach, layer = case.sequences(5, 1, 8), case.spec.orders[-1] - 1, case.spec.layers[0]
    for length in range(reach + 1):
        short = tokens[:, :length]
        padded = np.concatenate([np.full((1, reach - length), -1), short], axis=1)
        expected = case.spec.keys(tokens, layer)[:, length:]
        np.testing.assert_array_equal(case.spec.keys(tokens[:, length:], layer, short), expected)
        np.testing.assert_array_equal(case.spec.keys(tokens[:, length:], layer, padded), expected)


def test_a_history_of_any_length_gives_the_keys_of_the_whole(case: Case) -> None:
    tokens, reach = case.sequences(3, 2, 9), case.spec.orders[-1] - 1
    assert case.spec.history_tokens == reach
    for layer in case.spec.layers:
        whole = case.spec.keys(tokens, layer)
        for cut in range(10):
            np.testing.assert_array_equal(
                case.spec.keys(tokens[:, cut:], layer, history=tokens[:, :cut]), whole[:, cut:]
            )


def test_tokens_that_are_too_old_to_count_are_not_looked_at(case: Case) -> None:
    layer, reach = case.spec.layers[0], case.spec.orders[-1] - 1
    recent, old = [[4] * reach], [[-7, case.spec.vocab_size, 2**60]]
    expected = case.spec.keys([[5]], layer, history=recent)
    np.testing.assert_array_equal(case.spec.keys([[5]], layer, history=np.concatenate([old, recent], axis=1)), expected)


def test_a_history_that_is_too_short_is_the_start_of_a_document(case: Case) -> None:
    layer, reach = case.spec.layers[0], case.spec.orders[-1] - 1
    for known in range(reach):
        padded = [[-1] * (reach - known) + [4] * known]
        expected = case.spec.keys([[5, 6]], layer, history=padded)
        np.testing.assert_array_equal(case.spec.keys([[5, 6]], layer, history=np.full((1, known), 4)), expected)


def test_what_is_older_than_a_missing_token_of_the_history_counts_as_pad(case: Case) -> None:
    layer, reach = case.spec.layers[0], case.spec.orders[-1] - 1
    for hole in range(reach):
        history: list[int | None] = [4 + back for back in range(reach)]
        history[hole] = None
        given = [-1 if token is None else token for token in history]
        assert case.spec.keys([[5, 6]], layer, [given]).tolist() == [case.keys([*history, 5, 6], layer)[reach:]]


@pytest.mark.parametrize("garbage", [-1, -7, 10**12])
def test_dead_positions_anywhere_end_look_back_and_their_ids_are_not_looked_at(case: Case, garbage: int) -> None:
    tokens, layer = case.sequences(3, 1, 9), case.spec.layers[-1]
    for first in range(9):
        for last in range(first, 9):
            dead = np.zeros((1, 9), dtype=bool)
            dead[0, [first, last]] = True
            expected = case.keys(
                [None if gone else t for t, gone in zip(tokens[0].tolist(), dead[0], strict=True)], layer
            )
            found = case.spec.keys(np.where(dead, garbage, tokens), layer, dead=dead)
            assert found.tolist() == [expected]


def test_look_back_does_not_cross_an_eos_but_starts_at_one() -> None:
    case = tiny_qwen_case()
    for place in range(7):
        tokens = [5, 6, 8, 9, 10, 1, 2]
        tokens[place] = 3
        for layer in case.spec.layers:
            keys = case.spec.keys([tokens], layer)[0]
            assert keys.tolist() == case.keys(list(tokens), layer)
            fresh = case.spec.keys(np.array([tokens[place + 1 :]], dtype=np.int64), layer)[
                0
            ]  # as if the sequence began after the EOS
            np.testing.assert_array_equal(keys[place + 1 :], fresh)
            if place:
                alone = case.spec.keys([[3]], layer)[0, 0]
                assert (keys[place] != alone).all(), "an EOS itself looks back at what came before it"


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ngram_size", [2, 3, 5])
def test_row_ids_equal_those_of_transformers(seed: int, ngram_size: int) -> None:
    modeling = pytest.importorskip(
        "transformers.models.qwen4_exp.modeling_qwen4_exp", reason="transformers 5.19 has it"
    )
    values = {
        "vocab_size": 23, "ple_layer_ids": [3, 1], "ngram_size": ngram_size, "heads_per_ngram": 3, "eos_token_id": [4,
        9], "ngram_vocab_size_base": 211, "make_ngram_vocab_size_divisible_by": 64, "seed": 77 + seed,
        "hidden_size": 32,
    }  # fmt: skip
    config = SimpleNamespace(**values)
    config.ple_layer_ids = sorted(config.ple_layer_ids)
    spec = HashSpec.from_config(values)
    assert spec.layers == (0, 2)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 23, (4, 50))
    tokens[rng.random(tokens.shape) < 0.2] = 4
    for index, layer in enumerate(spec.layers):
        width = (ngram_size - 1) * 3 * 2
        module = modeling.Qwen4ExpTextNGramEmbedding(config, width, layer, index)
        assert module.layer_multipliers.tolist() == list(spec.multipliers(layer))
        assert module.ngram_heads_vocab_sizes.tolist() == list(spec.moduli(layer))
        assert module.ngram_embedding.num_embeddings == spec.num_rows(layer)
        seen: list[torch.Tensor] = []
        module.ngram_embedding.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        module(torch.from_numpy(tokens), None)
        np.testing.assert_array_equal(seen[0].numpy(), spec.row_ids(tokens, layer))


def test_ids_of_any_signed_type_layout_or_owner_give_the_same_keys(case: Case) -> None:
    tokens, layer = np.minimum(case.sequences(1, 4, 10), 100), case.spec.layers[0]
    expected = case.spec.keys(tokens, layer)
    wide = np.zeros((4, 20), dtype=np.int64)
    wide[:, ::2] = tokens
    for same in (
        tokens.astype(np.int32), tokens.astype(np.int8), np.asfortranarray(tokens), wide[:, ::2], tokens.tolist(),
        torch.from_numpy(tokens), torch.from_numpy(tokens).int(), tokens.astype(">i8"),
    ):  # fmt: skip
        np.testing.assert_array_equal(case.spec.keys(same, layer), expected)
    dead = torch.zeros(4, 10, dtype=torch.bool)
    np.testing.assert_array_equal(case.spec.keys(tokens, f"layers.{layer}", dead=dead), expected)


def test_arguments_are_left_as_they_were(case: Case) -> None:
    tokens, history = case.sequences(1, 2, 6), np.full((2, 1), -1)
    dead = np.zeros((2, 6), dtype=bool)
    dead[0, 2] = True
    before = tokens.copy(), history.copy(), dead.copy()
    case.spec.row_ids(tokens, case.spec.layers[0], history, dead)
    for left, was in zip((tokens, history, dead), before, strict=True):
        np.testing.assert_array_equal(left, was)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1)])
def test_empty_and_single_batches_have_their_shapes(case: Case, shape: tuple[int, int]) -> None:
    tokens, layer, spec = np.zeros(shape, dtype=np.int64), case.spec.layers[0], case.spec
    assert spec.keys(tokens, layer).shape == (*shape, len(spec.orders))
    assert spec.row_ids(tokens, layer).shape == (*shape, len(spec.orders) * spec.heads)
    assert spec.row_ids(tokens, layer).dtype == np.int64


def test_ids_outside_the_vocabulary_raise_value_error_with_number_and_place(case: Case) -> None:
    layer, size = case.spec.layers[0], case.spec.vocab_size
    for bad in (size, -1, -(2**62), 2**62):
        tokens = np.zeros((3, 4), dtype=np.int64)
        tokens[2, 1] = bad
        with pytest.raises(ValueError, match=rf"token id {bad} of sequence 2, position 1 .*{size}"):
            case.spec.keys(tokens, layer)
    for bad in (size, -2):
        with pytest.raises(ValueError, match=f"token id {bad} of sequence 0, position -1"):
            case.spec.row_ids([[0]], layer, history=[[bad]])


def test_arguments_of_other_types_or_shapes_are_refused(case: Case) -> None:
    layer, keys = case.spec.layers[0], case.spec.keys
    for tokens in (np.zeros((1, 2)), np.zeros((1, 2), dtype=bool), np.zeros((1, 2), dtype=np.uint64), [["a"]]):
        with pytest.raises(TypeError, match="expected integers"):
            keys(tokens, layer)
    with pytest.raises(TypeError, match="history"):
        keys([[1]], layer, history=[[0.5]])
    with pytest.raises(TypeError, match="dead"):
        keys([[1]], layer, dead=[[1]])
    for shaped in ([1, 2], 3, [[[1]]]):
        with pytest.raises(ValueError, match="expected \\[sequences, tokens\\]"):
            keys(shaped, layer)
    for history in ([1], [[[1]]]):
        with pytest.raises(ValueError, match=r"history are .* expected \[sequences, tokens\]"):
            keys([[1]], layer, history=history)
    with pytest.raises(ValueError, match=r"history is \[2, 1\], token_ids have 1 sequences"):
        keys([[1]], layer, history=[[1], [1]])
    with pytest.raises(ValueError, match="dead is \\[1, 2\\]"):
        keys([[1]], layer, dead=[[True, False]])


@pytest.mark.parametrize("layer", [99, -1, "layers.99", "layers", "", None, "layers.-1"])
def test_a_layer_without_a_table_is_refused_with_those_there_are(case: Case, layer: Any) -> None:
    with pytest.raises(KeyError, match=f"layers.{case.spec.layers[0]}"):
        case.spec.keys([[1]], layer)


def test_a_spec_without_its_token_map_gives_its_numbers_and_refuses_keys() -> None:
    bare, whole = HashSpec.from_config({"text_config": V41}), HashSpec.from_config(V41, FOLDED_MAP)
    for layer in (1, 14):
        assert bare.multipliers(layer) == whole.multipliers(layer)
        assert (bare.moduli(layer), bare.offsets(layer)) == (whole.moduli(layer), whole.offsets(layer))
        assert bare.num_rows(layer) == whole.num_rows(layer)
        for ask in (bare.fingerprint, lambda n: bare.keys([[1]], n), lambda n: bare.row_ids([[1]], n)):
            with pytest.raises(ConfigError, match="build_token_map"):
                ask(layer)
    with pytest.raises(ConfigError, match="build_token_map"):
        bare.attachments()


def test_a_token_map_of_another_count_or_length_is_refused_with_both_numbers() -> None:
    other_count = (np.arange(129_280) % 99_091).astype(np.int32)
    with pytest.raises(
        ConfigError, match=r"compressed_vocab_size is 99092, tokenizer.json gives 99091 distinct ids; .*download"
    ):
        HashSpec.from_config(V41, other_count)
    with pytest.raises(ConfigError, match=r"vocab_size is 129279, tokenizer.json gives 129280 tokens; .*download"):
        HashSpec.from_config(V41 | {"vocab_size": 129_279}, FOLDED_MAP)
    with pytest.raises(ConfigError, match=r"vocab_size is 133377, tokenizer.json gives 129280 tokens; .*download"):
        HashSpec.from_config(V41 | {"vocab_size": 129_280 + 4097}, FOLDED_MAP)


def test_a_padded_vocabulary_hashes_as_without_its_padding_and_has_no_keys_for_ids_that_no_token_has() -> None:
    plain = HashSpec.from_config(V41, FOLDED_MAP)
    padded = HashSpec.from_config(V41 | {"vocab_size": 129_280 + 512}, FOLDED_MAP)
    assert padded.fingerprint(1) == plain.fingerprint(1)
    assert padded.attachments() == plain.attachments()
    with pytest.raises(ValueError, match="129280"):
        padded.keys(np.array([[1, 129_280]]), 1)


@pytest.mark.parametrize(
    ("token_map", "error"),
    [
        (np.zeros(129_280), TypeError),
        (np.array([], dtype=np.int32), ValueError),
        (FOLDED_MAP.reshape(2, -1), ValueError),
        (np.where(FOLDED_MAP == 0, 2**31 - 1, FOLDED_MAP), ValueError),
        (np.where(FOLDED_MAP == 99_091, 99_092, FOLDED_MAP), ValueError),
        (np.where(FOLDED_MAP == 0, -1, FOLDED_MAP), ValueError),
    ],
    ids=["float", "empty", "2d", "far", "gap", "negative"],
)
def test_what_is_no_token_map_is_refused(token_map: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error, match="token_map"):
        HashSpec.from_config(V41, token_map)


def test_a_spec_keeps_its_own_copy_of_the_token_map() -> None:
    token_map = FOLDED_MAP.copy()
    spec = HashSpec.from_config(V41, token_map)
    before = spec.fingerprint(1)
    token_map[:] = 0
    assert spec.fingerprint(1) == before
    assert spec.token_map is not None
    assert not spec.token_map.flags.writeable


def test_row_counts_of_the_config_that_are_not_the_moduli_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engram_num_embeddings .*384006169.*384006168"):
        HashSpec.from_config(V41 | {"engram_num_embeddings": [384006169, 384016682]}, FOLDED_MAP)


@pytest.mark.parametrize("pad_key", ["engram_pad_token_id", "engram_pad_id"])
def test_either_name_of_the_pad_token_is_read(pad_key: str) -> None:
    config = {key: value for key, value in V41.items() if key != "engram_pad_token_id"} | {pad_key: 7}
    assert HashSpec.from_config(config, FOLDED_MAP).pad_id == FOLDED_MAP[7]


REQUIRED = [
    (V41, ["engram_layer_ids", "engram_vocab_size", "engram_max_ngram_size", "engram_n_heads", "engram_pad_token_id"]),
    (PUBLISHED, ["layer_ids", "engram_vocab_size", "max_ngram_size", "n_head_per_ngram", "pad_id"]),
    (QWEN, ["ple_layer_ids", "vocab_size", "eos_token_id"]),
]
FAMILY_OF = ["deepseek_v41", "engram", "qwen4_exp"]
OPTIONAL = [
    (V41, ["engram_compressed_vocab_size", "vocab_size", "engram_num_embeddings"]),
    (PUBLISHED, ["seed"]),
    (QWEN, ["ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "make_ngram_vocab_size_divisible_by", "seed"]),
]
WRONG = ["7", 1.5, True, -1, {}, 2**70, [True], ["7"], [-1], [1.0], [2**70], [[1]]]
EACH_KIND = ["7", True, -1, 2**70, [1.0]]  # another type, one that Python takes for a number, two sizes, in a list


def keys_by_family(table: list[tuple[dict[str, Any], list[str]]]) -> list[Any]:
    return [
        pytest.param(config, family, key, id=f"{family}-{key}")
        for family, (config, keys) in zip(FAMILY_OF, table, strict=True)
        for key in keys
    ]


@pytest.mark.parametrize(("config", "family", "key"), keys_by_family(REQUIRED))
def test_a_missing_config_value_is_named(config: dict[str, Any], family: str, key: str) -> None:
    token_map = None if family == "qwen4_exp" else FOLDED_MAP
    for lacking in ({k: v for k, v in config.items() if k != key}, config | {key: None}):
        with pytest.raises(ConfigError, match=key):
            HashSpec.from_config(lacking, token_map, family=family)


@pytest.mark.parametrize("values", [EACH_KIND, pytest.param(WRONG, marks=pytest.mark.slow)], ids=["each kind", "all"])
@pytest.mark.parametrize(("config", "family", "key"), keys_by_family(REQUIRED) + keys_by_family(OPTIONAL))
def test_a_config_value_of_a_wrong_type_or_size_is_refused_by_its_key(
    config: dict[str, Any], family: str, key: str, values: list[Any]
) -> None:
    token_map = None if family == "qwen4_exp" else FOLDED_MAP
    for wrong in values:
        with pytest.raises(ConfigError, match=key):
            HashSpec.from_config(config | {key: wrong}, token_map, family=family)


def test_family_keys_are_found_at_the_top_level_beside_another_text_config() -> None:
    beside = HashSpec.from_config(V41 | {"text_config": {"hidden_size": 5120}}, FOLDED_MAP)
    assert beside.fingerprint(14) == HashSpec.from_config({"text_config": V41}, FOLDED_MAP).fingerprint(14)


@pytest.mark.parametrize(
    "path", [("thinker_config", "text_config"), ("llm_config",), ("text_config", "language_config")]
)
def test_a_text_model_s_values_are_found_a_level_deeper(path: tuple[str, ...]) -> None:
    config: dict[str, Any] = dict(QWEN)
    for key in reversed(path):
        config = {"model_type": "speech", "seed": 99, "vision_config": {"hidden_size": 7}, key: config}
    assert HashSpec.from_config(config).fingerprint(1) == HashSpec.from_config(QWEN).fingerprint(1)


def test_two_parts_with_a_family_s_keys_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"talker, thinker all have a family's keys"):
        HashSpec.from_config({"talker": QWEN, "thinker": QWEN})


def test_a_value_that_text_config_lacks_is_the_top_levels_but_never_the_seed() -> None:
    whole = HashSpec.from_config({"text_config": QWEN})
    for key in ("eos_token_id", "vocab_size"):
        text = {name: value for name, value in QWEN.items() if name != key}
        for missing in (text, text | {key: None}):
            split = HashSpec.from_config({key: QWEN[key], "seed": 42, "text_config": missing})
            assert [split.fingerprint(layer) for layer in split.layers] == [
                whole.fingerprint(layer) for layer in whole.layers
            ]
    inner_first = HashSpec.from_config({"eos_token_id": 1, "vocab_size": 2, "text_config": QWEN})
    assert inner_first.fingerprint(inner_first.layers[0]) == whole.fingerprint(whole.layers[0])


def test_a_seed_that_is_not_the_hashs_leaves_v41_as_it_is() -> None:
    with_other_seed = HashSpec.from_config(V41 | {"seed": 42}, FOLDED_MAP)
    assert with_other_seed.multipliers(1) == HashSpec.from_config(V41, FOLDED_MAP).multipliers(1)


def test_layers_that_qwen_names_twice_or_out_of_order_count_once_in_order() -> None:
    assert HashSpec.from_config(QWEN | {"ple_layer_ids": [4, 2, 4]}).layers == (1, 3)


def test_a_published_config_without_a_token_map_says_that_it_needs_one() -> None:
    with pytest.raises(ConfigError, match="engram_compressed_vocab_size is missing and no token map"):
        HashSpec.from_config(PUBLISHED)


@pytest.mark.parametrize("changes", [{"engram_layer_ids": list(range(300))}, {"engram_layer_ids": list(range(200))}])
def test_absurdly_many_layers_or_heads_are_refused(changes: dict[str, Any]) -> None:
    config = V41 | {"engram_num_embeddings": None, "engram_n_heads": 256} | changes
    with pytest.raises(ConfigError, match="expected at most"):
        HashSpec.from_config(config, FOLDED_MAP)


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(TypeError, match="config is a list"):
        HashSpec.from_config([])  # type: ignore[arg-type]


def test_a_config_of_no_family_is_refused_with_what_was_looked_for() -> None:
    for config in ({}, {"model_type": "llama", "vocab_size": 5}, {"text_config": {"hidden_size": 3}}):
        with pytest.raises(ConfigError, match=r"engram_layer_ids.*ple_layer_ids"):
            HashSpec.from_config(config)
    with pytest.raises(ConfigError, match="'engrm' is not known; there are deepseek_v41"):
        HashSpec.from_config(V41, FOLDED_MAP, family="engrm")


def test_fingerprints_are_those_of_stores_built_before() -> None:
    """A fingerprint that drifts refuses every store on disk: these were written down once."""
    published, qwen = tiny_published_case().spec, tiny_qwen_case().spec
    assert published.fingerprint(7) == "0477636ed71edcb84a78dd2a2f3266caf3079b94990f67d4b92cd502c569d672"
    assert qwen.fingerprint(0) == "a38651ee6ecb11dcff97c920acaf7831974e8fdc6e439611ec7f742bcb520303"
    assert qwen.fingerprint("layers.0") == qwen.fingerprint(0)


def test_whatever_changes_a_row_id_changes_the_fingerprint() -> None:
    base = PUBLISHED | {"engram_vocab_size": [300, 300], "n_head_per_ngram": 2, "vocab_size": 40, "layer_ids": [1, 2]}
    token_map = np.arange(40, dtype=np.int32) % 20
    swapped = token_map.copy()
    swapped[[38, 39]] = swapped[[39, 38]]
    prints = [HashSpec.from_config(base, token_map).fingerprint(layer) for layer in (1, 2)]
    for changes in ({"seed": 1}, {"pad_id": 3}, {"engram_vocab_size": [300, 400]}, {"n_head_per_ngram": 3}):
        prints.append(HashSpec.from_config(base | changes, token_map).fingerprint(1))
    prints.append(HashSpec.from_config(base, swapped).fingerprint(1))
    small = QWEN | {"vocab_size": 90, "eos_token_id": 3, "ngram_vocab_size_base": 500}
    prints += [HashSpec.from_config(small | {"eos_token_id": eos}).fingerprint(1) for eos in (3, 4)]
    assert len(set(prints)) == len(prints)
    assert HashSpec.from_config(base | {"kernel_size": 9}, token_map).fingerprint(1) == prints[0]


def table_spec(spec: HashSpec, layer: int) -> TableSpec:
    name, num_rows, print_ = spec.table_name(layer), spec.num_rows(layer), spec.fingerprint(layer)
    moduli, offsets = spec.moduli(layer), spec.offsets(layer)
    return TableSpec(name, num_rows, 64, spec.orders, spec.heads, moduli, offsets, "bf16", 32, print_)


class KeptStore:
    """What `from_store` needs of a store: attachments, and tables with their specs."""

    def __init__(self, spec: HashSpec, attachments: dict[str, bytes] | None = None) -> None:
        self._attachments = spec.attachments() if attachments is None else attachments
        self.tables = {spec.table_name(layer): SimpleNamespace(spec=table_spec(spec, layer)) for layer in spec.layers}

    def attachment(self, name: str) -> bytes:
        return self._attachments[name]


def test_a_spec_comes_back_from_its_store_as_it_was_built(case: Case) -> None:
    kept = HashSpec.from_store(KeptStore(case.spec))  # type: ignore[arg-type]
    for name in ("family", "layers", "orders", "heads", "vocab_size", "pad_id", "barrier_id", "kind"):
        assert getattr(kept, name) == getattr(case.spec, name)
    for layer in case.spec.layers:
        for name in ("multipliers", "moduli", "offsets", "num_rows", "fingerprint", "table_name"):
            assert getattr(kept, name)(layer) == getattr(case.spec, name)(layer)
    assert kept.attachments() == case.spec.attachments()
    check_against_oracle(dataclasses.replace(case, spec=kept), case.sequences(9, 2, 9))


def test_a_store_without_a_hash_says_that_it_holds_plain_tables_only() -> None:
    with pytest.raises(ConfigError, match="plain tables"):
        HashSpec.from_store(KeptStore(tiny_qwen_case().spec, {}))  # type: ignore[arg-type]


def damaged(record: Any) -> list[Any]:
    """Copies of a JSON record, each with one value, at any depth, missing or replaced."""
    copies: list[Any] = []
    for key in record if isinstance(record, dict) else range(min(len(record), 2)):
        value = record[key]
        for other in (None, "x", -1, [], {}, 1.5, {"a": 1}):
            copies.append(copy.deepcopy(record))
            copies[-1][key] = other
        copies.append(copy.deepcopy(record))
        del copies[-1][key]
        if isinstance(value, dict | list):
            for inner in damaged(value):
                copies.append(copy.deepcopy(record))
                copies[-1][key] = inner
    return copies


def test_a_damaged_hash_record_raises_a_named_error() -> None:
    spec = tiny_published_case().spec
    attachments = spec.attachments()
    whole = attachments["hash_spec"]
    records = [json.dumps(record).encode() for record in damaged(json.loads(whole)) if record != json.loads(whole)]
    records += [whole[:length] for length in range(0, len(whole), 37)] + [b"\xff", b"[]", b"7", b"null"]
    assert len(records) > 150
    for record in records:
        with pytest.raises(FormatError):
            HashSpec.from_store(KeptStore(spec, attachments | {"hash_spec": record}))  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [0, 1, 4, 100])
def test_a_damaged_token_map_raises_a_named_error(cut: int) -> None:
    spec = tiny_published_case().spec
    attachments = spec.attachments()
    bytes_kept = attachments["token_map"][: -cut or None]
    flipped = bytearray(bytes_kept)
    flipped[5 % len(flipped)] ^= 1
    with pytest.raises(FormatError, match="hash record"):
        HashSpec.from_store(KeptStore(spec, attachments | {"token_map": bytes(flipped)}))  # type: ignore[arg-type]
    del attachments["token_map"]
    with pytest.raises(FormatError, match="token_map"):
        HashSpec.from_store(KeptStore(spec, attachments))  # type: ignore[arg-type]
