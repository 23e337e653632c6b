"""`make engines`: tierstore's plug-ins inside the real engines, on a CPU, against the engines' own resident tables.

Input: --folder, where environments, models and logs lie; --only, part of a case's name. Output: a table of results, and
the same as JSON. Errors: exit status 1 if anything differs that must be equal, or equals that must differ; a package
that does not install is named.

The engine runs eager on a CPU: this shows loading, ids, shapes, dtypes and arithmetic, not CUDA graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import CASES, ENGINE, Case
from environments import LAB, REPOSITORY, Environment, environments
from longcat_jobs import longcat_jobs
from measures import MEASURES
from sglang_jobs import sglang_jobs

RUN_S = 1200.0
ROWS_PER_HEAD, V41_ROWS_PER_HEAD = 1000, 1000
VARIABLES = {
    "TIERSTORE_LAB": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2",
    "TORCH_COMPILE_DISABLE": "1",  # it would compile for the driver that the shim feigns
}  # fmt: skip


class Lab:
    """The folder, the environments, and what was run in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environments = environments(folder)
        self.base = self.environments["0.32.0"]
        self._resident: dict[tuple[Any, ...], dict[str, Any]] = {}
        (folder / "logs").mkdir(exist_ok=True)

    def python(self, environment: Environment, name: str, arguments: list[str], variables: dict[str, str]) -> None:
        """Runs a program of an environment; its output goes to a log. Raises `SystemExit` with the log's end."""
        log = self.folder / "logs" / f"{name}.log"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TIERSTORE_", "VLLM_"))}
        env = kept | VARIABLES | {"VLLM_CACHE_ROOT": str(self.folder / "cache")} | environment.variables | variables
        with open(log, "w") as out:
            command = [str(environment.python), *arguments]
            try:
                # Not in the repository, where a subprocess of the engine would take kernels/ for another package.
                ended = subprocess.run(
                    command, stdout=out, stderr=out, env=env, cwd=self.folder, timeout=RUN_S, check=False
                )
                status = str(ended.returncode)
            except subprocess.TimeoutExpired:
                status = f"not within {RUN_S:.0f} s"
        if status != "0":
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"make engines: {name} ended with {status}; {log} ends:\n{tail}")

    def model(self, dtype: str, rows_per_head: int = ROWS_PER_HEAD) -> tuple[Path, Path]:
        """Returns a Qwen4-Exp checkpoint and the store built from it."""
        checkpoint = self.folder / "models" / f"qwen4_exp-{dtype}-{rows_per_head}"
        if not (checkpoint / "config.json").exists():
            self.python(
                self.base, checkpoint.name, [str(LAB / "model.py"), str(checkpoint), dtype, str(rows_per_head)], {}
            )
        return checkpoint, self.store(checkpoint)

    def store(self, checkpoint: Path) -> Path:
        """Returns the store of a checkpoint; builds it by the command if it is not there."""
        store = checkpoint.with_suffix(".tier")
        self.command("build", str(checkpoint), str(store))
        return store

    def command(self, *arguments: str) -> None:
        """Runs a tierstore command of the repository. Raises `SystemExit` with what it says."""
        ended = subprocess.run(
            [sys.executable, "-m", "tierstore.tools.cli", *arguments], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise SystemExit(f"make engines: tierstore {' '.join(arguments)}: {ended.stderr}")

    def vllm(self, name: str, case: Case, options: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
        """Runs vLLM once; returns tokens, log-probabilities, times and memory."""
        files = [self.folder / "logs" / f"{name}.{kind}.json" for kind in ("options", "answers")]
        files[0].write_text(json.dumps(options))
        files[1].unlink(missing_ok=True)
        arguments = [str(LAB / "run_vllm.py"), *map(str, files)]
        self.python(self.environments[case.version], name, arguments, variables)
        found: dict[str, Any] = json.loads(files[1].read_text())
        return found

    def resident(self, case: Case) -> dict[str, Any]:
        """Runs a case with the engine's own table; cases that differ in the store alone share it."""
        key = case.baseline_key()
        if key not in self._resident:
            checkpoint, _ = self.model(case.dtype)
            engine = ENGINE | case.engine | {"model": str(checkpoint), "engram_config": {"cpu_offload": False}}
            run = {name: value for name, value in case.run.items() if name != "rotate"}
            variables = case.variables if case.resident is None else case.resident
            self._resident[key] = self.vllm(
                f"resident-{len(self._resident)}", case, run | {"engine": engine}, variables
            )
        return self._resident[key]

    def tiered(self, case: Case, index: int) -> dict[str, Any]:
        """Runs a case with rows from tierstore."""
        checkpoint, store = self.model(case.dtype)
        with self.serving(store) if case.daemon else contextlib.nullcontext(store) as where:
            settings = {"store": str(where), "dram": "4MiB"}
            engine = ENGINE | case.engine | {"model": str(checkpoint), "additional_config": {"tierstore": settings}}
            return self.vllm(f"tierstore-{index}", case, case.run | {"engine": engine}, case.variables)

    @contextlib.contextmanager
    def serving(self, store: Path) -> Iterator[Path]:
        """A daemon of a store, for a while; yields its socket's path."""
        socket = self.folder / "daemon.sock"
        socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tierstore.tools.cli", "serve", str(store), "--socket", str(socket)]
        daemon = subprocess.Popen([*command, "--dram", "16MiB"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 30
            while not socket.exists():
                if time.monotonic() > end or daemon.poll() is not None:
                    raise SystemExit(f"make engines: the daemon of {store} did not start")
                time.sleep(0.1)
            yield socket
        finally:
            daemon.terminate()
            daemon.wait(30)


def compare(lab: Lab, case: Case, index: int) -> dict[str, Any]:
    """Runs a case and its resident counterpart; returns a result."""
    begun = time.monotonic()
    resident, tiered = lab.resident(case), lab.tiered(case, index)
    same_tokens = resident["tokens"] == tiered["tokens"]
    same = same_tokens and resident["logprobs"] == tiered["logprobs"]
    served = _log_line(lab.folder / "logs" / f"tierstore-{index}.log")
    return {
        "case": f"vLLM {case.version}, {case.dtype}: {case.name}",
        "result": "identical" if same else "tokens differ" if not same_tokens else "log-probabilities differ",
        "passed": same != case.differs and served and (tiered["cached_tokens"] > 0) == case.caches,
        "served": served,
        "tokens": sum(map(len, tiered["tokens"])),
        "cached_tokens": tiered["cached_tokens"],
        "metrics": tiered["metrics"],
        "seconds": round(time.monotonic() - begun, 1),
    }


def _log_line(log: Path) -> bool:
    """Whether the engine's log says that tierstore serves a layer."""
    return "tierstore serves model.layers.1" in log.read_text(errors="replace")


def engram(lab: Lab, version: str) -> dict[str, Any]:
    """Runs DeepSeek-V4.1's layers of one engine."""
    checkpoint = lab.folder / "models" / "deepseek_v41"
    if not checkpoint.exists():
        lab.command("synth", str(checkpoint), "--family", "deepseek_v41", "--rows-per-head", str(V41_ROWS_PER_HEAD),
                    "--layers", "1,3", "--hidden", "128")  # fmt: skip
    begun, out = time.monotonic(), lab.folder / "logs" / f"v41-{version}.json"
    arguments = [str(LAB / "run_v41.py"), str(checkpoint), str(lab.store(checkpoint)), str(out)]
    lab.python(lab.environments[version], f"v41-{version}", arguments, {})
    found = json.loads(out.read_text())
    checks = ("equal_staged", "equal_in_forward", "equal_packed", "rotated_differs")
    return {
        "case": f"vLLM {version}, DeepSeek-V4.1: layers alone, staged, in the forward, packed, rotated",
        "result": "identical" if all(found[each] for each in checks) else "differ",
        "passed": all(found[each] for each in checks),
        "seconds": round(time.monotonic() - begun, 1),
    } | found  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "engines")
    parser.add_argument("--only", default="", help="run what has this in its name")
    chosen = parser.parse_args()
    lab = Lab(chosen.folder.resolve())
    jobs: list[tuple[str, Any]] = [
        (case.name, lambda case=case, index=index: compare(lab, case, index)) for index, case in enumerate(CASES)
    ]
    jobs += [(f"deepseek_v41 {version}", lambda v=version: engram(lab, v)) for version in lab.environments]
    jobs += longcat_jobs(lab)
    jobs += [(name, lambda measure=measure: measure(lab)) for name, measure in MEASURES.items()]
    jobs += sglang_jobs(lab)
    results = []
    for name, job in jobs:
        if chosen.only not in name:
            continue
        results.append(_result(name, job))
        mark = "ok  " if results[-1]["passed"] else "FAIL"
        print(f"{mark} {results[-1]['case']}: {results[-1]['result']} ({results[-1]['seconds']} s)", flush=True)
    (lab.folder / "results.json").write_text(json.dumps(results, indent=1))
    failed = [each for each in results if not each["passed"]]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed; {lab.folder / 'results.json'}")
    sys.exit(1 if failed else 0)


def _result(name: str, job: Any) -> dict[str, Any]:
    """Runs a job; a run that ends with an error is a result too."""
    begun = time.monotonic()
    try:
        found: dict[str, Any] = job()
        return found
    except SystemExit as error:
        seconds = round(time.monotonic() - begun, 1)
        return {"case": name, "result": str(error), "passed": False, "seconds": seconds}


if __name__ == "__main__":
    main()
