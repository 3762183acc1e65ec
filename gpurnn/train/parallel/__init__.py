"""Data-parallel training: several processes train one model, each on its part of every batch.

    mpirun -n 4 gpurnn train text book.txt

or in a program of one's own, which mpirun, srun or torchrun starts:

>>> group = gpurnn.train.parallel.init()
>>> group.size                                            # of a process on its own
1

and then ``gpurnn.fit(..., group=group)``. N processes compute what one process computes with the same batches, up to
rounding, and the same bits in every run. docs/parallel.md says how to use it; group.py, what the processes exchange.
"""

from __future__ import annotations

import importlib.util
import math
import os

from ...errors import BackendError, check_choice, one_line
from .deadline import ended_after
from .group import Group, PeerError
from .launchers import Place, find_place, joined

__all__ = ["init", "Group", "PeerError", "Place", "find_place"]

KINDS = ("auto", "mpi", "nccl", "none")
TIMEOUT = 300.0  # seconds


def init(kind: str = "auto") -> Group:
    """The group of processes that this one was started with.

    Call it once, before a model is built. In each process the compiled code then takes an equal number of the
    processors that the processes of this machine have in common, unless GPURNN_NUM_THREADS or OMP_NUM_THREADS says how
    many.

    Parameters
    ----------
    kind : {"auto", "mpi", "nccl", "none"}
        What carries the sums. "mpi": mpi4py, for the CPU. "nccl": NCCL through CuPy, one GPU for each process. "none":
        this process alone. "auto": none where no launcher started several processes; else NCCL where torchrun did or a
        GPU can be used, and MPI otherwise.

    Returns
    -------
    Group
        What ``fit`` takes as ``group``. As a context manager it waits at the end for all processes, and ends all where
        one fails alone in the block.

    Raises
    ------
    BackendError
        For a kind that cannot work here.
    ValueError, TypeError
        For another ``kind``, or for variables of a launcher that make no sense.

    Examples
    --------
    >>> gpurnn.train.parallel.init("none").kind
    'none'
    """
    check_choice("kind", kind, KINDS)
    place = find_place()
    if kind == "auto":
        kind = _best_kind(place)
    if kind == "none":
        return Group()
    limit = _limit()
    group = join(kind, place, limit, limit)
    _divide_processors(place)
    return group


def join(kind: str, place: Place, limit: float, patience: float, last_words: str = "") -> Group:
    """The group of a kind, "mpi" or "nccl". Where the others do not join within ``patience`` seconds, this process ends
    with ``last_words`` and a line that says so.
    """
    text = (
        f"{last_words}Error: process {place.rank} of {place.size} waited {patience:g} seconds for the others to join "
        "the group, and was ended. All must call gpurnn.train.parallel.init(), or run gpurnn train. "
        "GPURNN_GROUP_TIMEOUT sets the limit\n"
    )
    with ended_after(patience, text):
        if kind == "mpi":
            group = _mpi(limit)
        else:
            from .nccl import make_group

            group = make_group(place, limit)
    joined.append(group)
    return group


def _best_kind(place: Place) -> str:
    if place.size == 1:
        return "none"
    return "nccl" if place.launcher == "torchrun" or _has_gpu() else "mpi"


def _has_gpu() -> bool:
    from ...backends import backends

    return importlib.util.find_spec("cupy") is not None and backends()["cuda"] is None


def _mpi(limit: float) -> Group:
    try:
        from .mpi import MpiGroup

        return MpiGroup(limit)
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            'several processes on CPUs need mpi4py and an MPI library: pip install "gpurnn[mpi]", and pip install '
            f"mpich where the system has none ({one_line(error)})"
        ) from error


def _limit() -> float:
    """GPURNN_GROUP_TIMEOUT in seconds, or the default."""
    text = os.environ.get("GPURNN_GROUP_TIMEOUT", "")
    try:
        seconds = float(text or TIMEOUT)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"GPURNN_GROUP_TIMEOUT should be seconds above 0, got {one_line(repr(text), 60)}")
    return seconds


def _divide_processors(place: Place) -> None:
    """Give the compiled code of each process on this machine an equal part of the processors."""
    if place.local_size > 1 and not any(os.environ.get(name) for name in ("GPURNN_NUM_THREADS", "OMP_NUM_THREADS")):
        from ...backends.cpu.threads import thread_count

        os.environ["GPURNN_NUM_THREADS"] = str(max(1, thread_count() // place.local_size))
