"""Addresses of the command line and of URLs: one form, whoever listens there or connects to it."""

from __future__ import annotations

import pytest

from tierstore.errors import ConfigError
from tierstore.ipc.ports import Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7443", "127.0.0.1", 7443),
        ("[::1]:1", "::1", 1),
        ("localhost:0", "localhost", 0),
        ("a.b:65535", "a.b", 65535),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert parse_address(text, "x") == Address(host, port)
    assert str(parse_address(text, "x")) == text


NO_ADDRESSES = [
    "",
    "7443",
    ":7443",
    "host",
    "host:",
    "host:-1",
    "host:65536",
    "::1:5",
    "[::1]",
    "a b:1",
    "h:٣",
    "u@h:1",
]


@pytest.mark.parametrize("text", [*NO_ADDRESSES, "[h]:1"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--listen .*: not an address; write HOST:PORT"):
        parse_address(text, "--listen")
