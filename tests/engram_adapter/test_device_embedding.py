"""TieredEmbedding on a store with an hbm tier: kernels, mailbox and host together, on a GPU or interpreted.

The oracle is NumPy's fancy indexing of the rows that went into the store. Which tiers answer is the fixture's: HBM,
DRAM's static set or whole tables where the device reads them, and misses by way of the mailbox.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.marks import slow_but
from support.tiny_store import DIM, LAYERS, NVFP4, VOCAB_SIZE, build_tiny, decoded, tiny_hash

import tierstore
from engram_adapter.device_embedding import DeviceCall, DeviceEmbedding, _identity
from engram_adapter.embedding import TieredEmbedding, prefetch_layers
from engram_adapter.row_id_embedding import RowIdEmbedding
from tierstore.decisions import hbm_budget
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen
from tierstore.tiers.hbm import times

CODECS = ["fp8_e4m3_e8m0x32", "fp32", NVFP4]  # decoded, moved as it is, and decoded in blocks
# Tables of 2,400 rows and more; half of the n-grams of these texts are placed.
BUDGETS = {
    "hbm, static, recency and nvme": {"dram": "480KiB", "hbm": "48KiB"},
    "all that is placed in hbm": {"dram": "480KiB", "hbm": "4MiB"},
    "hbm above whole tables": {"dram": "16MiB", "hbm": "48KiB"},
}
Open = Callable[..., contextlib.AbstractContextManager[tuple[tierstore.Store, dict[str, np.ndarray]]]]


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch, length))).to(DEVICE)


def expected(
    rows: dict[str, np.ndarray], codec: str, layer: int, token_ids: torch.Tensor, **context: Any
) -> torch.Tensor:
    given = {name: tensor.cpu().numpy() for name, tensor in context.items()}
    row_ids = tiny_hash().row_ids(token_ids.cpu().numpy(), layer, **given)
    return decoded(rows[f"layers.{layer}"][row_ids], codec).to(DEVICE)


def finished(embedding: TieredEmbedding, token_ids: torch.Tensor) -> torch.Tensor:
    """Looks up and waits for the device, so that what went wrong is raised."""
    got = embedding(token_ids)
    embedding.synchronize()
    return got


def place_half(path: Path, first: int = 0) -> None:
    """Places every other n-gram of the texts that tests draw with seeds 0 to 9, from this one on."""
    spec = tiny_hash()
    chosen = {}
    for layer in LAYERS:
        keys = np.concatenate(
            [spec.keys(tokens(4, 24, seed).cpu().numpy(), layer).reshape(-1, 2) for seed in range(10)]
        )
        pairs = np.unique(np.stack([np.tile([0, 1], len(keys)), keys.reshape(-1)]), axis=1)
        pairs = pairs[:, np.random.default_rng(layer).permutation(pairs.shape[1])[first::2]]
        chosen[f"layers.{layer}"] = Chosen(pairs[0].astype(np.uint8), pairs[1], 0.5)
    place_entries(path, chosen)


@pytest.fixture(scope="module", autouse=True)
def more_page_locked_memory() -> Iterator[None]:
    """Of so small a budget as these tests have, so that launches, which are slow to interpret, are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hbm_budget, "PINNED_DRAM_FRACTION", 1 / 2)
        yield


