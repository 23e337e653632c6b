"""What the runs on a real SGLang share: a machine without a GPU, small checkpoints and their stores, published options.

Input: an environment with SGLang, where there may be no kernels of its own. Output: an engine whose layers can be
built. Import this before SGLang.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engram_adapter import build_checkpoint
from engram_adapter.engines.gate import EngineMismatchError
from tierstore.tools.synth import write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
GROUP = "sglang.srt.plugins"
# torchvision's wheels for CUDA do not load their operators without it; only their names are needed here.
_operators = torch.library.Library("torchvision", "FRAGMENT")
if not hasattr(torch.ops.torchvision, "nms"):
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def announce_entry_point(folder: Path) -> None:
    """Makes the repository's entry point visible, as an installed tierstore's is, unless one is installed."""
    if any(point.name == "tierstore" for point in entry_points(group=GROUP)):
        return
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options.entry_points"][GROUP].strip()
    info = folder / "tierstore_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tierstore-here\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")
    sys.path.append(str(folder))


def built(folder: Path, family: str, seed: int = 0, **shape: Any) -> tuple[Path, Path]:
    """Writes a random checkpoint and builds its store; returns both paths."""
    checkpoint, store = folder / f"{family}-{seed}", folder / f"{family}-{seed}.store"
    write_checkpoint(checkpoint, family, seed=seed, **shape)
    build_checkpoint(checkpoint, store)
    return checkpoint, store


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and tensors as SGLang's default loader does: mapped, so that bytes are read when copied."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                yield name, opened.get_tensor(name)


@contextmanager
def published(decode: str = "disabled", prefill: str = "disabled", **options: Any) -> Iterator[None]:
    """Publishes a configuration of one rank, as a scheduler's process has."""
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
    from sglang.srt.runtime_context import get_context, get_parallel

    graphs = CudaGraphConfig(PhaseConfig(backend=decode), PhaseConfig(backend=prefill))
    ranks = {"tp_rank": 0, "attn_tp_rank": 0, "attn_dp_rank": 0, "attn_cp_rank": 0, "tp_group": None}
    with get_context().override_server_args(cuda_graph_config=graphs, **options), get_parallel().override(**ranks):
        yield


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Sets variables of the environment, or unsets those that are None."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name, None)
            if old is not None:
                os.environ[name] = old


def refused(what: str, also: str, act: Callable[[], Any]) -> None:
    """Asserts that `act` raises an error with both texts."""
    message = "nothing was refused"
    try:
        act()
    except EngineMismatchError as error:
        message = str(error)
    assert all(words in message for words in (what, also)), message
