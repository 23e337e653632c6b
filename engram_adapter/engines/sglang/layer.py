"""One layer of SGLang over its table: opened and checked at start, compared while weights load, read at every step.

Input: what the engine's layer expects, tensors of the checkpoint, row ids. Output: rows as stored.
Errors: `EngineMismatchError` until the model is loaded; then what lookups raise.

Shapes: T tokens of a step, C row ids of a token.
"""

from __future__ import annotations

import dataclasses
import logging
from weakref import WeakSet

import torch

from tierstore.errors import ConfigError
from tierstore.store.store import Store

from ..gate import EngineMismatchError
from ..settings import EngineSettings
from ..tables import ExpectedTable, check_rows, matching_table, rows_at, sample_offsets, served
from .checks import DUMMY, check_config, load_format

logger = logging.getLogger("sglang.tierstore")  # below the engine's logger, whose handlers show it

_tables: WeakSet[LayerTable] = WeakSet()  # all of this process; changed while a model is built, by one thread


def stores_in_use() -> list[Store]:
    """Returns the stores of all layers of this process; layers may share one."""
    return [table.store for table in _tables]


class LayerTable:
    """A layer's table: the right one, of the checkpoint that the engine loads. One thread at a time.

    Attributes:
        device: The engine's, where rows are wanted.
    """

    def __init__(
        self, layer: str, expected: ExpectedTable, *, decode: tuple[str, ...], prefill: tuple[str, ...]
    ) -> None:
        """Opens the store, or attaches to the daemon.

        Args:
            layer: The layer's name in the engine, for messages.
            expected: What it expects of its table. An empty fingerprint: the engine's hash is compared later.
            decode: Graph backends of decode that run Python at every step of this layer.
            prefill: The same of prefill.

        Raises:
            EngineMismatchError: SGLang's options do not fit, or the table is another one.
            ConfigError: TIERSTORE_STORE is not set; what opening the store raises.
        """
        self.layer = layer
        self.settings = required_settings()
        check_config(self.settings, decode, prefill)
        device = _device_name()
        self.device = torch.device(device or "cpu")
        self.store = self.settings.open_tables(device)
        if not expected.fingerprint and expected.name in self.store.tables:
            expected = dataclasses.replace(expected, fingerprint=self.store[expected.name].spec.fingerprint)
        self.table = matching_table(self.store, expected, layer)
        self.rows_compared = 0
        self._has_checkpoint = load_format() != DUMMY
        _tables.add(self)

    def compare(self, loaded: torch.Tensor, start_row: int, bytes_range: tuple[int, int]) -> None:
        """Compares some rows of a tensor that the engine loads with the store's. Blocks.

        Args:
            loaded: [R, ...], the table's rows from `start_row` on, or a part of each.
            start_row: The table's row that comes first.
            bytes_range: Where in a stored row the tensor's bytes lie, first and end.

        Raises:
            EngineMismatchError: The rows do not fit the table, or one differs.
        """
        spec, (start, end) = self.table.spec, bytes_range
        width = loaded.shape[1] * loaded.element_size()
        if width != end - start or start_row + len(loaded) > spec.num_rows:
            raise EngineMismatchError(
                f"{self.layer}: the checkpoint has rows {start_row} to {start_row + len(loaded)} of {width} bytes, "
                f"table {spec.name} in {self.store.name} has {spec.num_rows} of {end - start}; build the store from "
                f"the checkpoint that the engine loads"
            )
        offsets = sample_offsets(spec.num_rows, start_row, len(loaded), width)
        if len(offsets):
            found = rows_at(loaded.view(torch.uint8).numpy(), offsets)
            check_rows(self.table, offsets + start_row, found, start, self.layer)
            self.rows_compared += len(offsets)

    def check_loaded(self, **weights: torch.Tensor) -> None:
        """Checks what loading left here; weights: by their names in the engine.

        Raises:
            EngineMismatchError: A weight has rows, or no row of a checkpoint was compared with the store's.
        """
        for name, weight in weights.items():
            if weight.shape[0]:
                raise EngineMismatchError(
                    f"{self.layer}: {name} has {weight.shape[0]} rows in memory, expected none: something else loaded "
                    f"the table; name the plug-ins to load in SGLANG_PLUGINS"
                )
        if self._has_checkpoint and not self.rows_compared:
            raise EngineMismatchError(
                f"{self.layer}: 0 rows of table {self.table.spec.name} in {self.store.name} were compared with the "
                f"checkpoint, expected 1 at least: SGLang found no tensor of this table in it; give the engine the "
                f"checkpoint that the store was built from, or --load-format {DUMMY}"
            )

    def check_hash(self, fingerprint: str) -> None:
        """Raises `EngineMismatchError` unless the engine's hash is the table's."""
        stored = self.table.spec.fingerprint
        if stored != fingerprint:
            raise EngineMismatchError(
                f"{self.layer}: hash fingerprint of table {self.table.spec.name} in {self.store.name}: {stored}, the "
                f"engine has {fingerprint}: every row would be a wrong one; build the store from the checkpoint that "
                f"the engine loads, with its tokenizer"
            )

    def log_ready(self) -> None:
        """Logs the one line that says where this layer's rows come from."""
        served_line = served(self.table, self.store, self.settings.mode, self.layer, self.rows_compared)
        logger.info("%s", served_line)


def required_settings() -> EngineSettings:
    """Returns the settings of this process; raises `ConfigError` if they were unset since the plug-in was loaded."""
    settings = EngineSettings.find(None)
    if settings is None:
        raise ConfigError("TIERSTORE_STORE was unset while SGLang started; keep it in the environment")
    return settings


def _device_name() -> str | None:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None
