"""Secrets of lookups by gRPC: the token that calls bear, certificates and private keys, read from files.

Input: paths. Output: their content, checked, and for a server its credentials as grpc takes them, read again on demand.
Errors: `ConfigError` for a file that is missing, unfit, or readable by others; `PermissionError` for a call that bears
no token or a wrong one.
"""

from __future__ import annotations

import hmac
import os
import ssl
import stat
import time
from typing import Any

from ..causes import named
from ..errors import ConfigError
from ..ipc.identity import known_ids
from .messages import TOKEN_HEADER

TOKEN_CHARS_MIN = 16
TOKEN_BYTES_MAX = 4096
CERTIFICATE_BYTES_MAX = 1 << 20
PAIR_TRIES = 3  # to read a certificate and a key that belong together
PAIR_RETRY_S = 0.1  # between two such tries


class ServerCredentials:
    """A server's token and certificate, from their files. Any thread may call; `reload` one at a time."""

    def __init__(
        self,
        grpc: Any,
        token_file: str | os.PathLike[str] | None,
        tls_cert: str | os.PathLike[str] | None,
        tls_key: str | os.PathLike[str] | None,
    ) -> None:
        """token_file: None if calls need no token. tls_cert, tls_key: both None without TLS. Raises `ConfigError`."""
        self._grpc = grpc
        self._token_file = token_file
        self._tls = None if tls_cert is None or tls_key is None else (tls_cert, tls_key)
        self._token = None if token_file is None else read_token(token_file)
        self._renewed: Any = None  # a certificate as grpc takes it, until grpc has fetched it

    def reload(self) -> None:
        """Reads the files again, for new calls and connections. Raises `ConfigError` if one is bad, and keeps the old.

        A certificate and a key that do not belong together are bad.
        """
        token = None if self._token_file is None else read_token(self._token_file)
        if self._tls is not None:
            self._renewed = self._read_certificate(self._tls)
        self._token = token  # last, so that a bad certificate keeps the old token too

    def for_server(self) -> Any:
        """Returns what a grpc server takes to listen with TLS; None without TLS."""
        if self._tls is None:
            return None
        return self._grpc.dynamic_ssl_server_credentials(self._read_certificate(self._tls), self._take_renewed, False)

    def check_token(self, metadata: Any, address: str) -> None:
        """Raises `PermissionError` unless a call's metadata have the token; address: of the server, for the message."""
        if self._token is None:
            return
        given = next((str(value) for name, value in metadata if name == TOKEN_HEADER), None)
        if given is None:
            raise PermissionError(f"{address} wants a token, and the call bears none; give token_file")
        # In constant time: how long a refusal takes must not show how much of a guess was right.
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise PermissionError(f"the call bears another token than {address} wants; give the token_file that it has")

    def _read_certificate(self, tls: tuple[str | os.PathLike[str], str | os.PathLike[str]]) -> Any:
        certificate, key = read_pair(*tls)
        return self._grpc.ssl_server_certificate_configuration([(key, certificate)])

    def _take_renewed(self) -> Any:
        """grpc asks at every handshake for a new certificate; None keeps the one that it has."""
        renewed, self._renewed = self._renewed, None
        return renewed


def read_token(path: str | os.PathLike[str]) -> str:
    """Returns the token in a file, without blanks around it.

    Raises `ConfigError` if the file is missing, no regular file, readable by others, or has less than 16 characters.
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


def _check_private(path: str | os.PathLike[str], what: str, status: os.stat_result) -> None:
    """Raises `ConfigError` if others than this process's user may read a secret.

    A file of root's that one group may read is as private if that group is this process's own, or root's: so Kubernetes
    gives secrets to a pod (mode 440, the group of fsGroup), and systemd its credentials (mode 440 by an access list).
    """
    mode, owner, group = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    if not mode & 0o077:
        return
    own_groups = {os.getegid(), *os.getgroups()}
    if not mode & 0o037 and owner in known_ids("uid", {0}) and group in known_ids("gid", {0, *own_groups}):
        return
    text = f"the {what} file {path} may be read by others (mode {mode:o}, owner {owner}, group {group}"
    if owner == os.geteuid():
        raise ConfigError(f"{text}, expected mode 600 or less); run: chmod 600 {path}")
    raise ConfigError(
        f"{text}; this process runs as user {os.geteuid()}, groups {sorted(own_groups)}); give a file that only this "
        "user may read, or one of root's, mode 440, of a group of this user's: in Kubernetes, set fsGroup and "
        "defaultMode: 0440"
    )


def check_pair(certificate: bytes, key: bytes, names: str) -> None:
    """Raises `ConfigError` if a private key is not the certificate's, or one of the two is damaged. names: of the
    files.

    Checks the bytes themselves, in memory, so that what is checked is what is used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # how strong they are is grpc's to judge
    fd = os.memfd_create("tierstore-pair", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(certificate + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{names}: the private key is not the certificate's; give the two that were made together"
            ) from error
        raise ConfigError(
            f"{names}: no certificate and private key of PEM ({error.reason or error}); renew them"
        ) from error
    except _EncryptedKey as error:
        raise ConfigError(
            f"{names}: the private key has a password; give one without: openssl pkey -in KEY -out PLAIN"
        ) from error
    finally:
        os.close(fd)


class _EncryptedKey(Exception):
    """A private key asks for a password."""


def _no_password() -> str:
    raise _EncryptedKey


def read_pair(tls_cert: str | os.PathLike[str], tls_key: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """Returns a certificate and its private key, PEM, that belong together. Raises `ConfigError`.

    A pair that does not is read again, PAIR_TRIES times in all: a renewal writes one file after the other.
    """
    for left in reversed(range(PAIR_TRIES)):
        certificate, key = read_certificate(tls_cert, "certificate"), read_certificate(tls_key, "private key")
        try:
            check_pair(certificate, key, f"{tls_cert} and {tls_key}")
            break
        except ConfigError:
            if not left:
                raise
            time.sleep(PAIR_RETRY_S)
    return certificate, key


def _read_file(path: str | os.PathLike[str], bytes_max: int, what: str, *, private: bool) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise named(error, f"the {what} file {path} cannot be read", path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the {what} file {path} is no regular file; give one")
        if private:
            _check_private(path, what, status)
        if status.st_size > bytes_max:
            raise ConfigError(f"the {what} file {path} has {status.st_size} bytes, at most {bytes_max} are expected")
        return os.read(descriptor, bytes_max)
    finally:
        os.close(descriptor)
