"""A client that forks while its threads look up, run by test_remote.py in a process of its own.

Arguments: a URL, or several with commas between; how many forks; and "late" where grpc is to be loaded before tierstore
can ask it to survive them.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np

from tierstore.errors import DaemonError
from tierstore.remote.client import connect_remote

WAIT_S = 30.0


def keys_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63 - 1, (40, 3), dtype=np.int64)


def child(store: object, keys: np.ndarray, expected: np.ndarray, late: bool) -> int:
    connections = store._connections
    inherited = [connection._of_parents[-1][0] for connection in connections]
    try:
        out = np.full_like(expected, 0xA5)
        ticket = store.submit({"layers.1": (keys, out)})
        ticket.wait(WAIT_S)
        good = np.array_equal(out, expected) and np.array_equal(store["layers.1"].lookup(keys), expected)
        for connection, before in zip(connections, inherited, strict=True):
            good = good and before is not None and connection._channel not in (None, before)
        store.close()
        return 0 if good else 1
    except DaemonError as error:
        return 0 if late and "GRPC_ENABLE_FORK_SUPPORT=1" in str(error) else 2


def main(url: str, forks: str, late: bool) -> None:
    with connect_remote(url.split(",") if "," in url else url) as store:
        store._connections = (
            [connection for member in store._engine._asked.members for connection in member.connections]
            if "," in url
            else [store._engine._asked.connection]
        )
        keys = keys_of(0)
        expected = store["layers.1"].lookup(keys)
        store.submit({"layers.1": (keys, np.empty_like(expected))}).wait(WAIT_S)  # the threads of submit now exist
        done, faults = threading.Event(), []

        def work(seed: int) -> None:
            own = keys_of(seed)
            own_expected = store["layers.1"].lookup(own)
            while not done.is_set():
                if not np.array_equal(store["layers.1"].lookup(own), own_expected):
                    faults.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(int(forks)):
            process = os.fork()
            if not process:
                code = 3
                try:  # whatever happens, the child must not go on with the parent's work
                    code = child(store, keys, expected, late)
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert code == 0, code
        done.set()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert not faults
        assert np.array_equal(store["layers.1"].lookup(keys), expected)


if __name__ == "__main__":
    is_after_fork = sys.argv[3:] == ["late"]
    if is_after_fork:
        import grpc  # noqa: F401
    main(sys.argv[1], sys.argv[2], is_after_fork)
