"""A layer's lookups on the device of its store: token ids in, values out, without the host if nothing is missed.

Input: tensors of token ids on the store's device, or ids on the host. Output: values in the table's float type, on the
device. Errors: what goes wrong on the device raises at the next call, or in `synchronize`; until then NaN stands for
values that did not come.

Everything is launched on streams: `prefetch` on one of its own, `forward` on the caller's, which waits for the other.
Both may be captured in a CUDA graph after one eager call of the same shape.
Shapes: B sequences, T tokens, P tokens before, O orders, H rows per key.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tierstore.errors import ConfigError, TierStoreError

from .codecs import codec_dtype
from .hash_config import POLYNOMIAL
from .hash_spec import HashSpec
from .token_shapes import checked_arguments

if TYPE_CHECKING:
    from tierstore import Store, TableSpec

TOKENS_MIN = 64  # the least that a lookup's buffers are made for


class DeviceEmbedding:
    """One table's lookups on the device. Any threads may call; their lookups take turns."""

    def __init__(self, store: Store, table: TableSpec, layer: int | str, hash_spec: HashSpec) -> None:
        self.device: torch.device = store.device
        self._store, self._table, self._layer, self._hash_spec = store, table, layer, hash_spec
        self._dtype = codec_dtype(table.codec)
        self._is_capturing = store.capture_probe()
        self._device_hash, self._write_keys = _device_hash(hash_spec, layer, self.device)
        self._lookups: dict[int, Any] = {}  # by tokens; a captured graph may use any of them, so all are kept
        self._tokens_max = 1 << 62  # of one lookup, as far as is known; more tokens go in several parts
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._started: _Started | None = None
        self._lock = threading.RLock()  # guards `_lookups`, `_tokens_max`, `_started`, `_widths`, for a whole lookup
        self._widths: dict[int, tuple[int, int]] = {}  # P and T of each lookup's last call, for its errors

    @property
    def history_tokens(self) -> int:
        """As of the hash."""
        return self._hash_spec.history_tokens

    def copy(self) -> DeviceEmbedding:
        """Another one of the same table, with buffers of its own."""
        return DeviceEmbedding(self._store, self._table, self._layer, self._hash_spec)

    def reserve(self, max_tokens: int) -> None:
        """Makes the buffers of all lookups of up to so many tokens, which are as many again in page-locked memory.

        Calls of any such shape can then be captured in a graph without an eager one before. Raises `BudgetError` if the
        page-locked memory does not hold them, and what `Store.open_lookup` raises.
        """
        with self._lock:
            num_tokens = TOKENS_MIN
            while self._lookup(num_tokens).tokens_max < min(max_tokens, self._tokens_max):
                num_tokens *= 2

    def prefetch(self, call: DeviceCall) -> None:
        """Starts the lookup that a `forward` of the same tensors takes; one that was started before is dropped."""
        with self._lock:
            self._prefetch(call)

    def _prefetch(self, call: DeviceCall) -> None:
        self._drop()
        self._check_all()
        values = self._empty(call)
        with self._on_side():
            keys = self._keys(call)
            lookup = self._start_first(keys, values)
        self._share(values, self._side)  # it may be dropped while the kernels still write it
        self._started = _Started(call, values, keys, lookup, self._is_capturing())

    def forward(self, call: DeviceCall) -> torch.Tensor:
        """Returns the values, [B, T, O * H, dim]. On a GPU it only launches; for ids on the host it waits for reads."""
        with self._lock:
            return self._forward(call)

    def _forward(self, call: DeviceCall) -> torch.Tensor:
        started = self._started
        if started is None or started.call.identity != call.identity:
            self._drop()
            self._check_all()
            values = self._empty(call)
            keys = self._keys(call)
            lookup = self._start_first(keys, values)
        else:
            self._check_capture(started)
            self._started = None
            values, keys, lookup = started.values, started.keys, started.lookup
            self._join(values, keys)
        for start in range(0, max(1, len(keys)), lookup.tokens_max):
            if start > 0:
                self._start(lookup, keys[start : start + lookup.tokens_max], values[start : start + lookup.tokens_max])
            lookup.finish()
        if self._side is None:
            self._check(lookup)
        return values.unflatten(0, call.shape)

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given, and raises what went wrong."""
        if self._side is not None:
            torch.cuda.synchronize(self.device)
        with self._lock:
            for lookup in self._lookups.values():
                self._check(lookup)

    def _start_first(self, keys: torch.Tensor | np.ndarray, values: torch.Tensor) -> Any:
        """Starts the first part of a lookup; returns whose buffers it uses."""
        lookup = self._lookup(len(keys))
        self._start(lookup, keys[: lookup.tokens_max], values[: lookup.tokens_max])
        return lookup

    def _check_all(self) -> None:
        """Raises what went wrong in any lookup that the device has done; not while a graph is captured."""
        if self._side is not None and not self._is_capturing():
            for lookup in self._lookups.values():
                self._check(lookup)

    @staticmethod
    def _start(lookup: Any, keys: torch.Tensor | np.ndarray, values: torch.Tensor) -> None:
        if isinstance(keys, np.ndarray):
            lookup.start_known(keys, values)
        else:
            lookup.start(keys, values)

    def _drop(self) -> None:
        """Ends a lookup that was started and not taken, so that its buffers are free, on either stream."""
        started = self._started
        if started is None:
            return
        self._check_capture(started)
        self._started = None
        with self._on_side(), contextlib.suppress(TierStoreError, OSError):  # of rows that nobody wants any more
            started.lookup.finish()
        self._join(started.values, started.keys)

    def _join(self, values: torch.Tensor, keys: torch.Tensor | np.ndarray) -> None:
        """Has the current stream wait for the side stream, and keeps their memory until both have done."""
        if self._side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._side)
            self._share(values, current)
            self._share(keys, current)

    def _share(self, memory: torch.Tensor | np.ndarray, stream: Any) -> None:
        """Lets the allocator know that a stream uses another one's memory. A graph's memory is its own."""
        if stream is not None and isinstance(memory, torch.Tensor) and not self._is_capturing():
            memory.record_stream(stream)

    def _check_capture(self, started: _Started) -> None:
        """Refuses to finish in a captured graph what was started outside: each replay would write to freed values."""
        if self._is_capturing() and not started.captured:
            raise ConfigError(
                f"table {self._table.name}: a prefetch that was started before the graph's capture cannot be finished "
                f"in it; call forward with its tensors before the capture"
            )

    @contextlib.contextmanager
    def _on_side(self) -> Iterator[None]:
        """The stream of its own, behind what the current one was given."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def _lookup(self, num_tokens: int) -> Any:
        wanted = min(self._tokens_max, max(TOKENS_MIN, 1 << (num_tokens - 1).bit_length() if num_tokens else 1))
        if wanted not in self._lookups:
            lookup = self._store.open_lookup(self._table.name, wanted)
            if lookup.tokens_max < wanted:
                self._tokens_max = lookup.tokens_max
            self._lookups[lookup.tokens_max] = lookup
            return lookup
        return self._lookups[wanted]

    def _empty(self, call: DeviceCall) -> torch.Tensor:
        shape = (call.shape[0] * call.shape[1], self._table.num_heads, self._table.dim)
        with torch.inference_mode(False):  # a prefetch in that mode may serve a training forward
            return torch.empty(shape, dtype=self._dtype, device=self.device)

    def _keys(self, call: DeviceCall) -> torch.Tensor | np.ndarray:
        """Returns the keys, [B * T, O]: on the device, or, for ids on the host, here."""
        num_orders = len(self._table.orders)
        if call.on_host:
            arrays = (None if tensor is None else tensor.numpy() for tensor in (call.history, call.dead))
            return self._hash_spec.keys(call.token_ids.numpy(), self._layer, *arrays).reshape(-1, num_orders)
        lookup = self._lookup(call.token_ids.numel())
        keys = torch.empty((*call.shape, num_orders), dtype=torch.int64, device=self.device)
        tokens = (call.token_ids, call.history, call.dead)
        self._write_keys(*tokens, self._device_hash, keys, lookup.invalid_token_position)
        self._widths[id(lookup)] = 0 if call.history is None else call.history.shape[1], call.shape[1]
        return keys.view(-1, num_orders)

    def _check(self, lookup: Any) -> None:
        """Raises what went wrong in a step that the device has done."""
        lookup.check()
        invalid = lookup.take_invalid_token_position()
        if invalid:
            past, num_tokens = self._widths[id(lookup)]
            sequence, position = divmod(invalid - 1, past + num_tokens)
            raise ValueError(
                f"the token id of sequence {sequence}, position {position - past} (below 0: in the history) is outside "
                f"the vocabulary of {self._hash_spec.vocab_size} (seen on the device, in this step or one before)"
            )


