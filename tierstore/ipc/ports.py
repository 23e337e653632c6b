"""Ports: addresses to listen at, and why one cannot be had.

Input: "HOST:PORT". Output: a listening socket, or none and no error, if only looked whether the port is free. Errors:
`ConfigError` with the cause and its remedy: a taken port and an address of another host are different errors.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from ..causes import Fault, named
from ..errors import ConfigError

PORT_MAX = 65535
FOREIGN_CHARS = frozenset("/@?#[] ")  # of URLs: a host name has none of them
IPV6_NETWORK_BITS = 64  # of an address: what one customer of a provider has


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
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, what: str) -> Address:
    """Parses "HOST:PORT" or "[IPV6]:PORT".

    Args:
        text: the address. Port 0 asks the system for a free one.
        what: names the option in the error.

    Raises:
        ConfigError: it is not an address.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    sound = colon and host and bracketed == (":" in host) and not set(host) & FOREIGN_CHARS
    if not sound or not port.isascii() or not port.isdecimal() or int(port) > PORT_MAX:
        raise ConfigError(
            f"{what} {text!r}: not an address; write HOST:PORT with a port of 0 to {PORT_MAX}, such as 127.0.0.1:9464 "
            f"or [::1]:9464"
        )
    return Address(host, int(port))


def listen(address: str, what: str, backlog: int) -> socket.socket:
    """Returns a socket that listens at "HOST:PORT". `what` names the option. Raises `ConfigError`."""
    parsed = parse_address(address, what)
    try:
        family, _, _, _, bound = socket.getaddrinfo(
            parsed.host, parsed.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(bound)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise cannot_listen(address, what, error) from error
    return listener


def cannot_listen(address: str, what: str, error: Exception) -> ConfigError:
    """Returns the error for an address that cannot be listened at, with the remedy of its cause."""
    refused = f"{what} {address}: it cannot be listened at"
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror):
        remedy = "give a port of 1024 or more, or the capability CAP_NET_BIND_SERVICE"
        return ConfigError(str(named(error, refused, fault=Fault(ConfigError, remedy))))
    return ConfigError(f"{refused}: {error}; give an address of this host and a free port")


def check_ports(wanted: Iterable[tuple[str, str]]) -> None:
    """Raises `ConfigError` if one of these addresses cannot be listened at now, all at the same time.

    wanted: (the option's name, "HOST:PORT").
    """
    with contextlib.ExitStack() as listening:
        for what, address in wanted:
            listening.enter_context(listen(address, what, 1))


def network_of(host: str) -> str:
    """Returns what limits of a peer are counted by: an IPv4 address, or the network of 64 bits of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, IPV6_NETWORK_BITS), strict=False))
    return str(address)
