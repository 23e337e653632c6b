"""A transformers model whose n-gram tables are never loaded: their rows come from a store from the first forward on.

Input: a checkpoint's folder, an open store that was built from it, options of transformers' `from_pretrained`. Output:
the model, made by that very function. Errors: `ConfigError` and `FingerprintMismatchError` for a checkpoint without
tables, a store of another one, and options that would read the tables all the same.

The class of the model is given a constructor that puts the store's embeddings in place of the tables while the model
has no memory yet (transformers makes it on the meta device). The tables' tensors are then of no parameter, and nobody
reads them. Afterwards the model is of its own class again.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tierstore.causes import naming
from tierstore.durable import read_exactly
from tierstore.errors import ConfigError, FingerprintMismatchError
from tierstore.formats.checkpoint import Checkpoint, TableSource

from ...models import read_model
from ...trainable_module import Groups
from .saved_tables import save_with_tables
from .swap import check_hash, hash_of, put_in_place
from .trainable import put_trainable

if TYPE_CHECKING:
    from tierstore import Training
    from tierstore.store.store import Store

COMPARED_ROWS = 16  # of each table, in the checkpoint and in the store, so that weights of another training are noticed
_TABLE_KEYS = r"layers\.\d+\.ple\.ple_embedding\.ngram_embedding\."
# Options of from_pretrained that cannot go with tables left out, and why.
_REFUSED_OPTIONS = {
    "state_dict": "the weights are in the caller's memory already; make the model from them and use swap_embedding",
    "gguf_file": "a GGUF file is read whole; give the original checkpoint's folder",
    "disable_mmap": "files are then read whole, the tables too; leave it out",
}


def load_pretrained(
    folder: str | os.PathLike[str], store: Store, *, model_class: Any = None, **from_pretrained_options: Any
) -> Any:
    """Loads a qwen4_exp model of transformers without its n-gram tables, and serves their rows from `store`.

    Neither memory is taken for the tables nor are they read, but for COMPARED_ROWS rows of each, which must be the
    store's. The model is what `from_pretrained` and `swap_embedding` would have given. Blocks on the disk.

    Args:
        folder: The checkpoint that the store was built from, on this machine; with the option subfolder, above it.
        store: An open store, embedded or attached; it stays open as long as the model lives.
        model_class: A class of transformers, an Auto class too; by default the one that config.json names.
        from_pretrained_options: As for transformers' `from_pretrained`: dtype, device_map, attn_implementation, ...

    Returns:
        The model, in evaluation mode; with output_loading_info=True, the model and a dict.

    Raises:
        ConfigError: The checkpoint has no tables, the store's have another number of rows, dim or dtype, or other
            rows, or an option would read the tables.
        FingerprintMismatchError: The store was built with another hash.
        ImportError: transformers is not installed, or has no qwen4_exp.
    """
    _check_options(from_pretrained_options)
    path = _local_folder(folder, from_pretrained_options.get("subfolder", ""))
    _compare_rows(path, store)
    model_class = _model_class(folder, model_class, from_pretrained_options)
    names: list[str] = []
    unloaded = _without_tables(model_class, lambda model: put_in_place(model, store)[1], names)
    made = unloaded.from_pretrained(folder, **from_pretrained_options)
    model = made[0] if isinstance(made, tuple) else made
    _check_loaded(model, names)
    save_with_tables(model_class)
    return made


def load_trainable(
    folder: str | os.PathLike[str],
    training: Training,
    *,
    model_class: Any = None,
    quantized: bool = False,
    groups: Groups = "sequence",
    **from_pretrained_options: Any,
) -> Any:
    """Loads a qwen4_exp model of transformers without its n-gram tables, and trains them in `training`.

    `trained_tables(model)` gives its embeddings, for a `TableOptimizer`. The folder may be the checkpoint that the
    store was built from, or what a `Trainer` saved on the way, which has no tables. Rows are the training's, and
    compared with none. Blocks on the disk.

    Args:
        folder: On this machine.
        training: An open training; it stays open as long as the model lives.
        model_class: As of `load_pretrained`.
        quantized: As of `TrainableEmbedding`.
        groups: As of `TrainableEmbedding`.
        from_pretrained_options: As of `load_pretrained`.

    Raises:
        ConfigError, FingerprintMismatchError, ImportError: As `load_pretrained`.
    """
    _check_options(from_pretrained_options)
    _local_folder(folder, from_pretrained_options.get("subfolder", ""))
    model_class = _model_class(folder, model_class, from_pretrained_options)
    names: list[str] = []
    unloaded = _without_tables(model_class, lambda model: put_trainable(model, training, quantized, groups), names)
    made = unloaded.from_pretrained(folder, **from_pretrained_options)
    _check_loaded(made[0] if isinstance(made, tuple) else made, names)
    return made


def _without_tables(model_class: Any, put: Callable[[Any], list[str]], names: list[str]) -> Any:
    """Returns a class like `model_class` whose models have other embeddings as soon as they are made.

    put: puts them in place of the tables, and returns the names of the modules that hash; `names` gets them.
    """

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(self, *arguments, **options)
        self.__class__ = model_class  # nobody else ever sees the other one
        names.extend(put(self))
        unexpected = set(model_class._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = unexpected | {_TABLE_KEYS}

    kept = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (model_class,), {"__init__": __init__} | kept)


def _check_loaded(model: Any, names: Sequence[str]) -> None:
    """Checks the hash that came from the checkpoint, and takes back what was only for loading."""
    del model._keys_to_ignore_on_load_unexpected
    spec = hash_of(model)
    for name in names:
        check_hash(name, model.get_submodule(name), spec)


def _check_options(options: dict[str, Any]) -> None:
    """Raises `ConfigError` for options, and a setting of the process, by which transformers would read the tables."""
    for name, why in _REFUSED_OPTIONS.items():
        if options.get(name):
            raise ConfigError(f"a model without its tables, and {name}: {why}")
    if transformers_part("integrations").is_deepspeed_zero3_enabled():
        raise ConfigError(
            "load_pretrained under DeepSpeed ZeRO-3, which reads whole checkpoint files on its first rank: load before "
            "ZeRO-3 is enabled, or use from_pretrained and swap_embedding"
        )


def _local_folder(folder: str | os.PathLike[str], subfolder: str) -> Path:
    """Returns where the checkpoint's files lie."""
    path = Path(folder, subfolder)
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not a folder on this machine: download the checkpoint first (hf download), and pass its folder"
        )
    whole_reads = getattr(transformers_part("modeling_utils"), "_is_on_hf_mount", None)
    if whole_reads is not None and whole_reads(path):
        raise ConfigError(
            f"{path} lies on an hf-mount file system, from which transformers reads whole files, the tables too: "
            "copy the checkpoint to a disk"
        )
    return path


