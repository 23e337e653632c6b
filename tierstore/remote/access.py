"""Who may reach lookups by gRPC, and how: addresses, tokens, and the grpc library itself, loaded only when it is used.

Flows in: "HOST:PORT", "grpc://host:port", files. Flows out: parsed and checked. Refuses addresses that are none, tokens
that are short or that others may read, and anything beyond this machine without TLS and a token.
"""

from __future__ import annotations

import os
import ssl
import stat
import sys
import time
from typing import Any

from ..causes import named
from ..errors import ConfigError
from ..extras import missing
from ..ipc.identity import known_ids
from ..ipc.ports import Address, parse_address

TOKEN_CHARS_MIN = 16
TOKEN_BYTES_MAX = 4096
CERTIFICATE_BYTES_MAX = 1 << 20
PAIR_TRIES = 3  # to read a certificate and a key that belong together,
PAIR_AGAIN_S = 0.1  # so long after each other
FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


def load_grpc() -> Any:
    """Returns the grpc module; raises `ConfigError` where it is not installed.

    Asks it to survive forks, which it reads from the environment when it is first loaded. Where it was loaded before,
    without that, a forked child cannot use it at all; `survives_forks` says so.
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
    """Raises `ConfigError` where a server would be open to other machines without TLS or without a token."""
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
    """Returns the address to listen on; raises `ConfigError` where grpcio is missing or these do not go together."""
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
        "user may read, or one of root's, mode 440, of a group of this user's: in Kubernetes, "
        "set fsGroup and defaultMode: 0440"
    )


def check_pair(certificate: bytes, key: bytes, names: str) -> None:
    """Raises `ConfigError` if a private key is not the certificate's, or one of the two is damaged. names:
    of the files.

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

    A pair that does not is read again PAIR_TRIES times: who renews both writes one after the other.
    """
    for left in reversed(range(PAIR_TRIES)):
        certificate, key = read_certificate(tls_cert, "certificate"), read_certificate(tls_key, "private key")
        try:
            check_pair(certificate, key, f"{tls_cert} and {tls_key}")
            break
        except ConfigError:
            if not left:
                raise
            time.sleep(PAIR_AGAIN_S)
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
