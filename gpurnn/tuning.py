"""Schedules measured on this machine: the table of ``gpurnn tune``, kept on disk, which wins over the estimates.

A walk is timed at two lengths: what the longer one takes more is the price of a timestep, the rest that of a call. Only
the walk is timed; the input GEMM and the gradients of the weights are the same for every schedule.
"""

import logging
import os
import statistics
import time
from pathlib import Path

import numpy as np

from . import cells, schedules
from .errors import BackendError, FileError, check_choice, check_size
from .files import one_line, read_json, write_json_atomic
from .module import check_dtype

CELLS = {"rnn": cells.RNNCell(), "lstm": cells.LSTMCell(False), "gru": cells.GRUCell(True)}
CANDIDATES = 4  # of a schedule, the best by estimate
_FORMAT = 1
_log = logging.getLogger("gpurnn")


class Table:
    """What was measured: ``entries`` maps (device, cell, H, batch, directions, dtype, tf32, backward) to
    {way: (seconds of a timestep, seconds before the first)}. A batch stands for all up to the next power of two."""

    def __init__(self, entries=()):
        self.entries = dict(entries)

    def known(self, work, device):
        """{``Way.key``: (seconds, before)} of a ``schedules.Work``, empty where nothing was measured."""
        return self.entries.get(_key(work, device), {})


def _key(work, device):
    kernel = work.kernel.replace("Relu", "Tanh")  # which cost the same
    return device.name, kernel, work.H, bucket(work.B), work.directions, work.dtype, work.tf32, work.backward


def bucket(B):
    """The power of two that a batch is rounded up to."""
    return 1 << max(B - 1, 0).bit_length()


# ---- on disk


