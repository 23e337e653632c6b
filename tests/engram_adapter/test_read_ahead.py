"""The reads of a model's tables start with its forward, and are taken only for the very rows that it asks for."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tierstore
from engram_adapter import RowIdEmbedding, build_checkpoint, load_pretrained
from engram_adapter.engines.transformers import prefetch
from engram_adapter.row_id_embedding import ExpectedRows
from tests.engram_adapter.test_swap_qwen4 import PAD, VOCAB_SIZE, generated, made_model, prompts, transformers
from tierstore.errors import CorruptPageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    made_model(torch.bfloat16, 1, ple_layer_ids=[2, 3]).save_pretrained(folder / "checkpoint")
    build_checkpoint(folder / "checkpoint", folder / "store", jobs=1)
    return folder / "checkpoint"


@pytest.fixture
def store(checkpoint: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(checkpoint.parent / "store", dram="192KiB") as opened:
        yield opened


@pytest.fixture
def model(checkpoint: Path, store: tierstore.Store) -> Any:
    return load_pretrained(checkpoint, store)


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> Any:
    return transformers.Qwen4ExpForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each lookup of row ids, whether it took rows that were asked for at the forward's start."""
    noted: list[bool] = []
    look_up, take = RowIdEmbedding.look_up, RowIdEmbedding._take_expected

    of_thread = threading.local()

    def noting_look_up(self: RowIdEmbedding, row_ids: torch.Tensor) -> torch.Tensor:
        of_thread.took = False
        values = look_up(self, row_ids)
        noted.append(of_thread.took)
        return values

    def noting_take(self: RowIdEmbedding, ids: Any) -> Any:
        rows = take(self, ids)
        of_thread.took = rows is not None
        return rows

    monkeypatch.setattr(RowIdEmbedding, "look_up", noting_look_up)
    monkeypatch.setattr(RowIdEmbedding, "_take_expected", noting_take)
    return noted


def test_reads_are_under_way_before_the_first_layer_runs(model: Any, taken: list[bool]) -> None:
    under_way = []
    tables = [each for each in model.modules() if isinstance(each, RowIdEmbedding)]
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: under_way.extend(hasattr(each._of_thread, "expected") for each in tables)
    )
    with torch.no_grad():
        model(prompts(2, 9, seed=1))
    assert under_way == [True, True]
    assert taken == [True, True]
    assert not any(hasattr(each._of_thread, "expected") for each in tables)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("greedy", {}),
        ("beam", {"num_beams": 2, "cache_implementation": "static"}),
        ("padded", {"cache_implementation": "static"}),
        ("padded", {"use_cache": False}),
        ("in parts", {"prefill_chunk_size": 4}),
    ],
)
def test_every_lookup_of_a_generation_was_started_before(
    model: Any, resident: Any, taken: list[bool], way: str, options: dict[str, Any]
) -> None:
    token_ids = prompts(2, 9, seed=2)
    mask = torch.ones_like(token_ids)
    if way == "padded":
        token_ids[0, :3], mask[0, :3] = PAD, 0
    got = generated(model, token_ids, attention_mask=mask, **options)
    assert len(taken) >= 2 * 12
    assert all(taken)
    assert torch.equal(got[0], generated(resident, token_ids, attention_mask=mask, **options)[0])


def test_expected_rows_of_other_ids_are_dropped(store: tierstore.Store) -> None:
    embedding, twin = RowIdEmbedding(store, 1), RowIdEmbedding(store, 1)
    keys = torch.arange(10, 16).reshape(3, 2).numpy()
    rows = torch.zeros((3, embedding.num_heads, embedding.table_spec.row_bytes), dtype=torch.uint8).numpy()
    row_ids = embedding.table_spec.row_ids(keys)
    expected = ExpectedRows(row_ids, store.submit({"layers.1": (keys, rows)}), rows)
    for asked in (row_ids + 1, row_ids[:2], row_ids[0]):
        embedding.expect(expected)
        ids = torch.from_numpy(asked)
        assert torch.equal(embedding(ids), twin(ids))
        assert not hasattr(embedding._of_thread, "expected")
    embedding.expect(expected)
    rows_of_ids = embedding(torch.from_numpy(row_ids))
    assert torch.equal(rows_of_ids, twin(torch.from_numpy(row_ids)))
    assert rows_of_ids.data_ptr() == torch.from_numpy(rows).data_ptr(), "these very rows were taken"


def test_a_damaged_page_of_one_table_leaves_the_other_its_rows(
    model: Any, resident: Any, store: tierstore.Store, taken: list[bool]
) -> None:
    token_ids = prompts(1, 7, seed=3)
    store._engine._engine.inject("corrupt", 0, 1)  # the first page that is read, once
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, resident(token_ids).logits)
    assert taken == [False, False], "the request failed whole, and each table looked up again"
    store._engine._engine.inject("corrupt", 0, 1000)
    with pytest.raises(CorruptPageError), torch.no_grad():
        model(prompts(1, 7, seed=4))


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1])
def test_ids_outside_the_vocabulary_are_refused_by_the_model_as_ever(model: Any, bad: int) -> None:
    token_ids = prompts(1, 5, seed=5)
    token_ids[0, 2] = bad
    with pytest.raises(IndexError), torch.no_grad():
        model(token_ids)


def test_rows_ahead_have_a_limit_in_bytes(
    model: Any, resident: Any, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "AHEAD_BYTES_MAX", 6 * 8 * 16)  # six tokens of one table
    with torch.no_grad():
        for num_tokens, expected in ((6, [True, False]), (7, [False, False]), (3, [True, True])):
            token_ids = prompts(1, num_tokens, seed=6)
            assert torch.equal(model(token_ids).logits, resident(token_ids).logits)
            assert taken == expected
            taken.clear()


def test_a_forward_of_embeddings_alone_gives_equal_logits(model: Any, resident: Any, taken: list[bool]) -> None:
    embedded = model.model.embed_tokens(prompts(1, 6, seed=7))
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, resident(inputs_embeds=embedded).logits)
    assert taken == [False, False]


class Wrapper(torch.nn.Module):
    """What activation checkpointing and the like put around a layer: its parts have other names then."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.inner(*arguments, **options)


def test_a_layer_that_was_wrapped_looks_up_when_it_is_asked(model: Any, resident: Any, taken: list[bool]) -> None:
    model.model.layers[1] = Wrapper(model.model.layers[1])
    token_ids = prompts(1, 6, seed=9)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, resident(token_ids).logits)
    assert taken == [False, True]


def test_threads_that_share_a_model_take_their_own_rows(model: Any, resident: Any, taken: list[bool]) -> None:
    def work(worker: int) -> bool:
        equal = True
        for step in range(6):
            token_ids = prompts(1, 5 + worker, seed=10 * worker + step)
            with torch.no_grad():
                equal &= torch.equal(model(token_ids).logits, resident(token_ids).logits)
        return equal

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert all(taken)


def test_a_copy_reads_ahead_for_itself(model: Any, taken: list[bool]) -> None:
    copied = copy.deepcopy(model)
    token_ids = prompts(1, 6, seed=8)
    with torch.no_grad():
        assert torch.equal(copied(token_ids).logits, model(token_ids).logits)
    assert taken == [True] * 4
