"""Embeddings over ranks that hold a slice each give the rows of the whole table, exactly, whatever each rank asks."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_processes import RankFailure, await_ranks, outcomes_of, run_ranks, start_ranks
from support.served import least_budget, request, serving
from support.tiny_store import DIM, LAYERS, VOCAB_SIZE, build_tiny, decoded, tiny_hash

import tierstore
from engram_adapter import HashSpec, RowIdEmbedding, TieredEmbedding
from engram_adapter import lockstep as lockstep_module
from engram_adapter.embedding import prefetch_layers
from engram_adapter.exchange import Ranks
from engram_adapter.lookup_operators import module_of
from tierstore.errors import ConfigError, CorruptPageError, RankError, StoreNotReadyError
from tierstore.formats.catalog import read_catalog
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.offline.build import build_store


class Sliced:
    """A tiny model, its rows, and stores of its slices, which are built when they are first asked for."""

    def __init__(self, folder: Path, hash_spec: HashSpec, seed: int = 3) -> None:
        self.folder, self.hash_spec = folder, hash_spec
        path, self.rows = build_tiny(folder, hash_spec, "bf16", seed)
        self.checkpoint, self.image = Checkpoint.open(folder / "tables.safetensors"), read_catalog(path)

    def path(self, index: int, num_slices: int) -> Path:
        path = self.folder / f"{index}of{num_slices}"
        if not path.exists():
            sources = []
            for name, layout in self.image.tables.items():
                tensor = self.checkpoint.tensors[f"{name.removeprefix('layers.')}.0"]
                sources.append(TableSource(layout.spec, (Plane(layout.spec.row_bytes, (tensor,)),)))
            build_store(
                path, sources, origin=self.checkpoint.to_dict(), attachments=self.image.attachments, jobs=1,
                slice=(index, num_slices),
            )  # fmt: skip
        return path

    def build(self, num_slices: int) -> None:
        for index in range(num_slices):
            self.path(index, num_slices)

    def expected(self, layer: int, token_ids: torch.Tensor, **context: Any) -> torch.Tensor:
        """The oracle: NumPy's fancy indexing of the rows that went into the slices."""
        ids = self.hash_spec.row_ids(token_ids.numpy(), layer, **context)
        rows = self.rows[f"layers.{layer}"][ids]
        rows[ids < 0] = 0
        return decoded(rows, "bf16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return Sliced(tmp_path_factory.mktemp("sliced"), tiny_hash())


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch, length)))


def batches_of(rank: int) -> list[torch.Tensor]:
    """Batches that are another on each rank, of other sizes, some of them empty."""
    shapes = [(2, 5), (0, 3), (rank, 7), (1, 1), (3, 0), (1, 40 * (rank + 1))]
    return [tokens(batch, length, seed=10 * rank + number) for number, (batch, length) in enumerate(shapes)]


def embedding_of(store: Any, layer: int = 1, **options: Any) -> TieredEmbedding:
    return TieredEmbedding(store, layer, tiny_hash(), **{"process_group": Ranks.of()} | options)


def over_ranks(model: Sliced, size: int, folder: Path, act: Callable[[int, Any], Any], dram: str = "4MiB") -> list[Any]:
    """Runs act(rank, its open slice) on ranks; returns what each returned."""
    model.build(size)

    def work(rank: int) -> Any:
        with tierstore.open(model.path(rank, size), dram=dram) as store:
            return act(rank, store)

    return run_ranks(work, size, folder)


@pytest.mark.parametrize(("size", "dram"), [(1, "4MiB"), (2, "4MiB"), (2, "64MiB"), (3, "4MiB"), (11, "64MiB")])
def test_every_rank_gets_the_rows_of_its_own_tokens(model: Sliced, tmp_path: Path, size: int, dram: str) -> None:
    def act(rank: int, store: Any) -> bool:
        assert HashSpec.from_store(store).fingerprint(1) == model.hash_spec.fingerprint(1)
        embeddings = [embedding_of(store, layer) for layer in LAYERS]
        for token_ids in batches_of(rank):
            for layer, embedding in zip(LAYERS, embeddings, strict=True):
                got = embedding(token_ids, history=token_ids[:, :0])
                assert got.shape == (*token_ids.shape, 8, DIM)
                assert torch.equal(got, model.expected(layer, token_ids))
        return bool(embeddings[0]._lock_step.by_key)

    # 8 heads: 11 slices cut them, and rows are asked for by row id
    assert over_ranks(model, size, tmp_path, act, dram) == [size <= 8] * size


