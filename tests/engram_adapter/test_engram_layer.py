"""The Engram layer: its formula against plain float64 loops, a store against a resident table,
parts against the whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rounding import Rounded, check_within, rms_norm, sigmoid, signed_root, stack
from support.tiny_store import DIM, VOCAB_SIZE, build_tiny, decoded, tiny_hash

import tierstore
from engram_adapter.embedding import TieredEmbedding
from engram_adapter.engram_layer import GATE_FLOOR, EngramLayer, scale_block
from engram_adapter.resident_embedding import HashedEmbedding
from tierstore.errors import ConfigError

CODEC = "fp8_e4m3_e8m0x32"
LAYER, FEATURES, HIDDEN, BRANCHES = 4, 8 * DIM, 24, 3
FORMS = [{}, {"kernel_size": 4, "dilation": 3}, {"kernel_size": 1}, {"kernel_size": 2, "dilation": 1, "bias": True}]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TieredEmbedding, HashedEmbedding]]:
    """The same table twice: behind a store, and resident."""
    path, rows = build_tiny(tmp_path_factory.mktemp("layer"), tiny_hash(), CODEC, seed=8)
    with tierstore.open(path, dram="64MiB") as store:
        resident = HashedEmbedding(tiny_hash(), LAYER, decoded(rows[f"layers.{LAYER}"], CODEC))
        yield TieredEmbedding(store, LAYER, tiny_hash()), resident


def made_layer(embedding: torch.nn.Module, seed: int = 0, **form: Any) -> EngramLayer:
    """A layer whose every parameter is random: with the initial ones and zeros,
    norms and convolution would not show."""
    layer = EngramLayer(embedding, FEATURES, HIDDEN, BRANCHES, **form)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("embedding."):
                spread = 3 / math.sqrt(FEATURES) if name == "wkv.weight" else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + ("q_w" in name))
    return layer


def inputs(batch: int, length: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(batch, length, BRANCHES, HIDDEN, generator=generator).to(dtype)
    return hidden_states, torch.randint(0, VOCAB_SIZE, (batch, length), generator=generator)


def expected_output(layer: EngramLayer, rows: torch.Tensor, hidden_states: torch.Tensor) -> Rounded:
    """The layer's formula in float64, one token at a time, and how far float32 may be from it."""
    weight = {name: Rounded(value.detach().double().numpy()) for name, value in layer.named_parameters()}
    embedded, hidden = Rounded(rows.double().flatten(-2).numpy()), Rounded(hidden_states.double().numpy())
    batch, length, branches, size = hidden.value.shape
    gated = [[_gated(layer, weight, embedded[b, t], hidden[b, t]) for t in range(length)] for b in range(batch)]
    if layer.kernel_size is None:
        return stack([stack(of_sequence) for of_sequence in gated])
    output = []
    for of_sequence in gated:
        normed = [rms_norm(part, weight["conv_norm_weight"], layer.eps) for part in of_sequence]
        tokens = []
        for t, part in enumerate(of_sequence):
            sources = [t - (layer.kernel_size - 1 - k) * layer.dilation for k in range(layer.kernel_size)]
            nothing = Rounded(np.zeros((branches, size)))
            seen = stack([normed[source] if source >= 0 else nothing for source in sources])
            kernel = weight["conv_weight"].value[:, 0].T.reshape(layer.kernel_size, branches, size)
            mixed = seen.dot(Rounded(kernel), axis=0)
            tokens.append(part + mixed.lipschitz(lambda values: values * sigmoid(values), slope=1.1))
        output.append(stack(tokens))
    return stack(output)


def _gated(layer: EngramLayer, weight: dict[str, Rounded], embedded: Rounded, hidden: Rounded) -> Rounded:
    """The gated value of one token, [branches, size]."""
    branches, size = hidden.value.shape
    projected = weight["wkv.weight"].dot(embedded)
    if "wkv.bias" in weight:
        projected = projected + weight["wkv.bias"]
    keys = stack([projected[c * size : (c + 1) * size] for c in range(branches)])
    queries = rms_norm(hidden, weight["q_weight"], layer.eps)
    agreement = rms_norm(keys, weight["k_weight"], layer.eps).dot(queries).scaled(1 / math.sqrt(size))
    gate = agreement.monotone(lambda values: signed_root(values, GATE_FLOOR)).monotone(sigmoid)
    return gate[:, None] * projected[branches * size :]


