"""What the host relies on when a GPU speaks with it is in the instructions: the interpreter cannot show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.repository import SUPPORT, TESTS


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Names and PTX of all launches, from a process of its own: in this one the kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(TESTS),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }  # nothing compiled before counts
    program = SUPPORT / "compile_requests.py"
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(name, code) for name, code in json.loads(done.stdout)]


@pytest.fixture
def ptx(compiled: list[tuple[str, str]]) -> dict[str, str]:
    return dict(compiled)


def test_one_compilation_serves_batches_of_all_shapes(compiled: list[tuple[str, str]]) -> None:
    number = {name: len({code for other, code in compiled if other == name}) for name, _ in compiled}
    assert (
        number["_keys_of_tokens"] == 4
    )  # with and without a map, with and without dead positions, that were asked for
    assert number["_sums_of_tokens"] == 2  # with and without dead positions
    assert set(number.values()) == {1, 2, 4}


def test_asked_is_released_to_the_whole_system_behind_the_number_of_misses(ptx: dict[str, str]) -> None:
    code = ptx["_post_misses"]
    assert code.count("atom.global.sys.release.exch.b64") == 1
    before = code[: code.index("atom.global.sys.release.exch.b64")]
    assert before.rindex("st.global.b64") > before.rindex("bra")  # in the branch where something was missed


def test_the_answer_is_looked_at_anew_each_time_and_acquired_before_the_status(ptx: dict[str, str]) -> None:
    code = ptx["_await_answer"]
    acquired = code.index("atom.global.sys.acq_rel.exch.b64")
    looks = [place for place in range(len(code)) if code.startswith("ld.volatile.global.b64", place)]
    assert len(looks) == 3  # the first, the loop's, the status
    assert looks[0] < looks[1] < acquired < looks[2]


def test_a_program_takes_the_numbers_of_its_misses_at_once(ptx: dict[str, str]) -> None:
    assert ptx["_collect_misses"].count("atom.global") == 1
