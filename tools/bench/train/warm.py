"""Steps of which every row lies in DRAM: ours through Python, beside the bare loop, torch and FBGEMM.

Input: a store whose table fits the budget whole. Output: comparisons by rule, and one thread beside two. A step is a
gather of all references into a buffer that is there, and an apply. All sides draw batches of their own from the same
distribution, and have rows of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np

import tierstore
from tierstore.extras import install_command
from tierstore.training.optimizers import SGD, LazyAdam, Optimizer, RowWiseAdagrad
from tierstore.training.training import Training

from .. import stores
from ..bare.loops import BareLoop
from ..pairs import SUBJECT, Options, Result, interleave
from ..stores import MadeStore
from .peers import FBGEMM_INSTALL, Side, fbgemm_side, torch_side
from .work import LR, Batches, Seconds, compare, timed

TOKENS = 2048
BARE, TORCH, FBGEMM = "bare loop", "torch", "fbgemm-gpu-cpu"
RULES: dict[str, tuple[Optimizer, dict[str, str], dict[str, float]]] = {
    # torch's and FBGEMM's names, and targets of one thread; 1 / 1.5 of the bare loop's rate is 1.5 times its time
    "row-wise Adagrad": (
        RowWiseAdagrad(LR),
        {TORCH: "Adagrad", FBGEMM: "EXACT_ROWWISE_ADAGRAD"},
        {BARE: 1 / 1.5, f"{TORCH} Adagrad": 3.0, f"{FBGEMM} EXACT_ROWWISE_ADAGRAD": 5.0},
    ),
    "LazyAdam": (LazyAdam(LR), {TORCH: "SparseAdam"}, {BARE: 1 / 1.5, f"{TORCH} SparseAdam": 3.5}),
    "SGD": (SGD(LR), {TORCH: "SGD", FBGEMM: "EXACT_SGD"}, {BARE: 1 / 1.5, f"{TORCH} SGD": 1.2}),
}
TWO_THREADS = 1.7


def measure(made: MadeStore, other: MadeStore, options: Options, result: Result) -> None:
    """Adds the warm cases. Needs memory for three tables of float32 with their states. other: a second, equal store."""
    for name in RULES:
        _rule(made, name, options, result)
    _threads(made, other, options, result)


def warm_step(training: Training, batches: Batches) -> Callable[[], Seconds]:
    """Returns our side: a step on a batch, whose values go to a buffer that every step uses again."""
    table, out = training[stores.TABLE], np.zeros((batches.references, batches.dim), dtype=np.float32)

    def step(row_ids: np.ndarray) -> None:
        table.gather(row_ids, out)
        table.apply(row_ids, batches.gradients)

    return lambda: timed(partial(step, batches.draw()))


def opened_warm(made: MadeStore, optimizer: Optimizer, threads: int, dram_bytes: int | None) -> Training:
    """Opens a training with room for all rows and brings every one in."""
    record_bytes = 4 * (stores.DIM + optimizer.state_floats(stores.DIM)) + 64
    budget = dram_bytes or (256 << 20) + made.spec.num_rows * record_bytes * 9 // 8
    training = tierstore.open_training(made.path, optimizer, dram=budget, at=0, threads=threads)
    try:
        for start in range(0, made.spec.num_rows, 1 << 16):
            training[stores.TABLE].gather(np.arange(start, min(start + (1 << 16), made.spec.num_rows)))
        return training
    except BaseException:
        training.close()
        raise


def _rule(made: MadeStore, name: str, options: Options, result: Result) -> None:
    optimizer, theirs, targets = RULES[name]
    threads, tokens = options.threads, options.tokens or TOKENS
    batches = Batches(made.spec.num_rows, tokens)
    with ExitStack() as open_now:
        training = open_now.enter_context(opened_warm(made, optimizer, threads, options.dram_bytes))
        loop = open_now.enter_context(BareLoop.train(optimizer.rule, batches.dim, batches.num_rows, threads))
        sides: dict[str, Side] = {SUBJECT: warm_step(training, batches), BARE: partial(_bare_step, loop, batches)}
        for library, rule in theirs.items():
            make = torch_side if library == TORCH else fbgemm_side
            try:
                sides[f"{library} {rule}"] = make(rule, batches, threads)
            except ImportError:
                install = install_command("torch") if library == TORCH else FBGEMM_INSTALL
                result.skipped[library] = f"not installed; {install}"
        case = f"warm step, {name}, {tokens:,} tokens x {stores.ROWS_PER_TOKEN} rows, {threads} thread(s)"
        used = targets if threads == 1 else {}
        compare(result, case, batches.references, sides, options.pairs, used, by_cpu=True)
        misses = training[stores.TABLE].stats()["rows_read_from_base"] - made.spec.num_rows
        result.facts[f"{name}: rows that were read while steps were measured"] = max(0, misses)
    drawn = batches.draw()
    result.facts["distinct rows a reference"] = round(len(np.unique(drawn)) / len(drawn), 3)


def _bare_step(loop: BareLoop, batches: Batches) -> Seconds:
    loop.load(batches.draw()[:, None])
    cpu = loop.cpu_seconds()
    wall = sum(loop.run())
    return Seconds(wall, loop.cpu_seconds() - cpu)


def _wall(step: Callable[[], Seconds]) -> float:
    return step().wall


def _threads(made: MadeStore, other: MadeStore, options: Options, result: Result) -> None:
    """Two threads beside one, in turn. By the wall: it says something only where two processors are free."""
    batches = Batches(made.spec.num_rows, options.tokens or TOKENS)
    optimizer = RULES["row-wise Adagrad"][0]
    with (
        opened_warm(made, optimizer, 1, options.dram_bytes) as one,
        opened_warm(other, optimizer, 2, options.dram_bytes) as two,
    ):
        steps = {1: warm_step(one, batches), 2: warm_step(two, batches)}
        found = interleave({str(threads): partial(_wall, step) for threads, step in steps.items()}, options.pairs)
    with ExitStack() as open_now:
        made_for = optimizer.rule, batches.dim, batches.num_rows
        loops = {n: open_now.enter_context(BareLoop.train(*made_for, n)) for n in (1, 2)}
        sides = {str(n): partial(_wall, partial(_bare_step, loop, batches)) for n, loop in loops.items()}
        bare = interleave(sides, options.pairs)
    case = "row-wise Adagrad, rate of two threads over one"
    for what, of, bound in (("warm step", found, TWO_THREADS), (BARE, bare, None)):  # the bare loop: what memory allows
        ratios = [one / two for one, two in zip(of["1"], of["2"], strict=True)]
        result.figure(f"{what}, {case}", "x", ratios, bound, at_least=bound is not None)
