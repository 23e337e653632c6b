"""A checkpoint as the source of a store's rows: what `tierstore.verify` compares with, and repairs from.

Input: the path of a checkpoint. Output: a `CheckpointRows`, which finds the tables of any store that was built from it.
Errors: a checkpoint that lacks those tables, or a store that does not say how it was built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierstore import FormatError
from tierstore.formats.catalog import CatalogImage
from tierstore.formats.checkpoint import Checkpoint, TableSource

from .families import plain_source, read_model
from .hash_spec import RECORD_NAME


@dataclass(frozen=True)
class CheckpointRows:
    """An open checkpoint; keeps the `tierstore.offline.repair.RowSource` contract.
    Nothing is read before it is asked for."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.checkpoint.path

    def as_record(self) -> dict[str, Any]:
        """Returns who it is: its digest, its files. Blocks: reads samples of every tensor."""
        return self.checkpoint.as_record()

    def sources_of(self, image: CatalogImage) -> Sequence[TableSource]:
        """Returns its tables as a store was built from them: see `sources_of_store`."""
        return sources_of_store(image, self.checkpoint)


def open_checkpoint(folder: str | os.PathLike[str]) -> CheckpointRows:
    """Opens a checkpoint as a source of rows, for `tierstore.verify(store_path, source=...)`.

    Args:
        folder: a folder with config.json and *.safetensors, or one file of tensors, as `tierstore build` takes it.

    Raises:
        ConfigError: something is missing or cannot be read.
        FormatError: a header lies about its file.
    """
    return CheckpointRows(Checkpoint.open(folder))


def sources_of_store(image: CatalogImage, checkpoint: Checkpoint) -> tuple[TableSource, ...]:
    """Returns the checkpoint's tables as the store was built from them: by its family, or its plain tables by name.

    Raises `ConfigError` where the checkpoint lacks them, `FormatError` where the store's record of its hash is damaged.
    """
    if all(layout.spec.is_plain for layout in image.tables.values()):
        return tuple(plain_source(checkpoint, name) for name in image.tables)
    try:
        family = json.loads(image.attachments[RECORD_NAME])["family"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{image.path}: the catalog does not say which family its tables are of ({error!r}); restore it or rebuild"
        ) from error
    return read_model(checkpoint, family).sources
