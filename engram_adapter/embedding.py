"""`TieredEmbedding`: a module that looks up the rows of token ids in a store, and prefetches them.

Input: token ids. Output: rows in the table's float type, without gradient, on the device of the ids.
Errors: `FingerprintMismatchError` for a store whose table was built with another hash, and what lookups raise.

Shapes: B sequences, T tokens, O orders, H rows per key.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from tierstore.errors import ConfigError, TierStoreError

from .codecs import decode_rows
from .device_embedding import DeviceCall, DeviceEmbedding
from .hash_spec import HashSpec
from .lookup_call import WAIT_S, CallKey, LookupCall
from .lookup_operators import is_traced, lookup_operator
from .store_module import StoreModule, check_fingerprint, named_table

if TYPE_CHECKING:
    from tierstore import Store, Ticket

    from .lockstep import LockStep
    from .lockstep_fixed import FixedLockStep

PENDING_PREFETCHES_MAX = 8  # of one module; the oldest is dropped beyond it, so that unused ones cannot fill memory


class TieredEmbedding(StoreModule):
    """Looks up the rows of token ids in a store: `TieredEmbedding(store, layer, spec)(token_ids)`.

    It has no parameters and adds nothing to a state_dict. Any threads may call it at once. To torch.compile and
    torch.export it is one operator; copies share the store, and a pickled one opens it anew where it arrives.
    """

    _ANEW: ClassVar = StoreModule._ANEW | {"_on_device", "_pending_lock", "_pending"}

    def __init__(
        self,
        store: Store,
        layer: int | str,
        spec: HashSpec,
        process_group: Any = None,
        fixed_tokens: int | None = None,
    ) -> None:
        """Binds a table to a hash; reads nothing.

        Args:
            store: An open store; it stays open as long as this module lives.
            layer: The 0-based index of the model's module, or the table's name.
            spec: The model's hash.
            process_group: A group of torch.distributed, or `exchange.Ranks`, of which each rank's store holds a slice
                of the table. All ranks then construct, prefetch and look up in the same order, with ids of their own,
                and with none too: [B, 0]. Blocks here until all are there.
            fixed_tokens: The most tokens of a call over ranks, whose exchanges then always have the same sizes.

        Raises:
            FingerprintMismatchError: `spec` is not the hash that the table was built with.
            ConfigError: The store has no such table, or its rows have no float type; a slice without the ranks that
                hold the rest, slices that are not one table, `fixed_tokens` of slices that begin inside a head.
            RankError: The other ranks did not come.
        """
        try:
            name = spec.table_name(layer)
        except KeyError as error:
            raise ConfigError(f"{error.args[0]}: pass one of these, or the hash of another model") from None
        check_fingerprint(named_table(store, name), spec, layer)
        self._layer, self._hash_spec = layer, spec
        self._is_over_ranks = process_group is not None
        super().__init__(store, name)
        self._lock_step = self._over_ranks(process_group, fixed_tokens)

    def _bind(self, store: Store) -> None:
        super()._bind(store)
        # A store that was closed, or is a parent's, has no device any more.
        has_device = getattr(store, "device", None) is not None
        self._on_device = DeviceEmbedding(store, self._table_spec, self._layer, self._hash_spec) if has_device else None
        self._pending_lock = threading.Lock()  # guards `_pending`
        self._pending: OrderedDict[CallKey, tuple[Ticket, np.ndarray]] = OrderedDict()

    def _over_ranks(self, process_group: Any, fixed_tokens: int | None) -> LockStep | FixedLockStep | None:
        """Returns what looks up over ranks, if a process group is given. Blocks until all ranks are there."""
        spec = self._table_spec
        if process_group is None:
            if spec.is_slice or fixed_tokens is not None:
                what = f"rows {spec.row_start} to {spec.row_end} of {spec.num_rows}" if spec.is_slice else "all rows"
                raise ConfigError(
                    f"the store has {what} of table {spec.name}: pass process_group=, the ranks that have one slice "
                    f"each{'' if spec.is_slice else ', if fixed_tokens is given'}"
                )
            return None
        from .exchange import Ranks  # loads torch.distributed
        from .lockstep import LockStep
        from .lockstep_fixed import FixedLockStep

        ranks = Ranks.of(process_group)
        if fixed_tokens is None:
            return LockStep(ranks, self._store, self._table)
        return FixedLockStep(ranks, self._store, self._table, fixed_tokens)

    @property
    def _kind(self) -> str:
        return f"{super()._kind}{' over ranks' if self._is_over_ranks else ''}"

    @property
    def features(self) -> int:
        """Values that one token gets: rows a token times values a row."""
        return self.num_heads * self.embedding_dim

    def prefetch(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> None:
        """Starts the lookup that a later `forward` with equal arguments takes. Does not wait for any read.

        Of more than `PENDING_PREFETCHES_MAX` prefetches that no forward took, the oldest is dropped. A second prefetch
        with equal arguments does nothing, and so does one in a traced program. Errors of the lookup itself come out of
        the forward.
        """
        if is_traced():  # a traced program has its lookups, and nothing that starts before them
            return
        if self._lock_step is not None:
            self._lock_step.prefetch(lambda: self._ids_over_ranks(token_ids, history, dead))
        else:
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
        if is_traced():
            device = None if self._on_device is None else self._on_device.device
            traced: torch.Tensor = lookup_operator(
                token_ids, history, dead, self._handle, self.num_heads, self.embedding_dim, self.dtype, device
            )
            return traced
        return self.look_up(token_ids, history, dead)

    def look_up(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Does what `forward` says, in traced programs too."""
        if self._lock_step is not None:  # ranks exchange what their hosts look up
            over_ranks = self._lock_step.look_up(lambda: self._ids_over_ranks(token_ids, history, dead))
            return self._values(over_ranks, token_ids)
        if self._on_device is not None and self._store.device is not None:  # a forked child has none
            return self._on_device.forward(
                DeviceCall(token_ids, history, dead, self._on_device.device, self._hash_spec.history_tokens)
            )
        call = LookupCall(token_ids, history, dead, self._hash_spec.history_tokens)
        rows = self._prefetched(call)
        if rows is None:
            keys, rows = self._request(call)
            # On this thread: a ticket would hand the reads to a worker, and wait for that.
            self._table.lookup(keys, rows, timeout_s=WAIT_S)
        return self._values(rows, token_ids)

    def _values(self, rows: np.ndarray, token_ids: torch.Tensor) -> torch.Tensor:
        """Returns rows, uint8 [B * T, O * H, row_bytes], as values [B, T, O * H, dim] on the device of token ids."""
        # The tensor is made here, not in prefetch: one made under inference_mode could not serve a training forward.
        values = decode_rows(torch.from_numpy(rows).to(token_ids.device), self._table_spec.codec, self.embedding_dim)
        return values.unflatten(0, token_ids.shape)

    def _ids_over_ranks(
        self, token_ids: torch.Tensor, history: torch.Tensor | None, dead: torch.Tensor | None
    ) -> np.ndarray:
        """Returns what ranks are asked for: keys, int64 [B * T, O], or row ids, int64 [B * T, O * H]."""
        assert self._lock_step is not None
        call = LookupCall(token_ids, history, dead, self._hash_spec.history_tokens)
        made = self._hash_spec.keys if self._lock_step.by_key else self._hash_spec.row_ids
        ids = made(call.token_ids, self._layer, history=call.history, dead=call.dead)
        return ids.reshape(-1, ids.shape[-1])

    def synchronize(self) -> None:
        """Waits until the device has done all lookups, and raises what went wrong. Does nothing without an hbm tier."""
        if self._on_device is not None and self._store.device is not None:
            self._on_device.synchronize()

    def _prefetched(self, call: LookupCall) -> np.ndarray | None:
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

    def _request(self, call: LookupCall) -> tuple[np.ndarray, np.ndarray]:
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
    over_ranks = [embedding for embedding in embeddings if embedding._lock_step is not None]
    if over_ranks:
        for embedding in over_ranks:
            embedding.prefetch(token_ids, history, dead)
        embeddings = [each for each in embeddings if each._lock_step is None]
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
    call = LookupCall(token_ids, history, dead, spans.pop())
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
