"""connect: the way to a store that a daemon serves, from the same host or from another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .attached.backing import DIAL_S, attach
from .errors import ConfigError
from .store.store import Store

CALL_S = 30.0


def connect(
    address: str | os.PathLike[str] | Sequence[str],
    *,
    io: str = "auto",
    threads: int | None = None,
    readers: int | None = None,
    staging: int | str = "16MiB",
    timeout_s: float | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    hbm: int | str | None = None,
    device: str | None = None,
    dram: int | str = 0,
) -> Store:
    """Returns the store of a daemon (`tierstore serve`); also `tierstore.connect`.

    address: the path of its socket: this process then looks up in the daemon's memory by itself, see `attach` for io,
    threads, readers, staging, hbm and device. Or "grpc://HOST:PORT", "grpcs://HOST:PORT" by TLS: every lookup is a
    call, see `connect_remote` for token_file and ca_file. Or a list of such, of daemons that each serve a slice of one
    store, which they are together; dram: what this process may keep of its hottest entries. timeout_s: for a path, how
    long to try (5 s); else, how long any lookup may take (30 s).

    Blocks. Raises what those raise: `DaemonError` if the daemon cannot be reached or refuses,
    `ConfigError` for options.
    """
    if isinstance(address, (list, tuple)) or "://" in os.fspath(address):  # type: ignore[arg-type]
        return _connect_remote(
            address, hbm is not None or device is not None, timeout_s, token_file=token_file, ca_file=ca_file, dram=dram
        )
    text = os.fspath(address)  # type: ignore[arg-type]
    if token_file is not None or ca_file is not None:
        raise ConfigError(f"{text}: token_file and ca_file are of remote lookups, grpc://HOST:PORT; leave them out")
    if dram:
        raise ConfigError(f"{text}: dram is of a list of addresses; the daemon's memory is this process's too")
    limit_s = DIAL_S if timeout_s is None else timeout_s
    return attach(
        text, io=io, threads=threads, readers=readers, staging=staging, timeout_s=limit_s, hbm=hbm, device=device
    )


def _connect_remote(address: object, wants_device: bool, timeout_s: float | None, **options: Any) -> Store:
    several = list(address) if isinstance(address, (list, tuple)) else None
    for each in several or ():
        if "://" not in str(each):
            raise ConfigError(
                f"{each!r} in a list of addresses: only grpc://HOST:PORT and grpcs://HOST:PORT can be slices of one "
                "store; have the daemon listen there, too (tierstore serve --listen)"
            )
    if wants_device:
        raise ConfigError(
            f"{address}: hbm and device are for a daemon of this host, by the path of its socket; leave them out"
        )
    from .remote.client import connect_remote

    url = str(address) if several is None else several
    return connect_remote(url, timeout_s=CALL_S if timeout_s is None else timeout_s, **options)
