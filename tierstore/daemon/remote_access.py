"""Who may reach lookups by gRPC, and how: addresses, tokens, and the grpc library itself, loaded only when it is used.

Flows in: "HOST:PORT", "grpc://host:port", files. Flows out: parsed and checked. Refuses addresses that are none, tokens
that are short or that others may read, and anything beyond this machine without TLS and a token.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
from dataclasses import dataclass
from typing import Any

from ..causes import named
from ..errors import ConfigError
from ..extras import missing

TOKEN_CHARS_MIN = 16
TOKEN_BYTES_MAX = 4096
CERTIFICATE_BYTES_MAX = 1 << 20
FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


def load_grpc() -> Any:
    """Returns the grpc module; raises `ConfigError` where it is not installed.

    Asks it to survive forks, which it reads from the environment when it is first loaded. Where it was loaded before, without
    that, a forked child cannot use it at all; `survives_forks` says so.
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


@dataclass(frozen=True)
class Address:
    """A host and a port; `tls` of a client's URL."""

    host: str
    port: int
    tls: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether no byte leaves this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, what: str) -> Address:
    """Returns the address that "HOST:PORT" or "[IPV6]:PORT" says; `what` names the option in the `ConfigError`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    sound = colon and host and bracketed == (":" in host) and not set(host) & set("/@?#[] ")
    if not sound or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{what}: {text!r} is no address; write HOST:PORT, such as 127.0.0.1:7443 or [::1]:7443")
    return Address(host, int(port))


def parse_url(url: str) -> Address:
    """Returns the address of "grpc://host:port" or "grpcs://host:port" (TLS); raises `ConfigError` for anything else."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in ("grpc", "grpcs"):
        raise ConfigError(f"{url!r}: expected grpc://HOST:PORT, or grpcs://HOST:PORT for TLS")
    address = parse_address(rest, url)
    if address.port == 0:
        raise ConfigError(f"{url!r}: port 0 is no server's; give the port that tierstore serve printed")
    return Address(address.host, address.port, tls=scheme == "grpcs")


def check_server_access(address: Address, *, has_token: bool, has_tls: bool) -> None:
    """Raises `ConfigError` where a server would be open to other machines without TLS or without a token."""
    missing = []
    if not has_tls:
        missing.append("no TLS")
    if not has_token:
        missing.append("no token")
    if missing and not address.is_loopback:
        raise ConfigError(
            f"{address}: beyond this machine, lookups need TLS (--tls-cert and --tls-key) and a token (--token-file); there is "
            f"{' and '.join(missing)}; give what is missing, or serve on 127.0.0.1"
        )


def check_options(
    address: str,
    token_file: str | os.PathLike[str] | None,
    tls_cert: str | os.PathLike[str] | None,
    tls_key: str | os.PathLike[str] | None,
) -> Address:
    """Returns the address to listen on; raises `ConfigError` where grpcio is missing or these do not go together."""
    load_grpc()
    wanted = parse_address(address, "address")
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError(f"{address}: TLS needs both --tls-cert and --tls-key; give both or none")
    check_server_access(wanted, has_token=token_file is not None, has_tls=tls_cert is not None)
    if token_file is not None:
        read_token(token_file)
    if tls_cert is not None and tls_key is not None:
        read_certificate(tls_cert, "certificate")
        read_certificate(tls_key, "private key")
    return wanted


def read_token(path: str | os.PathLike[str]) -> str:
    """Returns the token that a file holds, blanks around it apart.

    Raises `ConfigError` where the file is missing, no regular file, readable by others, or has less than 16 characters.
    """
    data = _read_file(path, TOKEN_BYTES_MAX, "token", private=True)
    try:
        token = data.decode("ascii").strip()
    except UnicodeDecodeError:
        token = "\n"
    if not token.isprintable() or " " in token:
        raise ConfigError(
            f"the token file {path} holds other than one word of ASCII; write one: openssl rand -hex 32 > {path}"
        )
    if len(token) < TOKEN_CHARS_MIN:
        raise ConfigError(
            f"the token in {path} has {len(token)} characters, at least {TOKEN_CHARS_MIN} are needed; "
            f"write a longer one: openssl rand -hex 32 > {path}"
        )
    return token


def read_certificate(path: str | os.PathLike[str], what: str) -> bytes:
    """Returns a PEM file's bytes; private keys must not be readable by others. Raises `ConfigError`, naming `what`."""
    data = _read_file(path, CERTIFICATE_BYTES_MAX, what, private="key" in what)
    if b"-----BEGIN " not in data:
        raise ConfigError(f"the {what} {path} is no PEM file; it must have a line -----BEGIN ...")
    return data


def _read_file(path: str | os.PathLike[str], bytes_max: int, what: str, *, private: bool) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise named(error, f"the {what} file {path} cannot be read", path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the {what} file {path} is no regular file; give one")
        if private and status.st_mode & 0o077:
            raise ConfigError(
                f"the {what} file {path} may be read by others (mode {stat.S_IMODE(status.st_mode):o}, expected 600 or less); "
                f"run: chmod 600 {path}"
            )
        if status.st_size > bytes_max:
            raise ConfigError(f"the {what} file {path} has {status.st_size} bytes, at most {bytes_max} are expected")
        return os.read(descriptor, bytes_max)
    finally:
        os.close(descriptor)
