"""`tierstore serve`: the daemon, in the foreground, until a signal ends it.

Input: a store and options; signals. Output: a served socket, metrics and remote lookups if wanted, one line
of log an event, and what a service manager wants to hear. SIGTERM and SIGINT end it, with status 0;
SIGHUP reads files again.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tierstore.errors import ConfigError
from tierstore.process.interrupts import Ended
from tierstore.units import format_bytes, parse_bytes

from .cli import Progress

if TYPE_CHECKING:
    from tierstore.daemon.daemon import Daemon
    from tierstore.daemon.systemd import Notifier

ENDS_WITHIN_S = 30.0
BEAT_S = 1.0  # between two looks at signals and at the service manager's watchdog


@click.command("serve")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--socket", required=True, type=click.Path(path_type=Path), help="Where clients attach: a path, made new."
)
@click.option("--dram", default="2GiB", show_default=True, help="Memory that the tiers may take, all included.")
@click.option("--io", type=click.Choice(["auto", "uring", "mmap", "pread"]), default="auto", show_default=True)
@click.option("--placement", help="Epoch to begin with, or 'none', at any time.  [default: the store's current one]")
@click.option("--clients", type=click.IntRange(1, 1024), default=64, show_default=True, help="Attached at once.")
@click.option(
    "--allow-user",
    "users",
    type=int,
    multiple=True,
    metavar="UID",
    help="Who may attach beside you and root; they need read access to the store's files, too.",
)
@click.option(
    "--gpu-clients",
    is_flag=True,
    help="Let clients' GPUs read the static set in place; whoever may attach can then write it.",
)
@click.option(
    "--replan", default="600", show_default=True, metavar="SECONDS", help="Between replans from traffic, or 'off'."
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics here.")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Serve remote lookups by gRPC here, and the standard health service; beyond loopback with all below.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain of --listen, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="What remote clients must bear, at least 16 characters."
)
@click.option(
    "--threads", type=int, metavar="N", help="That copy the rows of one large lookup by gRPC.  [default: one a core]"
)
@click.option(
    "--readers", type=int, metavar="N", help="Lookups by gRPC that may read pages at once.  [default: two a core]"
)
@click.option(
    "--forget-swap",
    is_flag=True,
    help="Serve STORE, also if 'tierstore swap' put another store in its place before the daemon ended.",
)
@click.option(
    "--follow", is_flag=True, help="Serve each version of the rows that is published ('tierstore publish') meanwhile."
)
@click.option("--log-format", type=click.Choice(["logfmt", "json"]), default="logfmt", show_default=True)
def command(
    store: Path,
    socket: Path,
    dram: str,
    io: str,
    placement: str | None,
    clients: int,
    users: tuple[int, ...],
    gpu_clients: bool,
    replan: str,
    metrics: str | None,
    listen: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
    threads: int | None,
    readers: int | None,
    forget_swap: bool,
    follow: bool,
    log_format: str,
) -> None:
    """Serve STORE to every process of this host, from one copy of its tiers.

    \b
    tierstore serve model.tier --socket /run/tierstore/model.sock --dram 64GiB
    python -c 'import tierstore; print(tierstore.connect("/run/tierstore/model.sock"))'

    SIGTERM ends it when lookups by gRPC have; clients go on alone. SIGHUP has it adopt the placement that 'tierstore
    plan' made meanwhile, and read certificates and token again.

    After 'tierstore swap', a daemon that is started again with the same STORE serves what was swapped in, and says so.
    --forget-swap, or another STORE, ends that.
    """
    from tierstore.daemon.daemon import Daemon
    from tierstore.daemon.remote_lookups import Remote
    from tierstore.daemon.systemd import Notifier
    from tierstore.ipc.events import configure_logging, event
    from tierstore.ipc.ports import check_ports

    configure_logging(log_format)
    logger = logging.getLogger("tierstore.daemon")
    notifier = Notifier()
    remote = None if listen is None else Remote(listen, tls_cert, tls_key, token_file, threads, readers)
    of_listen = {
        "--tls-cert": tls_cert, "--tls-key": tls_key, "--token-file": token_file, "--threads": threads,
        "--readers": readers,
    }  # fmt: skip
    if remote is None and any(value is not None for value in of_listen.values()):
        raise ConfigError(f"{', '.join(of_listen)} are of --listen HOST:PORT, which is missing")
    if remote is not None:
        remote.check()
    check_ports(
        (what, address) for what, address in (("--metrics", metrics), ("--listen", listen)) if address is not None
    )
    with _signals() as signals:
        notifier.status("warming")
        with Progress("warming") as on_progress:
            daemon = Daemon(
                store,
                socket,
                parse_bytes(dram, "--dram"),
                io=io,
                placement=_placement_of(placement),
                clients_max=clients,
                allowed_users=users,
                replan_s=_seconds_of(replan),
                gpu_clients=gpu_clients,
                forget_swap=forget_swap,
                follow=follow,
                on_progress=signals.checked(on_progress),
            )
        try:
            daemon.start(metrics=metrics, remote=remote)
            used = format_bytes(daemon.dram_bytes)
            event(
                logger, logging.INFO, "ready",
                socket=socket, store=daemon.store_path, dram=used, metrics=daemon.metrics_address,
                listen=daemon.remote_address,
            )  # fmt: skip
            notifier.ready(f"serving {daemon.store_path}, {used} of DRAM")
            _serve(daemon, signals, notifier, logger)
        finally:
            notifier.stopping("saying goodbye to clients")
            ended = daemon.close()
            event(logger, logging.INFO, "ended", cleanly=ended)


def _serve(daemon: Daemon, signals: _Signals, notifier: Notifier, logger: logging.Logger) -> None:
    """Waits for signals until one ends it."""
    from tierstore.ipc.events import event

    while True:
        got = signals.wait(BEAT_S)
        notifier.watchdog()
        if got == signal.SIGHUP:
            # By a thread: it may wait for a change that is under way,
            # and signals and the watchdog must not wait for it.
            threading.Thread(
                target=_reload, args=(daemon, notifier, logger), name="tierstore-reload", daemon=True
            ).start()
        elif got is not None:
            event(logger, logging.INFO, "draining", signal=signal.Signals(got).name)
            return


def _reload(daemon: Daemon, notifier: Notifier, logger: logging.Logger) -> None:
    """Reads again what may have changed on disk; whatever fails, what is served is served on."""
    from tierstore.ipc.events import event

    notifier.reloading("reading files again")
    try:
        daemon.reload()
    except Exception as error:
        event(logger, logging.ERROR, "reload_failed", error=error)
    notifier.ready("serving")


class _Signals:
    """Signals that came, as they are asked for; while the tiers warm, one that ends it interrupts them."""

    def __init__(self) -> None:
        self._got: list[int] = []
        self._came = threading.Event()

    def handle(self, number: int, _: object) -> None:
        """The handler: notes it, nothing more."""
        self._got.append(number)
        self._came.set()

    def wait(self, timeout_s: float) -> int | None:
        """Returns the next signal, None if none came in time."""
        self._came.wait(timeout_s)
        if len(self._got) <= 1:
            self._came.clear()
        return self._got.pop(0) if self._got else None

    def checked(self, on_progress: Progress) -> Callable[[int, int], None]:
        """Returns on_progress, interrupted by a signal that ends the daemon."""

        def called(done: int, total: int) -> None:
            if signal.SIGINT in self._got:
                raise KeyboardInterrupt
            if signal.SIGTERM in self._got:
                raise Ended(signal.SIGTERM)
            on_progress(done, total)

        return called


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signals.handle) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _placement_of(text: str | None) -> int | str | None:
    if text is None or text == "none":
        return text
    if not text.isdigit():
        raise ConfigError(f"--placement {text}: give an epoch's number, or 'none'")
    return int(text)


def _seconds_of(text: str) -> float | None:
    if text == "off":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e9:
        raise ConfigError(f"--replan {text}: give seconds, 1 at least, or 'off'")
    return seconds