@dataclass(frozen=True)
class _Started:
    """A prefetch under way; captured: whether it is in a graph and not on its way itself."""

    call: DeviceCall
    values: torch.Tensor
    keys: torch.Tensor | np.ndarray
    lookup: Any
    captured: bool


class DeviceCall:
    """The arguments of one call: contiguous int64 and bool tensors, all on the device, or all on the host.

    `identity` is equal for calls with equal arguments. On the device, values are not compared: tensors are equal if
    they are the same memory and nobody has written there through torch in between. torch does not count writes to
    tensors that were made in inference mode: after a prefetch with one, do not write there before the forward.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        history: torch.Tensor | None,
        dead: torch.Tensor | None,
        device: torch.device,
        history_tokens: int,
    ) -> None:
        """history_tokens: how many of the tokens before count. Raises as `checked_arguments` does."""
        given = checked_arguments(token_ids, history, dead, history_tokens)
        self._given = given  # while it is kept, no other tensor has this memory
        self.identity = tuple(None if tensor is None else _identity(tensor) for tensor in given)
        self.on_host = token_ids.device.type == "cpu" and device.type != "cpu"  # those of another GPU are copied
        to = token_ids.device if self.on_host else device
        self.token_ids = token_ids.detach().to(to, torch.int64).contiguous()
        self.history = None if given.history is None else given.history.detach().to(to, torch.int64).contiguous()
        self.dead = None if given.dead is None else given.dead.detach().to(to).contiguous()
        self.shape = (token_ids.shape[0], token_ids.shape[1])


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.device.type == "cpu":
        return tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()
    version = None if tensor.is_inference() else tensor._version  # those made in inference mode have none
    return tuple(tensor.shape), tensor.data_ptr(), tensor.stride(), tensor.dtype, version


def _device_hash(spec: HashSpec, layer: int | str, device: torch.device) -> tuple[Any, Callable[..., None]]:
    """Returns the hash as the kernels take it, and the kernel's launcher."""
    barrier_id = -1 if spec.barrier_id is None else spec.barrier_id
    multipliers = torch.tensor(spec.multipliers(layer), dtype=torch.int64, device=device)
    if spec.kind == POLYNOMIAL:
        from tierstore.kernels.gpu.polynomial_keys import DeviceSums, polynomial_keys_of_tokens

        moduli, orders = (torch.tensor(each, device=device) for each in (spec.moduli(layer), spec.orders))
        weights = multipliers.view(len(spec.orders), -1)
        return DeviceSums(spec.vocab_size, weights, moduli, orders, barrier_id), polynomial_keys_of_tokens
    from tierstore.kernels.gpu.keys import DeviceHash, keys_of_tokens

    token_map = spec.kernel_token_map
    assert spec.pad_id is not None, "a spec that has its token map knows its pad id"
    made = DeviceHash(
        None if token_map is None else torch.from_numpy(token_map.copy()).to(device),
        spec.vocab_size,
        multipliers,
        spec.orders,
        spec.pad_id,
        barrier_id,
    )
    return made, keys_of_tokens
