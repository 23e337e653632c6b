"""Limits of the daemon's socket: how many peers there may be, and how long each may take.

Input: the connected peers. Output: whom to drop, and why. Errors: `DaemonError` for a peer that finds no room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ..errors import DaemonError
from .peer import Peer

ADMINS_MAX = 8
HANDSHAKES_MAX = 32  # connections before their hello; of more, the oldest of the user with the most goes
HANDSHAKE_S = 2.0  # from a connection to its hello
PEER_SEND_S = 5.0  # how long a peer may read nothing while something waits for it
ADMIN_IDLE_S = 60.0  # between an administrator's requests


def check_room(role: str, peers: Collection[Peer], clients_max: int) -> None:
    """Raises `DaemonError` if there are as many peers of a role as there may be."""
    limit = clients_max if role == "client" else ADMINS_MAX
    if sum(peer.role == role for peer in peers) < limit:
        return
    if role == "client":
        raise DaemonError(
            f"{limit} clients are attached, the limit is {limit} (--clients): end some, or restart the daemon with more"
        )
    raise DaemonError(f"{limit} administrators are connected, the limit is {limit}: end some of their commands")


def superfluous(peers: Collection[Peer]) -> tuple[Peer, DaemonError] | None:
    """Returns the peer to drop, and why, if too many have not sent their hello: the oldest of the user who has the
    most."""
    strangers = [peer for peer in peers if peer.role is None]
    if len(strangers) <= HANDSHAKES_MAX:
        return None
    counts = Counter(peer.uid for peer in strangers)
    most = max(counts.values())
    oldest = next(peer for peer in strangers if counts[peer.uid] == most)
    reason = f"{len(strangers)} connections sent no hello yet, the limit is {HANDSHAKES_MAX}: send it sooner"
    return oldest, DaemonError(reason)


def deadlines(peer: Peer) -> list[tuple[float, str]]:
    """Returns (when, why) a peer is dropped unless it sends or reads something first."""
    found = []
    if peer.role is None:
        found.append((peer.since + HANDSHAKE_S, f"no hello came within {HANDSHAKE_S} s of the connection"))
    elif peer.role == "admin" and not peer.is_answering:
        found.append(
            (peer.active_at + ADMIN_IDLE_S, f"no request came within {ADMIN_IDLE_S} s: connect again for the next")
        )
    if peer.blocked_since is not None:
        found.append(
            (peer.blocked_since + PEER_SEND_S, f"nothing was read within {PEER_SEND_S} s, though messages wait")
        )
    return found
