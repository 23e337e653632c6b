"""The handshake: who may connect to a daemon, and what its first message must say.

Input: who connected, as the kernel says, and its hello. Output: its role. Errors: `DaemonError`, which names both sides
and the remedy, for users without access, another version of the protocol, a message that is not a hello.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Literal

from ..errors import ConfigError, DaemonError
from ..ipc.identity import known_ids, process_text, unknown_id, user_text
from ..ipc.messages import Hello, from_json
from ..ipc.protocol import PROTOCOL_VERSION
from ..version import VERSION

logger = logging.getLogger("tierstore")

ROLE_CHARS_MAX = 64  # of a role that is quoted


class AccessPolicy:
    """Who may use the daemon at a path: its own user and root always, others as clients if they are named."""

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
        self.is_open_to_others = self._users > self._administrators

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

    def check_hello(self, uid: int, data: bytes) -> tuple[Literal["client", "admin"], Hello]:
        """Returns the role and the hello that the first message of a user says. Raises `DaemonError`."""
        try:
            hello = from_json(data, Hello)
        except DaemonError as error:
            raise DaemonError(f"expected a hello message with version, role, pid and release: {error}") from error
        version, role, release = hello.hello, hello.role, hello.release
        if version != PROTOCOL_VERSION:
            raise DaemonError(
                f"you speak version {version} of the protocol (tierstore {release!r}), the daemon at {self.path} "
                f"version {PROTOCOL_VERSION} (tierstore {VERSION!r}): install one release for both, and restart "
                f"the older"
            )
        if role == "client":
            return "client", hello
        if role != "admin":
            raise DaemonError(f"there is no role {role[:ROLE_CHARS_MAX]!r}; say client or admin")
        if uid not in self._administrators:
            raise DaemonError(
                f"user {uid} may attach to the daemon at {self.path} and not administer it: "
                f"ask as its own user, or root"
            )
        return "admin", hello
