"""The greeting: what a daemon asks of a connection's first message, and of who sends it.

Flows in: who connected, as the kernel says, and its hello. Flows out: its role. Refuses by `DaemonError`, which names
both sides and the remedy: users that are not let in, another version of the protocol, what is no hello.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any

from ..errors import ConfigError, DaemonError
from ..ipc.identity import known_ids, process_text, unknown_id, user_text
from ..ipc.protocol import PROTOCOL_VERSION
from ..version import VERSION

logger = logging.getLogger("tierstore")

RELEASE_CHARS_MAX = 64


class Door:
    """Who may use the daemon at a path: its own user and root always, others as clients where they are named."""

    def __init__(self, path: str, allowed_users: Collection[int]) -> None:
        """allowed_users: ids. Raises `ConfigError` if one of them does not name one user here."""
        self.path = path
        unknown = unknown_id("uid")
        if unknown in allowed_users:
            raise ConfigError(
                f"--allow-user {unknown}: in this user namespace, {unknown} stands for every user whom it does not map "
                f"(/proc/self/uid_map); map the user, and name the id that it has here"
            )
        if os.geteuid() == unknown:
            logger.warning(
                "%s: this daemon runs as user %d, which in this user namespace also stands for every user whom it does "
                "not map: only root and users of --allow-user may connect; run the daemon as another user",
                path, unknown,
            )  # fmt: skip
        self._administrators = known_ids("uid", {os.geteuid(), 0})
        self._users = self._administrators | set(allowed_users)
        self.open_to_others = self._users > self._administrators

    def check_user(self, pid: int, uid: int) -> None:
        """Raises `DaemonError` if a process of that user may not connect. The daemon's own process always may."""
        if uid in self._users or pid == os.getpid():
            return
        users = " and ".join(str(user) for user in sorted(self._users))
        who, at = f"{user_text(uid)} ({process_text(pid)})", f"the daemon at {self.path}, users {users} may"
        if uid == unknown_id("uid"):
            raise DaemonError(
                f"{who} may not use {at}: connect as one of them, from a user namespace whose users the daemon's maps"
            )
        raise DaemonError(f"{who} may not use {at}: restart it with --allow-user {uid}, or connect as one of them")

    def check_hello(self, uid: int, hello: dict[str, Any]) -> tuple[str, str]:
        """Returns the role, "client" or "admin", and the release of tierstore that the first message of a user says."""
        version, role, pid, release = (hello.get(name) for name in ("hello", "role", "pid", "release"))
        numbers = type(version) is int and type(pid) is int
        if not numbers or not isinstance(release, str) or len(release) > RELEASE_CHARS_MAX:
            raise DaemonError(
                "the first message is no hello, which has the protocol's version, a role, a pid, a release"
            )
        if version != PROTOCOL_VERSION:
            raise DaemonError(
                f"you speak version {version} of the protocol (tierstore {release!r}), the daemon at {self.path} "
                f"version {PROTOCOL_VERSION} (tierstore {VERSION!r}): install one release for both, "
                "and restart the older"
            )
        if role not in ("client", "admin"):
            raise DaemonError(f"there is no role {str(role)[:RELEASE_CHARS_MAX]!r}; say client or admin")
        if role == "admin" and uid not in self._administrators:
            raise DaemonError(
                f"user {uid} may attach to the daemon at {self.path} and not administer it: ask as its own user, "
                "or root"
            )
        return role, release
