"""Embedding modules over a store, and their resident counterpart: the same call, the same rows, bit for bit.

Input: token ids (`TieredEmbedding`, `HashedEmbedding`), or the row ids that a model already has (`RowIdEmbedding`).
Output: rows in the table's float type, without gradient, on the device of the ids.
Errors: `FingerprintMismatchError` for a store whose table was built with another hash, and what lookups raise.

Shapes: B sequences, T tokens, O orders, H rows per key.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import torch

from tierstore.errors import ConfigError, FingerprintMismatchError, TierStoreError

from .codecs import codec_dtype, decode_rows
from .device_embedding import DeviceCall, DeviceEmbedding
from .hash_spec import HashSpec
from .token_shapes import check_integers, checked_arguments

if TYPE_CHECKING:
    from tierstore import Store, Table, Ticket

WAIT_S = 60.0  # the longest a forward waits for its rows; reads of a dying disk can take tens of seconds
PENDING_PREFETCHES_MAX = 8  # of one module; the oldest is dropped beyond it, so that unused ones cannot fill memory

_Module = TypeVar("_Module", bound=torch.nn.Module)
# What identifies a call: shape and bytes of token ids, history and dead positions.
_CallKey = tuple[tuple[tuple[int, ...], bytes] | None, ...]


class TieredEmbedding(torch.nn.Module):
    """Looks up the rows of token ids in a store: `TieredEmbedding(store, layer, spec)(token_ids)`.

    It has no parameters and adds nothing to a state_dict. Any threads may call it at once.
    """

    def __init__(self, store: Store, layer: int | str, spec: HashSpec) -> None:
        """Binds a table to a hash; reads nothing.

        Args:
            store: An open store; it stays open as long as this module lives.
            layer: The 0-based index of the model's module, or the table's name.
            spec: The model's hash.

        Raises:
            FingerprintMismatchError: `spec` is not the hash that the table was built with.
            ConfigError: The store has no such table, or its rows have no float type.
        """
        super().__init__()
        try:
            name = spec.table_name(layer)
        except KeyError as error:
            raise ConfigError(f"{error.args[0]}: pass one of these, or the hash of another model") from None
        table = _table(store, name)
        check_fingerprint(table, spec, layer)
        self._store, self._layer, self._hash_spec, self._table_spec = store, layer, spec, table.spec
        self.dtype = codec_dtype(table.spec.codec)
        self.num_embeddings, self.num_heads = table.spec.num_rows, table.spec.num_heads
        self.embedding_dim = table.spec.dim
        self._on_device = (
            None if getattr(store, "device", None) is None else DeviceEmbedding(store, table.spec, layer, spec)
        )
        self._pending_lock = threading.Lock()  # guards `_pending`
        self._pending: OrderedDict[_CallKey, tuple[Ticket, np.ndarray]] = OrderedDict()

    @property
    def features(self) -> int:
        """Values that one token gets: rows a token times values a row."""
        return self.num_heads * self.embedding_dim

    def prefetch(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> None:
        """Starts the lookup that a later `forward` with equal arguments takes. Does not wait for any read.

        Of more than `PENDING_PREFETCHES_MAX` prefetches that no forward took, the oldest is dropped. A second prefetch
        with equal arguments does nothing. Errors of the lookup itself come out of the forward.
        """
        prefetch_layers([self], token_ids, history, dead)

    def forward(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the rows of token ids as [B, T, O * H, dim], on the device of `token_ids`. Blocks on the reads.

        If the store has an hbm tier, rows come out on its device. Kernels look up ids that lie there, and may be
        captured in a CUDA graph: the host waits for nothing, and raises what went wrong at a later call or in
        `synchronize`; NaN stands for values that did not come. Ids on the host start their reads before the first
        kernel.

        Args:
            token_ids: Integers [B, T].
            history: The tokens before, integers [B, P], of which the last ones count, because n-grams reach back.
                Decoding needs it: `embedding(next_id, history=seen)`. A call without it is the start of a document;
                for a single token that logs a warning, once.
            dead: bool [B, T], positions that are not text, such as image spans; their ids are not read.

        Raises:
            TypeError: Not tensors of integers, or `dead` not of bool.
            ValueError: Token ids outside the vocabulary, or shapes that disagree.
            TimeoutError: The rows did not come within `WAIT_S`.
            CorruptPageError: A row cannot be read as it was built.
        """
        if self._on_device is not None and self._store.device is not None:  # a forked child has none
            return self._on_device.forward(
                DeviceCall(token_ids, history, dead, self._on_device.device, self._hash_spec.history_tokens)
            )
        call = _Call(token_ids, history, dead, self._hash_spec.history_tokens)
        rows = self._prefetched(call)
        if rows is None:
            keys, rows = self._request(call)
            # On this thread: a ticket would hand the reads to a worker, and wait for that.
            self._store.tables[self._table_spec.name].lookup(keys, rows, timeout_s=WAIT_S)
        # The tensor is made here, not in prefetch: one made under inference_mode could not serve a training forward.
        values = decode_rows(torch.from_numpy(rows).to(token_ids.device), self._table_spec.codec, self.embedding_dim)
        return values.unflatten(0, call.token_ids.shape)

    def synchronize(self) -> None:
        """Waits until the device has done all lookups, and raises what went wrong. Does nothing without an hbm tier."""
        if self._on_device is not None and self._store.device is not None:
            self._on_device.synchronize()

    def _prefetched(self, call: _Call) -> np.ndarray | None:
        """Returns the rows that a prefetch of the same call has read; None without one, or if its request failed.

        A request of several layers fails as one: what is wrong may be another layer's page, so this layer looks up
        again, and raises then if the page is its own. `TimeoutError` comes through: waiting twice would break the
        limit.
        """
        with self._pending_lock:
            ticket, rows = self._pending.pop(call.key, (None, None))
        if ticket is None:
            return None
        try:
            ticket.wait(timeout_s=WAIT_S)
        except TierStoreError:
            return None
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredEmbedding:
        fresh: dict[str, Any] = {"_pending_lock": threading.Lock(), "_pending": OrderedDict()}
        # A store that was closed, or is a parent's, has no device any more.
        on_device = None if getattr(self._store, "device", None) is None else self._on_device
        fresh["_on_device"] = None if on_device is None else on_device.copy()
        return _copy_sharing(self, memo, ("_store", "_hash_spec"), fresh)

    def __copy__(self) -> TieredEmbedding:
        return _shallow_copy(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _not_pickled(self)

    def _request(self, call: _Call) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keys, int64 [B * T, O], and the buffer for their rows, uint8 [B * T, O * H, row_bytes]."""
        spec = self._table_spec
        keys = self._hash_spec.keys(call.token_ids, self._layer, history=call.history, dead=call.dead)
        keys = keys.reshape(-1, len(spec.orders))
        return keys, np.empty((len(keys), spec.num_heads, spec.row_bytes), dtype=np.uint8)


def prefetch_layers(
    embeddings: Sequence[TieredEmbedding],
    token_ids: torch.Tensor,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
) -> None:
    """Starts the lookups of several layers as one request of their store, which batches reads over tables.

    Each layer's forward with equal arguments then takes its part. Arguments as in `TieredEmbedding.forward`. Raises
    `ValueError` if the layers lie in different stores or one is named twice. Does not wait for any read.
    """
    if not embeddings:
        return
    store = embeddings[0]._store
    names = [embedding._table_spec.name for embedding in embeddings]
    if any(embedding._store is not store for embedding in embeddings) or len(set(names)) != len(names):
        raise ValueError(
            f"prefetch of {', '.join(names)}: one request needs distinct tables of one store; prefetch them apart"
        )
    on_device = [embedding._on_device for embedding in embeddings if embedding._on_device is not None]
    if on_device and store.device is not None:
        for each in on_device:
            each.prefetch(DeviceCall(token_ids, history, dead, each.device, each.history_tokens))
        return
    spans = {embedding._hash_spec.history_tokens for embedding in embeddings}
    if len(spans) > 1:
        raise ValueError(
            f"prefetch of {', '.join(names)}: their hashes look back at {' and '.join(map(str, sorted(spans)))} "
            f"tokens, as those of two models; prefetch them apart"
        )
    call = _Call(token_ids, history, dead, spans.pop())
    wanted = []
    for embedding in embeddings:
        with embedding._pending_lock:
            if call.key not in embedding._pending:
                wanted.append(embedding)
    if not wanted:
        return
    requests = [embedding._request(call) for embedding in wanted]
    ticket = store.submit(
        {embedding._table_spec.name: (keys, rows) for embedding, (keys, rows) in zip(wanted, requests, strict=True)}
    )
    for embedding, (_, rows) in zip(wanted, requests, strict=True):
        with embedding._pending_lock:
            embedding._pending[call.key] = (ticket, rows)
            while len(embedding._pending) > PENDING_PREFETCHES_MAX:
                embedding._pending.popitem(last=False)


class RowIdEmbedding(torch.nn.Module):
    """Drop-in for an embedding whose caller already has row ids: `RowIdEmbedding(store, layer)(row_ids)`.

    Stands in for `nn.Embedding` (`weight.device`, `weight.dtype`, `num_embeddings`, `embedding_dim`), and with
    `head_offsets=True` for the published MultiHeadEmbedding, which takes ids within each head and adds the offsets
    itself. `weight` is empty, [0, dim]: it follows `.to(device)`, keeps the table's float type under `.to(dtype)`,
    because that is the type of the output, and is not in the state_dict.

    Attributes:
        stands_for_weight: Whether a saved model has the rows as this module's weight; `swap_embedding` sets it.
    """

    weight: torch.Tensor

    def __init__(self, store: Store, layer: int | str, head_offsets: bool = False) -> None:
        """Binds a table, by the index of the model's module or by name. Raises `ConfigError` if the store has none."""
        super().__init__()
        self._store = store  # which lives as long as this does, also if nobody else names it
        self._table = _table(store, layer if isinstance(layer, str) else f"layers.{layer}")
        self.stands_for_weight = False
        spec = self._table.spec
        self._head_offsets = head_offsets
        self.num_embeddings, self.embedding_dim, self.num_heads = spec.num_rows, spec.dim, spec.num_heads
        # On the CPU whatever torch's default device is: a model that is made on the meta device still has its rows.
        empty = torch.empty((0, spec.dim), dtype=codec_dtype(spec.codec), device="cpu")
        self.register_buffer("weight", empty, persistent=False)

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of `row_ids`, integers [...], as [..., dim] on their device; row id -1 gives a zero row.

        With `head_offsets`, the last axis of `row_ids` is the heads, and each id counts within its head. Blocks on the
        reads. Raises `ValueError` for ids outside the table or their head, `CorruptPageError` if a row is damaged.
        """
        check_integers(row_ids, "row ids")
        ids = _as_int64(row_ids)
        if self._head_offsets:
            ids = self._ids_in_table(ids)
        # On the CPU whatever torch's default device is: the store writes into it.
        rows = torch.empty((*ids.shape, self._table.spec.row_bytes), dtype=torch.uint8, device="cpu")
        self._table.rows(ids, out=rows.numpy())
        return decode_rows(rows.to(row_ids.device), self._table.spec.codec, self.embedding_dim)

    def copy_rows_to(self, values: torch.Tensor, piece_bytes: int) -> None:
        """Fills values, [num_embeddings, embedding_dim] on the CPU, with all rows, piece by piece. Blocks."""
        spec = self._table.spec
        step = max(1, piece_bytes // spec.row_bytes)
        for start in range(0, spec.num_rows, step):
            rows = self._table.rows(np.arange(start, min(start + step, spec.num_rows), dtype=np.int64))
            values[start : start + step] = decode_rows(torch.from_numpy(rows), spec.codec, self.embedding_dim)

    def _ids_in_table(self, ids: np.ndarray) -> np.ndarray:
        """Adds each head's offset. An id past its head's end is refused: it would become the next head's row."""
        spec = self._table.spec
        if ids.ndim == 0 or ids.shape[-1] != spec.num_heads:
            raise ValueError(
                f"ids of shape {list(ids.shape)} for table {spec.name}: the last axis must be its {spec.num_heads} "
                f"heads"
            )
        outside = (ids < -1) | (ids >= np.array(spec.moduli, dtype=np.int64))
        if outside.any():
            *_, head = index = tuple(int(axis) for axis in np.argwhere(outside)[0])
            raise ValueError(
                f"id {ids[index]} of head {head} of table {spec.name}: that head has rows 0 to "
                f"{spec.moduli[head] - 1}; "
                f"pass ids within the head, or use head_offsets=False for ids that count from the table's start"
            )
        return np.where(ids == -1, -1, ids + np.array(spec.offsets, dtype=np.int64))

    def __deepcopy__(self, memo: dict[int, Any]) -> RowIdEmbedding:
        return _copy_sharing(self, memo, ("_store", "_table"), {})

    def __copy__(self) -> RowIdEmbedding:
        return _shallow_copy(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _not_pickled(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RowIdEmbedding:
        super()._apply(fn, recurse)
        self.weight = self.weight.to(codec_dtype(self._table.spec.codec))
        return self


class HashedEmbedding(torch.nn.Module):
    """The resident counterpart of `TieredEmbedding`: a whole table in memory, addressed by the same hash.

    `weight` is the decoded rows, [num_rows, dim], and stays frozen. For tables that fit, and as the oracle of
    tests. Raises `ValueError` if `weight` is not the size of the table that `spec` describes.
    """

    def __init__(self, spec: HashSpec, layer: int | str, weight: torch.Tensor) -> None:
        super().__init__()
        if weight.ndim != 2 or weight.shape[0] != spec.num_rows(layer):
            raise ValueError(
                f"weight of shape {list(weight.shape)} for {spec.table_name(layer)}: it must be "
                f"[{spec.num_rows(layer)}, values a row]"
            )
        self._hash_spec, self._layer = spec, layer
        self.num_embeddings, self.embedding_dim = weight.shape
        self.num_heads = len(spec.moduli(layer))
        self.embedding = torch.nn.Embedding.from_pretrained(weight, freeze=True)

    @property
    def features(self) -> int:
        """Values that one token gets: rows a token times values a row."""
        return self.num_heads * self.embedding_dim

    def forward(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the rows of `token_ids`, integers [B, T], as [B, T, O * H, dim]; as `TieredEmbedding.forward`."""
        call = _Call(token_ids, history, dead, self._hash_spec.history_tokens)
        ids = self._hash_spec.row_ids(call.token_ids, self._layer, history=call.history, dead=call.dead)
        row_ids = torch.from_numpy(ids).to(self.embedding.weight.device)
        rows: torch.Tensor = self.embedding(row_ids.clamp_min(0))
        return rows.masked_fill((row_ids < 0).unsqueeze(-1), 0).to(token_ids.device)


def check_fingerprint(table: Table, spec: HashSpec, layer: int | str) -> None:
    """Raises `FingerprintMismatchError` unless `table` was built with the hash that `spec` describes for `layer`."""
    if table.spec.fingerprint != spec.fingerprint(layer):
        raise FingerprintMismatchError(
            f"table {table.spec.name} was built with hash {table.spec.fingerprint[:16]}..., this model's hash is "
            f"{spec.fingerprint(layer)[:16]}...: every row would be a wrong one; open the store that was built from "
            f"this model's "
            f"checkpoint, or take the hash from the store with HashSpec.from_store"
        )


class _Call:
    """The arguments of one call as int64 and bool arrays on the CPU, and a key that equal calls share."""

    def __init__(
        self,
        token_ids: torch.Tensor,
        history: torch.Tensor | None,
        dead: torch.Tensor | None,
        history_tokens: int,
    ) -> None:
        """history_tokens: how many of the tokens before count. Raises as `checked_arguments` does."""
        given = checked_arguments(token_ids, history, dead, history_tokens)
        self.token_ids = _as_int64(given.token_ids)
        self.history = None if given.history is None else _as_int64(given.history)
        self.dead = None if given.dead is None else given.dead.detach().cpu().contiguous().numpy()
        arrays = (self.token_ids, self.history, self.dead)
        self.key: _CallKey = tuple(None if array is None else (array.shape, array.tobytes()) for array in arrays)


def _as_int64(ids: torch.Tensor) -> np.ndarray:
    """Returns an integer tensor of any device and layout as a contiguous int64 array on the CPU."""
    array: np.ndarray = ids.detach().to("cpu", torch.int64).contiguous().numpy()
    return array


def _copy_sharing(module: _Module, memo: dict[int, Any], shared: Sequence[str], fresh: dict[str, Any]) -> _Module:
    """Returns a deep copy of a module that shares the attributes `shared` with it and
    gets those of `fresh` as they are.

    A store is files and threads: there is nothing to copy, and a model's copy is meant to look up the same rows.
    """
    copied = module.__class__.__new__(module.__class__)
    memo[id(module)] = copied
    memo.update({id(module.__dict__[name]): module.__dict__[name] for name in shared})
    copied.__dict__.update(
        {name: fresh[name] if name in fresh else copy.deepcopy(value, memo) for name, value in module.__dict__.items()}
    )
    return copied


def _shallow_copy(module: _Module) -> _Module:
    """Returns a module of the same attributes."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    return copied


def _not_pickled(module: torch.nn.Module) -> TypeError:
    name = type(module).__name__
    return TypeError(
        f"{name} looks rows up in a store that is open in this process, and cannot be pickled: save the model's "
        f"state_dict(), which has no rows, and make {name} anew from a store opened where the model is loaded"
    )


def _table(store: Store, name: str) -> Table:
    """Returns the table `name`, or raises `ConfigError` that lists those there are."""
    if name not in store.tables:
        raise ConfigError(
            f"the store has no table {name}; it has {', '.join(sorted(store.tables))}: pass one of these, or build it"
        )
    return store.tables[name]
