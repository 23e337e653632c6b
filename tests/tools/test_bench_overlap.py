"""`tierstore bench overlap` at toy size: every side has the same rows, and figures say what they were taken of."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rounding import gamma

import tierstore
from engram_adapter import TieredEmbedding
from tests.tools.test_bench import bench, case, check_rounds, zipf_text
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.verify import verify_store
from tierstore.tools.bench import stores
from tierstore.tools.bench.overlap import command as overlap
from tierstore.tools.bench.overlap import sides as overlap_sides
from tierstore.tools.bench.overlap import tables as overlap_tables
from tierstore.tools.bench.overlap.model import Cache, Feed, Model, Shape
from tierstore.tools.bench.overlap.tables import Tables
from tierstore.tools.bench.pairs import SUBJECT, Result

WORDS = 500
LAYERS = (1, 3)
SHAPE = Shape(4, 32, 2)
SIZE_BYTES = 16 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlap")


@pytest.fixture(scope="module")
def tables(folder: Path) -> Tables:
    return overlap_tables.make_tables(folder, SIZE_BYTES, LAYERS, np.arange(WORDS, dtype=np.int32))


@pytest.fixture
def model(tables: Tables) -> Model:
    return Model(SHAPE, tables.spec, torch.float32, "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and smaller of everything: here only what is recorded counts."""
    training, held_out = zipf_text(0, 300, WORDS), zipf_text(0, 330, WORDS)
    held_out.documents[:] = held_out.documents[300:]
    monkeypatch.setattr(overlap.real_text, "load_split", lambda: (training, held_out))
    for module, sizes in {
        overlap: {"ENGRAM_LAYERS": LAYERS, "SHAPES": {"small model": (4, 32, 2), "tiny model": (4, 16, 2)}},
        overlap_sides: {"SEQUENCES": 5, "CONTEXT_TOKENS": 8, "STEPS": 3, "PROMPT_TOKENS": 70, "CHUNK_TOKENS": 32},
    }.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(overlap, "WARM_TOKENS", 500)


@pytest.mark.usefixtures("small")
def test_overlap_has_each_model_beside_itself_with_its_tables_on_the_device(folder: Path) -> None:
    record = bench(folder, "overlap", "--size", "16MiB", "--dram", "4MiB", "--device", "cpu")["overlap"]
    check_rounds(record)
    cases = [comparison["case"] for comparison in record["comparisons"]]
    assert cases == [
        "small model, decode, 5 sequences", "small model, prefill of 70 tokens", "tiny model, decode, 5 sequences"
    ]  # fmt: skip
    for comparison, tokens in zip(record["comparisons"], (5 * 3, 70, 5 * 3), strict=True):
        assert comparison["work"] == tokens
        assert set(comparison["seconds"]) == {SUBJECT, overlap_sides.RESIDENT, overlap_sides.HELD}
        assert comparison["targets"] == {overlap_sides.RESIDENT: 0.97}
        assert 0 < record["facts"][f"{comparison['case']}: share of keys that hit"] < 1
        check_hidden(record, comparison)
    assert "made up" in record["facts"]["text"]
    assert not list((folder / stores.FOLDER).glob("overlap-*/placements/*.placement"))


def check_hidden(record: dict[str, Any], comparison: dict[str, Any]) -> None:
    """What is hidden follows from what is printed beside it."""
    name, seconds = comparison["case"], comparison["seconds"]
    steps = 1 if "prefill" in name else 3
    alone = np.array(case(record, f"{name}: a tiered lookup alone")["values"]) * steps / 1e3
    extra = np.array(seconds[SUBJECT]) - np.array(seconds[overlap_sides.RESIDENT])
    expected = 100 * (1 - np.maximum(0, extra) / alone)
    assert case(record, f"{name}: part of the lookup")["values"] == pytest.approx(expected)
    assert case(record, f"{name}: a step")["median"] > 0


def test_the_tables_verify_and_a_models_own_are_the_stores_rows(tables: Tables) -> None:
    assert verify_store(tables.path).faults == []
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, WORDS, (3, 20)))
    with tierstore.open(tables.path, dram="4MiB") as store:
        for layer, resident in zip(LAYERS, tables.resident("cpu"), strict=True):
            rows = TieredEmbedding(store, layer, tables.spec)(ids)
            assert rows.isfinite().all()
            assert rows.abs().float().mean() > 0
            assert torch.equal(rows, resident(ids))


