"""A daemon's clients of another user: what they need beside being let in, and what they are told if they lack it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from support.daemon_peers import NOBODY, as_root, in_child
from support.served import ServeProcess
from support.stores import Model, random_keys

import tierstore


@as_root
@pytest.mark.parametrize("hidden", ["a shard", "the catalog", "the store", "a folder above"])
def test_a_client_of_another_user_is_told_that_it_must_read_the_stores_files(model: Model, hidden: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # whose folders above all users may enter
        folder = Path(name)
        store, socket = folder / "models" / "store", folder / "socket"
        store.parent.mkdir()
        model.build(store, shard_bytes=65536)
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        folder.chmod(0o777)
        keys = random_keys(np.random.default_rng(0), 5)

        def look_up() -> str:
            with tierstore.connect(socket) as attached:
                return str(np.array_equal(attached["layers.1"].lookup(keys), model.expected("layers.1", keys)))

        with ServeProcess(store, socket, "--dram", "900KiB", "--allow-user", str(NOBODY)):
            assert look_up() == "True"
            assert in_child(look_up, NOBODY) == "True"
            shard = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
            at = {"a shard": shard, "the catalog": None, "the store": store, "a folder above": store.parent}[hidden]
            for path in [at] if at else [path for path in store.iterdir() if path.is_file()]:
                path.chmod(0o700)
            said = in_child(look_up, NOBODY)
        assert said.startswith(
            f"ConfigError: {store}: the daemon lets user {NOBODY} attach, but that user may not read "
        )
        assert f"setfacl -R -m u:{NOBODY}:rX {store}" in said
