"""Real text through the real tokenizer's map: V4.1's keys on a recorded trace, against plain Python integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zstandard
from support.plain_hash_oracle import engram_numbers, keys_of, row_ids_of

from engram_adapter import HashSpec, build_token_map

V41 = {
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384006168, 384016682],
    "engram_vocab_size": 16000000,
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_compressed_vocab_size": 99092,
    "engram_pad_token_id": 2,
    "vocab_size": 129280,
}


@pytest.mark.parametrize("layer", [1, 14])
def test_row_ids_of_a_recorded_trace_equal_plain_python(shared_data: Path, layer: int) -> None:
    token_map = build_token_map(shared_data / "deepseek_v3_tokenizer.json")
    lengths = np.load(shared_data / "trace_test_doclens.npy")
    with (shared_data / "trace_test.i32.zst").open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read(int(lengths[0]) * 4)
    document = np.frombuffer(data, "<i4").astype(np.int64)[:2000]
    spec = HashSpec.from_config({"text_config": V41}, token_map)
    numbers = engram_numbers([1, 14], [16000000] * 3, 8, 99092)[layer]
    mapped = [int(token_map[token]) for token in document]
    expected = row_ids_of(keys_of(mapped, list(numbers.multipliers), int(token_map[2])), numbers)
    assert spec.row_ids(document[None], layer)[0].tolist() == expected