def test_prefill_in_chunks_and_steps_of_decode_give_the_logits_of_the_whole(tables: Tables, model: Model) -> None:
    text = np.random.default_rng(2).integers(0, WORDS, 60)
    resident = tables.resident("cpu")
    model = copy.deepcopy(model).double()  # sums of another order then differ by nothing that counts
    like = model.tokens.weight
    with torch.inference_mode():
        whole = model.run(resident, Feed.of_prompts(text, 60, 60, 3, "cpu").next(), Cache(SHAPE, 1, 60, like))
        parts = model.run(resident, Feed.of_prompts(text, 60, 16, 3, "cpu").next(), Cache(SHAPE, 1, 60, like))
    # Norms of the Engram layers are in float32 all the same. A logit's terms are those of a normalised stream, of
    # length
    # sqrt(hidden), and of a token's weights: their magnitudes sum to no more than the product of both lengths.
    tolerance = gamma(SHAPE.hidden) * math.sqrt(SHAPE.hidden) * like.norm(dim=-1)
    assert ((whole - parts).abs() <= tolerance).all(), ((whole - parts).abs() / tolerance).max()
    assert ((whole - whole.flip(-1)).abs() > 100 * tolerance).double().mean() > 0.9


def test_a_feed_gives_each_token_once_with_the_tokens_before_it() -> None:
    text = np.arange(100)
    feed = Feed.of_sequences(text, 4, 8, 3, "cpu")
    for number in range(10):
        (piece,) = feed.next()
        assert piece.token_ids[:, 0].tolist() == [3 + number + 25 * i for i in range(4)]
        assert piece.history is not None
        assert torch.equal(piece.history, piece.token_ids + torch.arange(-3, 0))
        assert (piece.start, piece.seen) == (number % 8, 8)
    prompts = Feed.of_prompts(text, 40, 16, 3, "cpu")
    for start in (0, 40):
        pieces = prompts.next()
        assert torch.cat([piece.token_ids for piece in pieces], 1)[0].tolist() == list(range(start, start + 40))
        assert [piece.seen for piece in pieces] == [16, 32, 40]
        assert pieces[0].history is None
        assert [piece.history[0, -1].item() for piece in pieces[1:] if piece.history is not None] == [
            start + 15, start + 31
        ]  # fmt: skip


@pytest.mark.usefixtures("small")
def test_a_side_with_other_rows_is_refused_before_anything_is_timed(
    folder: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Tables.resident

    def one_value_off(self: Tables, device: str) -> list[Any]:
        embeddings = honest(self, device)
        embeddings[1].embedding.weight.mul_(1.01)
        return embeddings

    monkeypatch.setattr(Tables, "resident", one_value_off)
    with pytest.raises(ConfigError, match="logits other than"):
        overlap.run(folder, overlap.Options(size_bytes=SIZE_BYTES, pairs=1, budgets=(4 << 20,), device="cpu"))
    assert read_catalog(tables.path).epoch is None


@pytest.mark.usefixtures("small")
def test_sides_with_an_hbm_tier_give_the_same_logits(
    tables: Tables, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap_sides, "hbm_for", lambda _device, _dram_bytes: 1 << 20)
    training, held_out = overlap.real_text.load_split()
    promised = overlap_tables.place(tables, training, 4 << 20, 1 << 20, 5)
    assert 0 < promised["all"] < 1
    text = np.concatenate(held_out.documents)
    try:
        with torch.inference_mode(), ExitStack() as stack:
            sides = overlap_sides.Sides(
                tables, 4 << 20, "cpu", overlap.Options(size_bytes=SIZE_BYTES, pairs=1), Result("sides"), stack
            )
            cache = Cache(SHAPE, 5, 8, model.tokens.weight)
            sides._check("decode", model, cache, Feed.of_sequences(text, 5, 8, 3, "cpu").next())
            assert sides.store.stats()["hits"]["hbm"] > 0
    finally:
        stores.unplace(tables.path)
