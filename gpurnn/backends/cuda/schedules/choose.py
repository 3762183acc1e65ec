"""The choice: every candidate for a problem, the fastest first."""

import functools
from dataclasses import replace

from ....dtypes import ITEMSIZE
from ....errors import check_choice
from .block import block_candidates, fma_tile, mma_tile
from .cluster import cluster_candidates, cluster_tile
from .cost import product_before
from .fused import fused_candidates
from .grid import grid_candidates, grid_mma_tile, grid_tile
from .step import step_candidates

# schedule -> function(problem, device): its candidates, or a sentence that says why it has none
FINDERS = {
    "step": step_candidates,
    "block": block_candidates,
    "grid": grid_candidates,
    "cluster": cluster_candidates,
    "fused": fused_candidates,
}
SCHEDULES = ("auto", *FINDERS)


@functools.lru_cache(maxsize=4096)  # asked at every call of a layer
def candidates(problem, device, measured=None):
    """Find the candidates for a problem, and the schedules that have none.

    measured: a ``tuned_table.Table`` or None. Where it knows this problem, a schedule offers only its measured
    candidates, with measured seconds in place of estimates. A schedule that was not measured offers all of its own.

    Returns ``(candidates, refusals)``: a list of ``Candidate``, the fastest first, and schedule -> why it has none.
    """
    found, refusals = [], {}
    device = _shared_device(problem, device)
    for schedule, find in FINDERS.items():
        answer = find(problem, device)
        if isinstance(answer, str):
            refusals[schedule] = answer
        else:
            found += answer
    known = measured.known(problem, device) if measured and problem.concurrent == 1 else {}
    timed = {candidate.schedule for candidate in found if candidate.key in known}
    found = [candidate for candidate in found if candidate.key in known or candidate.schedule not in timed]
    found = [_timed(candidate, *known[candidate.key]) if candidate.key in known else candidate for candidate in found]
    product = product_before(problem, device)
    found = [candidate if candidate.inputs else replace(candidate, product=product) for candidate in found]
    return sorted(found, key=lambda candidate: candidate.total(problem.T)), refusals


def _timed(candidate, seconds, before):
    """``candidate`` with measured times."""
    return replace(candidate, seconds=seconds, before=before, measured=True)


def choose(problem, device, wanted="auto", measured=None):
    """Choose the fastest candidate for a problem.

    wanted: "auto", or the schedule to take; one that does not fit raises ValueError, which says why.

    Returns ``(Candidate, reason)``; the reason compares it with the other schedules in words.
    """
    check_choice("schedule", wanted, SCHEDULES)
    found, refusals = candidates(problem, device, measured)
    if wanted in refusals:
        raise ValueError(f"schedule: {refusals[wanted]}")
    fastest = next(candidate for candidate in found if wanted in ("auto", candidate.schedule))
    lines = ["" if wanted == "auto" else f"{wanted} was asked for", str(fastest)]
    best = {candidate.schedule: candidate for candidate in reversed(found)}
    lines += [
        best[schedule].price(problem.T) for schedule in sorted(best, key=lambda name: best[name].total(problem.T))
    ]
    return fastest, "; ".join(filter(None, (*lines, *refusals.values())))


def hold_less(problem, candidate, device, spilled=1):
    """The same tile with fewer of its weights in registers, by at least ``spilled`` bytes of a thread.

    None where no weights are left in registers, or where shared memory has no room for them.
    """
    if candidate.schedule == "fused":  # it holds none
        return None
    device, numbers = _shared_device(problem, device), candidate.numbers
    place = {"block": 2, "block_mma": 1, "grid": 3}.get(candidate.kernel, 2)  # of ``held`` in the numbers
    if not numbers[place]:
        return None
    # a tile of tensor cores takes 16 bytes; four columns take one vector for each row, a row of `grid` one
    tensor_cores = candidate.kernel not in ("block", "grid")
    rows = 1 if candidate.kernel == "grid" and problem.backward else problem.products
    unit = 16 if tensor_cores else 4 * ITEMSIZE[problem.dtype] * rows
    fewer = -(-spilled // unit) * (1 if tensor_cores else 4)
    held = max(0, numbers[place] - fewer)
    if candidate.kernel == "block":
        less = fma_tile(problem, *numbers[:2], held, numbers[3], IP=candidate.inputs)
    elif candidate.kernel == "block_mma":
        less = mma_tile(problem, numbers[0], held, numbers[2], IP=candidate.inputs)
    elif candidate.kernel == "grid":
        less = grid_tile(problem, device, numbers[0], numbers[4], candidate.threads, held, candidate.at_once)
    elif candidate.kernel == "grid_mma":
        less = grid_mma_tile(problem, device, numbers[0], *numbers[3:5], held, candidate.at_once)
    else:
        less = cluster_tile(problem, device, numbers[0], numbers[3], held)
    if less is None or less.shared > device.shared_bytes:
        return None
    like = {name: getattr(candidate, name) for name in ("seconds", "before", "measured", "product", "like")}
    return replace(less, **like)


def _shared_device(problem, device):
    """The part of a device that one of several concurrent time loops gets."""
    return replace(device, multiprocessors=max(1, device.multiprocessors // problem.concurrent))
