"""Errors of a command that mpirun, srun or torchrun started several times: said once, by process 0."""

import contextlib
import io
import sys
import time

from ..errors import BackendError
from ..train import parallel
from ..train.parallel import launchers
from ..train.parallel.group import GRACE

_PATIENCE = 60.0  # seconds in which other processes must have come as far as this one, which has failed


@contextlib.contextmanager
def said_once(words):
    """Hold back what processes other than the first write as they fail. words: the command line.

    Once there is a group, an error of one process alone is reported by the group; all others are errors of all. Before,
    as with wrong options, the processes find out here whether all of them fail, and end all where they do not. Commands
    that join no group know nothing of each other, and each says its own errors.
    """
    try:
        place = launchers.find_place()
    except ValueError:  # train says it
        place = launchers.Place()
    if place.size == 1 or not joins(words):
        yield
        return
    errors, held = sys.stderr, io.StringIO()
    if place.rank:
        sys.stderr = held
    try:
        yield
    except SystemExit as end:
        said = f"process {place.rank} of {place.size}: {held.getvalue()}" if place.rank else ""
        if end.code and not launchers.joined and not _all_fail(place, said):
            errors.write(said)
            errors.flush()
            if launchers.joined:
                launchers.joined[0].abort(end.code)
        raise
    except BaseException:
        errors.write(held.getvalue())
        raise
    finally:
        sys.stderr = errors


def joins(words):
    """Whether a command line is one that joins a group: train, unless it says that it does not."""
    command = next((word for word in words if not word.startswith("-")), None)
    apart = "--group=none" in words or any(pair == ("--group", "none") for pair in zip(words, words[1:], strict=False))
    return command == "train" and not apart


def _all_fail(place, said):
    """Whether all processes fail within ``GRACE`` seconds; where there is no MPI to find out, the launcher decides.

    said: what this process says where the others do not even join.
    """
    try:
        if place.launcher == "torchrun":
            raise BackendError("torchrun starts processes for NCCL")
        return parallel.join("mpi", place, parallel.TIMEOUT, _PATIENCE, said).all_fail(GRACE)
    except BackendError:
        time.sleep(GRACE)
        return False
