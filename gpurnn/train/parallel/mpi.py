"""A group over MPI, through mpi4py."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import numpy as np

from ..._typing import Array
from ...errors import BackendError
from ...losses import quiet
from .group import GRACE, Group, Sum, say_at_once

_SPINS = 200  # tests of a request before the processor is offered to others
_PATIENT = 0.2  # seconds of waiting after which a process sleeps between two tests
_NAP = 0.001  # seconds of that sleep
_ALIVE = 3  # the tag of messages that say what a process waits for; those of sums follow
_LINE = 80  # bytes of such a message


class MpiSum(Sum):
    """A sum over all processes: slices to their owners, who add them by rank, then the finished slices to all."""

    def __init__(self, group: MpiGroup, array: Array, number: int) -> None:
        self.group, self.array, self.tag = group, array, _ALIVE + 1 + 2 * (number % 1000)
        size, rank = group.size, group.rank
        length = -(-array.size // size)
        self.slices = [array[min(k * length, array.size) : min((k + 1) * length, array.size)] for k in range(size)]
        self.others = [(rank + k) % size for k in range(1, size)]  # each process begins with another one
        mine = self.slices[rank]
        self.parts = group.scratch(size, mine.size, array.dtype)
        receives = [group.world.Irecv(self.parts[k], k, self.tag) for k in self.others]
        self.requests = receives + [group.world.Isend(self.slices[k], k, self.tag) for k in self.others]
        self.added = self.done = False

    def advance(self) -> None:
        if not self.done and self.group.all_done(self.requests):
            self._next()

    def finish(self) -> None:
        while not self.done:
            self.group.wait(self.requests, f"a sum after {self.group.at}")
            self._next()

    def _next(self) -> None:
        if self.added:
            self.done = True
            self.group.give_scratch(self.parts)
            return
        rank, world = self.group.rank, self.group.world
        mine = self.slices[rank]
        self.parts[rank] = mine
        np.copyto(mine, self.parts[0])
        with quiet():  # the norm of the sum says what is not finite
            for part in self.parts[1:]:
                np.add(mine, part, out=mine)
        receives = [world.Irecv(self.slices[k], k, self.tag + 1) for k in self.others]
        self.requests, self.added = receives + [world.Isend(mine, k, self.tag + 1) for k in self.others], True


class MpiGroup(Group):
    """The processes that mpirun or srun started.

    limit: seconds without an answer after which a process that waits gives up and ends all.
    """

    kind = "mpi"

    def __init__(self, limit: float) -> None:
        from mpi4py import MPI

        self._mpi, self.limit = MPI, limit
        self.world = MPI.COMM_WORLD.Dup()
        self._watch = MPI.COMM_WORLD.Dup()  # for failures, beside whatever goes on
        self.rank, self.size = self.world.rank, self.world.size
        self._scratch: dict[Any, list[Array]] = {}
        self._sums = 0

    # ---- sums and bytes

    def start_sum(self, array: Array) -> Sum:
        if self.size == 1:
            return Sum()
        if not isinstance(array, np.ndarray):
            raise BackendError("a model on a GPU needs the group 'nccl': MPI carries arrays of the CPU")
        self._sums += 1
        return MpiSum(self, array, self._sums)

    def gather_equal(self, data: bytes) -> list[bytes]:
        received = np.empty((self.size, len(data)), np.uint8)
        self.wait([self.world.Iallgather(np.frombuffer(data, np.uint8), received)], self.at)
        return [row.tobytes() for row in received]

    def gather_counted(self, data: bytes, counts: list[int]) -> list[bytes]:
        received = np.empty(sum(counts), np.uint8)
        starts = [sum(counts[:k]) for k in range(self.size)]
        sent = np.frombuffer(data, np.uint8)
        into = [received, counts, starts, self._mpi.BYTE]
        self.wait([self.world.Iallgatherv(sent, into)], self.at)
        return [received[start : start + count].tobytes() for start, count in zip(starts, counts, strict=True)]

    def scratch(self, *key: Any) -> Array:
        """An array (size, count) that a sum receives into."""
        unused = self._scratch.get(key)
        return unused.pop() if unused else np.empty(key[:2], key[2])

    def give_scratch(self, array: Array) -> None:
        """Take an array of ``scratch`` back."""
        self._scratch.setdefault((*array.shape, array.dtype), []).append(array)

    # ---- waiting

    def all_done(self, requests: list[Any]) -> bool:
        """Whether these requests are done."""
        return self._mpi.Request.Testall(requests)

    def wait(self, requests: list[Any], what: str) -> None:
        """Wait for requests, no longer than the limit; then end all processes and name those that do not answer."""
        if not self._wait(requests, self.limit):
            self._give_up(what)

    def _wait(self, requests, seconds):
        """Whether requests are done within so many seconds."""
        for _ in range(_SPINS):
            if self.all_done(requests):
                return True
        start = time.monotonic()
        while not self.all_done(requests):
            waited = time.monotonic() - start
            if waited > seconds:
                return False
            time.sleep(_NAP if waited > _PATIENT else 0)
        return True

    def _give_up(self, what):
        """Say which processes do not answer, and end all. Those that wait here too answer with what they wait for."""
        mine, waits = np.frombuffer(what.encode()[:_LINE].ljust(_LINE), np.uint8), {self.rank: what}
        with contextlib.suppress(self._mpi.Exception):
            for k in set(range(self.size)) - {self.rank}:
                self._watch.Isend(mine, k, _ALIVE)
        start = time.monotonic()
        while len(waits) < self.size and time.monotonic() - start < GRACE:
            for k in set(range(self.size)) - set(waits):
                if self._watch.Iprobe(k, _ALIVE):
                    line = np.empty(_LINE, np.uint8)
                    self._watch.Recv(line, k, _ALIVE)
                    waits[k] = line.tobytes().decode(errors="replace").strip()
            time.sleep(0.05)
        silent = sorted(set(range(self.size)) - set(waits))
        if self.rank == min(waits):
            waiting = ", ".join(f"process {k} waits for {waits[k]}" for k in sorted(waits)[:4])
            named = f"Without an answer: {', '.join(map(str, silent))} (of {self.size})" if silent else waiting
            say_at_once(
                f"Error: {what} took more than {self.limit:g} seconds, and all processes were ended. "
                f"{named}. GPURNN_GROUP_TIMEOUT sets the limit\n"
            )
        else:
            time.sleep(1)
        self.abort(1)

    # ---- the end

    def all_fail(self, seconds: float) -> bool:
        return self._wait([self._watch.Ibarrier()], seconds)

    def abort(self, code: int) -> None:
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # where that does not end this process
