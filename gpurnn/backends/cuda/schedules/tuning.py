"""Schedules measured on this machine: what ``gpurnn tune`` puts into the table that wins over the estimates.

A time loop is timed at two lengths. The difference is the cost of the additional timesteps, the rest that of a call.
Only the loop is timed: the input GEMM and the weight gradients are the same for every schedule.
"""

import logging
import statistics
import time

import numpy as np

from ....cells import CELLS, Cell, Weights
from ....dtypes import check_dtype
from ....errors import BackendError, check_choice, check_size
from ..launch import BY_STEP
from ..loop import Loop
from ..loop_plan import LoopPlan, LoopShape
from .choose import candidates as candidates_of
from .problem import Problem
from .tuned_table import Table, bucket, key

OF_EACH_SCHEDULE = 4  # candidates of a schedule that are measured: the best by estimate
_log = logging.getLogger("gpurnn")


# ---- measuring


def problems(cells, hidden, batches, dtypes, directions=1, tf32=False):
    """Every ``Problem`` of these sizes, forward and backward. cells: keys of ``gpurnn.cells.CELLS``, or records. Raises
    ValueError for an unknown cell."""
    found = []
    for name in cells:
        cell = name if isinstance(name, Cell) else CELLS[check_choice("cell", name, tuple(CELLS))]
        for H in hidden:
            for B in batches:
                for dtype in dtypes:
                    sizes = check_size("hidden", H), 0, bucket(check_size("batch", B)), directions, dtype
                    one = tf32 and dtype == "float32"
                    found += [Problem(cell, *sizes, False, backward, one) for backward in (False, True)]
    return found


def worth_measuring(problem, device):
    """The candidates that are worth measuring: the best of each schedule by estimate."""
    found, _ = candidates_of(problem, device)
    by_schedule = {}
    for candidate in found:
        by_schedule.setdefault(candidate.schedule, []).append(candidate)
    return [candidate for some in by_schedule.values() for candidate in some[:OF_EACH_SCHEDULE]]


def measure(ops, problem, candidate, lengths=(64, 320), least=0.02, clock=time.perf_counter):
    """Time one candidate on this device.

    ops: a ``CudaOps``. lengths: timesteps of the two runs. least: fewest seconds to time each of them, after a run that
    compiles and records. clock: a function that returns seconds.

    Returns ``(seconds per timestep, seconds before the first)``, from the medians of five times.
    """
    short, long = (_time(_time_loop(ops, problem, candidate, T), ops, least, clock) for T in lengths)
    seconds = max(long - short, 0.0) / (lengths[1] - lengths[0])
    return seconds, max(short - lengths[0] * seconds, 0.0)


def _time_loop(ops, problem, candidate, T):
    """A function that runs one forward or backward pass over zeros, as values do not change the time."""
    cell, dtype = problem.cell, check_dtype(problem.dtype)
    xp, B, H, D = ops.xp, problem.B, problem.H, problem.directions
    plan = LoopPlan(ops, cell, LoopShape(T, B, 0, H, H, dtype, (False, True)[:D], True, False, True, "step"))
    candidate = ops.without_spills(problem, candidate)
    plan.use(plan.candidates | {"backward" if problem.backward else "forward": candidate})
    loop = Loop(ops, plan)
    compute_dtype = np.dtype("float32" if dtype.itemsize < 4 else dtype)
    masks = [xp.ones((plan.mask_steps, B, len(cell.draws) * H), np.bool_)] * D if cell.draws else None
    weights = [_zero_weights(xp, cell, H, compute_dtype) for _ in range(D)]
    for array in (loop.gates, loop.h, loop.others):
        if array is not None:
            array[...] = 0
    loop.recorded = candidate.schedule in BY_STEP
    loop.load(weights, None, masks)
    if not problem.backward:
        return loop.forward
    doutput, nothing = xp.zeros((T, B, D * H), dtype), [None] * D
    loop.forward()
    return lambda: loop.backward(doutput, nothing, nothing)


def _zero_weights(xp, cell, H, dtype):
    """The ``Weights`` that a time loop reads."""
    G, rows = len(cell.gates), len(cell.hidden)
    hh = xp.zeros((rows * H, H), dtype) if rows else None
    own = tuple(xp.zeros(parameter.vectors * H, dtype) for parameter in cell.parameters)
    return Weights(None, hh, xp.zeros(G * H, dtype), xp.zeros(G * H, dtype), own=own)


def _time(run, ops, least, clock):
    """Seconds of a call of ``run``: the median of five times of at least ``least`` seconds."""
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


def tune(ops, problems, progress=None, **how):
    """Measure these problems on this device, and write nothing.

    progress: a function that wraps the list of problems, as ``tqdm`` does. how: keyword arguments of ``measure``.

    Returns a ``Table`` with them and all problems that ``ops`` already knew.
    """
    table, device = Table() | (ops.measured or Table()), ops.device.limits
    for problem in progress(problems) if progress else problems:
        timed, estimates = {}, {}
        for candidate in worth_measuring(problem, device):
            try:
                timed[candidate.key] = measure(ops, problem, candidate, **how)
                estimates[candidate.key] = candidate.seconds, candidate.before
            except BackendError as error:  # this device does not run that kernel: measure the others
                _log.warning("%s was not measured: %s", candidate.key, error)
        table.entries[key(problem, device)], table.estimates[key(problem, device)] = timed, estimates
    return table


def rows(table):
    """The rows of a table, for people and machines: dictionaries with "device", "name", "ways", "told" and "errors".

    "ways" maps each candidate to its times, "told" says them in words; the fastest at 512 timesteps is first. "errors"
    maps a candidate to how many times as long as estimated 512 timesteps took.
    """
    found = []
    for entry, candidates in table.entries.items():
        device, kernel, H, B, directions, dtype, tf32, backward = entry
        which, both = "backward" if backward else "forward", ", both" if directions == 2 else ""
        ordered = sorted(candidates.items(), key=lambda item: _total(item[1]))
        estimates = table.estimates.get(entry, {})
        errors = {name: _total(times) / _total(estimates[name]) for name, times in ordered if name in estimates}
        lines = [
            f"{name.partition('<')[0]} {seconds * 1e6:.2f} +{before * 1e6:.0f}" for name, (seconds, before) in ordered
        ]
        name = f"{kernel} H{H} B{B} {'tf32' if tf32 else dtype} {which}{both}"
        found.append({"device": device, "name": name, "ways": dict(ordered), "told": lines, "errors": errors})
    return found


def _total(times):
    """Seconds of a call of 512 timesteps."""
    seconds, before = times
    return before + 512 * seconds
