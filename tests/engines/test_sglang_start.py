"""How SGLang's processes start with the plug-in: inert without settings; ended by name, if rows would not be right."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import fake_sglang
from support.repository import REPOSITORY

import engram_adapter.engines.sglang as plugin

ENGRAM = "sglang.srt.layers.engram"


def start() -> None:
    """Loads the plug-in as SGLang does in each of its processes."""
    fake_sglang.load(plugin.register)


def engine(name: str = ENGRAM) -> Any:
    return importlib.import_module(name)


def ended_with(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        start()
    for each in ("tierstore stops SGLang", *words):
        assert each in str(ended.value)


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


@pytest.mark.usefixtures("sglang", "store")
def test_the_classes_of_a_family_that_the_store_does_not_serve_are_replaced_too() -> None:
    """Its model would load the whole table without a word; so its layer refuses the store."""
    start()
    qwen = engine("sglang.srt.models.qwen4_exp")
    for name in ("Qwen4ExpPinnedHostEmbedding", "Qwen4ExpNGramEmbedding"):
        assert getattr(qwen, name).__module__ == "engram_adapter.engines.sglang.qwen4_exp"


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
@pytest.mark.parametrize(
    ("module", "owner", "method"),
    [
        (ENGRAM, "EngramEmbedding", "forward"),
        (ENGRAM, "Engram", "embed_rows"),
        (fake_sglang.MANAGER, "NgramEmbeddingManager", "prepare_for_forward"),
        (f"{fake_sglang.RUNNER}.decode_cuda_graph_runner", "DecodeCudaGraphRunner", "capture"),
    ],
)
def test_a_changed_signature_is_refused_by_name_even_if_forced(
    module: str, owner: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERSTORE_STRICT", "0")

    def changed(self: Any, rows: Any) -> None: ...

    setattr(getattr(engine(module), owner), method, changed)
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
