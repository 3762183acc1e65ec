"""Errors of a command that mpirun, srun or torchrun started several times: said once, by process 0."""

import contextlib
import io
import sys
import time

from ..errors import BackendError
from ..train.parallel import find_place, init, launchers
from ..train.parallel.group import GRACE


@contextlib.contextmanager
def said_once():
    """Hold back what processes other than the first write as they fail.

    Once there is a group, an error of one process alone is reported by the group; all others are errors of all. Before,
    as with wrong options, the processes find out here whether all of them fail, and end all where they do not.
    """
    try:
        place = find_place()
    except ValueError:  # train says it
        place = launchers.Place()
    if place.size == 1:
        yield
        return
    errors, held = sys.stderr, io.StringIO()
    if place.rank:
        sys.stderr = held
    try:
        yield
    except SystemExit as end:
        if end.code and not launchers.joined and not _all_fail():
            errors.write(f"process {place.rank} of {place.size}: {held.getvalue()}" if place.rank else "")
            errors.flush()
            _end_all(end.code)
        raise
    except BaseException:
        errors.write(held.getvalue())
        raise
    finally:
        sys.stderr = errors


def _all_fail():
    """Whether all processes fail within ``GRACE`` seconds; where there is no MPI to find out, the launcher decides."""
    try:
        return init("mpi").all_fail(GRACE)
    except BackendError:
        time.sleep(GRACE)
        return False


def _end_all(code):
    if launchers.joined:
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(code)
