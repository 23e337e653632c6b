"""What modules over a store share: they are copied with their store, and pickled with the way to it.

Input: an open store and one of its tables. Output: a base class for modules. Errors: `ConfigError` for a table that the
store has not, `FingerprintMismatchError` for one of another hash, and where a pickled module arrives, what
`store_reference` raises.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import torch

from tierstore.errors import ConfigError, FingerprintMismatchError
from tierstore.spec import TableSpec

from .codecs import codec_dtype
from .hash_spec import HashSpec
from .lookup_operators import handle_of
from .store_reference import StoreReference, fixed_build

if TYPE_CHECKING:
    from tierstore import Store

AnyTable = TypeVar("AnyTable", covariant=True)


class StoreModule(torch.nn.Module):
    """A module that looks rows up in one table of a store, which stays open as long as the module lives.

    A store is files and threads: a copy shares it, because a model's copy is meant to look up the same rows. A pickled
    module carries how to open the store, or where its daemon is; where it is unpickled, the store is opened anew, once
    for all modules of a process.
    """

    _ANEW: ClassVar[frozenset[str]] = frozenset({"_store", "_table", "_handle"})  # attributes that `_bind` makes

    def __init__(self, store: Store, name: str) -> None:
        """Binds the table `name`. Raises `ConfigError` if the store has none, or its rows have no float type."""
        super().__init__()
        if not hasattr(store, "submit"):
            raise TypeError(f"store: a {type(store).__name__}; give a store, or train with TrainableEmbedding")
        self._table_spec = named_table(store, name).spec
        self.dtype = codec_dtype(self._table_spec.codec)
        whole = self._table_spec.whole or self._table_spec
        self.num_embeddings, self.num_heads = whole.num_rows, whole.num_heads
        self.embedding_dim = self._table_spec.dim
        self._bind(store)

    def _bind(self, store: Store) -> None:
        """Makes what belongs to one module and one open store, and so is neither copied nor pickled."""
        self._store = store
        self._table = named_table(store, self._table_spec.name)
        self._handle = handle_of(self, self._kind, _called(store), self._table_spec)

    @property
    def store(self) -> Store:
        """The store that it looks up in."""
        return self._store

    @property
    def table_spec(self) -> TableSpec:
        """What its table is."""
        return self._table_spec

    @property
    def _kind(self) -> str:
        """What beside the table decides which rows it gives for ids."""
        return type(self).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(
            {
                name: value if isinstance(value, (HashSpec, TableSpec)) else copy.deepcopy(value, memo)
                for name, value in self.__dict__.items()
                if name not in self._ANEW
            }
        )
        copied._bind(self._store)
        return copied

    def __copy__(self) -> Self:
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name not in self._ANEW}
        return _unpickled, (type(self), StoreReference.of(self._store), state)


def _unpickled(module_class: type[StoreModule], reference: StoreReference, state: dict[str, Any]) -> StoreModule:
    """Makes a module again from what was pickled, over the same table: one of another hash, shape or build is
    refused, but not what a daemon or a server has swapped since."""
    store = reference.open()
    expected = state["_table_spec"]
    found = named_table(store, expected.name).spec
    if found != expected:
        raise FingerprintMismatchError(
            f"table {expected.name} of {reference} is not the one that the module was pickled with: {found.num_rows} "
            f"rows of {found.row_bytes} bytes, hash {found.fingerprint[:16]}..., and {expected.num_rows} rows of "
            f"{expected.row_bytes} bytes, hash {expected.fingerprint[:16]}..., then; give it the store of that model"
        )
    reference.check_build(store)
    made = module_class.__new__(module_class)
    made.__dict__.update(state)
    made._bind(store)
    return made


def _called(store: Store) -> str:
    """What handles call a store: its name, and the digest of its rows unless they may become others."""
    name, build = getattr(store, "name", "a store"), fixed_build(store)
    return f"{name}, digest {build[:16]}" if build else name


class TableHolder(Protocol[AnyTable]):
    """A store, or a training."""

    @property
    def tables(self) -> Mapping[str, AnyTable]:
        """Tables by name."""


class TableLike(Protocol):
    """A table of either."""

    @property
    def spec(self) -> TableSpec:
        """What the table is."""


def named_table(store: TableHolder[AnyTable], name: str) -> AnyTable:
    """Returns the table `name`, or raises `ConfigError` that lists those there are."""
    if name not in store.tables:
        raise ConfigError(
            f"the store has no table {name}; it has {', '.join(sorted(store.tables))}: pass one of these, or build it"
        )
    return store.tables[name]


def check_fingerprint(table: TableLike, spec: HashSpec, layer: int | str) -> None:
    """Raises `FingerprintMismatchError` unless `table` was built with the hash that `spec` describes for `layer`."""
    if table.spec.fingerprint != spec.fingerprint(layer):
        raise FingerprintMismatchError(
            f"table {table.spec.name} was built with hash {table.spec.fingerprint[:16]}..., this model's hash is "
            f"{spec.fingerprint(layer)[:16]}...: every row would be a wrong one; open the store that was built from "
            f"this model's "
            f"checkpoint, or take the hash from the store with HashSpec.from_store"
        )
