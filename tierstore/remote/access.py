"""Where lookups by gRPC may be reached: addresses, and the grpc library itself, loaded only when it is used.

Input: "HOST:PORT", "grpc://host:port", the options of a server. Output: addresses, checked. Errors: `ConfigError` for a
malformed address, for a server that other machines could reach without TLS and a token, and if grpcio is not installed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..errors import ConfigError
from ..extras import missing
from ..ipc.ports import Address, parse_address
from .credentials import read_pair, read_token

FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


def load_grpc() -> Any:
    """Returns the grpc module; raises `ConfigError` if it is not installed.

    Asks it to survive forks, which it reads from the environment when it is first loaded. If something else has loaded
    it before without that, a forked child cannot use it at all; see `survives_forks`.
    """
    if "grpc" not in sys.modules:
        os.environ.setdefault(FORK_VARIABLE, "1")
    try:
        import grpc
    except ImportError as error:
        raise missing("a lookup by gRPC", "remote", error) from error
    return grpc


def survives_forks() -> bool:
    """Returns whether the loaded grpc can be used in a forked child."""
    from grpc._cython import cygrpc

    return bool(cygrpc.is_fork_support_enabled())


def parse_url(url: str) -> Address:
    """Returns the address of "grpc://host:port" or "grpcs://host:port" (TLS);
    raises `ConfigError` for anything else."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in ("grpc", "grpcs"):
        raise ConfigError(f"{url!r}: expected grpc://HOST:PORT, or grpcs://HOST:PORT for TLS")
    address = parse_address(rest, f"{url}:")
    if address.port == 0:
        raise ConfigError(f"{url!r}: port 0 is no server's; give the port that tierstore serve printed")
    return Address(address.host, address.port, tls=scheme == "grpcs")


def check_server_access(address: Address, *, has_token: bool, has_tls: bool) -> None:
    """Raises `ConfigError` if a server would be open to other machines without TLS or without a token."""
    missing = []
    if not has_tls:
        missing.append("no TLS")
    if not has_token:
        missing.append("no token")
    if missing and not address.is_loopback:
        raise ConfigError(
            f"{address}: beyond this machine, lookups need TLS (--tls-cert and --tls-key) and a token (--token-file); "
            f"there is {' and '.join(missing)}; give what is missing, or serve on 127.0.0.1"
        )


def check_options(
    address: str,
    token_file: str | os.PathLike[str] | None,
    tls_cert: str | os.PathLike[str] | None,
    tls_key: str | os.PathLike[str] | None,
) -> Address:
    """Returns the address to listen on; raises `ConfigError` if grpcio is missing or these do not go together."""
    load_grpc()
    wanted = parse_address(address, "--listen")
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError(f"{address}: TLS needs both --tls-cert and --tls-key; give both or none")
    check_server_access(wanted, has_token=token_file is not None, has_tls=tls_cert is not None)
    if token_file is not None:
        read_token(token_file)
    if tls_cert is not None and tls_key is not None:
        read_pair(tls_cert, tls_key)
    return wanted