def test_history_and_dead_positions_reach_the_hash(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        token_ids, dead = tokens(2, 9, seed=rank), torch.zeros(2, 9, dtype=torch.bool)
        dead[:, 3:6] = True
        for size in (None, 32):
            embedding = embedding_of(store, fixed_tokens=size)
            alive = model.expected(1, token_ids, dead=dead.numpy())
            assert torch.equal(embedding(token_ids, dead=dead), alive)
            after = model.expected(1, token_ids[:, 4:], history=token_ids[:, :4].numpy())
            assert torch.equal(embedding(token_ids[:, 4:], history=token_ids[:, :4]), after)

    over_ranks(model, 2, tmp_path, act)


def test_a_prefetch_is_taken_by_the_next_forward_and_asks_nothing_twice(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> list[int]:
        embedding, told = embedding_of(store), []
        for first, second in zip(batches_of(rank), batches_of(rank + 5), strict=True):
            embedding.prefetch(first)
            embedding.prefetch(second)
            keys = store.stats()["keys"]
            assert torch.equal(embedding(first, history=first[:, :0]), model.expected(1, first))
            assert torch.equal(embedding(second, history=second[:, :0]), model.expected(1, second))
            told.append(store.stats()["keys"] - keys)
        return told

    assert over_ranks(model, 2, tmp_path, act) == [[0] * 6] * 2


def test_a_prefetch_of_other_ids_on_one_rank_costs_a_lookup_on_all_and_no_wrong_row(
    model: Sliced, tmp_path: Path
) -> None:
    def act(rank: int, store: Any) -> None:
        embedding, other = embedding_of(store), tokens(1, 6, seed=99)
        for number, token_ids in enumerate(batches_of(rank)):
            embedding.prefetch(other if rank == number % 2 else token_ids)
            assert torch.equal(embedding(token_ids, history=token_ids[:, :0]), model.expected(1, token_ids))
            assert torch.equal(embedding(token_ids, history=token_ids[:, :0]), model.expected(1, token_ids))

    over_ranks(model, 2, tmp_path, act)


def test_prefetches_of_several_layers_go_out_in_their_order_and_the_oldest_are_dropped(
    model: Sliced, tmp_path: Path
) -> None:
    def act(rank: int, store: Any) -> None:
        embeddings = [embedding_of(store, layer) for layer in LAYERS]
        token_ids = tokens(1, 4, seed=rank)
        for _ in range(lockstep_module.PREFETCHES_MAX + 3):
            prefetch_layers(embeddings, token_ids)
        for layer, embedding in zip(LAYERS, embeddings, strict=True):
            assert len(embedding._lock_step._prefetched) == lockstep_module.PREFETCHES_MAX
            assert torch.equal(embedding(token_ids), model.expected(layer, token_ids))

    over_ranks(model, 2, tmp_path, act)


@pytest.mark.parametrize("fixed_tokens", [None, 64])
@pytest.mark.parametrize("prefetched", [False, True])
def test_what_one_rank_refuses_is_named_on_the_others_and_all_go_on(
    model: Sliced, tmp_path: Path, fixed_tokens: int | None, prefetched: bool
) -> None:
    def act(rank: int, store: Any) -> None:
        embedding = embedding_of(store, fixed_tokens=fixed_tokens)
        good, bad = tokens(1, 6, seed=rank), torch.full((1, 3), VOCAB_SIZE)
        for wrong in (0, 1):
            if prefetched:
                embedding.prefetch(good)
            with pytest.raises(ValueError if rank == wrong else RankError) as raised:
                embedding(bad if rank == wrong else good)
            if rank != wrong:
                assert raised.value.ranks == (wrong,)
                assert f"rank {wrong}: ValueError: " in str(raised.value)
                assert str(VOCAB_SIZE) in str(raised.value)
            assert torch.equal(embedding(good), model.expected(1, good))

    over_ranks(model, 2, tmp_path, act)


@pytest.mark.parametrize("fixed_tokens", [None, 64])
def test_a_damaged_page_of_one_rank_fails_the_lookup_on_all(
    model: Sliced, tmp_path: Path, fixed_tokens: int | None
) -> None:
    def act(rank: int, store: Any) -> None:
        embedding = embedding_of(store, fixed_tokens=fixed_tokens)
        token_ids = tokens(1, 6, seed=rank)
        if rank == 1:
            store._engine._engine.inject("corrupt", 0, 1 << 30)
        with pytest.raises(CorruptPageError if rank == 1 else RankError, match=r"layers\.1|rank 1: CorruptPageError"):
            embedding(token_ids)
        if rank == 1:
            store._engine._engine.inject("none")
        assert torch.equal(embedding(token_ids), model.expected(1, token_ids))

    over_ranks(model, 2, tmp_path, act, dram="128KiB")


def lagging(store: Any, versions: Sequence[int]) -> None:
    """Has a store answer from these versions, one lookup after another, and then from the last."""
    left = list(versions)
    type(store).common_build = property(lambda _: f"{left.pop(0) if len(left) > 1 else left[0]:064x}")


@pytest.mark.parametrize("prefetched", [False, True])
def test_ranks_ask_again_until_all_answer_from_one_version(model: Sliced, tmp_path: Path, prefetched: bool) -> None:
    def act(rank: int, store: Any) -> int:
        embedding, token_ids = embedding_of(store), tokens(1, 6, seed=rank)
        if prefetched:
            embedding.prefetch(token_ids)
        keys = store.stats()["keys"]
        lagging(store, [5, 5, 6] if rank else [6])
        assert torch.equal(embedding(token_ids), model.expected(1, token_ids))
        return int(store.stats()["keys"] - keys)

    keys = over_ranks(model, 2, tmp_path, act)
    once = over_ranks(model, 2, tmp_path / "once", lambda rank, store: _keys_of_one_lookup(rank, store))
    assert keys == [(2 if prefetched else 3) * each for each in once]


def _keys_of_one_lookup(rank: int, store: Any) -> int:
    embedding_of(store)(tokens(1, 6, seed=rank))
    return int(store.stats()["keys"])


@pytest.mark.parametrize("fixed_tokens", [None, 64])
def test_rows_of_two_versions_are_never_mixed(
    model: Sliced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixed_tokens: int | None
) -> None:
    monkeypatch.setattr(lockstep_module, "VERSION_PAUSE_S", 0.0)

    def act(rank: int, store: Any) -> None:
        embedding, token_ids = embedding_of(store, fixed_tokens=fixed_tokens), tokens(1, 6, seed=rank)
        lagging(store, [(7 + rank) << 228])
        with pytest.raises(StoreNotReadyError, match=f"rank 0 from {7 << 20:012x}, rank 1 from {8 << 20:012x}"):
            embedding(token_ids)
        lagging(store, [8])
        assert torch.equal(embedding(token_ids), model.expected(1, token_ids))

    over_ranks(model, 2, tmp_path, act)


def test_slices_of_two_checkpoints_are_not_mixed(model: Sliced, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Sliced(tmp_path / "other", tiny_hash(), seed=4)
    paths = [model.path(0, 2), other.path(1, 2)]

    def work(rank: int) -> None:
        lockstep_module.VERSION_PAUSE_S = 0.0
        with tierstore.open(paths[rank], dram="4MiB") as store:
            embedding = embedding_of(store)
            with pytest.raises(StoreNotReadyError, match="different versions or checkpoints"):
                embedding(tokens(1, 6, seed=rank))

    run_ranks(work, 2, tmp_path / "ranks")


@pytest.mark.parametrize("fixed_tokens", [None, 64])
def test_a_rank_that_hangs_is_named_within_the_time_limit(
    model: Sliced, tmp_path: Path, fixed_tokens: int | None
) -> None:
    def act(rank: int, store: Any) -> tuple[str, float]:
        embedding = embedding_of(store, process_group=Ranks(timeout_s=2.0), fixed_tokens=fixed_tokens)
        token_ids = tokens(1, 6, seed=rank)
        embedding(token_ids)
        started = time.monotonic()
        if rank == 1:
            while not list(tmp_path.glob("gave-up-*")):  # hangs, as long as the others wait
                time.sleep(0.05)
            return "", 0.0
        with pytest.raises(RankError, match="rank 1 did not come within 2 s") as raised:
            embedding(token_ids)
        (tmp_path / f"gave-up-{rank}").touch()
        return str(raised.value.ranks), time.monotonic() - started

    (names, took_s), _ = over_ranks(model, 2, tmp_path, act)
    assert names == "(1,)"
    assert took_s < 10


def test_a_rank_that_dies_is_named(model: Sliced, tmp_path: Path) -> None:
    model.build(2)

    def work(rank: int) -> str:
        with tierstore.open(model.path(rank, 2), dram="4MiB") as store:
            embedding = embedding_of(store, process_group=Ranks(timeout_s=20.0))
            embedding(tokens(1, 6, seed=rank))
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with pytest.raises(RankError) as raised:
                embedding(tokens(1, 6, seed=rank))
            return str(raised.value)

    assert await_ranks(start_ranks(work, 2, tmp_path)) == [0, -signal.SIGKILL]
    said = outcomes_of(tmp_path, 2)[0]
    assert not isinstance(said, RankFailure), said
    assert "rank 1 left" in said or "rank 1 did not come" in said


def test_the_fixed_variant_gives_equal_rows_by_exchanges_of_equal_sizes(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> list[Any]:
        embedding = embedding_of(store, fixed_tokens=120)
        sizes: list[Any] = []
        ranks = embedding._lock_step.ranks
        ranks.start_all_to_all = _noting(ranks.start_all_to_all, sizes)
        seen = []
        for token_ids in batches_of(rank):
            sizes.clear()
            embedding.prefetch(token_ids)
            assert torch.equal(embedding(token_ids, history=token_ids[:, :0]), model.expected(1, token_ids))
            seen.append(list(sizes))
        return seen

    for seen in over_ranks(model, 3, tmp_path, act):
        assert len(seen[0]) == 3
        assert all(each == seen[0] for each in seen)


def _noting(call: Callable[..., Any], sizes: list[Any]) -> Callable[..., Any]:
    """Notes the shapes, and the parts, of what is exchanged."""

    def noted(what: str, sent: Any, *rest: Any) -> Any:
        sizes.append((tuple(sent.shape), [list(part) for part in rest if isinstance(part, list)]))
        return call(what, sent, *rest)

    return noted


def test_only_distinct_entries_travel(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> tuple[int, int]:
        embedding = embedding_of(store)
        sizes: list[Any] = []
        ranks = embedding._lock_step.ranks
        ranks.start_all_to_all = _noting(ranks.start_all_to_all, sizes)
        token_ids = tokens(1, 7, seed=rank).repeat(20, 3)
        embedding(token_ids)
        *_, (_, (_, received)) = sizes
        (other,) = (share for number, share in enumerate(embedding._lock_step.slices.shares) if number != rank)
        keys = model.hash_spec.keys(token_ids.numpy(), 1).reshape(-1, 2)[:, list(other.columns)]
        entries = sum(len(np.unique(column)) for column in keys.T)
        return sum(received), entries * 4 * 128

    for received, needed in over_ranks(model, 2, tmp_path, act):
        assert received == needed + 512  # a header, in the room of an entry; nothing to itself


def test_rows_go_to_the_callers_buffer_if_it_fits(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        lock_step, keys = embedding_of(store)._lock_step, model.hash_spec.keys(tokens(1, 5, seed=rank).numpy(), 1)[0]
        expected = lock_step.look_up(lambda: keys)
        out = np.full_like(expected, 255)
        assert lock_step.look_up(lambda: keys, out) is out
        np.testing.assert_array_equal(out, expected)
        for wrong in (out[:4], out.astype(np.int8), np.repeat(out, 2, axis=0)[::2]):
            with pytest.raises(ValueError, match=r"must be contiguous uint8 \[5, 8, 128\]"):
                lock_step.look_up(lambda: keys, wrong)

    over_ranks(model, 2, tmp_path, act)


def test_more_tokens_than_are_fixed_are_refused_on_all_ranks(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        embedding = embedding_of(store, fixed_tokens=8)
        with pytest.raises(ValueError if rank else RankError, match="9 tokens, and fixed_tokens is 8"):
            embedding(tokens(1, 8 + rank, seed=1))
        assert torch.equal(embedding(tokens(2, 4, seed=rank)), model.expected(1, tokens(2, 4, seed=rank)))

    over_ranks(model, 2, tmp_path, act)


@pytest.mark.slow
def test_fixed_tokens_need_slices_on_head_boundaries(model: Sliced, tmp_path: Path) -> None:
    def act(_: int, store: Any) -> None:
        with pytest.raises(ConfigError, match="begins inside a head"):
            embedding_of(store, fixed_tokens=8)

    over_ranks(model, 9, tmp_path, act)


def test_rows_by_row_id_come_from_whichever_rank_holds_them(model: Sliced, tmp_path: Path) -> None:
    rows = decoded(model.rows["layers.1"], "bf16")

    def act(rank: int, store: Any) -> None:
        by_id = RowIdEmbedding(store, 1, process_group=Ranks.of())
        by_head = RowIdEmbedding(store, 1, head_offsets=True, process_group=Ranks.of())
        assert by_id.num_embeddings == len(rows)
        ids = torch.from_numpy(np.random.default_rng(rank).integers(-1, len(rows), (3, 5 * rank)))
        for dtype in (torch.int64, torch.int32):
            expected = torch.where((ids < 0).unsqueeze(-1), 0, rows[ids])
            assert torch.equal(by_id(ids.to(dtype)), expected)
        spec = tiny_hash()
        within = torch.from_numpy(np.random.default_rng(rank).integers(0, min(spec.moduli(1)), (4, 8)))
        assert torch.equal(by_head(within), rows[within + torch.tensor(spec.offsets(1))])
        with pytest.raises(ValueError if rank else RankError, match=f"row id {len(rows)} is outside"):
            by_id(torch.tensor([0, len(rows) if rank else 1]))
        with pytest.raises(ConfigError, match="has a slice"):
            by_id.copy_rows_to(torch.empty(0), 1 << 20)

    over_ranks(model, 2, tmp_path, act)


def test_a_handle_of_a_lookup_over_ranks_names_no_other_module(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        embedding, by_id = embedding_of(store), RowIdEmbedding(store, 1, process_group=Ranks.of())
        alone = RowIdEmbedding(store, 1)
        for module in (embedding, by_id, alone):
            assert module_of(module._handle) is module
        assert len({module._handle.rpartition("#")[0] for module in (embedding, by_id, alone)}) == 3
        assert "over ranks" in embedding._handle
        assert torch.equal(module_of(embedding._handle).look_up(tokens(1, 5, rank)), embedding(tokens(1, 5, rank)))

    over_ranks(model, 2, tmp_path, act)


@pytest.mark.slow
def test_a_lookup_over_ranks_is_one_operator_of_traced_programs(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        embedding, token_ids = embedding_of(store), tokens(2, 5, seed=rank)
        got = torch.ops.tierstore.lookup(
            token_ids, None, None, embedding._handle, embedding.num_heads, DIM, torch.bfloat16, None
        )
        assert torch.equal(got, model.expected(1, token_ids))

    over_ranks(model, 2, tmp_path, act)


@pytest.mark.slow
def test_a_compiled_program_looks_up_over_ranks(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        embedding = embedding_of(store)
        program = torch.compile(lambda ids: embedding(ids) * 2, backend="eager", fullgraph=True)
        token_ids = tokens(2, 5, seed=rank)
        assert torch.equal(program(token_ids), model.expected(1, token_ids) * 2)

    over_ranks(model, 2, tmp_path, act)


def test_a_slice_without_its_ranks_is_refused(model: Sliced) -> None:
    with tierstore.open(model.path(1, 2), dram="4MiB") as store, tierstore.open(model.folder / "store") as whole:
        with pytest.raises(ConfigError, match=r"has rows \d+ to \d+ of \d+ of table layers\.1: pass process_group="):
            TieredEmbedding(store, 1, tiny_hash())
        with pytest.raises(ConfigError, match="if fixed_tokens is given"):
            TieredEmbedding(whole, 1, tiny_hash(), fixed_tokens=8)


def test_a_copy_asks_the_same_ranks_and_none_can_be_pickled(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        for size in (None, 8):
            embedding = embedding_of(store, fixed_tokens=size)
            copied, token_ids = copy.deepcopy(embedding), tokens(1, 6, seed=rank)
            assert torch.equal(copied(token_ids), embedding(token_ids))
            with pytest.raises(TypeError, match="make it on each rank"):
                pickle.dumps(embedding)

    over_ranks(model, 2, tmp_path, act)


def test_a_store_reached_by_grpc_is_refused_on_all_ranks(model: Sliced, tmp_path: Path) -> None:
    def act(rank: int, store: Any) -> None:
        stats = store.stats()
        if rank == 1:
            type(store).stats = lambda _: stats | {"server": {"url": "grpc://a:1"}}
        with pytest.raises(ConfigError, match="the store of rank 1 is reached by gRPC"):
            embedding_of(store)

    over_ranks(model, 2, tmp_path, act)


def test_ranks_whose_slices_are_not_one_table_are_refused(model: Sliced, tmp_path: Path) -> None:
    model.build(2)
    model.build(3)
    for number, (paths, why) in enumerate(
        [
            ([model.path(0, 2), model.path(0, 2)], "are in two ranks' slices"),
            ([model.path(0, 3), model.path(2, 3)], "are in no rank's slice"),
            ([model.path(0, 3), model.path(1, 3)], "are in no rank's slice"),
            ([model.folder / "store", model.path(1, 2)], "are in two ranks' slices"),
        ]
    ):

        def work(rank: int, paths: list[Path] = paths, why: str = why) -> None:
            with tierstore.open(paths[rank], dram="4MiB") as store, pytest.raises(ConfigError, match=why):
                embedding_of(store)

        run_ranks(work, 2, tmp_path / str(number))


@pytest.mark.daemon
def test_daemons_that_are_swapped_one_after_the_other_never_give_mixed_rows(model: Sliced, tmp_path: Path) -> None:
    (tmp_path / "newer").mkdir()
    newer = Sliced(tmp_path / "newer", tiny_hash(), seed=4)
    for each in (model, newer):
        each.build(2)
    sockets = [tmp_path / f"s{rank}" for rank in range(2)]

    def work(rank: int) -> list[int]:
        while not (tmp_path / "serving").exists():
            time.sleep(0.01)
        ranks, seen = Ranks(timeout_s=30.0), []
        with tierstore.connect(sockets[rank]) as store:
            embedding = embedding_of(store, process_group=ranks)
            while not any(ranks.gather_objects("the end", (tmp_path / "end").exists())):
                number = len(seen)
                token_ids = tokens(1, 9, seed=1000 * rank + number)
                if number % 2:
                    embedding.prefetch(token_ids)
                got = embedding(token_ids)
                seen += [v for v, each in enumerate((model, newer)) if torch.equal(got, each.expected(1, token_ids))]
                assert len(seen) == number + 1, "rows of neither version, or of both"
                (tmp_path / f"seen{seen[-1]}").touch()
        return seen

    children = start_ranks(work, 2, tmp_path / "ranks")  # before there are daemons, whose threads no fork may copy
    budget = least_budget(model.path(0, 2)) + (1 << 20)
    with serving(model.path(0, 2), sockets[0], budget), serving(model.path(1, 2), sockets[1], budget):
        (tmp_path / "serving").touch()
        for paths in ((), (newer, newer), (model, model)):
            (tmp_path / "seen0").unlink(missing_ok=True)
            (tmp_path / "seen1").unlink(missing_ok=True)
            for rank, of in enumerate(paths):
                request(sockets[rank], "swap", store=str(of.path(rank, 2)))
            await_file(tmp_path / f"seen{int(newer in paths)}")
        (tmp_path / "end").touch()
        assert await_ranks(children) == [0, 0]
    first, second = outcomes_of(tmp_path / "ranks", 2)
    assert first == second, first
    assert sorted(set(first)) == [0, 1]
    assert first[0] == first[-1] == 0


def await_file(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.01)
