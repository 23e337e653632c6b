"""Settings of the engines' plug-ins: from the engine's configuration, else from the environment, else nothing."""

from __future__ import annotations

import gc
import socket
from pathlib import Path

import pytest
from support.stores import make_model

from engram_adapter.engines.settings import EngineSettings
from tierstore.errors import ConfigError, StoreNotReadyError


def test_without_a_setting_there_are_none() -> None:
    assert EngineSettings.find(None, {}) is None
    assert EngineSettings.find(None, {"TIERSTORE_STORE": "", "TIERSTORE_DRAM": "1GiB"}) is None


def test_the_engines_configuration_comes_before_the_environment() -> None:
    found = EngineSettings.find({"store": "a", "dram": "64MiB"}, {"TIERSTORE_STORE": "b"})
    assert found == EngineSettings("a", "64MiB")


def test_the_environment_has_every_setting() -> None:
    variables = {
        "TIERSTORE_STORE": "grpc://host:1",
        "TIERSTORE_DRAM": "1GiB",
        "TIERSTORE_HBM": "2GiB",
        "TIERSTORE_MODE": "device",
        "TIERSTORE_STRICT": "0",
        "TIERSTORE_OTHER": "not ours",
    }
    found = EngineSettings.find(None, variables)
    assert found == EngineSettings("grpc://host:1", "1GiB", "2GiB", "device", False)
    assert found.is_daemon


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("model.tier", "give a dict"),
        ({}, "without store"),
        ({"store": ""}, "store is ''"),
        ({"store": "a", "dam": "1GiB"}, "dam is not known; there are store, dram"),
        ({"store": "a", "mode": "gpu"}, "mode is 'gpu'; it is one of host, device"),
        ({"store": "a", "strict": "no"}, "strict is 'no'"),
        ({"store": "a", "dram": "much"}, "dram"),
        ({"store": "a", "mode": "device"}, "without hbm"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(config: object, message: str) -> None:
    with pytest.raises((ConfigError, ValueError, TypeError), match=message):
        EngineSettings.find(config, {})


def test_a_wrong_truth_of_the_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="TIERSTORE_STRICT is 'maybe'; set it to 1 or 0"):
        EngineSettings.find(None, {"TIERSTORE_STORE": "a", "TIERSTORE_STRICT": "maybe"})


def test_equal_settings_share_one_open_store_as_long_as_it_is_held(tmp_path: Path) -> None:
    make_model(tmp_path).build(tmp_path / "store")
    first = EngineSettings(str(tmp_path / "store"), "4MiB").open_tables()
    assert EngineSettings(str(tmp_path / "store"), "4MiB").open_tables() is first
    other = EngineSettings(str(tmp_path / "store"), "5MiB").open_tables()
    assert other is not first
    del first, other
    gc.collect()
    again = EngineSettings(str(tmp_path / "store"), "4MiB").open_tables()
    assert "closed" not in repr(again)


def test_a_sockets_path_is_a_daemon_and_a_folder_is_not(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "daemon.sock"))
        assert EngineSettings(str(tmp_path / "daemon.sock")).is_daemon
    assert not EngineSettings(str(tmp_path)).is_daemon
    with pytest.raises(StoreNotReadyError):
        EngineSettings(str(tmp_path / "nothing")).open_tables()
