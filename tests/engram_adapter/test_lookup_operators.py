"""A model with a store's embedding is traced whole: torch.compile, torch.export, AOT see one operator for a lookup."""

from __future__ import annotations

import copy
import gc
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.served import least_budget, request, serving
from support.tiny_store import DIM, build_tiny, tiny_hash
from support.waiting import eventually
from torch.fx.experimental.proxy_tensor import make_fx

import tierstore
from engram_adapter import EngramLayer, RowIdEmbedding, TieredEmbedding
from engram_adapter.lookup_operators import lookup_operator, rows_operator
from tests.engram_adapter.test_embedding import tokens
from tierstore.errors import ConfigError, StoreNotReadyError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), tiny_hash(), "bf16", seed=3)[0]


@pytest.fixture
def store(path: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(path, dram="192KiB") as opened:
        yield opened


class Doubled(torch.nn.Module):
    """Some arithmetic on both sides of a lookup."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(
        self, ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        others = () if history is None else (history, dead)
        out: torch.Tensor = self.embedding(ids + 0, *others).float().sum(dim=-1) * 2
        return out


def row_ids_of(token_ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(tiny_hash().row_ids(token_ids.numpy(), 1))


def model_and_ids(store: Any, kind: str, shape: tuple[int, int] = (2, 7)) -> tuple[Doubled, torch.Tensor]:
    token_ids = tokens(*shape, seed=sum(shape))
    if kind == "tokens":
        return Doubled(TieredEmbedding(store, 1, tiny_hash())), token_ids
    return Doubled(RowIdEmbedding(store, 1)), row_ids_of(token_ids)


KINDS = pytest.mark.parametrize("kind", ["tokens", "row ids"])


def operators_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "tierstore" in str(node.target)]


@KINDS
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_one_graph_and_gives_equal_values_for_any_shape(
    store: tierstore.Store, kind: str, backend: str
) -> None:
    torch.compiler.reset()
    model, _ = model_and_ids(store, kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((1, 1), (2, 7), (3, 4), (1, 1)):
        _, ids = model_and_ids(store, kind, shape)
        assert torch.equal(compiled(ids), model(ids)), shape


def test_a_compiled_lookup_takes_history_and_dead_positions(store: tierstore.Store) -> None:
    torch.compiler.reset()
    model, token_ids = model_and_ids(store, "tokens")
    dead = torch.zeros_like(token_ids, dtype=torch.bool)
    dead[0, 3] = True
    graphs: list[torch.fx.GraphModule] = []

    def noting(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=noting)
    history = tokens(2, 2, seed=8)
    assert torch.equal(compiled(token_ids, history, dead), model(token_ids, history, dead))
    assert not torch.equal(compiled(token_ids, history, dead), model(token_ids, history))
    assert [operators_in(graph.graph) for graph in graphs] == [["tierstore.lookup.default"]]


def test_an_engram_layer_is_compiled_whole_and_trained(store: tierstore.Store) -> None:
    torch.compiler.reset()
    embedding = TieredEmbedding(store, 1, tiny_hash())
    layer = EngramLayer(embedding, embedding.features, 16, 2, kernel_size=3)
    hidden, token_ids = torch.randn(2, 7, 2, 16), tokens(2, 7, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, expected = compiled(hidden, token_ids), layer(hidden, token_ids)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    assert layer.wkv.weight.grad is not None
    assert layer.wkv.weight.grad.abs().sum() > 0


@KINDS
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_has_one_operator_and_serves_other_shapes(
    store: tierstore.Store, kind: str, strict: bool
) -> None:
    model, ids = model_and_ids(store, kind)
    tokens_axis = {1: torch.export.Dim("tokens", min=2, max=64)}
    exported = torch.export.export(model, (ids,), dynamic_shapes=(tokens_axis,), strict=strict)
    assert operators_in(exported.graph) == [f"tierstore.{'lookup' if kind == 'tokens' else 'rows'}.default"]
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    _, other = model_and_ids(store, kind, (2, 11))
    for program in (exported.module(), loaded):
        assert torch.equal(program(ids), model(ids))
        assert torch.equal(program(other), model(other))


@KINDS
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_other_tracers_see_the_operator_too(store: tierstore.Store, kind: str, mode: str) -> None:
    model, ids = model_and_ids(store, kind)
    traced = make_fx(model, tracing_mode=mode)(ids)
    assert len(operators_in(traced.graph)) == 1
    model, other = model_and_ids(store, kind) if mode != "symbolic" else model_and_ids(store, kind, (2, 5))
    assert torch.equal(traced(other), model(other))


@KINDS
def test_the_operator_is_what_torch_asks_of_one(store: tierstore.Store, kind: str) -> None:
    model, ids = model_and_ids(store, kind)
    embedding: Any = model.embedding
    if kind == "tokens":
        arguments = (ids, None, None, embedding._handle, embedding.num_heads, DIM, torch.bfloat16, None)
        torch.library.opcheck(lookup_operator, arguments)
    else:
        torch.library.opcheck(rows_operator, (ids, embedding._handle, DIM, torch.bfloat16))


def test_a_program_outlives_its_module_if_another_is_over_the_same_table(path: Path, tmp_path: Path) -> None:
    store = tierstore.open(path, dram="192KiB")
    model, ids = model_and_ids(store, "tokens")
    expected = model(ids)
    program = torch.export.export(model, (ids,)).module()
    twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert torch.equal(program(ids), expected)
    del twin, store
    gc.collect()
    with pytest.raises(
        StoreNotReadyError, match=r"asks TieredEmbedding over table layers\.1 of .*no such module lives"
    ):
        program(ids)
    with tierstore.open(path, dram="64MiB") as again:
        module = TieredEmbedding(again, 1, tiny_hash())
        assert torch.equal(program(ids), expected)
        del module
    other, _ = build_tiny(tmp_path, tiny_hash(), "bf16", seed=4)
    with tierstore.open(other) as another, tierstore.open(path) as again:
        others = TieredEmbedding(another, 1, tiny_hash()), RowIdEmbedding(again, 1)
        assert all(others)
        with pytest.raises(StoreNotReadyError, match="no such module lives"):
            program(ids)


@KINDS
def test_a_program_refuses_a_store_at_the_same_path_that_was_built_from_other_weights(
    tmp_path: Path, kind: str
) -> None:
    path, _ = build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)
    with tierstore.open(path) as store:
        model, ids = model_and_ids(store, kind)
        expected = model(ids)
        program = torch.export.export(model, (ids,)).module()
        old = store.build[:16]
    del model
    gc.collect()
    shutil.rmtree(path)
    build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)
    with tierstore.open(path) as store:
        again, _ = model_and_ids(store, kind)
        assert torch.equal(program(ids), expected)
    del again
    gc.collect()
    shutil.rmtree(path)
    build_tiny(tmp_path, tiny_hash(), "bf16", seed=4)
    with tierstore.open(path) as store:
        other, _ = model_and_ids(store, kind)
        with pytest.raises(StoreNotReadyError, match=f"digest {old}, .* no such .*, only .* {store.build[:16]}, "):
            program(ids)
        assert not torch.equal(other(ids), expected)


def test_a_program_over_a_daemon_follows_its_swap_with_a_copy_of_its_module(tmp_path: Path) -> None:
    paths = []
    for seed in (3, 4):
        (tmp_path / str(seed)).mkdir()
        paths.append(build_tiny(tmp_path / str(seed), tiny_hash(), "bf16", seed=seed)[0])
    socket = tmp_path / "s"
    with serving(paths[0], socket, 4 * least_budget(paths[0])), tierstore.connect(socket) as store:
        model, ids = model_and_ids(store, "row ids")
        program = torch.export.export(model, (ids,)).module()
        before, build = program(ids), store.build
        request(socket, "swap", store=str(paths[1]))
        eventually(lambda: store.build != build)
        twin = copy.deepcopy(model)
        del model
        gc.collect()
        assert torch.equal(program(ids), twin(ids))
        assert not torch.equal(twin(ids), before)


def test_a_program_refuses_a_table_of_other_values(tmp_path: Path) -> None:
    path, _ = build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)
    store = tierstore.open(path)
    model, ids = model_and_ids(store, "row ids")
    program = torch.export.export(model, (ids,)).module()
    module: Any = model.embedding
    module.look_up = lambda row_ids: row_ids.new_zeros((*row_ids.shape, DIM), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"expects \[2, 7, 8, 64\] torch\.bfloat16 of .*table layers\.1 of"):
        program(ids)
    store.close()


def test_a_prefetch_in_a_traced_program_starts_nothing(store: tierstore.Store) -> None:
    torch.compiler.reset()
    embedding = TieredEmbedding(store, 1, tiny_hash())

    def both(token_ids: torch.Tensor) -> torch.Tensor:
        embedding.prefetch(token_ids)
        out: torch.Tensor = embedding(token_ids)
        return out

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    token_ids = tokens(1, 5, seed=2)
    assert torch.equal(compiled(token_ids), embedding(token_ids))
    assert len(embedding._pending) == 0
