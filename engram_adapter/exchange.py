"""`Ranks`: the ranks of a process group that exchange rows in lock-step. The only file that imports torch.distributed.

Input: a process group, tensors on the CPU. Output: the other ranks' tensors. Errors: `RankError`, which names the ranks
that did not come, what was waited for and for how long; it comes within `timeout_s`, and the group is of no use then.

Ranks that share an exchange must call the same things in the same order. Every exchange begins with one of counts,
which carries what it is for: ranks that are in different places notice it there, by name, and nothing is mixed.

Shapes: W ranks. A row of a tensor is what lies along its first axis.
"""

from __future__ import annotations

import copy
import json
import weakref
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tierstore.errors import ConfigError, RankError

from .rank_waits import RankWaits

TIMEOUT_S = 300.0
COUNTS_MAX = 61  # numbers that one rank sends another in an exchange of counts
HEADER_MARK = 0x74696572  # begins what a rank sends in an exchange of counts, before the number of what it is for

_shared: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()  # of the main thread, as groups are


class Pending:
    """An exchange that has begun. It owns its tensors until it has ended."""

    def __init__(self, waits: RankWaits, what: str, work: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        self._waits, self._what, self._work, self._tensors = waits, what, work, tensors

    def wait(self) -> torch.Tensor:
        """Returns what came. Blocks, at most as long as the ranks' limit; Ctrl-C comes through."""
        self._waits.wait(self._what, self._work)
        return self._tensors[0]


class Scratch:
    """Memory that exchanges use again and again: fresh pages cost as much as the exchange over the loopback."""

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor of that shape, not cleared; whoever takes the same name next gets the same memory."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        block = self._blocks.get(name)
        if block is None or len(block) < num_bytes:
            block = self._blocks[name] = torch.empty(num_bytes + num_bytes // 4, dtype=torch.uint8, device="cpu")
        return block[:num_bytes].view(dtype).view(shape)


class Ranks:
    """The ranks of one process group, in the order of the group. One thread at a time exchanges.

    It has a gloo group of its own: CPU tensors travel whatever the given group's backend is (nccl takes none), and
    nothing meets the collectives of others, such as DDP's. All ranks of the group construct it together.

    `rank` and `size` are its own place and how many there are; `members` the same ranks in the default group.
    """

    def __init__(self, process_group: Any = None, timeout_s: float = TIMEOUT_S) -> None:
        """Makes the gloo group. Blocks until all ranks are here.

        Args:
            process_group: A group of torch.distributed, of any backend; None: the default group, all ranks.
            timeout_s: The longest wait for the others in any exchange.

        Raises:
            ConfigError: torch.distributed is not initialised, or this process is not in the group.
            RankError: The others did not come.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError("process_group: torch.distributed is not initialised; call init_process_group before")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s is {timeout_s}, must be above 0")
        group = dist.group.WORLD if process_group is None else process_group
        if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
            raise ConfigError("process_group: this process is not a rank of the group")
        self.members = tuple(dist.get_process_group_ranks(group))
        self.rank, self.size, self.timeout_s = dist.get_rank(group), len(self.members), float(timeout_s)
        self.scratch = Scratch()
        self._open()

    def _open(self) -> None:
        """Makes the gloo group. It ends with the default group, not before: torch gives the name of one that was
        destroyed to the next, and ranks would look for each other at the old one's addresses. The given group may end
        before."""
        self._group = self._new_group()
        store = dist.PrefixStore(f"tierstore/{self._group.group_name}", dist.distributed_c10d._get_default_store())
        self._waits = RankWaits(self.rank, self.size, self.timeout_s, store)

    def _new_group(self) -> Any:
        limit = timedelta(seconds=self.timeout_s)
        try:
            return dist.new_group(list(self.members), limit, backend="gloo", use_local_synchronization=True)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size}: the other ranks did not make their gloo group within "
                f"{self.timeout_s:g} s: all ranks construct the same modules in the same order ({error})"
            ) from error

    @classmethod
    def of(cls, process_group: Any = None, timeout_s: float | None = None) -> Ranks:
        """Returns the one `Ranks` of a group that its tables share; a `Ranks` is returned as it is.

        A `DeviceMesh` of one dimension stands for its group.
        timeout_s: Of a group that has none yet; None: 300 s. Raises as the constructor does.
        """
        if isinstance(process_group, Ranks):
            return process_group
        if isinstance(process_group, dist.device_mesh.DeviceMesh):
            process_group = process_group.get_group()
        group = dist.group.WORLD if process_group is None and dist.is_initialized() else process_group
        if group is None or group not in _shared:
            made = cls(group, TIMEOUT_S if timeout_s is None else timeout_s)
            _shared[dist.group.WORLD if group is None else group] = made
            return made
        return _shared[group]

    def beside(self) -> Ranks:
        """Makes another `Ranks` of the same ranks, for exchanges of another thread. All ranks call it together."""
        beside = copy.copy(self)
        beside.scratch = Scratch()
        beside._open()
        return beside

    def __repr__(self) -> str:
        return f"<Ranks: rank {self.rank} of {self.size}>"

    def end(self, reason: str) -> None:
        """Allows no exchange from now on; one that another thread waits in ends with a `RankError`."""
        self._waits.end(reason)

    def whole(self, what: str) -> AbstractContextManager[None]:
        """For what comes after `counts` and belongs together: if it raises, no exchange is possible any more."""
        return self._waits.whole(what)

    def counts(self, what: str, counts: np.ndarray) -> np.ndarray:
        """Sends each rank its numbers, and returns theirs for this one. Blocks.

        Every other exchange follows one of these: here ranks see whether they are in the same place.

        Args:
            what: What the exchange is for, in words: "forward of table layers.1". The same on all ranks.
            counts: int64 [W, n], n at most COUNTS_MAX: row r is for rank r.

        Returns:
            int64 [W, n]: row r is from rank r.

        Raises:
            RankError: A rank is at another place in its code, or did not come; the message says which, and where.
        """
        if counts.ndim != 2 or len(counts) != self.size or counts.shape[1] > COUNTS_MAX:
            raise ValueError(f"counts are {list(counts.shape)}, expected [{self.size}, at most {COUNTS_MAX}]")
        self._waits.number += 1
        sent = torch.zeros((self.size, 3 + COUNTS_MAX), dtype=torch.int64, device="cpu")
        sent[:, 0], sent[:, 1], sent[:, 2] = HEADER_MARK, zlib.crc32(what.encode()), self._waits.number
        sent[:, 3 : 3 + counts.shape[1]] = torch.from_numpy(np.ascontiguousarray(counts, dtype=np.int64))
        with self.whole(what):
            came = self.all_to_all(what, sent).numpy()
        if (came[:, :3] != sent[0, :3].numpy()).any():
            self._raise_places(what)
        return came[:, 3 : 3 + counts.shape[1]].copy()

    def _raise_places(self, what: str) -> None:
        """Raises `RankError`: some rank is elsewhere. All ranks have seen it, and say where they are."""
        places = self._gathered(what, f"{what} (exchange {self._waits.number})")
        listed = "; ".join(f"rank {rank} is in {place}" for rank, place in enumerate(places))
        elsewhere = tuple(rank for rank, place in enumerate(places) if place != places[self.rank])
        message = (
            f"ranks are at different places: {listed}. All ranks must call the same tables in the same order, with an "
            "empty batch too"
        )
        raise self._waits.failed(message, elsewhere, what)

    def start_all_to_all(
        self,
        what: str,
        sent: torch.Tensor,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
    ) -> Pending:
        """Begins to send rows to all ranks, and to receive theirs; call it after `counts`. Does not block.

        Args:
            what: As in `counts`.
            sent: Contiguous, on the CPU: the rows for rank 0, then those for rank 1, and so on.
            send_counts, receive_counts: [W], rows to and from each rank; None: equal parts.
            out: [sum of receive_counts, ...], contiguous, is filled; None: a new tensor.
        """
        if out is None:
            num_rows = len(sent) if receive_counts is None else sum(map(int, receive_counts))
            out = torch.empty((num_rows, *sent.shape[1:]), dtype=sent.dtype, device="cpu")
        self._waits.check(what)
        received, given = _listed(receive_counts), _listed(send_counts)
        work = dist.all_to_all_single(out, sent, received, given, group=self._group, async_op=True)
        return Pending(self._waits, what, work, (out, sent))

    def all_to_all(
        self,
        what: str,
        sent: torch.Tensor,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sends rows to all ranks and returns theirs, in the order of ranks. Blocks. As `start_all_to_all`."""
        return self.start_all_to_all(what, sent, send_counts, receive_counts, out).wait()

    def all_gather(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the small, equally shaped tensors of all ranks, [W, ...]; call it after `counts`. Blocks."""
        return self.all_to_all(what, tensor.unsqueeze(0).repeat(self.size, *[1] * tensor.ndim))

    def broadcast(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        """Fills a tensor with rank 0's, which is contiguous and of the same shape; after `counts`. Blocks."""
        self._waits.check(what)
        work = dist.broadcast(tensor, group=self._group, group_src=0, async_op=True)
        return Pending(self._waits, what, work, (tensor,)).wait()

    def start_send(self, what: str, tensor: torch.Tensor, to: int) -> Pending:
        """Begins to send a tensor to rank `to` alone, which receives it; call it after `counts`. Does not block."""
        self._waits.check(what)
        work = dist.isend(tensor, group=self._group, group_dst=to)
        return Pending(self._waits, what, work, (tensor,))

    def receive(self, what: str, out: torch.Tensor, sender: int) -> torch.Tensor:
        """Fills `out` with what rank `sender` sends to this one, and returns it. Blocks."""
        self._waits.check(what)
        work = dist.irecv(out, group=self._group, group_src=sender)
        return Pending(self._waits, what, work, (out,)).wait()

    def gather_objects(self, what: str, value: Any) -> list[Any]:
        """Returns what each rank gives, by rank: small values that JSON holds (tuples come as lists). Blocks."""
        with self.whole(what):
            self.counts(what, np.zeros((self.size, 0), dtype=np.int64))
            return self._gathered(what, value)

    def _gathered(self, what: str, value: Any) -> list[Any]:
        """By tensors, not by `all_gather_object`, through which Ctrl-C does not come."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.all_gather(what, torch.tensor([len(data)], dtype=torch.int64)).view(-1).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: len(data)] = data
        came = self.all_gather(what, padded).numpy()
        return [json.loads(came[rank, :size].tobytes()) for rank, size in enumerate(sizes)]


def _listed(counts: Sequence[int] | None) -> list[int] | None:
    return None if counts is None else [int(each) for each in counts]
