"""How the compiled time loop shares its work among threads."""

from typing import NamedTuple

from .threads import thread_count

_ROWS = 4  # fewest sequences per thread; with fewer, loading the weights dominates. Up to so many, units are divided
_UNITS = 64  # fewest units per thread
WORK = 1 << 22  # fewest multiplications that are worth a second thread: a tenth of a millisecond
_STEP = 1 << 17  # fewest multiplications of a timestep that pay for a meeting of threads, less than a microsecond


class Sharing(NamedTuple):
    """threads: how many. by_units: whether they divide the units of all sequences, or else the sequences."""

    threads: int
    by_units: bool


def share(T, B, units, work, directions):
    """The ``Sharing`` of a time loop. units: from ``units_to_share``. work: the ``multiplications`` of one direction.

    Where there are few sequences, threads divide the units: each reads its share of the weights, and they meet once in
    a timestep. In a single timestep they divide the units of many sequences, too, and need not meet.
    """
    if work * directions < WORK:
        return Sharing(1, False)
    if T > 1 and work < T * _STEP:
        units = 0
    by_sequences = min(thread_count(), directions * -(-B // _ROWS))
    by_units = min(thread_count(), directions * (units // _UNITS))
    if by_units >= max(2, by_sequences) and (T == 1 or B * directions <= _ROWS * by_units):
        return Sharing(by_units, True)
    return Sharing(max(1, by_sequences), False)


def multiplications(cell, units, P, I=0):
    """Those of one direction. units: of all timesteps and sequences. I: of the input that this loop multiplies."""
    return units * (len(cell.hidden) * P + len(cell.gates) * I)


def units_to_share(cell, projected, H):
    """The units that threads can divide: none where a timestep has a projection, a second product, or means over the
    units."""
    return 0 if projected or cell.means or cell.first < len(cell.hidden) else H
