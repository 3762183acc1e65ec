"""A group over NCCL, through CuPy: one GPU for each process.

NCCL carries bytes from process to process; the sums are CuPy's, in the order of the ranks, as over MPI. Before there is
a communicator the processes exchange its id, and when one fails they must hear of it: both go over MPI where mpirun
or srun started them, and over torchrun's store where torchrun did.

No GPU has run this yet: tests/train/test_parallel_nccl.py runs it on a stand-in for CuPy and NCCL, which checks what is
sent to whom, and nothing of NCCL itself.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from ..._typing import Array
from ...errors import BackendError, one_line
from ...losses import quiet
from .group import GRACE, Group, Sum, say_at_once
from .launchers import Place

_ON_CPUS = "Processes on CPUs are started by mpirun or srun, not by torchrun"


class NcclSum(Sum):
    """A sum over all processes: on its way in the GPU's queue, where what follows waits for it."""

    def __init__(self, group: NcclGroup, array: Array) -> None:
        cupy, size, rank = group.cupy, group.size, group.rank
        length = -(-array.size // size)
        slices = [array[min(k * length, array.size) : min((k + 1) * length, array.size)] for k in range(size)]
        mine = slices[rank]
        parts = cupy.empty((size, mine.size), array.dtype)
        group.trade([(slices[k], parts[k], k) for k in range(size) if k != rank])
        parts[rank] = mine
        with quiet():  # the norm of the sum says what is not finite
            mine[...] = parts[0]
            for part in parts[1:]:
                cupy.add(mine, part, out=mine)
        group.trade([(mine, slices[k], k) for k in range(size) if k != rank])
        self.group, self.waits_for = group, (array, parts)

    def finish(self) -> None:
        self.group.wait(f"a sum after {self.group.at}")


class NcclGroup(Group):
    """The processes that torchrun, mpirun or srun started, each with a GPU.

    control: how they find each other and hear of failures. limit: seconds without an answer after which a process that
    waits gives up and ends.
    """

    kind = "nccl"

    def __init__(self, cupy: Any, nccl: Any, control: Any, limit: float) -> None:
        self.cupy, self._nccl, self._control, self.limit = cupy, nccl, control, limit
        self.rank, self.size = control.rank, control.size
        made = list(nccl.get_unique_id()) if self.rank == 0 else None
        self._communicator = nccl.NcclCommunicator(self.size, tuple(control.send(made)), self.rank)

    def start_sum(self, array: Array) -> Sum:
        return Sum() if self.size == 1 else NcclSum(self, array)

    def trade(self, pairs: list[tuple[Array, Array, int]]) -> None:
        """Send and receive arrays, all at once: (what is sent, what is received into, with which process)."""
        nccl, stream = self._nccl, self.cupy.cuda.get_current_stream().ptr
        nccl.groupStart()
        for sent, into, other in pairs:
            if sent.size:
                self._communicator.send(sent.data.ptr, sent.nbytes, nccl.NCCL_UINT8, other, stream)
            if into.size:
                self._communicator.recv(into.data.ptr, into.nbytes, nccl.NCCL_UINT8, other, stream)
        nccl.groupEnd()

    def gather_equal(self, data: bytes) -> list[bytes]:
        cupy, count = self.cupy, len(data)
        mine = cupy.asarray(np.frombuffer(data, np.uint8))
        every = cupy.empty(self.size * count, np.uint8)
        stream = cupy.cuda.get_current_stream().ptr
        kind = self._nccl.NCCL_UINT8
        self._communicator.allGather(mine.data.ptr, every.data.ptr, count, kind, stream)
        self.wait(self.at)
        received = cupy.asnumpy(every).tobytes()
        return [received[k * count : (k + 1) * count] for k in range(self.size)]

    def wait(self, what: str) -> None:
        """Wait for the GPU, no longer than the limit; then end this process, and with it all."""
        event = self.cupy.cuda.Event()
        event.record()
        start = time.monotonic()
        while not event.done:
            if time.monotonic() - start > self.limit:
                if self.is_first or not self._control.all_fail(GRACE):
                    say_at_once(
                        f"Error: {what} took more than {self.limit:g} seconds, and all processes were ended (this one "
                        f"is {self.rank} of {self.size}). GPURNN_GROUP_TIMEOUT sets the limit\n"
                    )
                self.abort(1)
            time.sleep(0)

    def all_fail(self, seconds: float) -> bool:
        return self._control.all_fail(seconds)

    def abort(self, code: int) -> None:
        self._control.abort(code)
        os._exit(code)


class Store:
    """What a group needs of torchrun's store: it is a dictionary that all processes share. The launcher ends all
    processes where one ends with an error.

    attempt: which restart this is: the store outlives it, and what an earlier one wrote must not be read.
    """

    def __init__(self, store: Any, place: Place, attempt: str = "0") -> None:
        self.store, self.rank, self.size = store, place.rank, place.size
        self.id, self.failed = f"gpurnn/{attempt}/id", f"gpurnn/{attempt}/failed"

    def send(self, document: Any) -> Any:
        """A list of numbers from process 0 to all."""
        if self.rank == 0:
            self.store.set(self.id, ",".join(map(str, document)))
        return [int(number) for number in self.store.get(self.id).decode().split(",")]

    def all_fail(self, seconds: float) -> bool:
        """Whether within so many seconds all processes call this."""
        start = time.monotonic()
        self.store.add(self.failed, 1)
        while self.store.add(self.failed, 0) < self.size:
            if time.monotonic() - start > seconds:
                return False
            time.sleep(0.05)
        return True

    def abort(self, code: int) -> None:
        """The launcher does the rest."""


def make_group(place: Place, limit: float) -> NcclGroup:
    """The group over NCCL. Raises BackendError where there is no CuPy, NCCL or GPU, or no way to exchange the id."""
    try:
        import cupy
        from cupy.cuda import nccl

        if not nccl.available:
            raise ImportError("CuPy finds no NCCL library: pip install nvidia-nccl-cu12 (or -cu13)")
        cupy.cuda.Device(place.local_rank).use()
    except (ImportError, AttributeError) as error:
        raise BackendError(
            f'NCCL needs CuPy and its NCCL: pip install "gpurnn[cuda12]" nvidia-nccl-cu12 ({one_line(error)}). '
            f"{_ON_CPUS}"
        ) from error
    except Exception as error:  # of CUDA, whose classes are not there without CuPy
        raise BackendError(f"NCCL needs a GPU for each process ({one_line(error)}). {_ON_CPUS}") from error
    return NcclGroup(cupy, nccl, _control(place, limit), limit)


def _control(place, limit):
    """What the processes find each other by."""
    if place.launcher == "torchrun":
        from datetime import timedelta

        try:
            from torch.distributed import TCPStore
        except ImportError as error:
            raise BackendError("the processes that torchrun started find each other by torch's store") from error
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and place.rank == 0
        store = TCPStore(host, port, place.size, own, timedelta(seconds=limit))
        return Store(store, place, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    from .mpi import MpiGroup

    try:
        return MpiGroup(limit)
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            'NCCL under mpirun or srun needs mpi4py: pip install "gpurnn[mpi]". torchrun needs none'
        ) from error