def path():
    """Where the table is kept: ``GPURNN_TUNED``, else ``gpurnn/tuned.json`` in the user's cache folder."""
    if os.environ.get("GPURNN_TUNED"):
        return Path(os.environ["GPURNN_TUNED"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpurnn" / "tuned.json"


def read():
    """The ``Table`` on disk; an empty one where there is none, or with a warning where it cannot be read."""
    try:
        document = read_json(path())
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, expected {_FORMAT}")
        return Table(
            (tuple(entry["work"]), {way: (float(a), float(b)) for way, (a, b) in entry["ways"].items()})
            for entry in document["entries"]
        )
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used, schedules are estimated: %s", path(), one_line(error))
        return Table()


def check_file():
    """Raise FileError where there is a file at ``path()`` that is no table: it is neither replaced nor removed."""
    if path().exists() and not {"format", "entries"} <= set(_document() or ()):
        raise FileError(f"{path()} is not a table of gpurnn tune, and stays: move it away, or set GPURNN_TUNED")


def _document():
    try:
        return read_json(path())
    except (OSError, ValueError):
        return None


def write(table):
    """Put the table on disk, whole or not at all."""
    path().parent.mkdir(parents=True, exist_ok=True)
    entries = [{"work": list(key), "ways": ways} for key, ways in table.entries.items()]
    write_json_atomic(path(), {"format": _FORMAT, "entries": entries})


# ---- measuring


def works(cells, hidden, batches, dtypes, directions=1, tf32=False):
    """The ``schedules.Work`` of all these, forward and backward. Raises ValueError for an unknown cell."""
    found = []
    for name in cells:
        cell = CELLS[check_choice("cell", name, tuple(CELLS))]
        for H in hidden:
            for B in batches:
                for dtype in dtypes:
                    sizes = check_size("hidden", H), 0, bucket(check_size("batch", B)), directions, dtype
                    one = tf32 and dtype == "float32"
                    found += [schedules.Work(cell.kernel, cell.gates, *sizes, False, way, one) for way in (False, True)]
    return found


def candidates(work, device):
    """The ways that are worth measuring: of each schedule the best by estimate."""
    found, _ = schedules.ways(work, device)
    by_schedule = {}
    for way in found:
        by_schedule.setdefault(way.schedule, []).append(way)
    return [way for some in by_schedule.values() for way in some[:CANDIDATES]]


def measure(ops, work, way, lengths=(64, 320), least=0.02, clock=time.perf_counter):
    """``(seconds of a timestep, seconds before the first)`` of one way of a work on this device.

    ops: a ``CudaOps``. lengths: timesteps of the two walks. least: seconds that each is timed for, at least, after a
    run that compiles and records; of five such times the middle one counts.
    """
    short, long = (_time(_walk(ops, work, way, T), ops, least, clock) for T in lengths)
    seconds = max(long - short, 0.0) / (lengths[1] - lengths[0])
    return seconds, max(short - lengths[0] * seconds, 0.0)


def _walk(ops, work, way, T):
    """A function that walks once, there or back, over arrays of zeros: their numbers do not change the time."""
    from .cuda_ops import Loop

    cell = next(cell for cell in CELLS.values() if cell.kernel == work.kernel)
    xp, B, H, D = ops.xp, work.B, work.H, work.directions
    dtype = check_dtype(work.dtype)
    loop = Loop(ops, cell, T, B, 0, H, H, (False, True)[:D], dtype, True, False, True, "step")
    way = ops.without_spills(work, way)
    loop.ways = loop.ways | {"backward" if work.backward else "forward": way}
    wide = np.dtype("float32" if dtype.itemsize < 4 else dtype)
    G = cell.gates
    weights = [
        cells.Weights(None, xp.zeros((G * H, H), wide), xp.zeros(G * H, wide), xp.zeros(G * H, wide)) for _ in range(D)
    ]
    for array in (loop.gates, loop.h, loop.c):
        if array is not None:
            array[...] = 0
    loop.recorded = way.schedule == "step"
    loop.load(weights, None)
    if not work.backward:
        return loop.forward
    doutput, nothing = xp.zeros((T, B, D * H), dtype), [None] * D
    loop.forward()
    return lambda: loop.backward(doutput, nothing)


def _time(run, ops, least, clock):
    run()
    ops.synchronize()
    count, times = 1, []
    while len(times) < 5:
        start = clock()
        for _ in range(count):
            run()
        ops.synchronize()
        taken = clock() - start
        if taken < least and count < 1 << 16:
            count, times = 2 * count, []
        else:
            times.append(taken / count)
    return statistics.median(times)


def tune(ops, works, progress=None, **how):
    """Measure works on this device: a ``Table`` with these and all that were known. Nothing is written.

    progress: wraps the list of works, as ``tqdm`` does. how: of ``measure``.
    """
    table, device = Table(ops.measured.entries if ops.measured else ()), ops.device.limits
    for work in progress(works) if progress else works:
        timed = {}
        for way in candidates(work, device):
            try:
                timed[way.key] = measure(ops, work, way, **how)
            except BackendError as error:  # a kernel that this device does not run: the others are measured
                _log.warning("%s is left out: %s", way.key, error)
        table.entries[_key(work, device)] = timed
    return table


def rows(table):
    """What a table knows, for people and machines: a list of {"device", "name", "ways", "told"}, each work's ways with
    the quickest at 512 timesteps first."""
    found = []
    for (device, kernel, H, B, directions, dtype, tf32, backward), ways in table.entries.items():
        way_back, both = "backward" if backward else "forward", ", both" * (directions == 2)
        ordered = sorted(ways.items(), key=lambda item: item[1][1] + 512 * item[1][0])
        told = [
            f"{key.partition('<')[0]} {seconds * 1e6:.2f} +{before * 1e6:.0f}" for key, (seconds, before) in ordered
        ]
        name = f"{kernel} H{H} B{B} {'tf32' if tf32 else dtype} {way_back}{both}"
        found.append({"device": device, "name": name, "ways": dict(ordered), "told": told})
    return found
