"""The choice: every candidate for a problem, the fastest first."""

import functools
from dataclasses import replace

from ....errors import check_choice
from .block import block_candidates, fma_tile, mma_tile
from .cost import product_before
from .grid import grid_candidates, grid_mma_tile, grid_tile
from .step import step_candidates

# schedule -> function(problem, device): its candidates, or a sentence that says why it has none
FINDERS = {"step": step_candidates, "block": block_candidates, "grid": grid_candidates}
SCHEDULES = ("auto", *FINDERS)


@functools.lru_cache(maxsize=4096)  # asked at every call of a layer
def candidates(problem, device, measured=None):
    """``(candidates, refusals)``: all candidates for a problem, the fastest first, and schedule -> why
    it has none.

    measured: a ``tuned_table.Table`` or None. Where it knows this problem, a schedule keeps only its measured
    candidates, with measured seconds in place of estimates; a schedule without any keeps all of them.
    """
    found, refusals = [], {}
    device = _shared_device(problem, device)
    for schedule, find in FINDERS.items():
        some = find(problem, device)
        if isinstance(some, str):
            refusals[schedule] = some
        else:
            found += some
    known = measured.known(problem, device) if measured and problem.concurrent == 1 else {}
    timed = {candidate.schedule for candidate in found if candidate.key in known}
    found = [candidate for candidate in found if candidate.key in known or candidate.schedule not in timed]
    found = [_timed(candidate, *known[candidate.key]) if candidate.key in known else candidate for candidate in found]
    product = product_before(problem, device)
    found = [candidate if candidate.inputs else replace(candidate, product=product) for candidate in found]
    return sorted(found, key=lambda candidate: candidate.total(problem.T)), refusals


def _timed(candidate, seconds, before):
    return replace(candidate, seconds=seconds, before=before, measured=True)


def choose(problem, device, wanted="auto", measured=None):
    """``(Candidate, reason)``: how this problem is served, and why not otherwise.

    wanted: "auto", or the schedule to take; one that does not fit is a ValueError that says why.
    """
    check_choice("schedule", wanted, SCHEDULES)
    found, refusals = candidates(problem, device, measured)
    if wanted in refusals:
        raise ValueError(f"schedule: {refusals[wanted]}")
    mine = [candidate for candidate in found if wanted in ("auto", candidate.schedule)]
    lines = ["" if wanted == "auto" else f"{wanted} was asked for", str(mine[0])]
    best = {candidate.schedule: candidate for candidate in reversed(found)}
    lines += [
        best[schedule].price(problem.T) for schedule in sorted(best, key=lambda name: best[name].total(problem.T))
    ]
    return mine[0], "; ".join(filter(None, (*lines, *refusals.values())))


def hold_less(problem, candidate, device):
    """The same tile with fewer of its weights in registers; None where there are none left or they fit nowhere else."""
    device, numbers = _shared_device(problem, device), candidate.numbers
    place = {"block": 2, "block_mma": 1, "grid": 3, "grid_mma": 2}[candidate.kernel]  # of what is held
    held = numbers[place] - (1 if "mma" in candidate.kernel else 4)
    if held < 0:
        return None
    if candidate.kernel == "block":
        less = fma_tile(problem, *numbers[:2], held, numbers[3], IP=candidate.inputs)
    elif candidate.kernel == "block_mma":
        less = mma_tile(problem, numbers[0], held, numbers[2], IP=candidate.inputs)
    elif candidate.kernel == "grid":
        less = grid_tile(problem, device, numbers[0], numbers[4], candidate.threads, held)
    else:
        less = grid_mma_tile(problem, device, numbers[0], *numbers[3:], held)
    if less is None or less.shared > device.shared_bytes:
        return None
    like = {name: getattr(candidate, name) for name in ("seconds", "before", "measured", "product", "like")}
    return replace(less, **like)


def _shared_device(problem, device):
    """The part of a device that one of several concurrent time loops gets."""
    return replace(device, multiprocessors=max(1, device.multiprocessors // problem.concurrent))
