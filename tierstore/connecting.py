"""connect: the way to a store that a daemon serves, from the same host or from another."""

from __future__ import annotations

import os

from .attached.backing import DIAL_S, attach
from .errors import ConfigError
from .store.store import Store

CALL_S = 30.0


def connect(
    address: str | os.PathLike[str],
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
) -> Store:
    """Returns the store of a daemon (`tierstore serve`); also `tierstore.connect`.

    address: the path of its socket: this process then looks up in the daemon's memory by itself, see `attach` for io,
    threads, readers, staging, hbm and device. Or "grpc://HOST:PORT", "grpcs://HOST:PORT" by TLS: every lookup is a
    call, see `connect_remote` for token_file and ca_file. timeout_s: for a path, how long to try (5 s); else, how long
    any lookup may take (30 s).

    Blocks. Raises what those raise: `DaemonError` if the daemon cannot be reached or refuses,
    `ConfigError` for options.
    """
    text = os.fspath(address)
    if "://" not in text:
        if token_file is not None or ca_file is not None:
            raise ConfigError(f"{text}: token_file and ca_file are of remote lookups, grpc://HOST:PORT; leave them out")
        limit_s = DIAL_S if timeout_s is None else timeout_s
        return attach(
            text, io=io, threads=threads, readers=readers, staging=staging, timeout_s=limit_s, hbm=hbm, device=device
        )
    if hbm is not None or device is not None:
        raise ConfigError(
            f"{text}: hbm and device are for a daemon of this host, by the path of its socket; leave them out"
        )
    from .remote.client import connect_remote

    return connect_remote(
        text, token_file=token_file, ca_file=ca_file, timeout_s=CALL_S if timeout_s is None else timeout_s
    )
