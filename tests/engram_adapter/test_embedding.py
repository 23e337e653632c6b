"""The embedding modules over a real store, held against plain gathers from the rows that it was built from."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import DIM, LAYERS, VOCAB_SIZE, WatchedStore, build_tiny, decoded, tiny_hash

import tierstore
from engram_adapter import token_shapes
from engram_adapter.embedding import PENDING_PREFETCHES_MAX, TieredEmbedding, prefetch_layers
from engram_adapter.lookup_call import WAIT_S
from engram_adapter.resident_embedding import HashedEmbedding
from engram_adapter.row_id_embedding import RowIdEmbedding
from tierstore.errors import ConfigError, CorruptPageError, FingerprintMismatchError

CODECS = ["fp8_e4m3_e8m0x32", "bf16", "fp16", "fp32"]
RESIDENT, CACHED = "64MiB", "192KiB"  # budgets that hold the tiny tables whole, and that do not
Open = Callable[..., contextlib.AbstractContextManager[tuple[Any, dict[str, np.ndarray]]]]


@pytest.fixture(scope="module")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens the tiny store of a codec, built once a module."""
    built: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    @contextlib.contextmanager
    def opened(codec: str, dram: str = RESIDENT) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        if codec not in built:
            built[codec] = build_tiny(tmp_path_factory.mktemp("tiny"), tiny_hash(), codec, seed=3)
        path, rows = built[codec]
        with tierstore.open(path, dram=dram) as store:
            assert len(store.stats()["memory"]["resident_tables"]) == (2 if dram == RESIDENT else 0)
            yield store, rows

    return opened


@pytest.fixture(params=[RESIDENT, CACHED])
def watched(open_tiny: Open, request: pytest.FixtureRequest) -> Iterator[tuple[WatchedStore, dict[str, np.ndarray]]]:
    with open_tiny("bf16", request.param) as (store, rows):
        yield WatchedStore(store), rows


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch, length)))


def gathered(rows: np.ndarray, codec: str, layer: int, token_ids: torch.Tensor, **context: Any) -> torch.Tensor:
    """The oracle: NumPy's fancy indexing of the rows that went into the store."""
    return decoded(rows[tiny_hash().row_ids(token_ids.numpy(), layer, **context)], codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17), (2, 0), (0, 5)])
def test_forward_returns_the_checkpoints_rows(open_tiny: Open, codec: str, batch: int, length: int) -> None:
    with open_tiny(codec) as (store, rows):
        for layer in LAYERS:
            token_ids = tokens(batch, length, seed=layer)
            got = TieredEmbedding(store, layer, tiny_hash())(token_ids)
            assert got.shape == (batch, length, 8, DIM)
            assert torch.equal(got, gathered(rows[f"layers.{layer}"], codec, layer, token_ids))


