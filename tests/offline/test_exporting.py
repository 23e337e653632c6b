"""Parts of new files: rows in their places wherever a step begins and ends, and a folder that appears whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tierstore.errors import ConfigError
from tierstore.offline.exporting.new_folder import MARK, new_folder
from tierstore.offline.exporting.parts import put_rows


def test_rows_lie_in_their_places_wherever_a_step_begins_and_ends() -> None:
    rng = np.random.default_rng(0)
    width, num_rows = 5, 6
    numbers = np.array([0, 1, 3, 5])
    rows = rng.integers(1, 255, (4, width), dtype=np.uint8)
    expected = np.zeros((num_rows, width), dtype=np.uint8)
    expected[numbers] = rows
    for start in range(num_rows * width):
        for end in range(start, num_rows * width + 1):
            out = np.zeros(end - start, dtype=np.uint8)
            within = (numbers >= start // width) & (numbers < -(-end // width))
            put_rows(out, numbers[within], rows[within], start)
            np.testing.assert_array_equal(out, expected.reshape(-1)[start:end])


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"

    def interrupted() -> None:
        with new_folder(path) as folder:
            (folder / "file").write_text("half")
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []
    with new_folder(path) as folder:
        (folder / "file").write_text("whole")
    assert [each.name for each in path.iterdir()] == ["file"]


@pytest.mark.process
def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = f"import os, sys; sys.path.insert(0, {os.getcwd()!r})\n" + (
        "from pathlib import Path\nfrom tierstore.offline.exporting.new_folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'left').write_text('left')\n    print('made', flush=True)\n    sys.stdin.readline()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "made\n"
    with pytest.raises(ConfigError, match="another process is writing out"), new_folder(path):
        pass
    child.communicate("go\n", timeout=30)
    assert (tmp_path / "out.new" / MARK).exists()
    with new_folder(path) as folder:
        assert [each.name for each in folder.iterdir()] == [MARK]
    assert list(path.iterdir()) == []
