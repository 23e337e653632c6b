"""Who may look up by gRPC: addresses, tokens, TLS; everything else is refused by name."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.daemon_peers import as_root, in_child
from support.remote_servers import serving
from support.served import ServeProcess
from support.shapes import HEADS, ROW_BYTES
from support.stores import Model, random_keys

from tierstore.daemon.metrics import MetricsServer
from tierstore.errors import ConfigError, DaemonError
from tierstore.ipc.ports import Address
from tierstore.remote.access import (
    check_options,
    check_server_access,
    parse_url,
)
from tierstore.remote.client import connect_remote
from tierstore.remote.credentials import read_certificate, read_pair, read_token

TOKEN = "0123456789abcdef-token"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return write_private(tmp_path / "token", TOKEN + "\n")


def write_private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority (ca), and what it signed for 127.0.0.1: good, renewed, and expired,
    each .pem and .key."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "3650")
    for name, days in (("good", "3650"), ("renewed", "3650"), ("expired", "-1")):
        run("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        run(*signed, "-out", f"{name}.pem", "-days", days, "-extfile", "names")
        (folder / f"{name}.key").chmod(0o600)
    return folder


@pytest.mark.parametrize(
    "url", ["127.0.0.1:1", "http://h:1", "grpc:/h:1", "grpc://h", "grpc://h:0", "grpcs://", "grpc://h:1/x"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="grpc"):
        parse_url(url)
    with pytest.raises(ConfigError):
        connect_remote(url)


def test_urls_say_whether_tls_is_spoken() -> None:
    assert parse_url("grpcs://h:1") == Address("h", 1, tls=True)
    assert not parse_url("grpc://[::1]:1").tls


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_neither_tls_nor_a_token_is_asked_for(host: str) -> None:
    check_server_access(Address(host, 1), has_token=False, has_tls=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "128.0.0.1"])
def test_beyond_this_machine_tls_and_a_token_are_both_asked_for(host: str) -> None:
    check_server_access(Address(host, 1), has_token=True, has_tls=True)
    for has_token, has_tls, missing in (
        (False, True, "there is no token"),
        (True, False, "there is no TLS"),
        (False, False, "there is no TLS and no token"),
    ):
        with pytest.raises(ConfigError, match=rf"--tls-cert and --tls-key.*--token-file.*{missing}"):
            check_server_access(Address(host, 1), has_token=has_token, has_tls=has_tls)


def test_a_server_beyond_this_machine_without_tls_and_a_token_does_not_start(built: Path, token_file: Path) -> None:
    with pytest.raises(ConfigError, match="no TLS and no token"), serving(built, "0.0.0.0:0"):
        pass
    with pytest.raises(ConfigError, match="there is no TLS"), serving(built, "0.0.0.0:0", token_file=token_file):
        pass
    with pytest.raises(ConfigError, match="give both or none"), serving(built, tls_cert=token_file):
        pass


def test_a_client_sends_nothing_to_other_machines_in_plain_text(token_file: Path) -> None:
    with pytest.raises(ConfigError, match="write grpcs://"):
        connect_remote("grpc://10.0.0.1:1", token_file=token_file)
    with pytest.raises(ConfigError, match="write grpcs://"):
        connect_remote("grpc://example.org:1")


def test_a_token_file_must_be_private_regular_and_long_enough(tmp_path: Path) -> None:
    file = write_private(tmp_path / "token", f"  {TOKEN}\n")
    assert read_token(file) == TOKEN
    for mode in (0o660, 0o604, 0o622, 0o777):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=rf"may be read by others \(mode {mode:o}.*chmod 600 {file}"):
            read_token(file)
    file.chmod(0o600)
    for text, words in (
        ("short", "has 5 characters, at least 16 are needed"),
        ("", "has 0 characters"),
        ("é" * 20, "one word of ASCII"),
        ("two words of sixteen", "one word of ASCII"),
        ("line-one-of-two\nline-two", "one word of ASCII"),
        ("x" * 5000, "has 5000 bytes, at most 4096"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_token(file)
    with pytest.raises(ConfigError, match="no regular file"):
        read_token(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_token(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="no regular file"):  # and does not wait for a writer
        read_token(tmp_path / "pipe")


def test_private_keys_must_be_private_and_certificates_pem(tmp_path: Path) -> None:
    file = write_private(tmp_path / "pem", "-----BEGIN CERTIFICATE-----\n")
    file.chmod(0o644)
    assert read_certificate(file, "certificate").startswith(b"-----BEGIN")
    with pytest.raises(ConfigError, match=f"chmod 600 {file}"):
        read_certificate(file, "private key")
    file.write_text("other")
    with pytest.raises(ConfigError, match="no PEM file"):
        read_certificate(file, "certificate")


def test_a_server_with_a_token_answers_nobody_without_it(
    built: Path, model: Model, token_file: Path, tmp_path: Path
) -> None:
    keys = random_keys(np.random.default_rng(0), 5)
    with serving(built, token_file=token_file) as server:
        url = f"grpc://{server.address}"
        with connect_remote(url, token_file=token_file) as store:
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        with pytest.raises(DaemonError, match="wants a token, and the call bears none; give token_file"):
            connect_remote(url)
        other = write_private(tmp_path / "other", TOKEN + "x")
        with pytest.raises(DaemonError, match="bears another token"):
            connect_remote(url, token_file=other)
        with grpc.insecure_channel(server.address) as channel:
            for name, value in (("authorization", TOKEN), ("authorization", f"bearer {TOKEN}"), ("token", TOKEN)):
                for method in ("Describe", "Lookup", "Stats", "Locate"):
                    ask = channel.unary_unary(f"/tierstore.v1.Lookups/{method}")
                    with pytest.raises(grpc.RpcError) as caught:
                        ask(b"", metadata=((name, value),), timeout=20)
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert TOKEN not in repr(server.record())


def test_the_message_of_a_call_without_the_token_is_not_even_read(built: Path, token_file: Path) -> None:
    with serving(built, token_file=token_file) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/tierstore.v1.Lookups/Lookup")(bytes(65 << 20), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # and not RESOURCE_EXHAUSTED, of its length


def test_lookups_by_tls(built: Path, model: Model, certificates: Path, token_file: Path) -> None:
    keys = random_keys(np.random.default_rng(1), 400)
    access = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key", "token_file": token_file}
    with serving(built, "0.0.0.0:0", **access) as server:
        url = f"grpcs://127.0.0.1:{server.address.rpartition(':')[2]}"
        with connect_remote(url, token_file=token_file, ca_file=certificates / "ca.pem") as store:
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        with pytest.raises(DaemonError, match=r"certificate is refused: .*give the ca_file that signed it"):
            connect_remote(url, token_file=token_file, timeout_s=60)
        with pytest.raises(DaemonError, match="it speaks TLS; write grpcs://"):
            connect_remote(url.replace("grpcs", "grpc"), token_file=token_file, timeout_s=5)


def test_an_expired_certificate_is_named(built: Path, certificates: Path) -> None:
    access = {"tls_cert": certificates / "expired.pem", "tls_key": certificates / "expired.key"}
    words = "certificate is refused: certificate has expired; renew it"
    with serving(built, **access) as server, pytest.raises(DaemonError, match=words):
        connect_remote(f"grpcs://{server.address}", ca_file=certificates / "ca.pem", timeout_s=60)


def test_a_server_without_tls_is_named(built: Path, certificates: Path) -> None:
    with serving(built) as server, pytest.raises(DaemonError, match="does not speak TLS"):
        connect_remote(f"grpcs://{server.address}", ca_file=certificates / "ca.pem", timeout_s=60)


def test_a_server_that_speaks_http_is_named() -> None:
    with (
        MetricsServer("127.0.0.1:0", dict) as server,
        pytest.raises(DaemonError, match="it speaks HTTP/1, and no gRPC; give the address of --listen, not"),
    ):
        connect_remote(f"grpc://{server.address}", timeout_s=5)


def test_a_certificate_with_another_key_does_not_start(built: Path, certificates: Path) -> None:
    names = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "renewed.key"}
    with pytest.raises(ConfigError, match=r"good\.pem and .*renewed\.key: the private key is not the certificate's"):
        check_options("127.0.0.1:0", None, names["tls_cert"], names["tls_key"])  # before anything is warmed
    with pytest.raises(ConfigError, match="the private key is not the certificate's"), serving(built, **names):
        pass


def test_a_damaged_or_locked_pair_is_named(certificates: Path, tmp_path: Path) -> None:
    good, key = certificates / "good.pem", certificates / "good.key"
    damaged = write_private(tmp_path / "damaged", "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match="no certificate and private key of PEM"):
        read_pair(good, damaged)
    locked = tmp_path / "locked"
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    locked.chmod(0o600)
    with pytest.raises(ConfigError, match="the private key has a password"):  # and nobody is asked for it
        read_pair(good, locked)
    assert read_pair(good, key) == (good.read_bytes(), key.read_bytes())


def test_a_pair_that_is_being_renewed_is_read_again(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used.pem"
    shutil.copy(certificates / "good.pem", used)
    monkeypatch.setattr(
        "tierstore.remote.credentials.time.sleep", lambda _: shutil.copy(certificates / "renewed.pem", used)
    )
    assert read_pair(used, certificates / "renewed.key")[0] == (certificates / "renewed.pem").read_bytes()


def test_a_reload_with_another_key_keeps_the_old_pair(built: Path, certificates: Path, tmp_path: Path) -> None:
    used = {ending: tmp_path / f"used.{ending}" for ending in ("pem", "key")}
    for ending, path in used.items():
        shutil.copy(certificates / f"good.{ending}", path)
    with serving(built, tls_cert=used["pem"], tls_key=used["key"]) as server:
        shutil.copy(certificates / "renewed.pem", used["pem"])
        with pytest.raises(ConfigError, match="the private key is not the certificate's"):
            server.reload()
        for _ in range(2):
            with connect_remote(f"grpcs://{server.address}", ca_file=certificates / "ca.pem", timeout_s=5) as store:
                assert store["layers.1"].lookup(np.ones((1, 3), dtype=np.int64)).shape == (1, HEADS, ROW_BYTES)


def test_a_daemon_that_is_told_to_reload_another_key_logs_it_and_serves_on(
    built: Path, certificates: Path, tmp_path: Path
) -> None:
    used = {ending: tmp_path / f"used.{ending}" for ending in ("pem", "key")}
    for ending, path in used.items():
        shutil.copy(certificates / f"good.{ending}", path)
    tls = ("--tls-cert", str(used["pem"]), "--tls-key", str(used["key"]))
    with ServeProcess(built, tmp_path / "socket", "--dram", "900KiB", "--listen", "127.0.0.1:0", *tls) as daemon:
        found = re.search(r"listen=(\S+)", daemon.line("event=ready"))
        assert found
        shutil.copy(certificates / "renewed.key", used["key"])
        daemon.process.send_signal(signal.SIGHUP)
        assert "the private key is not the certificate's" in daemon.line("event=reload_failed")
        with connect_remote(f"grpcs://{found[1]}", ca_file=certificates / "ca.pem", timeout_s=20) as store:
            assert store["layers.1"].lookup(np.ones((1, 3), dtype=np.int64)).shape == (1, HEADS, ROW_BYTES)


@as_root
@pytest.mark.parametrize(
    ("owner", "group", "mode", "is_taken"),
    [
        ("root", "own", 0o440, True),  # Kubernetes, with fsGroup
        ("root", "root", 0o440, True),  # systemd, by an access list
        ("root", "own", 0o444, False),
        ("root", "own", 0o460, False),
        ("root", "other", 0o440, False),
        ("other", "own", 0o440, False),
        ("own", "own", 0o440, False),
        ("own", "own", 0o400, True),
    ],
)
def test_a_secret_of_roots_for_the_readers_group_is_as_private_as_ones_own(
    tmp_path: Path, owner: str, group: str, mode: int, is_taken: bool
) -> None:
    ids = {"root": 0, "own": 54321, "other": 54322}
    file = tmp_path / "token"
    file.write_text(TOKEN)
    os.chown(file, ids[owner], ids[group])
    file.chmod(mode)
    fd = os.open(file, os.O_RDONLY)  # whatever lets a process open it
    path = f"/proc/self/fd/{fd}"

    def read() -> str:
        os.setresgid(54321, 54321, 54321)
        os.setgroups([54321])
        os.setresuid(54321, 54321, 54321)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", lambda *_: os.dup(fd))
            return read_token(path)

    said = in_child(read)
    os.close(fd)
    if is_taken:
        assert said == TOKEN
    else:
        assert "may be read by others" in said
        assert ("chmod 600" in said) == (owner == "own")
        assert ("fsGroup" in said) == (owner != "own")


def test_certificates_and_tokens_are_read_anew(built: Path, model: Model, certificates: Path, tmp_path: Path) -> None:
    keys = random_keys(np.random.default_rng(2), 5)
    token = write_private(tmp_path / "token", TOKEN)
    used = {ending: tmp_path / f"used.{ending}" for ending in ("pem", "key")}

    def use(name: str) -> None:
        for ending, path in used.items():
            shutil.copy(certificates / f"{name}.{ending}", path)

    use("expired")
    with serving(built, tls_cert=used["pem"], tls_key=used["key"], token_file=token) as server:
        url, access = f"grpcs://{server.address}", {"ca_file": certificates / "ca.pem", "timeout_s": 5}
        with pytest.raises(DaemonError, match="expired"):
            connect_remote(url, token_file=token, **access)
        use("renewed")
        with pytest.raises(DaemonError, match="expired"):  # until it is told
            connect_remote(url, token_file=token, **access)
        server.reload()
        with connect_remote(url, token_file=token, **access) as store:
            write_private(token, TOKEN + "2")
            server.reload()
            with pytest.raises(DaemonError, match="bears another token"):
                store["layers.1"].lookup(keys)
            with connect_remote(url, token_file=token, **access) as again:
                np.testing.assert_array_equal(again["layers.1"].lookup(keys), model.expected("layers.1", keys))
            used["pem"].write_text("damaged")
            token.chmod(0o644)
            with pytest.raises(ConfigError):
                server.reload()
            with connect_remote(url, token_file=write_private(tmp_path / "t2", TOKEN + "2"), **access) as still:
                assert still["layers.1"].lookup(keys).shape == (5, HEADS, ROW_BYTES)


def test_a_refused_ca_file_and_timeout_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a ca_file is of TLS"):
        connect_remote("grpc://127.0.0.1:1", ca_file=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        connect_remote("grpcs://127.0.0.1:1", ca_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="timeout_s is 0"):
        connect_remote("grpc://127.0.0.1:1", timeout_s=0)
