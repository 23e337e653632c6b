"""Lookups as operators of torch, for whoever traces a model: torch.compile, torch.export and AOT see one opaque call.

Input: tensors of ids, and the handle of a module over a store. Output: a new tensor of rows; to the tracer, its shape.
Errors: `StoreNotReadyError` if a traced program runs where no such module lives, `ConfigError` if it gives other
shapes; else what lookups raise.

An operator takes tensors, numbers and text, and no module. So a handle names one: the module with this very handle
where it lives, else, in another process or after a copy, any module over the same table of a store of the same name
and, unless a daemon or a server may swap them, the same rows.
Untraced calls do not come here: an operator's dispatch takes longer than a lookup's own arithmetic.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling
from torch.jit import is_tracing
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tierstore.errors import ConfigError, StoreNotReadyError

if TYPE_CHECKING:
    from tierstore import TableSpec

_modules: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
# A lookup runs on the host: a graph that was captured without it would replay old rows.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def handle_of(module: torch.nn.Module, kind: str, store: str, table: TableSpec) -> str:
    """Returns a new handle of a module over a table; the module is not kept alive by it.

    kind: what else decides its rows: modules of one kind, over one table, give the same for the same ids. store: its
    name, with the digest of its rows if they stay what they are.
    """
    handle = f"{kind} over table {table.name} of {store}, hash {table.fingerprint[:16]}#{next(_numbers)}"
    _modules[handle] = module
    return handle


def module_of(handle: str) -> Any:
    """Returns the living module of a handle, or one of its kind over the same table, whose store is open."""
    found = _modules.get(handle)
    if found is not None:
        return found
    what = handle.rpartition("#")[0]
    for other, module in list(_modules.items()):
        if other.rpartition("#")[0] == what and not module._store._closed:
            return module
    like = what.partition(" of ")[0]
    others = sorted({other.rpartition("#")[0] for other in list(_modules) if other.startswith(f"{like} of ")})
    raise StoreNotReadyError(
        f"this compiled or exported program asks {what}, and no such module lives in this process"
        f"{', only ' + ' and '.join(others) if others else ''}: open that store, make the module over its table, and "
        f"keep it"
    )


def is_traced() -> bool:
    """Whether a tracer watches this call, so that it must be an operator."""
    return is_compiling() or is_in_torch_dispatch_mode() or is_tracing()


@torch.library.custom_op("tierstore::rows", mutates_args=(), tags=_TAGS)
def rows_operator(row_ids: torch.Tensor, handle: str, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`RowIdEmbedding.forward` of the module that the handle names."""
    return _as_traced(module_of(handle).look_up(row_ids), handle, (*row_ids.shape, dim), dtype)


@rows_operator.register_fake
def _(row_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
    _, dim, dtype = rest
    return row_ids.new_empty((*row_ids.shape, dim), dtype=dtype)


@torch.library.custom_op("tierstore::lookup", mutates_args=(), tags=_TAGS)
def lookup_operator(
    token_ids: torch.Tensor,
    history: torch.Tensor | None,
    dead: torch.Tensor | None,
    handle: str,
    num_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | None,
) -> torch.Tensor:
    """`TieredEmbedding.forward` of the module that the handle names; device: of the rows, None for that of the ids."""
    values = module_of(handle).look_up(token_ids, history, dead)
    return _as_traced(values, handle, (*token_ids.shape, num_heads, dim), dtype).to(device or token_ids.device)


@lookup_operator.register_fake
def _(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
    *_, num_heads, dim, dtype, device = rest
    return token_ids.new_empty((*token_ids.shape, num_heads, dim), dtype=dtype, device=device or token_ids.device)


def _as_traced(values: torch.Tensor, handle: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns values if they are what the program was traced with; else a compiled program would misread them."""
    if values.shape != shape or values.dtype != dtype:
        raise ConfigError(
            f"this compiled or exported program expects {list(shape)} {dtype} of {handle.rpartition('#')[0]}, "
            f"which gives {list(values.shape)} {values.dtype}: compile or export it anew with this store"
        )
    return values
