"""How vLLM's workers start with the plug-in: inert without settings; refused by name, if rows would not be right."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.repository import REPOSITORY

from engram_adapter.engines.gate import EngineMismatchError
from engram_adapter.engines.vllm import register
from tests.engines.conftest import FAKES, vllm_config
from tierstore.errors import ConfigError

QWEN, ENGRAM, OTHER = {"ple_layer_ids": [2]}, {"engram_layer_ids": [1, 4]}, {"model_type": "llama"}
COMMON = "vllm.models.qwen4_exp.common.ngram_embedding"
STOCK = ("Qwen4ExpPLEPinnedHostEmbedding", "Qwen4ExpPLEDeviceEmbedding")


def start(config: Any) -> Any:
    """Starts a worker as the engine does, once by keywords and once not."""
    register()
    worker_class = import_module("vllm.v1.worker.worker_base").WorkerBase
    worker_class(config, 0, 0, "tcp://")
    return worker_class(vllm_config=config, local_rank=0, rank=0, distributed_init_method="tcp://")


def registry() -> dict[str, type]:
    found: dict[str, type] = import_module("vllm.model_executor.custom_op").op_registry_oot
    return found


@pytest.mark.usefixtures("vllm")
def test_without_settings_a_worker_starts_as_if_the_plug_in_was_not_there() -> None:
    config = vllm_config(QWEN, None)
    assert start(config).vllm_config is config
    assert "engram_adapter.engines.vllm.worker" not in sys.modules
    assert not any(name.startswith("vllm.models") for name in sys.modules)


def test_registering_loads_no_torch_and_no_module_of_the_engine_but_the_workers() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(FAKES)!r}); from engram_adapter.engines.vllm import register; "
        "register(); register(); print(sorted(m for m in sys.modules if m in ('torch', 'tierstore.store.store', "
        "'engram_adapter.engines.settings') or m.startswith('vllm.')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "'vllm.v1.worker.worker_base'" in ended.stdout
    assert "torch" not in ended.stdout
    assert "settings" not in ended.stdout


@pytest.mark.usefixtures("vllm")
def test_a_configured_worker_has_the_engines_embeddings_replaced(tmp_path: Path) -> None:
    start(vllm_config(QWEN, tmp_path))
    assert {name: registry()[name].__name__ for name in STOCK} == {name: f"Tiered{name}" for name in STOCK}
    for name in STOCK:
        assert issubclass(registry()[name], getattr(import_module(COMMON), name))
        assert registry()[name].start_prefetch.breaks_capture


@pytest.mark.usefixtures("vllm")
def test_the_environment_configures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERSTORE_STORE", str(tmp_path))
    start(vllm_config(QWEN, None))
    assert set(registry()) == set(STOCK)


@pytest.mark.usefixtures("vllm")
def test_an_engine_without_settings_after_one_with_them_has_its_own_classes(tmp_path: Path) -> None:
    engram = import_module("vllm.models.deepseek_v41.common.engram").Engram
    stock = engram._create_embedding
    start(vllm_config(QWEN | ENGRAM, tmp_path))
    assert engram._create_embedding is not stock
    start(vllm_config(QWEN | ENGRAM, None))
    assert registry() == {}
    assert engram._create_embedding is stock


def test_a_newer_engine_is_refused_by_name(vllm: Any, tmp_path: Path) -> None:
    vllm.__version__ = "0.34.0"
    with pytest.raises(EngineMismatchError, match=r"vllm 0\.34\.0 is not among the versions .* 0\.32 up to"):
        start(vllm_config(QWEN, tmp_path))
    assert registry() == {}


def test_a_newer_engine_is_tried_if_it_is_forced(vllm: Any, tmp_path: Path) -> None:
    vllm.__version__ = "0.34.0"
    config = vllm_config(QWEN, tmp_path)
    config.additional_config["tierstore"]["strict"] = False
    start(config)
    assert set(registry()) == set(STOCK)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.usefixtures("vllm")
def test_a_changed_signature_is_refused_even_if_forced(tmp_path: Path, strict: bool) -> None:
    stock = import_module(COMMON).Qwen4ExpPLEEmbedding
    stock.start_prefetch = lambda self, hidden_states, ngram_ids: None  # noqa: ARG005 - as in 0.31
    config = vllm_config(QWEN, tmp_path)
    config.additional_config["tierstore"]["strict"] = strict
    with pytest.raises(
        EngineMismatchError, match=r"start_prefetch takes \(hidden_states, ngram_ids\), .*\(ngram_ids\)"
    ):
        start(config)


@pytest.mark.parametrize(
    ("module", "owner", "method"),
    [
        (COMMON, "Qwen4ExpPLEPinnedHostEmbedding", "finalize_prefetch"),
        (COMMON, "Qwen4ExpPLEDeviceEmbedding", "weight_loader"),
        ("vllm.models.qwen4_exp.nvidia.ngram_embedding", "Qwen4ExpNGramEmbedding", "compute_ngram_ids"),
        ("vllm.models.qwen4_exp.nvidia.model_state", "Qwen4ExpModelState", "prepare_inputs"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "capture_model"),
        ("vllm.models.deepseek_v41.common.engram", "Engram", "_init_staging"),
        ("vllm.models.deepseek_v41.common.engram", "ParallelEngramEmbedding", "lookup"),
        ("vllm.models.deepseek_v41.common.engram", "NgramHashState", "forward"),
        ("vllm.models.deepseek_v41.nvidia.model_state", "DeepseekV41ModelState", "prepare_inputs"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_every_method_that_is_relied_on_is_checked(tmp_path: Path, module: str, owner: str, method: str) -> None:
    setattr(getattr(import_module(module), owner), method, lambda self, something_new: None)  # noqa: ARG005
    with pytest.raises(EngineMismatchError, match=rf"{owner}\.{method} takes \(something_new\)"):
        start(vllm_config(QWEN | ENGRAM, tmp_path))


@pytest.mark.usefixtures("vllm")
def test_another_plug_in_for_the_same_layer_is_refused(tmp_path: Path) -> None:
    registry()[STOCK[0]] = type("Other", (object,), {"__module__": "other.plugin"})
    with pytest.raises(EngineMismatchError, match=r"is replaced by other\.plugin\.Other already"):
        start(vllm_config(QWEN, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_config__load_format": "fastsafetensors"}, "load_format 'fastsafetensors' reads the whole"),
        ({"load_config__load_format": "runai_streamer"}, "load_format 'runai_streamer' reads the whole"),
        ({"load_config__safetensors_load_strategy": "eager"}, "strategy 'eager' reads the whole"),
        ({"load_config__safetensors_load_strategy": "prefetch"}, "strategy 'prefetch' reads the whole"),
        ({"load_config__model_loader_extra_config": {"enable_multithread_load": True}}, "enable_multithread_load"),
        ({"use_v2_model_runner": False}, "V1 model runner"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"parallel_config__data_parallel_size": 2, "engram_config__embedding_across_dp": True}, "embedding_across_dp"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_a_configuration_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineMismatchError, match=message):
        start(vllm_config(QWEN, tmp_path, **changes))
    assert registry() == {}


@pytest.mark.usefixtures("vllm")
def test_files_on_a_networks_disk_are_not_read_ahead(tmp_path: Path) -> None:
    assert start(vllm_config(QWEN, tmp_path)).vllm_config.load_config.safetensors_load_strategy == "lazy"
    assert start(vllm_config(QWEN, None)).vllm_config.load_config.safetensors_load_strategy is None


@pytest.mark.usefixtures("vllm")
def test_an_engine_without_the_workers_starts_unless_the_environment_configures_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", None)
    register()
    assert "rows do not come from a store" in caplog.text
    monkeypatch.setenv("TIERSTORE_STORE", "model.tier")
    with pytest.raises(EngineMismatchError, match="unset TIERSTORE_STORE"):
        register()


@pytest.mark.usefixtures("vllm")
def test_rocm_is_refused(tmp_path: Path) -> None:
    import_module("vllm.platforms").current_platform.is_rocm = lambda: True
    with pytest.raises(EngineMismatchError, match="ROCm"):
        start(vllm_config(QWEN, tmp_path))


@pytest.mark.usefixtures("vllm")
def test_a_wrong_setting_ends_the_worker(tmp_path: Path) -> None:
    config = vllm_config(QWEN, tmp_path)
    config.additional_config["tierstore"]["budget"] = "1GiB"
    with pytest.raises(ConfigError, match="budget is not known; there are store, dram"):
        start(config)


@pytest.mark.usefixtures("vllm")
def test_a_model_without_tables_is_refused_if_it_was_configured_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EngineMismatchError, match=r"llama.* has no n-gram tables"):
        start(vllm_config(OTHER, tmp_path))
    monkeypatch.setenv("TIERSTORE_STORE", str(tmp_path))
    start(vllm_config(OTHER, None))
    assert "TIERSTORE_STORE is not used here" in caplog.text


def test_the_entry_points_are_in_the_metadata() -> None:
    text = (REPOSITORY / "setup.cfg").read_text()
    assert "vllm.general_plugins =\n    tierstore = engram_adapter.engines.vllm:register\n" in text
    assert "vllm.stat_logger_plugins =\n    tierstore = engram_adapter.engines.vllm.stat_logger:Tierstore" in text