def _compare_rows(path: Path, store: Store) -> None:
    """Holds some rows of each table of a checkpoint against the store's: two trainings have equal hashes."""
    for source in read_model(Checkpoint.open(path), "qwen4_exp").sources:
        name = source.spec.name
        if name not in store.tables:
            raise ConfigError(
                f"{path} has table {name}, the store has {', '.join(sorted(store.tables))}: "
                "open the store that was built from this checkpoint"
            )
        stored = store.tables[name]
        if (source.spec.num_rows, source.spec.row_bytes) != (stored.spec.num_rows, stored.spec.row_bytes):
            raise ConfigError(
                f"table {name} is {source.spec.num_rows} rows of {source.spec.row_bytes} bytes in {path}, and "
                f"{stored.spec.num_rows} rows of {stored.spec.row_bytes} bytes in the store: "
                "open the store that was built from this checkpoint"
            )
        if stored.spec.fingerprint != source.spec.fingerprint:
            raise FingerprintMismatchError(
                f"table {name} of the store was built with hash {stored.spec.fingerprint[:16]}..., {path} has "
                f"{source.spec.fingerprint[:16]}...: every row would be a wrong one; "
                "open the store that was built from this checkpoint"
            )
        row_ids = np.unique(np.linspace(0, source.spec.num_rows - 1, COMPARED_ROWS).astype(np.int64))
        differing = (_rows_of(source, row_ids) != stored.rows(row_ids)).any(axis=1)
        if differing.any():
            raise ConfigError(
                f"table {name}: {int(differing.sum())} of {len(row_ids)} rows that were compared, row "
                f"{row_ids[differing][0]} first, differ between {path} and the store: it was built from another "
                "training's weights; build it from this checkpoint"
            )


def _rows_of(source: TableSource, row_ids: np.ndarray) -> np.ndarray:
    """Returns rows of a checkpoint's table, uint8 [N, row_bytes]. Blocks on the disk, which reads only their pages."""
    parts = []
    for plane in source.planes:
        num_rows = [tensor.num_bytes // plane.width_bytes for tensor in plane.tensors]
        ends = np.cumsum(num_rows)
        out = np.empty((len(row_ids), plane.width_bytes), dtype=np.uint8)
        for row_id, row in zip(row_ids.tolist(), out, strict=True):
            place = int(np.searchsorted(ends, row_id, side="right"))
            tensor = plane.tensors[place]
            row_in_tensor = row_id - int(ends[place]) + num_rows[place]
            what = f"row {row_id} of tensor {tensor.name} in {tensor.path}"
            with naming(what, tensor.path), tensor.path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # else megabytes are read ahead
                read_exactly(file.fileno(), row, tensor.byte_start + row_in_tensor * plane.width_bytes, what)
        parts.append(out)
    return np.concatenate(parts, axis=1)


def _model_class(folder: str | os.PathLike[str], model_class: Any, options: dict[str, Any]) -> Any:
    """Returns the class to load: the one given, the one that an Auto class stands for, or the configuration's own."""
    transformers = transformers_part("")
    mapping = getattr(model_class, "_model_mapping", None)
    if model_class is not None and mapping is None:
        return model_class
    config = options.get("config")
    if config is None or isinstance(config, (str, os.PathLike)):
        kept = {name: options[name] for name in ("subfolder", "trust_remote_code") if name in options}
        config = transformers.AutoConfig.from_pretrained(folder if config is None else config, **kept)
    if mapping is not None:
        found = mapping.get(type(config), None)
        found = found[0] if isinstance(found, (tuple, list)) else found
    else:
        found = getattr(transformers, (getattr(config, "architectures", None) or ["-"])[0], None)
    if found is None:
        raise ConfigError(
            f"{folder}: its configuration names no class of transformers {transformers.__version__} "
            f"({getattr(config, 'architectures', None)}); pass one as model_class, for instance Qwen4ExpForCausalLM"
        )
    return found


def transformers_part(name: str) -> Any:
    """Imports transformers, or a module of it. Raises `ImportError` that says what to install."""
    try:
        return importlib.import_module(f"transformers.{name}" if name else "transformers")
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "transformers":
            raise
        raise ImportError(
            "models of transformers need transformers 5.19 or newer: pip install 'transformers>=5.19'"
        ) from error
