"""A transformers model that is loaded without its tables gives what the resident model gives, and reads no table."""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import mmap
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.marks import slow_but

import tierstore
from engram_adapter import RowIdEmbedding, build_checkpoint, load_pretrained
from tests.engram_adapter.test_saved_tables import same_tensors
from tests.engram_adapter.test_swap_qwen4 import PAD, generated, made_model, prompts, transformers
from tierstore.errors import ConfigError, FingerprintMismatchError

TABLE = "ngram_embedding.shard_"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two tables, and its store beside it. Tests must not change it; see `own`."""
    folder = tmp_path_factory.mktemp("loaded")
    made_model(torch.bfloat16, 1, ple_layer_ids=[2, 3]).save_pretrained(folder / "checkpoint")
    build_checkpoint(folder / "checkpoint", folder / "store", jobs=1)
    return folder / "checkpoint"


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(checkpoint.parent / "store", dram="192KiB") as opened:
        yield opened


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> Any:
    return transformers.Qwen4ExpForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, store: tierstore.Store) -> Any:
    return load_pretrained(checkpoint, store)


def test_a_loaded_model_is_of_its_own_class_and_has_no_table(loaded: Any) -> None:
    assert type(loaded) is transformers.Qwen4ExpForCausalLM
    assert not loaded.training
    assert sum(isinstance(module, RowIdEmbedding) for module in loaded.modules()) == 2
    assert not any("ngram_embedding" in name for name in loaded.state_dict())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    fresh = transformers.Qwen4ExpForCausalLM(loaded.config)
    assert not any(isinstance(module, RowIdEmbedding) for module in fresh.modules())


@pytest.mark.parametrize(
    ("way", "cache"),
    slow_but(
        [("greedy", "static"), ("beam", "dynamic"), ("padded", "dynamic")],
        itertools.product(["greedy", "beam", "padded"], ["dynamic", "static"]),
        several=True,
    ),
)
def test_logits_and_generations_are_the_resident_models(resident: Any, loaded: Any, way: str, cache: str) -> None:
    token_ids = prompts(2, 11, seed=4)
    mask = torch.ones_like(token_ids)
    if way == "padded":
        token_ids[0, :4], mask[0, :4] = PAD, 0
    options = {"num_beams": 3} if way == "beam" else {}
    with torch.no_grad():
        logits = [model(token_ids, attention_mask=mask).logits for model in (resident, loaded)]
    assert torch.equal(*logits)
    expected, got = (
        generated(model, token_ids, attention_mask=mask, cache_implementation=cache, **options)
        for model in (resident, loaded)
    )
    assert torch.equal(expected[0], got[0])
    assert all(torch.equal(one, other) for one, other in zip(expected[1], got[1], strict=True))


def resident_pages(path: Path) -> bytes:
    """Which pages of a file the page cache holds: a byte for each, 1 if it does."""
    num_bytes = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_WRITE) as memory:
        start = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(ctypes.addressof(start))
        assert libc.mincore(address, ctypes.c_size_t(num_bytes), pages) == 0, os.strerror(ctypes.get_errno())
        del start
    return bytes(page & 1 for page in pages)


def read_ahead_bytes(path: Path) -> int:
    """How much the kernel reads around a page of a file that is mapped and missed."""
    device = path.stat().st_dev
    found = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(found.read_text()) << 10 if found.exists() else 128 << 10


def test_of_a_table_only_pages_of_compared_rows_and_what_is_read_ahead_are_read(tmp_path: Path) -> None:
    made_model(torch.bfloat16, 2, ngram_vocab_size_base=400_000).save_pretrained(tmp_path / "checkpoint")
    build_checkpoint(tmp_path / "checkpoint", tmp_path / "store", jobs=1)
    file = tmp_path / "checkpoint" / "model.safetensors"
    table_bytes = sum(tensor.nbytes for name, tensor in load_file(file).items() if TABLE in name)
    # Read around the header, and around what lies before and after the table.
    expected = 4 * read_ahead_bytes(file) + file.stat().st_size - table_bytes
    if expected > table_bytes:
        pytest.skip(f"this file system reads {read_ahead_bytes(file)} bytes ahead, too many for this table")
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sum(resident_pages(file)):
        pytest.skip("this file system keeps its files in memory")
    with tierstore.open(tmp_path / "store", dram="8MiB") as store:
        load_pretrained(tmp_path / "checkpoint", store)
        assert sum(resident_pages(file)) * mmap.PAGESIZE < expected


def test_loading_info_names_no_table(checkpoint: Path, store: tierstore.Store) -> None:
    model, info = load_pretrained(checkpoint, store, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert model._keys_to_ignore_on_load_unexpected == type(model)._keys_to_ignore_on_load_unexpected


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoModel", "Qwen4ExpTextModel"])
def test_another_class_of_the_checkpoint_can_be_named(checkpoint: Path, store: tierstore.Store, name: str) -> None:
    model = load_pretrained(checkpoint, store, model_class=getattr(transformers, name), attn_implementation="eager")
    expected = getattr(transformers, name).from_pretrained(checkpoint, attn_implementation="eager")
    assert type(model) is type(expected)
    with torch.no_grad():
        got, wanted = model(prompts(1, 6, seed=5)), expected(prompts(1, 6, seed=5))
    assert torch.equal(got[0], wanted[0])


def test_a_whole_model_whose_other_layers_can_be_traced_is_one_graph(tmp_path: Path) -> None:
    """The sparse attention of transformers 5.24.0 cannot, with resident tables too."""
    torch.compiler.reset()
    layers = ["linear_attention"] * 2
    made_model(torch.bfloat16, 6, num_hidden_layers=2, layer_types=layers).save_pretrained(tmp_path / "checkpoint")
    build_checkpoint(tmp_path / "checkpoint", tmp_path / "store", jobs=1)
    graphs: list[torch.fx.GraphModule] = []

    def noting(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with tierstore.open(tmp_path / "store", dram="192KiB") as store, torch.no_grad():
        model = load_pretrained(tmp_path / "checkpoint", store)
        compiled = torch.compile(model, fullgraph=True, backend=noting)
        token_ids = prompts(2, 7, seed=6)
        assert torch.equal(compiled(token_ids, use_cache=False).logits, model(token_ids, use_cache=False).logits)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets.count("tierstore.rows.default") == len(graphs) == 1


def test_a_loaded_model_can_be_copied_and_pickled(loaded: Any) -> None:
    token_ids = prompts(1, 6, seed=7)
    with torch.no_grad():
        expected = loaded(token_ids).logits
        for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(twin(token_ids).logits, expected)


def test_a_loaded_model_is_saved_with_its_tables(tmp_path: Path, checkpoint: Path, loaded: Any) -> None:
    loaded.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", checkpoint)


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def of_another_training(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 if TABLE in name else tensor for name, tensor in tensors.items()}


def without_tables(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if TABLE not in name}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda folder: weights(folder, of_another_training), {}, ConfigError, "16 of 16 rows .* another training"),
        (lambda folder: weights(folder, without_tables), {}, ConfigError, "no such tensor"),
        (lambda folder: configured(folder, ple_layer_ids=[]), {}, ConfigError, "ple_layer_ids"),
        (lambda folder: configured(folder, seed=77), {}, ConfigError, "layer_multipliers"),
        (lambda folder: configured(folder, architectures=["Nobody"]), {}, ConfigError, "pass one as model_class"),
        (None, {"dtype": torch.float32}, ConfigError, r"torch\.float32.*torch\.bfloat16"),
        (None, {"disable_mmap": True}, ConfigError, "read whole"),
        (None, {"gguf_file": "a.gguf"}, ConfigError, "read whole"),
        (None, {"state_dict": {"a": 1}}, ConfigError, "use swap_embedding"),
        (None, {"subfolder": "elsewhere"}, ConfigError, "not a folder on this machine"),
        (None, {"vocab_size": 98}, FingerprintMismatchError, "hash"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    own: Path,
    store: tierstore.Store,
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    if change is not None:
        change(own)
    with pytest.raises(error, match=message):
        load_pretrained(own, store, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 77}, FingerprintMismatchError, "was built with hash"),
        ({"ple_layer_ids": [3]}, ConfigError, r"table layers\.1, the store has layers\.2: open"),
        ({"ple_embed_dim": 32}, ConfigError, r"rows of 8 bytes in the store"),
    ],
)
def test_a_store_of_another_checkpoint_is_refused(
    tmp_path: Path, checkpoint: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    made_model(torch.bfloat16, 3, **({"ple_layer_ids": [2, 3]} | changes)).save_pretrained(tmp_path / "other")
    build_checkpoint(tmp_path / "other", tmp_path / "store", jobs=1)
    with tierstore.open(tmp_path / "store", dram="8MiB") as other, pytest.raises(error, match=message):
        load_pretrained(checkpoint, other)