@pytest.fixture(scope="module")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens the tiny store of a codec with an hbm tier, built once a module."""
    built: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    @contextlib.contextmanager
    def opened(codec: str, **budgets: Any) -> Iterator[tuple[tierstore.Store, dict[str, np.ndarray]]]:
        if codec not in built:
            built[codec] = build_tiny(tmp_path_factory.mktemp("tiny"), tiny_hash(), codec, seed=3)
            place_half(built[codec][0])
        path, rows = built[codec]
        with tierstore.open(path, device=DEVICE, **budgets) as store:
            yield store, rows

    return opened


@pytest.fixture(params=slow_but([BUDGETS["hbm, static, recency and nvme"]], BUDGETS.values()), ids=BUDGETS)
def tiered(open_tiny: Open, request: pytest.FixtureRequest) -> Iterator[tuple[tierstore.Store, dict[str, np.ndarray]]]:
    with open_tiny("fp8_e4m3_e8m0x32", **request.param) as opened:
        yield opened


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
def test_values_are_the_checkpoints_from_every_tier(open_tiny: Open, codec: str, budgets: dict[str, str]) -> None:
    with open_tiny(codec, **budgets) as (store, rows):
        for layer in LAYERS:
            embedding = TieredEmbedding(store, layer, tiny_hash())
            for batch, length in ((1, 1), (3, 11), (2, 0), (0, 5)):
                token_ids = tokens(batch, length, seed=layer)
                got = embedding(token_ids)
                embedding.synchronize()
                assert got.shape == (batch, length, 8, DIM)
                assert got.device == store.device
                assert torch.equal(got, expected(rows, codec, layer, token_ids))


def test_the_tiers_that_are_meant_to_answer_do(open_tiny: Open) -> None:
    shares = {}
    for name, budgets in BUDGETS.items():
        with open_tiny("bf16", **budgets) as (store, _):
            embedding = TieredEmbedding(store, 1, tiny_hash())
            for seed in range(4):
                embedding(tokens(4, 24, seed)[:2])  # as many as the buffers hold at once
            stats = store.stats()
            assert stats["keys"] == sum(stats["hits"].values()) == 4 * 2 * 24 * 2
            assert stats["batches"] == 4
            assert stats["sentinels"] == 0
            static = sum(stats["tables"]["layers.1"]["static_hits"].values())
            shares[name] = stats["hits"] | {"static": static, "zero_miss": stats["zero_miss_batches"]}
    first, second, third = shares.values()
    assert min(first["hbm"], first["static"], first["nvme"]) > 0
    assert first["dram"] > first["static"]  # the second seed's text meets n-grams that the first one's reads brought
    assert second["hbm"] > first["hbm"]
    assert second["static"] == 0
    assert third["nvme"] == 0
    assert third["zero_miss"] == 4
    assert first["zero_miss"] == 0


def test_a_batch_that_hbm_holds_whole_makes_no_request_to_the_host(open_tiny: Open) -> None:
    with open_tiny("bf16", dram="480KiB", hbm="4MiB") as (store, rows):
        placed = store["layers.1"].explain(tiny_hash().keys(tokens(4, 24, 0).cpu().numpy(), 1).reshape(-1, 2)) == "hbm"
        both = np.flatnonzero(placed.all(axis=1))
        assert len(both) > 0
        embedding = TieredEmbedding(store, 1, tiny_hash())
        ids = tokens(4, 24, 0).reshape(-1)
        at = int(next(place for place in both if place % 24 >= 2))  # a token whose n-grams lie in its own sequence
        got = embedding(ids[at : at + 1].view(1, 1), history=ids[at - 2 : at].view(1, 2))
        assert torch.equal(got, expected(rows, "bf16", 1, tokens(4, 24, 0))[at // 24, at % 24].view_as(got))
        lookup = next(iter(embedding._on_device._lookups.values()))
        assert lookup.num_requests() == 0
        assert store.stats()["zero_miss_batches"] == 1


def test_lookups_from_the_device_are_timed_prefetched_or_not_wherever_their_rows_lie(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = tiered
    monkeypatch.setattr(times, "LATENCY_FRACTION", 1.0)
    embedding = TieredEmbedding(store, 1, tiny_hash())
    for seed in range(3):
        finished(embedding, tokens(1, 4, seed))
    embedding.prefetch(tokens(1, 5, 1))
    finished(embedding, tokens(1, 5, 1))
    latency = store.stats()["latency"]
    assert sum(latency["counts"]) == 4
    assert latency["sum_ns"] > 0
    monkeypatch.setattr(times, "LATENCY_FRACTION", 0.0)
    finished(embedding, tokens(1, 4, 5))
    assert sum(store.stats()["latency"]["counts"]) == 4


def test_what_runs_between_a_prefetch_and_its_forward_is_no_part_of_the_latency(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = tiered
    now = iter([1_000, 3_000, 900_000_000, 900_000_500])
    monkeypatch.setattr(times, "LATENCY_FRACTION", 1.0)
    monkeypatch.setattr(times.time, "perf_counter_ns", lambda: next(now, 0))
    embedding, token_ids = TieredEmbedding(store, 1, tiny_hash()), tokens(1, 4, 1)
    embedding.prefetch(token_ids)
    embedding(token_ids)
    took = store.stats()["latency"]["sum_ns"]
    assert took in (2_000, 2_500)  # nothing can come late, so the second half takes no time


@pytest.mark.parametrize("split", [1, 2, 5, 11])
def test_a_sequence_fed_in_parts_with_history_gives_the_values_of_the_whole(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]], split: int
) -> None:
    embedding = TieredEmbedding(tiered[0], 1, tiny_hash())
    token_ids = tokens(2, 12, seed=2)
    first = embedding(token_ids[:, :split])
    rest = embedding(token_ids[:, split:], history=token_ids[:, max(0, split - 2) : split])
    whole = embedding(token_ids)
    embedding.synchronize()
    assert torch.equal(torch.cat([first, rest], dim=1), whole)
    assert torch.equal(embedding(token_ids, history=token_ids[:, :0]), whole)


def test_decoding_with_all_that_was_seen_as_history_gives_the_values_of_the_whole(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]],
) -> None:
    embedding, token_ids = TieredEmbedding(tiered[0], 1, tiny_hash()), tokens(2, 9, seed=3)
    whole = finished(embedding, token_ids)
    steps = [embedding(token_ids[:, at : at + 1], history=token_ids[:, :at]) for at in range(9)]
    embedding.prefetch(token_ids[:, 8:], history=token_ids[:, :8])
    again = embedding(token_ids[:, 8:], history=token_ids[:, :8])
    embedding.synchronize()
    assert torch.equal(torch.cat(steps, dim=1), whole)
    assert torch.equal(again, whole[:, 8:])


def test_a_history_of_a_wrong_shape_is_refused_by_name(tiered: tuple[tierstore.Store, dict[str, np.ndarray]]) -> None:
    embedding, token_ids = TieredEmbedding(tiered[0], 1, tiny_hash()), tokens(2, 3, seed=1)
    for history in (token_ids[0], token_ids[:1], token_ids[None]):
        with pytest.raises(ValueError, match=r"history of shape .* it must be \[2, the tokens before\]"):
            embedding(token_ids, history=history)


def test_dead_positions_and_history_reach_the_hash(tiered: tuple[tierstore.Store, dict[str, np.ndarray]]) -> None:
    store, rows = tiered
    token_ids, history = tokens(2, 12, seed=4), tokens(2, 2, seed=5)
    dead = torch.zeros(2, 12, dtype=torch.bool, device=DEVICE)
    dead[:, 3:6] = True
    got = TieredEmbedding(store, 4, tiny_hash())(token_ids, history, dead)
    assert torch.equal(got, expected(rows, "fp8_e4m3_e8m0x32", 4, token_ids, history=history, dead=dead))


def test_a_prefetch_is_taken_by_its_forward_and_dropped_by_another(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]],
) -> None:
    store, rows = tiered
    layers = [TieredEmbedding(store, layer, tiny_hash()) for layer in LAYERS]
    one, other = tokens(2, 9, seed=1), tokens(2, 9, seed=2)
    for token_ids in (one, other, one):
        prefetch_layers(layers, one)
        for layer, embedding in zip(LAYERS, layers, strict=True):
            assert torch.equal(embedding(token_ids), expected(rows, "fp8_e4m3_e8m0x32", layer, token_ids))
            embedding.synchronize()
    taken = store.stats()["batches"]
    assert taken == 2 * (1 + 2 + 1)
    layers[0].prefetch(one)
    changed = one.clone()
    layers[0].prefetch(one)
    one[0, 0] = (one[0, 0] + 1) % VOCAB_SIZE  # another call, though the same memory
    assert torch.equal(layers[0](one), expected(rows, "fp8_e4m3_e8m0x32", 1, one))
    assert torch.equal(layers[0](changed), expected(rows, "fp8_e4m3_e8m0x32", 1, changed))


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_keys_that_the_host_knows_start_their_reads_at_once(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]], num_tokens: int
) -> None:
    store, rows = tiered
    token_ids = tokens(num_tokens, 24, seed=7)
    keys = tiny_hash().keys(token_ids.cpu().numpy(), 1).reshape(-1, 2)
    lookup = store.open_lookup("layers.1", len(keys))
    whole = expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids).view(-1, 8, DIM)
    for start in range(0, len(keys), lookup.tokens_max):
        part = keys[start : start + lookup.tokens_max]
        got = torch.full((len(part), 8, DIM), 7.0, dtype=torch.bfloat16, device=DEVICE)
        lookup.start_known(part, got)
        lookup.finish()
        lookup.check()
        assert torch.equal(got, whole[start : start + len(part)])
    stats = store.stats()
    assert stats["keys"] == keys.size
    assert stats["batches"] == -(-len(keys) // lookup.tokens_max)
    assert stats["sentinels"] == 0


def test_what_was_reserved_needs_no_buffers_any_more(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tiny("fp8_e4m3_e8m0x32", dram="8MiB", hbm="64KiB") as (store, rows):
        lookups = DeviceEmbedding(store, store["layers.1"].spec, 1, tiny_hash())
        lookups.reserve(200)
        monkeypatch.setattr(store, "open_lookup", None)
        for length in (1, 65, 200, 256):
            token_ids = tokens(1, length, seed=length)
            call = DeviceCall(token_ids, None, None, store.device, lookups.history_tokens)
            values = lookups.forward(call)
            lookups.synchronize()
            assert torch.equal(values, expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids))
        with pytest.raises(TypeError):  # 257 want more
            lookups.forward(DeviceCall(tokens(1, 257, seed=1), None, None, store.device, lookups.history_tokens))


def test_more_tokens_than_the_buffers_hold_go_in_parts(open_tiny: Open) -> None:
    with open_tiny("fp32", **BUDGETS["hbm, static, recency and nvme"]) as (store, rows):
        embedding = TieredEmbedding(store, 1, tiny_hash())
        token_ids = tokens(5, 24, seed=9)
        embedding.prefetch(token_ids)
        assert torch.equal(embedding(token_ids), expected(rows, "fp32", 1, token_ids))
        most = max(embedding._on_device._lookups)
        assert most < token_ids.numel()


def test_tokens_outside_the_vocabulary_are_named(tiered: tuple[tierstore.Store, dict[str, np.ndarray]]) -> None:
    store, rows = tiered
    embedding = TieredEmbedding(store, 1, tiny_hash())
    token_ids = tokens(2, 5, seed=1)
    bad = token_ids.clone()
    bad[1, 3] = VOCAB_SIZE
    with pytest.raises(ValueError, match=rf"sequence 1, position 3 .* outside the vocabulary of {VOCAB_SIZE}"):
        finished(embedding, bad)
    got = embedding(token_ids)
    embedding.synchronize()
    assert torch.equal(got, expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids))
    lookup = store.open_lookup("layers.1", 2)  # what the step gave meanwhile, which a GPU has no time to take back
    values = torch.zeros((2, 8, DIM), dtype=torch.bfloat16, device=DEVICE)
    lookup.start(torch.tensor([[-2, -1], [-1, -2]], device=DEVICE), values)
    lookup.finish()
    embedding.synchronize()
    lost = torch.tensor([[True] * 4 + [False] * 4, [False] * 4 + [True] * 4], device=DEVICE)
    assert values[lost].isnan().all()
    assert not values[~lost].any()


def test_a_read_that_fails_is_raised_by_name_and_leaves_no_wrong_value(open_tiny: Open) -> None:
    with open_tiny("bf16", **BUDGETS["all that is placed in hbm"]) as (store, rows):
        embedding = TieredEmbedding(store, 1, tiny_hash())
        token_ids = tokens(1, 7, seed=31)
        lookup = store.open_lookup("layers.1", 7)
        values = torch.zeros((7, 8, DIM), dtype=torch.bfloat16, device=DEVICE)
        keys = torch.from_numpy(tiny_hash().keys(token_ids.cpu().numpy(), 1).reshape(-1, 2)).to(DEVICE)
        store._engine._engine.native.inject("failing", 0, 1 << 40)
        lookup.start(keys, values)
        lookup.finish()
        embedding.synchronize()
        with pytest.raises(tierstore.CorruptPageError, match=r"page \d+ of table layers\.1"):
            lookup.check()
        right = expected(rows, "bf16", 1, token_ids).view(7, 8, DIM)
        late = values.isnan().all(dim=2)
        assert late.any()
        assert torch.equal(values[~late], right[~late])
        with pytest.raises(tierstore.CorruptPageError):
            finished(embedding, token_ids)
        store._engine._engine.native.inject("none")
        assert torch.equal(embedding(token_ids), expected(rows, "bf16", 1, token_ids))


def test_a_host_that_does_not_answer_ends_the_wait_with_an_error(open_tiny: Open) -> None:
    with open_tiny("bf16", **BUDGETS["all that is placed in hbm"]) as (store, rows):
        token_ids = tokens(1, 7, seed=32)
        lookup = store.open_lookup("layers.1", 7)
        keys = torch.from_numpy(tiny_hash().keys(token_ids.cpu().numpy(), 1).reshape(-1, 2)).to(DEVICE)
        values = torch.zeros((7, 8, DIM), dtype=torch.bfloat16, device=DEVICE)
        assert lookup._mailbox._server.remove(lookup._mailbox._id, 10)  # nobody answers
        lookup._mailbox._server, lookup._launches.spins_max = SimpleNamespace(fault=lambda _: None), 20
        lookup.start(keys, values)
        lookup.finish()
        TieredEmbedding(store, 1, tiny_hash()).synchronize()
        with pytest.raises(TimeoutError, match=r"waited 60 s, in step 1, for entries of table layers\.1"):
            lookup.check()
        late = values.isnan().all(dim=2)
        assert late.any()
        right = expected(rows, "bf16", 1, token_ids).view(7, 8, DIM)
        assert torch.equal(values[~late], right[~late])


@pytest.mark.parametrize("given_up", ["of the host", "of the device"])
@pytest.mark.parametrize("then", ["start", "start_known"])
def test_buffers_are_not_used_again_before_reads_that_were_given_up_have_ended(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch, given_up: str, then: str
) -> None:
    with open_tiny("bf16", **BUDGETS["all that is placed in hbm"]) as (store, rows):
        ids = [tokens(1, 7, seed=seed) for seed in (31, 32)]
        late, keys = (tiny_hash().keys(each.cpu().numpy(), 1).reshape(-1, 2) for each in ids)
        lookup = store.open_lookup("layers.1", 7)
        values = torch.zeros((7, 8, DIM), dtype=torch.bfloat16, device=DEVICE)
        lookup.start_known(keys, values)  # so that the recency cache has them, which is faster than what is late
        lookup.finish()
        native = store._engine._engine.native
        native.inject("slow", 0, 1 << 40)
        if given_up == "of the host":
            lookup.start_known(late, values)
            before = lookup._started.pending
            with monkeypatch.context() as patch:
                patch.setattr("tierstore.tiers.hbm.lookup.WAIT_S", 0.0)
                with pytest.raises(TimeoutError, match="within"):
                    lookup.finish()
        else:
            before, spins_max = None, lookup._launches.spins_max
            lookup._launches.spins_max = 1
            lookup.start(torch.from_numpy(late).to(DEVICE), values)
            lookup.finish()
            lookup._launches.spins_max = spins_max
        if then == "start":
            lookup.start(torch.from_numpy(keys).to(DEVICE), values)
        else:
            lookup.start_known(keys, values)
        if before is not None:
            before.wait(60)
        while lookup.num_requests() < (given_up == "of the device") + (then == "start"):
            time.sleep(0.001)
        lookup.finish()
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        assert torch.equal(values, expected(rows, "bf16", 1, ids[1]).view(7, 8, DIM))


def test_threads_that_share_an_embedding_get_their_own_rows(open_tiny: Open) -> None:
    with open_tiny("bf16", **BUDGETS["hbm, static, recency and nvme"]) as (store, rows):
        embedding = TieredEmbedding(store, 1, tiny_hash())
        wrong: list[int] = []

        def look_up(thread: int) -> None:
            for turn in range(8):
                token_ids = tokens(1 + thread, 5, seed=100 * thread + turn)
                if turn % 2:
                    embedding.prefetch(token_ids)
                if not torch.equal(embedding(token_ids), expected(rows, "bf16", 1, token_ids)):
                    wrong.append(turn)

        threads = [threading.Thread(target=look_up, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not wrong
        assert not any(thread.is_alive() for thread in threads)


def test_a_copy_of_a_model_whose_store_was_closed_is_one_that_says_so(open_tiny: Open) -> None:
    with open_tiny("bf16", dram="16MiB", hbm="1MiB") as (store, _):
        embedding = TieredEmbedding(store, 1, tiny_hash())
    twin = copy.deepcopy(embedding)
    with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
        twin(tokens(1, 3, seed=0))


def test_what_inference_mode_made_serves_outside_of_it_too(open_tiny: Open) -> None:
    with contextlib.ExitStack() as stack:
        token_ids = tokens(1, 3, seed=0)
        with torch.inference_mode():
            store, rows = stack.enter_context(open_tiny("bf16", **BUDGETS["hbm, static, recency and nvme"]))
            embedding = TieredEmbedding(store, 1, tiny_hash())
            embedding(tokens(1, 3, seed=1))
            embedding.prefetch(tokens(1, 3, seed=0))
        scale = torch.ones(DIM, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        with torch.inference_mode():
            embedding.prefetch(token_ids)
        values = embedding(token_ids)
        assert torch.equal(values, expected(rows, "bf16", 1, token_ids))
        (values.float() * scale).sum().backward()
        bad = token_ids.clone()
        bad[0, 0] = VOCAB_SIZE
        with pytest.raises(ValueError, match="outside the vocabulary"):
            finished(embedding, bad)
        keys = tiny_hash().keys(token_ids.cpu().numpy(), 1).reshape(-1, 2)
        store.open_lookup("layers.1", 4).start_known(
            keys, torch.empty((3, 8, DIM), dtype=torch.bfloat16, device=DEVICE)
        )
        store["layers.1"].lookup(keys)
        store.change_hbm()


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU: ids there are told apart by their values")
def test_ids_made_in_inference_mode_are_looked_up(tiered: tuple[tierstore.Store, dict[str, np.ndarray]]) -> None:
    store, rows = tiered
    embedding = TieredEmbedding(store, 1, tiny_hash())
    with torch.inference_mode():
        token_ids = tokens(2, 9, seed=1) + 0
        embedding.prefetch(token_ids)
        assert torch.equal(embedding(token_ids), expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids))


def test_a_tensor_made_in_inference_mode_has_an_identity() -> None:
    with torch.inference_mode():
        one, other = (torch.zeros((1, 3), dtype=torch.int64, device="meta") for _ in range(2))
    assert _identity(one) == _identity(one)
    assert _identity(one)[0] == _identity(other)[0] == (1, 3)


def test_copies_and_row_ids_work_beside_it(tiered: tuple[tierstore.Store, dict[str, np.ndarray]]) -> None:
    store, rows = tiered
    embedding = TieredEmbedding(store, 1, tiny_hash())
    twin = copy.deepcopy(embedding)
    token_ids = tokens(2, 6, seed=3)
    right = expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids)
    assert torch.equal(twin(token_ids), right)
    assert torch.equal(embedding(token_ids), right)
    row_ids = torch.from_numpy(tiny_hash().row_ids(token_ids.cpu().numpy(), 1)).to(DEVICE)
    assert torch.equal(RowIdEmbedding(store, 1)(row_ids), right)


def test_values_started_in_inference_mode_serve_a_forward_that_trains(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]],
) -> None:
    store, rows = tiered
    embedding = TieredEmbedding(store, 1, tiny_hash())
    token_ids = tokens(2, 6, seed=6)
    with torch.inference_mode():
        embedding.prefetch(token_ids)
        made_there = token_ids.clone()
        assert torch.equal(embedding(made_there), expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids))
        embedding.prefetch(token_ids)
    weight = torch.ones(DIM, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    values = embedding(token_ids)
    (values * weight).sum().backward()
    assert torch.equal(values, expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids))
    assert weight.grad is not None


def test_a_lookup_takes_no_more_tokens_than_it_has_room_for_and_none_after_the_close(open_tiny: Open) -> None:
    with open_tiny("bf16", **BUDGETS["all that is placed in hbm"]) as (store, _):
        lookup = store.open_lookup("layers.1", 3)
        keys = torch.zeros((4, 2), dtype=torch.int64, device=DEVICE)
        values = torch.zeros((4, 8, DIM), dtype=torch.bfloat16, device=DEVICE)
        with pytest.raises(ValueError, match="4 tokens for a lookup of at most 3"):
            lookup.start(keys, values)
        with pytest.raises(ValueError, match="4 tokens for a lookup of at most 3"):
            lookup.start_known(keys.cpu().numpy(), values)
    for start, given in ((lookup.start, keys[:2]), (lookup.start_known, keys[:2].cpu().numpy())):
        with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
            start(given, values[:2])


def test_epochs_change_under_lookups_from_the_device(tmp_path: Path) -> None:
    path, rows = build_tiny(tmp_path, tiny_hash(), "fp8_e4m3_e8m0x32", seed=3)
    place_half(path)
    place_half(path, first=1)
    token_ids = tokens(2, 12, seed=3)
    right = expected(rows, "fp8_e4m3_e8m0x32", 1, token_ids)
    wrong, ended = [], threading.Event()
    with tierstore.open(path, dram="480KiB", hbm="64KiB", device=DEVICE) as store:
        embedding = TieredEmbedding(store, 1, tiny_hash())

        def look_up() -> None:
            while not ended.is_set():
                if not torch.equal(finished(embedding, token_ids), right):
                    wrong.append(1)

        thread = threading.Thread(target=look_up)
        thread.start()
        try:
            for turn in range(6):
                store.change_hbm(1 + turn % 2)
        finally:
            ended.set()
            thread.join(timeout=60)
        assert not thread.is_alive()
        assert not wrong
        assert store.stats()["hits"]["hbm"] > 0


@pytest.mark.parametrize(
    ("token_ids", "dead", "error"),
    [
        (torch.zeros(2, 3), None, TypeError),
        (torch.zeros(2, dtype=torch.int64), None, ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), TypeError),
        (np.zeros((2, 3)), None, TypeError),
    ],
)
def test_wrong_arguments_are_refused_by_name(token_ids: Any, dead: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"token_ids|dead"):
        DeviceCall(token_ids, None, dead, torch.device("cpu"), 2)


def test_after_the_store_is_closed_it_says_so(open_tiny: Open) -> None:
    with open_tiny("bf16", dram="16MiB", hbm="1MiB") as (store, _):
        embedding = TieredEmbedding(store, 1, tiny_hash())
        embedding(tokens(1, 3, seed=0))
    with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
        embedding(tokens(1, 3, seed=0))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_a_captured_graph_replays_lookups_with_and_without_misses(
    tiered: tuple[tierstore.Store, dict[str, np.ndarray]],
) -> None:
    store, rows = tiered
    layers = [TieredEmbedding(store, layer, tiny_hash()) for layer in LAYERS]
    static_ids = tokens(4, 1, seed=0)
    static_history = tokens(4, 2, seed=1)

    def step() -> list[torch.Tensor]:
        prefetch_layers(layers, static_ids, static_history)
        return [embedding(static_ids, static_history) for embedding in layers]

    step()  # makes buffers and compiles kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = step()
    for seed in range(20):
        static_ids.copy_(tokens(4, 1, seed=seed))
        static_history.copy_(tokens(4, 2, seed=seed + 100))
        graph.replay()
        torch.cuda.synchronize()
        for layer, embedding, got in zip(LAYERS, layers, values, strict=True):
            embedding.synchronize()
            right = expected(rows, "fp8_e4m3_e8m0x32", layer, static_ids, history=static_history)
            assert torch.equal(got, right)