def test_layer_may_be_named_by_its_table(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, _ = watched
    token_ids = tokens(1, 5, seed=1)
    by_index, by_name = (TieredEmbedding(store, layer, tiny_hash()) for layer in (4, "layers.4"))
    assert torch.equal(by_index(token_ids), by_name(token_ids))
    assert torch.equal(
        RowIdEmbedding(store, 4)(torch.tensor([3])), RowIdEmbedding(store, "layers.4")(torch.tensor([3]))
    )


@pytest.mark.parametrize("split", [1, 2, 5, 11])
def test_a_sequence_fed_in_parts_with_history_gives_the_rows_of_the_whole(
    watched: tuple[WatchedStore, dict[str, np.ndarray]], split: int
) -> None:
    embedding = TieredEmbedding(watched[0], 1, tiny_hash())
    token_ids = tokens(2, 12, seed=2)
    first = embedding(token_ids[:, :split])
    rest = embedding(token_ids[:, split:], history=token_ids[:, max(0, split - 2) : split])
    assert torch.equal(torch.cat([first, rest], dim=1), embedding(token_ids))
    assert torch.equal(embedding(token_ids, history=token_ids[:, :0]), embedding(token_ids))


def test_decoding_with_all_that_was_seen_as_history_gives_the_rows_of_the_whole(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    token_ids = tokens(2, 9, seed=3)
    resident = HashedEmbedding(tiny_hash(), 1, decoded(rows["layers.1"], "bf16"))
    for embedding in (TieredEmbedding(store, 1, tiny_hash()), resident):
        steps = [embedding(token_ids[:, :4])]
        steps += [embedding(token_ids[:, at : at + 1], history=token_ids[:, :at]) for at in range(4, 9)]
        assert torch.equal(torch.cat(steps, dim=1), embedding(token_ids))


def test_a_prefetch_is_taken_whatever_older_tokens_its_forward_brings(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, _ = watched
    embedding, token_ids = TieredEmbedding(store, 1, tiny_hash()), tokens(1, 9, seed=4)
    embedding.prefetch(token_ids[:, 8:], token_ids[:, 6:8])
    embedding(token_ids[:, 8:], token_ids[:, :8])
    assert len(store.requests) == 1


def test_one_token_without_history_is_the_start_of_a_document_and_warned_of_once(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(token_shapes, "_warned", False)
    embedding, token_ids = TieredEmbedding(watched[0], 1, tiny_hash()), tokens(1, 3, seed=5)
    with caplog.at_level("WARNING", logger="tierstore"):
        start = embedding(token_ids[:, :1], history=token_ids[:, :0])  # says so: nothing to warn of
        embedding(token_ids)
        assert not caplog.records
        assert torch.equal(embedding(token_ids[:, :1]), start)
        embedding.prefetch(token_ids[:, 1:2])
        embedding(token_ids[:, 2:])
    (record,) = caplog.records
    assert "history=seen" in record.getMessage()


def test_dead_positions_reach_the_hash(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, rows = watched
    token_ids = tokens(2, 12, seed=4)
    dead = torch.zeros(2, 12, dtype=torch.bool)
    dead[:, 3:6] = True
    got = TieredEmbedding(store, 1, tiny_hash())(token_ids, dead=dead)
    expected_ids = tiny_hash().row_ids(token_ids.numpy(), 1, dead=dead.numpy())
    alive = ~dead
    assert torch.equal(got[alive], decoded(rows["layers.1"][expected_ids[alive.numpy()]], "bf16"))
    assert not torch.equal(got[:, 6], TieredEmbedding(store, 1, tiny_hash())(token_ids)[:, 6])
    resident = HashedEmbedding(tiny_hash(), 1, decoded(rows["layers.1"], "bf16"))
    assert torch.equal(got, resident(token_ids, dead=dead))


def test_resident_counterpart_gives_equal_rows(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, rows = watched
    resident = HashedEmbedding(tiny_hash(), 4, decoded(rows["layers.4"], "bf16"))
    tiered = TieredEmbedding(store, 4, tiny_hash())
    token_ids, history = tokens(3, 9, seed=5), tokens(3, 2, seed=6)
    assert torch.equal(tiered(token_ids, history), resident(token_ids, history))
    assert tiered.features == resident.features == 8 * DIM
    with pytest.raises(ValueError, match="weight of shape"):
        HashedEmbedding(tiny_hash(), 4, decoded(rows["layers.4"][:-1], "bf16"))


@pytest.mark.parametrize("other", ["orders", "token map"])
def test_another_hash_is_refused(watched: tuple[WatchedStore, dict[str, np.ndarray]], other: str) -> None:
    spec = tiny_hash(max_order=4) if other == "orders" else tiny_hash(compressed=39)
    with pytest.raises(FingerprintMismatchError, match=r"layers\.1"):
        TieredEmbedding(watched[0], 1, spec)


def test_a_table_that_is_not_there_is_refused_with_those_that_are(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    with pytest.raises(ConfigError, match=r"no table layers\.2; it has layers\.1, layers\.4"):
        RowIdEmbedding(watched[0], 2)
    for layer in (2, "layers.2", "layers.²", "plain"):
        with pytest.raises(ConfigError, match=rf"no table for layer {layer!r}; there are layers\.1, layers\.4"):
            TieredEmbedding(watched[0], layer, tiny_hash())


def test_forward_takes_the_prefetch_with_equal_arguments_once(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    token_ids, history = tokens(2, 6, seed=7), tokens(2, 2, seed=8)
    expected = gathered(rows["layers.1"], "bf16", 1, token_ids, history=history.numpy())
    embedding.prefetch(token_ids, history)
    embedding.prefetch(token_ids.clone(), history.clone())
    assert len(store.requests) == 1
    assert torch.equal(embedding(token_ids.to(torch.int32), history), expected)
    assert len(store.requests) == 1
    assert torch.equal(embedding(token_ids, history), expected)
    assert len(store.requests) == 2


def test_a_prefetch_of_other_arguments_is_not_taken(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, rows = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    token_ids = tokens(1, 6, seed=9)
    dead = torch.zeros(1, 6, dtype=torch.bool)
    dead[0, 2] = True
    embedding.prefetch(token_ids)
    assert torch.equal(
        embedding(token_ids.reshape(2, 3)), gathered(rows["layers.1"], "bf16", 1, token_ids.reshape(2, 3))
    )
    history = tokens(1, 2, seed=10)
    assert torch.equal(
        embedding(token_ids, history), gathered(rows["layers.1"], "bf16", 1, token_ids, history=history.numpy())
    )
    embedding(token_ids, dead=dead)
    assert len(store.requests) == 4
    token_ids[0, 0] = (token_ids[0, 0] + 1) % VOCAB_SIZE  # in place, after its prefetch
    assert torch.equal(embedding(token_ids), gathered(rows["layers.1"], "bf16", 1, token_ids))
    assert len(store.requests) == 5


def test_prefetches_beyond_the_limit_drop_the_oldest(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, rows = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    batches = [tokens(1, 4, seed=100 + i) for i in range(PENDING_PREFETCHES_MAX + 2)]
    for batch in batches:
        embedding.prefetch(batch)
    assert len(store.requests) == len(batches)
    looked_up_anew = []
    for batch in batches:
        requests = len(store.requests)
        assert torch.equal(embedding(batch), gathered(rows["layers.1"], "bf16", 1, batch))
        looked_up_anew.append(len(store.requests) > requests)
    assert looked_up_anew == [True, True] + [False] * PENDING_PREFETCHES_MAX


def test_layers_are_prefetched_in_one_request(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, rows = watched
    embeddings = [TieredEmbedding(store, layer, tiny_hash()) for layer in LAYERS]
    token_ids = tokens(2, 7, seed=11)
    prefetch_layers(embeddings, token_ids)
    assert store.requests == [("layers.1", "layers.4")]
    for layer, embedding in zip(reversed(LAYERS), reversed(embeddings), strict=True):
        assert torch.equal(embedding(token_ids), gathered(rows[f"layers.{layer}"], "bf16", layer, token_ids))
    assert len(store.requests) == 1


def test_layers_of_two_stores_or_one_table_twice_are_no_one_request(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, _ = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    token_ids = tokens(1, 3, seed=12)
    for other in (TieredEmbedding(store, 1, tiny_hash()), TieredEmbedding(WatchedStore(store.store), 4, tiny_hash())):
        with pytest.raises(ValueError, match="one store"):
            prefetch_layers([embedding, other], token_ids)
    prefetch_layers([], token_ids)
    assert store.requests == []


def test_every_wait_has_the_named_limit(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, _ = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    embedding(tokens(1, 3, seed=13))
    embedding.prefetch(tokens(1, 3, seed=14))
    embedding(tokens(1, 3, seed=14))
    assert store.timeouts_s == [WAIT_S, WAIT_S]


@pytest.mark.parametrize(
    ("error", "prefetched"),
    [(TimeoutError("rows late"), True), (TimeoutError("rows late"), False), (CorruptPageError("page 3"), False)],
)
def test_a_failed_lookup_raises_in_forward_and_the_next_forward_looks_up_anew(
    watched: tuple[WatchedStore, dict[str, np.ndarray]], error: Exception, prefetched: bool
) -> None:
    store, rows = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    token_ids = tokens(1, 5, seed=15)
    if prefetched:
        embedding.prefetch(token_ids)
    store.fail_next = error
    with pytest.raises(type(error), match=str(error)):
        embedding(token_ids)
    assert torch.equal(embedding(token_ids), gathered(rows["layers.1"], "bf16", 1, token_ids))
    assert len(store.requests) == 2


def test_a_damaged_page_of_one_layer_does_not_fail_another_that_was_prefetched_with_it(tmp_path: Path) -> None:
    path, rows = build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)
    for shard in (path / "shards").glob("*layers.4/*.shard"):
        data = bytearray(shard.read_bytes())
        data[5::4096] = bytes(byte ^ 0xFF for byte in data[5::4096])
        shard.write_bytes(data)
    with tierstore.open(path, dram=CACHED) as store:
        healthy, damaged = (TieredEmbedding(store, layer, tiny_hash()) for layer in LAYERS)
        token_ids = tokens(2, 7, seed=21)
        prefetch_layers([healthy, damaged], token_ids)
        assert torch.equal(healthy(token_ids), gathered(rows["layers.1"], "bf16", 1, token_ids))
        with pytest.raises(CorruptPageError, match=r"of table layers\.4"):
            damaged(token_ids)


def test_a_copied_model_shares_the_store_and_nothing_else(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    tiered = TieredEmbedding(store, 1, tiny_hash())
    model = torch.nn.ModuleList([tiered, RowIdEmbedding(store, 4), torch.nn.Linear(2, 2)])
    model.eval()
    token_ids = tokens(1, 5, seed=22)
    tiered.prefetch(token_ids)
    copied = copy.deepcopy(model)
    assert copied[0] is not tiered
    assert not copied[0].training
    assert torch.equal(copied[0](token_ids), gathered(rows["layers.1"], "bf16", 1, token_ids))
    assert len(store.requests) == 2  # the prefetch stays the original's
    assert torch.equal(tiered(token_ids), copied[0](token_ids))
    copied.to("meta")
    assert (copied[1].weight.device.type, model[1].weight.device.type) == ("meta", "cpu")
    assert torch.equal(model[1](torch.tensor([3])), decoded(rows["layers.4"][3:4], "bf16"))
    assert torch.equal(copied[1](torch.tensor([3])), decoded(rows["layers.4"][3:4], "bf16"))


def test_the_default_device_of_torch_does_not_reach_the_rows(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    tiered, by_row = TieredEmbedding(store, 1, tiny_hash()), RowIdEmbedding(store, 1)
    token_ids, row_ids = tokens(1, 5, seed=23), torch.tensor([[3, -1]])
    expected = gathered(rows["layers.1"], "bf16", 1, token_ids)
    with torch.device("meta"):
        got, got_rows = tiered(token_ids), by_row(row_ids)
    assert torch.equal(got, expected)
    assert torch.equal(got_rows[0, 0], decoded(rows["layers.1"][3], "bf16"))


def test_threads_that_share_a_module_each_get_their_rows(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, rows = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())

    def work(worker: int) -> bool:
        equal = True
        for step in range(40):
            token_ids = tokens(2, 5, seed=(worker % 3) * 1000 + step)  # some threads ask for the same
            embedding.prefetch(token_ids)
            equal &= torch.equal(embedding(token_ids), gathered(rows["layers.1"], "bf16", 1, token_ids))
        return equal

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_rows_get_no_gradient_and_the_module_holds_no_state(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, _ = watched
    tiered, by_row = TieredEmbedding(store, 1, tiny_hash()), RowIdEmbedding(store, 1)
    for output in (tiered(tokens(1, 3, seed=16)), by_row(torch.tensor([1, 2]))):
        assert not output.requires_grad
    for module in (tiered, by_row):
        assert list(module.parameters()) == []
        assert module.state_dict() == {}
    with torch.inference_mode():
        assert torch.equal(tiered(tokens(1, 3, seed=16)), tiered(tokens(1, 3, seed=16)))


def test_rows_prefetched_under_inference_mode_serve_a_training_forward(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    embedding = TieredEmbedding(watched[0], 1, tiny_hash())
    token_ids = tokens(1, 3, seed=20)
    with torch.inference_mode():
        embedding.prefetch(token_ids)
    projection = torch.nn.Linear(DIM, 2, dtype=torch.bfloat16)
    projection(embedding(token_ids)).sum().backward()  # torch refuses to save inference tensors for this
    assert projection.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 3),), TypeError, "integers"),
        ((torch.zeros(1, 3, dtype=torch.bool),), TypeError, "integers"),
        (([[1, 2]],), TypeError, "list"),
        ((torch.zeros(3, dtype=torch.int64),), ValueError, "sequences"),
        ((torch.full((1, 2), VOCAB_SIZE),), ValueError, str(VOCAB_SIZE)),
        ((torch.full((1, 2), -1),), ValueError, "-1"),
        ((torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2)), TypeError, "history"),
        ((torch.zeros(1, 3, dtype=torch.int64), torch.zeros(5, 0, dtype=torch.int64)), ValueError, r"\[5, 0\]"),
        (
            (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            r"history of shape \[3\]",
        ),
        ((torch.zeros(1, 3, dtype=torch.int64), np.zeros((1, 2), dtype=np.int64)), TypeError, "history are ndarray"),
        ((torch.zeros(1, 3, dtype=torch.int64), None, torch.zeros(1, 3)), TypeError, "bool"),
        ((torch.zeros(1, 3, dtype=torch.int64), None, [[True, False, True]]), TypeError, "dead is list"),
        ((torch.zeros(1, 3, dtype=torch.int64), None, np.zeros((1, 3), dtype=bool)), TypeError, "dead is ndarray"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_looked_up(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
    arguments: tuple[Any, ...],
    error: type[Exception],
    message: str,
) -> None:
    store, _ = watched
    embedding = TieredEmbedding(store, 1, tiny_hash())
    for call in (embedding, embedding.prefetch):
        with pytest.raises(error, match=message):
            call(*arguments)
    assert store.requests == []


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (2, 5, 8), (3, 0, 8), (2, 3)])
def test_row_ids_give_what_a_resident_embedding_gives(open_tiny: Open, codec: str, shape: tuple[int, ...]) -> None:
    with open_tiny(codec) as (store, rows):
        resident = torch.nn.Embedding.from_pretrained(decoded(rows["layers.4"], codec))
        swapped = RowIdEmbedding(store, 4)
        row_ids = torch.from_numpy(np.asarray(np.random.default_rng(17).integers(0, resident.num_embeddings, shape)))
        got = swapped(row_ids)
        assert torch.equal(got, resident(row_ids))
        assert got.dtype == resident.weight.dtype == swapped.weight.dtype
        assert torch.equal(swapped(row_ids.to(torch.int32)), got)
        assert (swapped.num_embeddings, swapped.embedding_dim) == (resident.num_embeddings, resident.embedding_dim)


def test_row_ids_of_whole_tokens_in_any_layout_give_their_rows(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    row_ids = torch.from_numpy(tiny_hash().row_ids(tokens(3, 6, seed=18).numpy(), 1))
    expected = decoded(rows["layers.1"], "bf16")[row_ids]
    assert torch.equal(RowIdEmbedding(store, 1)(row_ids), expected)
    assert torch.equal(RowIdEmbedding(store, 1)(row_ids.transpose(0, 1)), expected.transpose(0, 1))


def test_row_id_minus_one_gives_zero_rows_and_ids_outside_are_refused(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    embedding = RowIdEmbedding(store, 1)
    last = embedding.num_embeddings - 1
    got = embedding(torch.tensor([-1, last, -1]))
    assert not got[0].any()
    assert not got[2].any()
    assert torch.equal(got[1], decoded(rows["layers.1"][last], "bf16"))
    for outside in (last + 1, -2):
        with pytest.raises(ValueError, match=str(outside)):
            embedding(torch.tensor([outside]))
    with pytest.raises(TypeError, match="integers"):
        embedding(torch.tensor([0.5]))


def test_weight_follows_the_device_and_keeps_the_tables_dtype(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    parent = torch.nn.Sequential(RowIdEmbedding(watched[0], 1))
    parent.to(torch.float32).double().half()
    assert parent[0].weight.dtype == torch.bfloat16
    assert parent[0](torch.tensor([1])).dtype == torch.bfloat16
    assert parent[0].weight.shape == (0, DIM)
    parent.to("meta")
    assert parent[0].weight.device.type == "meta"
    assert parent[0].weight.dtype == torch.bfloat16


class MultiHead(torch.nn.Module):
    """What `head_offsets=True` stands in for: one table for all heads, ids counted within each."""

    def __init__(self, sizes: list[int], weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([sum(sizes[:head]) for head in range(len(sizes))]))
        self.embedding = torch.nn.Embedding.from_pretrained(weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embedding(ids + self.offsets)
        return out


def test_ids_within_heads_give_what_the_published_module_gives(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    store, rows = watched
    sizes = list(store.tables["layers.4"].spec.moduli)
    published = MultiHead(sizes, decoded(rows["layers.4"], "bf16"))
    swapped = RowIdEmbedding(store, 4, head_offsets=True)
    ids = torch.from_numpy(np.random.default_rng(19).integers(0, sizes, (2, 9, len(sizes))))
    ids[0, 0], ids[0, 1] = 0, torch.tensor(sizes) - 1
    assert torch.equal(swapped(ids), published(ids))
    ids[1, 2, 3] = -1
    assert not swapped(ids)[1, 2, 3].any()


def test_an_id_past_its_heads_end_is_refused_instead_of_read_from_the_next_head(
    watched: tuple[WatchedStore, dict[str, np.ndarray]],
) -> None:
    swapped = RowIdEmbedding(watched[0], 4, head_offsets=True)
    sizes = watched[0].tables["layers.4"].spec.moduli
    for head, value in ((0, sizes[0]), (5, sizes[5]), (5, -2)):
        ids = torch.zeros(1, 2, 8, dtype=torch.int64)
        ids[0, 1, head] = value
        with pytest.raises(ValueError, match=f"id {value} of head {head} "):
            swapped(ids)
    with pytest.raises(ValueError, match="8 heads"):
        swapped(torch.zeros(2, 7, dtype=torch.int64))


def test_an_embedding_keeps_its_store_open_that_nobody_else_names(tmp_path: Path) -> None:
    path, rows = build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)

    def loaded(kind: str) -> torch.nn.Module:
        store = tierstore.open(path, dram=CACHED)
        return RowIdEmbedding(store, 1) if kind == "row ids" else TieredEmbedding(store, 1, tiny_hash())

    by_row_id, tiered = loaded("row ids"), loaded("tokens")
    twin = copy.deepcopy(by_row_id)
    del by_row_id
    gc.collect()
    token_ids = tokens(1, 5, seed=1)
    expected = gathered(rows["layers.1"], "bf16", 1, token_ids)
    assert torch.equal(tiered(token_ids), expected)
    assert torch.equal(twin(torch.from_numpy(tiny_hash().row_ids(token_ids.numpy(), 1))), expected)


def test_a_shallow_copy_looks_up_the_same_rows(watched: tuple[WatchedStore, dict[str, np.ndarray]]) -> None:
    store, _ = watched
    token_ids = tokens(1, 4, seed=2)
    tiered, by_row_id = TieredEmbedding(store, 1, tiny_hash()), RowIdEmbedding(store, 1)
    assert torch.equal(copy.copy(tiered)(token_ids), tiered(token_ids))
    assert torch.equal(copy.copy(by_row_id)(token_ids), by_row_id(token_ids))