@pytest.mark.parametrize("form", FORMS)
def test_output_is_the_formula(embeddings: tuple[TieredEmbedding, HashedEmbedding], form: dict[str, Any]) -> None:
    layer = made_layer(embeddings[0], **form)
    hidden_states, token_ids = inputs(2, 13, seed=1)
    got = layer(hidden_states, token_ids).detach().double().numpy()
    check_within(got, expected_output(layer, embeddings[1](token_ids), hidden_states))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_with_a_store_equals_the_output_with_a_resident_table_exactly(
    embeddings: tuple[TieredEmbedding, HashedEmbedding], form: dict[str, Any], dtype: torch.dtype
) -> None:
    tiered, resident = (made_layer(embedding, dtype=dtype, **form) for embedding in embeddings)
    hidden_states, token_ids = inputs(2, 17, seed=2, dtype=dtype)
    history = inputs(2, 2, seed=3)[1]
    dead = torch.zeros(2, 17, dtype=torch.bool)
    dead[1, 4:8] = True
    got = tiered(hidden_states, token_ids, history, dead)
    assert got.dtype == dtype
    assert got.shape == hidden_states.shape
    assert torch.equal(got, resident(hidden_states, token_ids, history, dead))
    embeddings[0].prefetch(token_ids, history, dead)
    assert torch.equal(tiered(hidden_states, token_ids, history, dead), got)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [[1] * 14, [5, 1, 8], [13, 1], [14], [0, 3, 0, 11, 0]])
def test_a_sequence_decoded_in_parts_gives_the_output_of_the_whole(
    embeddings: tuple[TieredEmbedding, HashedEmbedding], form: dict[str, Any], parts: list[int]
) -> None:
    layer = made_layer(embeddings[0], **form)
    hidden_states, token_ids = inputs(2, sum(parts), seed=4)
    whole = layer(hidden_states, token_ids)
    outputs, conv_state, start = [], None, 0
    for tokens in parts:
        span, history = slice(start, start + tokens), token_ids[:, max(0, start - 2) : start]
        output, conv_state = layer.step(hidden_states[:, span], token_ids[:, span], history, conv_state=conv_state)
        outputs.append(output)
        start += tokens
    # Not exact: matrix products and convolutions of another length may add in another order.
    expected = expected_output(layer, embeddings[1](token_ids), hidden_states)
    for found in (whole, torch.cat(outputs, dim=1)):
        check_within(found.detach().double().numpy(), expected)


def test_the_convolution_reaches_back_into_the_part_before(
    embeddings: tuple[TieredEmbedding, HashedEmbedding],
) -> None:
    layer = made_layer(embeddings[0], kernel_size=4, dilation=3)
    hidden_states, token_ids = inputs(1, 12, seed=5)
    _, conv_state = layer.step(hidden_states[:, :11], token_ids[:, :11])
    assert conv_state is not None
    assert conv_state.shape == (1, BRANCHES * HIDDEN, 9)
    assert not conv_state.requires_grad
    last = hidden_states[:, 11:], token_ids[:, 11:], token_ids[:, 9:11]
    assert not torch.allclose(layer.step(*last, conv_state=conv_state)[0], layer.step(*last)[0], atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_do_not_change_earlier_outputs(
    embeddings: tuple[TieredEmbedding, HashedEmbedding], form: dict[str, Any]
) -> None:
    layer = made_layer(embeddings[0], **form)
    hidden_states, token_ids = inputs(1, 12, seed=6)
    before = layer(hidden_states, token_ids)
    hidden_states[:, 7:] += 1
    token_ids[:, 7:] = (token_ids[:, 7:] + 1) % VOCAB_SIZE
    after = layer(hidden_states, token_ids)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_a_new_convolution_adds_nothing(embeddings: tuple[TieredEmbedding, HashedEmbedding]) -> None:
    torch.manual_seed(0)
    with_conv = EngramLayer(embeddings[0], FEATURES, HIDDEN, BRANCHES, kernel_size=4, dilation=3)
    without = EngramLayer(embeddings[0], FEATURES, HIDDEN, BRANCHES)
    without.load_state_dict(with_conv.state_dict(), strict=False)
    hidden_states, token_ids = inputs(1, 9, seed=7)
    assert torch.equal(with_conv(hidden_states, token_ids), without(hidden_states, token_ids))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1]])
