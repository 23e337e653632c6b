"""Ports: addresses to listen at, and why one cannot be had.

Input: "HOST:PORT". Output: a listening socket, or none and no error, if only looked whether the port is free. Errors:
`ConfigError` with the cause and its remedy: a taken port is told apart from an address of another host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable

from ..causes import Fault, named
from ..errors import ConfigError

IPV6_NETWORK_BITS = 64  # of an address: what one customer of a provider has


def parse_address(address: str, what: str) -> tuple[str, int]:
    """Returns (host, port) of "HOST:PORT"; IPv6 in brackets. `what` names the option. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not (host and colon and port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ConfigError(
            f"{what} {address!r}: that is no HOST:PORT with a port of 0 to 65535; "
            "write one such as 127.0.0.1:9464 or [::1]:9464"
        )
    return host, int(port)


def listen(address: str, what: str, backlog: int) -> socket.socket:
    """Returns a socket that listens at "HOST:PORT". `what` names the option. Raises `ConfigError`."""
    host, port = parse_address(address, what)
    try:
        family, _, _, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
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
    with contextlib.ExitStack() as held:
        for what, address in wanted:
            held.enter_context(listen(address, what, 1))


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
