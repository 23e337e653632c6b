"""How processes of the real SGLang start and end with the plug-in. Run by `sglang_layers.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import sglang_lab as lab

START = "from sglang.srt.plugins import load_plugins; load_plugins(); print('alive')"
LOADED = (
    "; import sys; print(sorted(m for m in sys.modules if m.startswith(('sglang.srt.models.', 'sglang.srt.layers.', "
    "'engram_adapter'))))"
)


def prepare(folder: Path) -> dict[str, Callable[[], None]]:
    """Builds a small checkpoint and its store; returns the cases by name."""
    _, store = lab.built(folder, "deepseek_v41", rows_per_head=300, layers=(1,), dim=32, hidden=64)
    cases = Cases(folder, store)
    return {name: getattr(cases, name) for name in dir(cases) if name.startswith(("the_", "a_"))}


class Cases:
    """Each case is a process, with the entry point that an installed tierstore has."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store

    def the_plug_in_is_inert_without_a_store(self) -> None:
        status, out, _ = self.run(START + LOADED, None)
        assert status == 0, out
        assert out.splitlines()[0] == "alive"
        assert "sglang.srt.layers.engram" not in out
        assert "engram_adapter.engines.sglang.plugin" not in out

    def the_classes_of_all_families_are_replaced(self) -> None:
        code = (
            f"{START}; from sglang.srt.layers.engram import EngramEmbedding; print(EngramEmbedding.__name__); "
            "from sglang.srt.models.qwen4_exp import Qwen4ExpNGramEmbedding; print(Qwen4ExpNGramEmbedding.__name__)"
        )
        status, out, errors = self.run(code, self.store)
        assert status == 0, errors
        assert out.splitlines()[:3] == ["alive", "TieredEngramEmbedding", "TieredNGramEmbedding"]

    def a_store_that_is_not_there_ends_the_process(self) -> None:
        self.ends(START, self.folder / "none", str(self.folder / "none"))

    def a_newer_sglang_ends_the_process(self) -> None:
        newer = f"import sglang; sglang.__version__ = '0.5.24'; {START}"
        self.ends(newer, self.store, "sglang 0.5.24 is not among the versions")

    def a_hook_that_sglang_cannot_apply_ends_the_process(self) -> None:
        broken = (
            "from sglang.srt.plugins.hook_registry import HookRegistry as R\n"
            "def fail(*a): raise OSError('cannot')\n"
            "R._apply_target = staticmethod(fail)\n"  # which SGLang logs, and goes on
        )
        self.ends(
            broken + START, self.store, "engram.EngramEmbedding is sglang.srt.layers.engram.EngramEmbedding after"
        )

    def a_changed_signature_ends_the_process(self) -> None:
        changed = (
            "import sglang_lab; from sglang.srt.layers import engram\n"
            "def forward(self, rows): ...\n"
            "engram.EngramEmbedding.forward = forward\n"
        )
        self.ends(
            changed + START, self.store, "EngramEmbedding.forward takes (rows), tierstore was written for (indices"
        )

    def ends(self, code: str, store: Path, words: str) -> None:
        status, out, errors = self.run(code, store)
        assert status == 1, (status, errors)
        assert "alive" not in out
        last = errors.strip().splitlines()[-1]
        assert last.startswith("tierstore stops SGLang: ")
        assert words in last, last

    def run(self, code: str, store: Path | None) -> tuple[int, str, str]:
        """Runs Python code in a process; returns its status and what it wrote."""
        paths = [str(self.folder), str(Path(__file__).resolve().parent)]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("TIERSTORE_")}
        variables["PYTHONPATH"] = os.pathsep.join(paths)
        if store is not None:
            variables["TIERSTORE_STORE"] = str(store)
        ended = subprocess.run(
            [sys.executable, "-c", f"import sglang_lab\n{code}"],
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return ended.returncode, ended.stdout, ended.stderr