def test_a_training_step_moves_the_projections_and_leaves_the_rows(
    embeddings: tuple[TieredEmbedding, HashedEmbedding], form: dict[str, Any]
) -> None:
    tiered, resident = (made_layer(embedding, **form) for embedding in embeddings)
    hidden_states, token_ids = inputs(2, 11, seed=9)
    rows_before = embeddings[0](token_ids).clone()
    before = {name: value.detach().clone() for name, value in tiered.named_parameters()}
    for layer in (tiered, resident):
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        layer(hidden_states, token_ids).square().mean().backward()
        optimizer.step()
    assert set(before) == {"wkv.weight", "q_weight", "k_weight"} | (
        {"conv_weight", "conv_norm_weight"} if form else set()
    )
    for name, value in tiered.named_parameters():
        assert value.grad is not None, name
        assert not torch.equal(value, before[name]), name
    assert embeddings[1].embedding.weight.grad is None
    assert torch.equal(embeddings[0](token_ids), rows_before)
    assert torch.equal(tiered(hidden_states, token_ids), resident(hidden_states, token_ids))


def test_hidden_states_or_a_conv_state_of_another_shape_are_refused(
    embeddings: tuple[TieredEmbedding, HashedEmbedding],
) -> None:
    plain, with_conv = made_layer(embeddings[0]), made_layer(embeddings[0], kernel_size=4, dilation=3)
    hidden_states, token_ids = inputs(2, 5, seed=10)
    with pytest.raises(ValueError, match="hidden_states of shape"):
        plain(hidden_states[:, :, 0], token_ids)
    with pytest.raises(ValueError, match="no convolution"):
        plain.step(hidden_states, token_ids, conv_state=torch.zeros(2, 72, 9))
    with pytest.raises(ValueError, match=r"must be \[2, 72, 9\]"):
        with_conv.step(hidden_states, token_ids, conv_state=torch.zeros(2, 72, 8))
    with pytest.raises(ValueError, match="at least 1"):
        EngramLayer(embeddings[0], FEATURES, HIDDEN, 0)


