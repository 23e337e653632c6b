"""How SGLang's processes start with the plug-in: inert without settings; ended by name, if rows would not be right."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from support import fake_sglang
from support.repository import REPOSITORY
from support.tiny_store import DIM, LAYERS, build_tiny, decoded, tiny_hash

import engram_adapter.engines.sglang as plugin
from engram_adapter.engines.gate import EngineMismatchError

CODEC = "fp8_e4m3_e8m0x32"
ENGRAM = "sglang.srt.layers.engram"


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A fake SGLang; the modules of ours that import it are of this test alone."""
    published = fake_sglang.install(monkeypatch)
    yield published
    for name in [name for name in sys.modules if name.startswith(f"{plugin.__name__}.")]:
        del sys.modules[name]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A store of V4.1's kind, which the environment names; returns its tables' rows."""
    path, rows = build_tiny(tmp_path, tiny_hash(), CODEC, seed=7)
    monkeypatch.setenv("TIERSTORE_STORE", str(path))
    monkeypatch.setenv("TIERSTORE_DRAM", "16MiB")
    return rows


def start() -> None:
    """Loads the plug-in as SGLang does in each of its processes."""
    load_plugins: Any = importlib.import_module("sglang.srt.plugins").load_plugins  # type: ignore[attr-defined]
    load_plugins(plugin.register)


def engine(name: str = ENGRAM) -> Any:
    return importlib.import_module(name)


def ended_with(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        start()
    for each in ("tierstore stops SGLang", *words):
        assert each in str(ended.value)


def expected_table(layer: int) -> tuple[int, int, int, tuple[int, ...]]:
    spec = tiny_hash()
    rows = spec.num_rows(layer)
    return rows, DIM, layer, (*spec.offsets(layer), rows)


def test_setup_cfg_names_the_function_that_sglang_calls() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    name, _, target = setup["options.entry_points"]["sglang.srt.plugins"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "tierstore"
    assert getattr(importlib.import_module(module), function) is plugin.register


def test_without_settings_the_plug_in_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys; from engram_adapter.engines.sglang import register; register(); "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'sglang')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.usefixtures("sglang")
def test_without_settings_no_class_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERSTORE_STORE", raising=False)
    stock = engine().EngramEmbedding
    start()
    assert engine().EngramEmbedding is stock


@pytest.mark.usefixtures("sglang", "store")
def test_the_embedding_and_the_stager_are_replaced() -> None:
    start()
    assert engine().EngramEmbedding.__name__ == "TieredEngramEmbedding"
    assert engine(f"{ENGRAM}_staging").EngramRowStager.__name__ == "TieredRowStager"
    assert "engram_adapter.engines.sglang.qwen4_exp" not in sys.modules  # of another family


@pytest.mark.usefixtures("sglang", "store")
def test_a_newer_sglang_is_refused_by_name() -> None:
    engine("sglang").__version__ = "0.5.24"
    stock = engine().EngramEmbedding
    ended_with("sglang 0.5.24 is not among the versions", "0.5.23 up to and without 0.5.24", "set strict to false")
    assert engine().EngramEmbedding is stock


@pytest.mark.usefixtures("sglang", "store")
def test_a_newer_sglang_is_tried_if_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    engine("sglang").__version__ = "0.5.24"
    monkeypatch.setenv("TIERSTORE_STRICT", "0")
    start()
    assert engine().EngramEmbedding.__name__ == "TieredEngramEmbedding"


@pytest.mark.usefixtures("sglang", "store")
@pytest.mark.parametrize(("owner", "method"), [("EngramEmbedding", "forward"), ("Engram", "embed_rows")])
def test_a_changed_signature_is_refused_by_name_even_if_forced(
    owner: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERSTORE_STRICT", "0")

    def changed(self: Any, rows: Any) -> None: ...

    setattr(getattr(engine(), owner), method, changed)
    ended_with(f"{owner}.{method} takes (rows), tierstore was written for (")


@pytest.mark.usefixtures("sglang", "store")
def test_a_class_that_is_gone_is_refused_by_name() -> None:
    del engine(f"{ENGRAM}_staging").EngramRowStager
    ended_with("sglang 0.5.23: what tierstore replaces is not where it was", "EngramRowStager")


@pytest.mark.usefixtures("sglang", "store")
def test_a_hook_that_sglang_cannot_apply_ends_the_process() -> None:
    registry = engine("sglang.srt.plugins.hook_registry").HookRegistry
    registry.register = classmethod(lambda *_arguments: None)  # as if it were logged and forgotten
    ended_with(f"{ENGRAM}.EngramEmbedding is", "expected engram_adapter.engines.sglang", "SGLANG_PLUGINS")


@pytest.mark.usefixtures("sglang", "store")
def test_another_plug_in_that_replaces_the_class_ends_the_process() -> None:
    hooks = engine("sglang.srt.plugins.hook_registry")

    def other() -> None:
        hooks.HookRegistry.register(f"{ENGRAM}.EngramEmbedding", type("Other", (), {}), hooks.HookType.REPLACE)

    with pytest.raises(SystemExit, match=r"EngramEmbedding is .*Other after SGLang applied"):
        engine("sglang.srt.plugins").load_plugins(plugin.register, other)


@pytest.mark.usefixtures("sglang")
def test_a_store_that_is_not_there_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERSTORE_STORE", str(tmp_path / "none"))
    ended_with(str(tmp_path / "none"))


@pytest.mark.usefixtures("sglang", "store")
def test_an_unknown_setting_value_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERSTORE_MODE", "somewhere")
    ended_with("ConfigError", "somewhere")


def test_the_process_really_ends_with_one_line(tmp_path: Path) -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r}); import pytest; "
        "from support import fake_sglang; fake_sglang.install(pytest.MonkeyPatch(), '9.9'); "
        f"os.environ['TIERSTORE_STORE'] = {str(tmp_path)!r}; "
        "from sglang.srt.plugins import load_plugins; from engram_adapter.engines.sglang import register; "
        "load_plugins(register); print('alive')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "alive" not in ended.stdout
    assert "tierstore stops SGLang: EngineMismatchError: sglang 9.9 is not among the versions" in ended.stderr


@pytest.mark.usefixtures("sglang")
def test_the_embedding_gives_the_stored_rows_as_the_engine_dequantizes_them(store: dict[str, np.ndarray]) -> None:
    start()
    for layer in LAYERS:
        embed = engine().EngramEmbedding(*expected_table(layer))
        rows = decoded(store[f"layers.{layer}"], CODEC)
        ids = torch.from_numpy(np.random.default_rng(layer).integers(0, len(rows), (70, tiny_hash().heads * 2)))
        assert torch.equal(embed(ids), rows[ids])
        assert embed.weight.shape[0] == embed.scale.shape[0] == 0
        stale = ids.clone()
        stale[3, 2], stale[5, 0] = len(rows) + 5, -9  # what padded tokens of a graph may hold
        found = embed(stale)
        assert not found[3, 2].any()
        assert not found[5, 0].any()
        assert torch.equal(found[6:], rows[ids[6:]])


@pytest.mark.usefixtures("store")
def test_a_layers_counters_are_among_the_engines_metrics(sglang: SimpleNamespace) -> None:
    sglang.observability.enable_metrics = True
    start()
    embed = engine().EngramEmbedding(*expected_table(1))
    ids = torch.zeros((5, tiny_hash().heads * 2), dtype=torch.int64)
    embed(ids)
    labels = {"rank": "0", "layer": "layers.1"}
    for name, count in (("steps", 1), ("tokens", 5), ("rows", ids.numel())):
        assert REGISTRY.get_sample_value(f"tierstore_engine_{name}_total", labels) == count
    embed(ids)  # within the period: counted, and published with a later step
    embed._now._metrics._due_s = 0.0
    embed(ids)
    assert REGISTRY.get_sample_value("tierstore_engine_steps_total", labels) == 3


@pytest.mark.usefixtures("sglang", "store")
def test_registering_leaves_prometheus_to_sglang_which_sets_its_folder_first() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r}); import pytest; "
        "from support import fake_sglang; fake_sglang.install(pytest.MonkeyPatch()); "
        "from sglang.srt.plugins import load_plugins; from engram_adapter.engines.sglang import register; "
        "load_plugins(register); print('prometheus_client' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "False"


@pytest.mark.usefixtures("sglang")
def test_weights_that_load_are_compared_and_not_kept(store: dict[str, np.ndarray]) -> None:
    start()
    rows = torch.from_numpy(store["layers.1"])
    embed = engine().EngramEmbedding(*expected_table(1))
    values, scales = rows[:, :DIM].contiguous(), rows[:, DIM:].contiguous()
    embed.weight.weight_loader(embed.weight, values.view(torch.float8_e4m3fn))
    embed.scale.weight_loader(embed.scale, scales.view(torch.float8_e8m0fnu))
    embed.finish_load("layer 1")
    assert embed.weight.shape[0] == 0
    with pytest.raises(EngineMismatchError, match="is not row"):
        embed.weight.weight_loader(embed.weight, values.roll(1, 0).view(torch.float8_e4m3fn))
    with pytest.raises(EngineMismatchError, match=f"of {DIM // 2} bytes"):
        embed.weight.weight_loader(embed.weight, values[:, : DIM // 2].view(torch.float8_e4m3fn))


@pytest.mark.usefixtures("store")
def test_options_that_cannot_work_are_refused_when_the_layer_is_built(sglang: SimpleNamespace) -> None:
    start()
    build = engine().EngramEmbedding
    full = SimpleNamespace(decode=SimpleNamespace(backend="full"), prefill=SimpleNamespace(backend="breakable"))
    for owner, name, value, words in (
        (sglang.model, "load_format", "fastsafetensors", "--load-format fastsafetensors reads the whole"),
        (sglang.model, "weight_loader_disable_mmap", True, "--weight-loader-disable-mmap reads the whole"),
        (sglang.model, "weight_loader_prefetch_checkpoints", True, "--weight-loader-prefetch-checkpoints reads"),
        (sglang.model, "is_startup_weight_load_overlap", True, "--startup-weight-load-mode overlap reads"),
        (sglang.model, "weight_cache_mode", "client", "--weight-cache-mode client reads"),
        (sglang.exec.kernel, "enable_nvidia_megakernel", True, "--enable-nvidia-megakernel"),
        (sglang.exec.graph, "cuda_graph_config", full, "--cuda-graph-backend-decode=breakable"),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        with pytest.raises(EngineMismatchError, match=words):
            build(*expected_table(1))
        setattr(owner, name, before)
    build(*expected_table(1))
