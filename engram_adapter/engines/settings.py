"""What a user sets for an engine's plug-in: which store, its budgets, the mode.

Input: a dict of the engine's own configuration, else variables of the environment that begin with TIERSTORE_. Output:
`EngineSettings`, or None: then the plug-in does nothing. Errors: `ConfigError` for unknown names and for values that do
not fit; what opening a store raises.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tierstore
from tierstore.errors import ConfigError
from tierstore.store.store import Store
from tierstore.units import parse_bytes

MODES = ("host", "device")
ENVIRONMENT = "TIERSTORE_"  # then a field's name in capitals: TIERSTORE_STORE, TIERSTORE_DRAM, ...
_TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_opened: weakref.WeakValueDictionary[EngineSettings, Store] = weakref.WeakValueDictionary()
_opened_lock = threading.Lock()  # guards `_opened`


@dataclass(frozen=True)
class EngineSettings:
    """Where an engine's rows come from, and how.

    Attributes:
        store: The path of a store, which every process of the engine opens; or a daemon: the path of its socket, or
            "grpc://HOST:PORT".
        dram: Bytes of memory that a store opened here may take, in every process of the engine. A daemon has its own.
        hbm: Bytes of GPU memory for the hottest entries, of each process; None: no such tier.
        mode: "host": rows are read before the forward, and copied to the GPU. "device": kernels look them up in the
            forward, which needs `hbm`.
        strict: Whether an engine of a version that was not tested is refused. False: it is tried, and a warning says
            so; changed signatures are refused all the same.
    """

    store: str
    dram: int | str = "2GiB"
    hbm: int | str | None = None
    mode: str = "host"
    strict: bool = True

    def __post_init__(self) -> None:
        """Raises `ConfigError` for values that do not fit."""
        if not isinstance(self.store, str) or not self.store:
            raise ConfigError(f"tierstore setting store is {self.store!r}; give the path of a store, or a daemon's")
        if self.mode not in MODES:
            raise ConfigError(f"tierstore setting mode is {self.mode!r}; it is one of {', '.join(MODES)}")
        if not isinstance(self.strict, bool):
            raise ConfigError(f"tierstore setting strict is {self.strict!r}; it is true or false")
        parse_bytes(self.dram, "tierstore setting dram")
        if self.hbm is not None:
            parse_bytes(self.hbm, "tierstore setting hbm")
        if self.mode == "device" and self.hbm is None:
            raise ConfigError('tierstore setting mode is "device" without hbm; give it GPU memory, such as hbm="4GiB"')

    @classmethod
    def find(cls, config: object, environment: Mapping[str, str] | None = None) -> EngineSettings | None:
        """Returns the settings of an engine's configuration, else of the environment; None if neither has any.

        Args:
            config: A dict with this class's fields, or None.
            environment: Variables; by default those of this process.
        """
        if config is not None:
            if not isinstance(config, Mapping):
                raise ConfigError(f'tierstore settings are {config!r}; give a dict, such as {{"store": "model.tier"}}')
            return cls._checked(dict(config), "tierstore setting")
        variables = os.environ if environment is None else environment
        if not variables.get(f"{ENVIRONMENT}STORE"):
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        found: dict[str, Any] = {
            name: variables[f"{ENVIRONMENT}{name.upper()}"]
            for name in names
            if variables.get(f"{ENVIRONMENT}{name.upper()}")
        }
        if "strict" in found:
            text = found["strict"].lower()
            if text not in _TRUTHS:
                raise ConfigError(f"{ENVIRONMENT}STRICT is {found['strict']!r}; set it to 1 or 0")
            found["strict"] = _TRUTHS[text]
        return cls._checked(found, "environment variable of tierstore")

    @classmethod
    def _checked(cls, found: dict[str, Any], what: str) -> EngineSettings:
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(found.keys() - set(names))
        if unknown:
            raise ConfigError(f"{what} {', '.join(map(str, unknown))} is not known; there are {', '.join(names)}")
        if "store" not in found:
            raise ConfigError(f"{what}s without store; give the path of a store, or a daemon's")
        return cls(**found)

    @property
    def is_daemon(self) -> bool:
        """Whether `store` is a daemon's address: of the network, or a socket's path."""
        if "://" in self.store:
            return True
        try:
            return stat.S_ISSOCK(os.stat(self.store).st_mode)
        except OSError:
            return False  # opening it says what is wrong

    def open_tables(self, device: str | None = None) -> Store:
        """Opens the store, or attaches to the daemon. Blocks.

        Equal settings share one open store in this process, as long as anybody holds it.

        Args:
            device: The GPU of an hbm tier, such as "cuda:0"; by default the first.

        Raises:
            What `tierstore.open` and `tierstore.connect` raise.
        """
        with _opened_lock:
            store = _opened.get(self)
            if store is None:
                store = _opened[self] = self._open(device)
            return store

    def _open(self, device: str | None) -> Store:
        on_gpu: dict[str, Any] = {} if self.hbm is None else {"hbm": self.hbm, "device": device}
        if self.is_daemon:
            return tierstore.connect(self.store, **on_gpu)
        return tierstore.open(self.store, dram=self.dram, **on_gpu)