def write_checkpoint(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """Writes a safetensors file by hand, so that dtypes which some torch versions lack can be in it."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    encoded = json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    (path / "config.json").write_text("{}")
    return path


def v41_tensors(block: tuple[int, int], prefix: str = "", hidden: int = 40) -> dict[str, Any]:
    """Engram tensors of one layer, hidden size 40 (no multiple of the blocks), 3 branches, 512 features."""
    rng = np.random.default_rng(11)
    outputs = hidden * (BRANCHES + 1)
    scale_shape = (math.ceil(outputs / block[0]), math.ceil(FEATURES / block[1]))
    norm = torch.from_numpy(rng.normal(1, 0.3, (2, BRANCHES, hidden)).astype(np.float32)).to(torch.bfloat16)
    parts = {
        "wkv.weight": ("F8_E4M3", (outputs, FEATURES), rng.integers(0, 0x7F, (outputs, FEATURES), np.uint8).tobytes()),
        "wkv.scale": ("F8_E8M0", scale_shape, rng.integers(110, 130, scale_shape, dtype=np.uint8).tobytes()),
        "q_weight": ("BF16", (BRANCHES, hidden), norm[0].view(torch.uint8).numpy().tobytes()),
        "k_weight": ("BF16", (BRANCHES, hidden), norm[1].view(torch.uint8).numpy().tobytes()),
    }
    return {f"{prefix}layers.{LAYER}.engram.{name}": part for name, part in parts.items()}


def fp8(byte: int) -> float:
    """A positive fp8 e4m3 byte as a number."""
    exponent, mantissa = byte >> 3, byte & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
@pytest.mark.parametrize("block", [(32, 32), (128, 128), (1, 32)])
def test_from_checkpoint_reads_the_projections(
    tmp_path: Path, embeddings: tuple[TieredEmbedding, HashedEmbedding], block: tuple[int, int], prefix: str
) -> None:
    tensors = v41_tensors(block, prefix)
    layer = EngramLayer.from_checkpoint(write_checkpoint(tmp_path, tensors), LAYER, embeddings[0])
    name = f"{prefix}layers.{LAYER}.engram."
    (rows, columns), content = tensors[name + "wkv.weight"][1:]
    scales = np.frombuffer(tensors[name + "wkv.scale"][2], np.uint8).reshape(tensors[name + "wkv.scale"][1])
    values = np.array([fp8(byte) for byte in range(127)])[np.frombuffer(content, np.uint8).reshape(rows, columns)]
    powers = np.array(
        [[2.0 ** (int(scales[i // block[0], j // block[1]]) - 127) for j in range(columns)] for i in range(rows)]
    )
    assert np.array_equal(layer.wkv.weight.detach().double().numpy(), values * powers)  # exact in bfloat16
    assert layer.q_weight.detach().view(torch.uint8).numpy().tobytes() == tensors[name + "q_weight"][2]
    assert layer.k_weight.detach().view(torch.uint8).numpy().tobytes() == tensors[name + "k_weight"][2]
    assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert (layer.hc_mult, layer.hidden_size, layer.features) == (BRANCHES, 40, FEATURES)
    hidden_states = torch.randn(1, 6, BRANCHES, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert layer(hidden_states, inputs(1, 6, seed=12)[1]).isfinite().all()


def test_from_checkpoint_takes_projections_that_are_not_quantized(
    tmp_path: Path, embeddings: tuple[TieredEmbedding, HashedEmbedding]
) -> None:
    tensors = v41_tensors((32, 32))
    del tensors[f"layers.{LAYER}.engram.wkv.scale"]
    weight = torch.randn(160, FEATURES, generator=torch.Generator().manual_seed(0))
    tensors[f"layers.{LAYER}.engram.wkv.weight"] = ("F32", (160, FEATURES), weight.numpy().tobytes())
    layer = EngramLayer.from_checkpoint(write_checkpoint(tmp_path, tensors), LAYER, embeddings[0])
    assert torch.equal(layer.wkv.weight, weight.to(torch.bfloat16))


@pytest.mark.parametrize("fault", ["no layer", "no scale", "no norm", "scale shape", "norm shape", "outputs", "dtype"])
def test_from_checkpoint_refuses_tensors_that_do_not_belong_together(
    tmp_path: Path, embeddings: tuple[TieredEmbedding, HashedEmbedding], fault: str
) -> None:
    tensors, name, layer = v41_tensors((32, 32)), f"layers.{LAYER}.engram.", LAYER
    if fault == "no layer":
        layer = 5
    elif fault == "no scale":
        del tensors[name + "wkv.scale"]
    elif fault == "no norm":
        del tensors[name + "k_weight"]
    elif fault == "scale shape":
        tensors[name + "wkv.scale"] = ("F8_E8M0", (7, 16), bytes(7 * 16))
    elif fault == "norm shape":
        tensors[name + "k_weight"] = ("BF16", (BRANCHES, 39), bytes(2 * BRANCHES * 39))
    elif fault == "outputs":
        tensors |= {key: part for key, part in v41_tensors((32, 32), hidden=44).items() if "wkv" not in key}
    else:
        tensors[name + "wkv.weight"] = ("I8", *tensors[name + "wkv.weight"][1:])
    with pytest.raises(ConfigError, match=r"layers\.\d|layer \d"):
        EngramLayer.from_checkpoint(write_checkpoint(tmp_path, tensors), layer, embeddings[0])


@pytest.mark.parametrize("block", [1, 2, 32, 128])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 127, 128, 129, 130, 192, 384, 6144, 25600])
def test_scale_block_is_found_from_the_number_of_scales(size: int, block: int) -> None:
    found = scale_block(size, math.ceil(size / block), "scale")
    assert [i // found for i in range(size)] == [i // block for i in range(size)]


@pytest.mark.parametrize(("size", "num_scales"), [(10, 0), (10, 11), (10, 4), (160, 7)])
def test_scale_counts_that_no_block_gives_are_refused(size: int, num_scales: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_scales} scales for {size} elements"):
        scale_block(size, num_scales, "axis 0 of wkv.scale")
