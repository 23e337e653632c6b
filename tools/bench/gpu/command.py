"""`tierstore bench gpu`: the kernels and the hbm tier on a GPU, checked first, then set beside what the machine can do.

Input: a machine with a GPU, and a folder for a store of half a gigabyte. Output: a check of every kernel against its
reference on inputs that are new in every run, then ceilings (copies within the device and over the bus), lookups beside
them, and whether each kept its bound. A failed check leaves no figures. Without a GPU the checks run small, in Triton's
interpreter, and the figures stay open: the interpreter's times say nothing. Ends within LIMIT_S and its longest case,
compiling included.
"""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tierstore.extras import missing
from tierstore.tiers.hbm.device import open_device
from tierstore.version import VERSION

from ..pairs import Figure, Options, Result

LIMIT_S = 390.0  # no case begins later
INTERPRETED = "cpu (interpreted)"
COMMAND = "tierstore bench gpu --json FILE"
NEXT_COMMAND = "tierstore bench overlap: throughput of a small model on the GPU, its table resident and tiered"
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass
class GpuResult(Result):
    """device: the GPU's name. checks: name, tokens, and what was wrong, if anything. measured:
    whether there are figures."""

    device: str = INTERPRETED
    checks: list[dict[str, Any]] = field(default_factory=list)
    measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it for JSON; figures are null where nothing was measured."""
        record = super().to_dict()
        if not self.measured:
            record["figures"] = None
        return record | {"device": self.device, "checks": self.checks, "failed": self.failed}


def run(folder: Path, options: Options) -> GpuResult:
    """Checks, then measures. Blocks for minutes. Raises `ConfigError` where torch or triton is missing."""
    started = time.monotonic()
    device = open_device(_device_name())
    seed = secrets.randbits(32)
    result = GpuResult("GPU: kernels and hbm tier")
    result.device = _name_of(device)
    result.facts = _provenance(device) | {"seed": seed}
    _say(started, f"{result.device}; seed {seed}")
    _check_all(result, device, seed, started)
    if result.failed is None and device.type == "cuda":
        _measure(result, device, seed, folder, options, started)
    result.facts["checks"] = f"{sum(check['wrong'] is None for check in result.checks)} of {len(result.checks)} passed"
    result.facts["seconds"] = round(time.monotonic() - started, 1)
    if result.measured:
        result.facts["bounds missed"] = (
            ", ".join(each.case for each in result.figures if each.reached is False) or "none"
        )
    elif result.failed is None:
        result.facts["not measured"] = (
            f"figures are left open: there is no GPU here; {COMMAND!r} on a machine with one measures them"
        )
    result.facts["next"] = NEXT_COMMAND
    return result


def _device_name() -> str:
    """A GPU where there is one, unless the kernels are to be interpreted."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise missing("bench gpu", "gpu", error) from None
    return "cuda:0" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def _check_all(result: GpuResult, device: Any, seed: int, started: float) -> None:
    """Runs every check at every size, and notes the first that failed; the others run all the same."""
    from . import checks as gpu_checks  # loads the kernels, for the device that is open now

    for name in gpu_checks.CHECKS:
        for num_tokens in gpu_checks.SIZES if device.type == "cuda" else gpu_checks.SIZES_INTERPRETED:
            wrong = gpu_checks.failure_of(name, device, seed, num_tokens)
            result.checks.append({"kernel": name, "tokens": num_tokens, "wrong": wrong})
            if wrong is not None:
                _say(started, f"FAILED: {name}, {num_tokens} tokens: {wrong}")
                result.failed = result.failed or f"{name} is wrong with {num_tokens} tokens, seed {seed}: {wrong}"
        _say(started, f"checked {name}")


def _measure(result: GpuResult, device: Any, seed: int, folder: Path, options: Options, started: float) -> None:
    """Runs the cases one after the other, as long as there is time."""
    from .cases import Scale
    from .clock import DeviceClock
    from .tables import CheckError

    result.measured = True
    groups = cases_of(device, DeviceClock(device), Scale(), seed, folder, options.pairs, result.facts)
    for group, cases in groups.items():
        name = f"the start of {group}"
        if time.monotonic() - started > LIMIT_S:
            result.skipped[group] = f"{LIMIT_S:.0f} s were over"
            continue
        try:
            for name, figures in cases:
                result.figures += figures
                _say(started, f"measured {name}")
                if time.monotonic() - started > LIMIT_S:
                    result.skipped[f"what comes after {name}"] = f"{LIMIT_S:.0f} s were over"
                    cases.close()
        except CheckError as error:
            result.failed = f"wrong rows in the case after {name}, seed {seed}: {error}"
            result.measured = False
            result.figures.clear()
            return
        except Exception as error:  # of whatever kind: what was measured before stands, and the command fails
            result.skipped[f"what comes after {name}"] = why = f"{type(error).__name__}: {error}"
            result.failed = result.failed or why
            _say(started, f"FAILED after {name}: {why}")


def cases_of(
    device: Any, clock: Any, scale: Any, seed: int, folder: Path, rounds: int, facts: dict[str, Any]
) -> dict[str, Generator[tuple[str, list[Figure]], None, None]]:
    """Returns groups of cases by name, each of which yields names and figures, and adds to `facts`.

    clock: a `gpu_clock.Clock`; scale: a `gpu_cases.Scale`.
    """
    import numpy as np

    from .cases import KernelCases
    from .store_cases import StoreCases

    random = np.random.default_rng(seed)
    return {
        "kernels alone": KernelCases(device, clock, scale, random, rounds).figures(),
        "a store": StoreCases(device, clock, scale, random, rounds, facts).figures(folder),
    }


def _provenance(device: Any) -> dict[str, Any]:
    """What the figures rest on."""
    torch, triton = (importlib.import_module(name) for name in ("torch", "triton"))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": _name_of(device),
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "tierstore": VERSION,
        "commit": _commit(),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
    }


def _name_of(device: Any) -> str:
    return str(importlib.import_module("torch").cuda.get_device_name(device)) if device.type == "cuda" else INTERPRETED


def _driver() -> str | None:
    """The driver's own line about itself, None where it has none."""
    try:
        return DRIVER_FILE.read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return None


def _commit() -> str | None:
    """The commit of the checkout that this runs from, "-dirty" if it was changed since; None if it is not one."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _say(started: float, text: str) -> None:
    """Prints a line of progress."""
    click.echo(f"[{time.monotonic() - started:5.0f} s] {text}", err=True)
