"""The command line `tierstore`: a group of commands, each in its own file, imported only when it is called.

Input: arguments. Output: results on standard output, progress and errors on standard error, and an exit status: 0, 1
(an error, or something found wrong), 2 (wrong usage), 130 (Ctrl-C). SIGTERM and SIGHUP end a command after it removed
its unfinished files. Nothing here loads torch. What all commands share lies here too: progress for people and for logs,
and the console that tables are printed to.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from tierstore.causes import named
from tierstore.errors import TierStoreError
from tierstore.printable import PrintableStream, printable
from tierstore.process import interrupts
from tierstore.process.interrupts import INTERRUPTED_STATUS
from tierstore.units import format_bytes
from tierstore.version import VERSION

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

TABLE_COLUMNS = 120  # width of tables where output is no terminal
PLAIN_STEPS = 20  # a line of progress for every twentieth of the work,
PLAIN_SECONDS = 1.0  # but none sooner after another: what is over in a moment needs no report
COMPLETE_VARIABLE = "_TIERSTORE_COMPLETE"  # set by the script of a shell that wants completions

# Each command: the module whose `command` it is, and its line in the list.
COMMANDS = {
    "build": ("tierstore.tools.build", "Build a store from a checkpoint; run it again to resume."),
    "init": ("tierstore.tools.init", "Make a store for a model that was not trained yet."),
    "verify": ("tierstore.tools.verify", "Check every page of a store; with --source, every row."),
    "export": ("tierstore.tools.export", "Write a store's rows as the checkpoint that they came from."),
    "inspect": ("tierstore.tools.inspect", "Say what a store, a trace or a profile holds."),
    "trace": ("tierstore.tools.trace", "Write a trace of token ids, or of text through a tokenizer."),
    "profile": ("tierstore.tools.profile", "Count traces, and say what each gigabyte of memory would buy."),
    "plan": ("tierstore.tools.plan", "Choose what goes where, and make the store open warm with it."),
    "commits": ("tierstore.tools.commits", "List the commits of a training, and pin those that must stay."),
    "epochs": ("tierstore.tools.epochs", "List, choose or prune the placements of a store."),
    "stat": ("tierstore.tools.stat.command", "Say how a daemon fares: hit rates, latency, memory, clients."),
    "top": ("tierstore.tools.top", "Watch a daemon, with rates."),
    "publish": ("tierstore.tools.publish", "Publish what training has committed, for a store's readers."),
    "versions": ("tierstore.tools.versions", "List what was published of a store."),
    "compact": ("tierstore.tools.compact", "Make one new store of a store and its versions."),
    "reslice": ("tierstore.tools.reslice", "Make other slices of slices, or join them into one store."),
    "delta": ("tierstore.tools.delta", "Pack versions of a store for another host, or apply them there."),
    "mooncake": ("tierstore.tools.mooncake", "Put a store's shards into Mooncake, the memory of a cluster."),
    "serve": ("tierstore.tools.serve", "Serve a store to all processes of a host from one copy."),
    "replan": ("tierstore.tools.replan", "Have a daemon replan from the traffic that it saw."),
    "swap": ("tierstore.tools.swap", "Have a daemon serve another version of its store."),
    "synth": ("tierstore.tools.synth", "Write a checkpoint of random values in a real model's layout."),
    "doctor": ("tierstore.tools.doctor", "Say what this machine can do, and how to mend what it cannot."),
    "completion": ("tierstore.tools.completion", "Print what completes tierstore in bash, zsh or fish."),
    "packaging": ("tierstore.tools.packaging", "Print the systemd unit, the Grafana dashboard or the proto."),
    "bench": ("tierstore.tools.bench", "Measure, beside the hardware's own limit."),
}


class _Commands(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        interrupts.begin_work()
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Returns the commands that begin so, and imports none of them: somebody waits at a Tab."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=line) for name, (_, line) in COMMANDS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="tierstore")
def cli() -> None:
    """A tiered memory store for embedding tables: hot rows in HBM, warm ones in DRAM, the long tail on NVMe.

    \b
    Try it without a model:
      tierstore synth model --family deepseek_v41 --size 64MiB
      tierstore build model model.tier
      tierstore verify model.tier --source model
    """


class Progress:
    """Shows work done: a bar with rate and time left on a terminal, else a line for every twentieth, on standard error.

    Call it with (done, total) in `unit` ("bytes", or the plural of what is counted). One thread calls it,
    inside `with`.
    """

    def __init__(self, what: str, unit: str = "bytes") -> None:
        self._what, self._unit = what, unit
        self._bar: Any = None
        self._task: Any = None
        self._started: tuple[float, int] | None = None
        self._last = 0, 0  # what was shown last, and of how much
        self._step_printed = -1
        self._time_printed = 0.0

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are done. What is done at the first call was skipped: it is in no rate.

        Less than before, or more than all, is other work, whose rate begins anew.
        """
        was_done, was_total = self._last
        first = self._started is None or done < was_done or was_done == was_total < total
        self._last = done, total
        if first:
            self._started = time.monotonic(), done
            self._time_printed = time.monotonic()
            self._step_printed = -1
            self._end_bar()
        if sys.stderr.isatty():
            self._show_bar(done, total)
        elif total and (step := done * PLAIN_STEPS // total) > self._step_printed:
            self._step_printed = step
            now = time.monotonic()
            if (done == total or now - self._time_printed >= PLAIN_SECONDS) and not (first and done < total):
                self._time_printed = now  # the first call comes before there is a rate
                click.echo(self._line(done, total), err=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _show_bar(self, done: int, total: int) -> None:
        from .bars import new_bar

        if self._bar is None:
            self._bar = new_bar(console(err=True))
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=total, completed=done, unit=self._unit)
        self._bar.update(self._task, completed=done, total=total)

    def _line(self, done: int, total: int) -> str:
        assert self._started is not None
        started_s, started_done = self._started
        rate = (done - started_done) / max(time.monotonic() - started_s, 1e-9)
        as_text = format_bytes if self._unit == "bytes" else "{:.0f}".format
        parts = [f"{self._what}: {100 * done // total:3d} %, {as_text(done)} of {as_text(total)}"]
        if self._unit != "bytes":
            parts[0] += f" {self._unit}"
        if rate:
            parts += [f"{as_text(rate)}/s", f"{(total - done) / rate:.0f} s left"]
        return ", ".join(parts)


def console(*, err: bool = False) -> Console:
    """Returns the console for tables, on standard output or error; if that is not a terminal,
    COLUMNS or 120 columns wide."""
    from .terminal import SafeConsole

    stream = sys.stderr if err else sys.stdout
    return SafeConsole(stream, width=None if stream.isatty() or "COLUMNS" in os.environ else TABLE_COLUMNS)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Escapes the control characters in whatever is printed meanwhile: names in files must not steer the terminal."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, PrintableStream(stream)) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line on `arguments` (by default the process's) and returns the exit status. Blocks."""
    with printable_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = cli.main(args=arguments, prog_name="tierstore", complete_var=COMPLETE_VARIABLE, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        # Who read the output has left, as `head` does: nothing is wrong,
        # but Python would complain when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TierStoreError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error = named(error)
        click.echo(f"error: {printable(str(error), lines=True)}", err=True)
        return 1
    return status if isinstance(status, int) else 0


def main() -> None:
    """The entry point of the `tierstore` script: runs the command line and exits with its status."""
    interrupts.begin_importing()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    signal_number = None
    try:
        status = run()
        interrupts.end_work()
    except KeyboardInterrupt:  # the second one, or one that came in the last moment
        status = INTERRUPTED_STATUS
    except interrupts.Ended as ended:
        signal_number = ended.number
    # Here the exception is gone, and with it all that its frames held.
    if signal_number is not None:
        interrupts.die_of(signal_number)
    if status == INTERRUPTED_STATUS:
        interrupts.leave(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
