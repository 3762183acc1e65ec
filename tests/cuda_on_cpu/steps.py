"""What the machine code of all schedules but step says about a timestep on an H200: an ESTIMATE.

    pip install nvidia-cuda-nvdisasm
    PYTHONPATH=tests python -m cuda_on_cpu.steps --save steps.json > steps.md
    PYTHONPATH=tests python -m cuda_on_cpu.steps --before steps_of_before.json > steps.md
    PYTHONPATH=tests python -m cuda_on_cpu.steps --only "lstm H768 B16"
    PYTHONPATH=tests python -m cuda_on_cpu.steps --hidden 384 --batch 16 --batch 64 --only tf32

Each kernel is the one that the cost model would choose of its schedule. sass.py takes its time loop out of the machine
code and adds up what one warp waits for. A launch of `fused` is a timestep: it is taken whole.
"""

import argparse
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.schedules.constants import CLUSTER_BYTES, CLUSTER_HOP, EXCHANGE_BYTES, ONE_READS
from gpurnn.backends.cuda.schedules.fused import PANEL, THREADS
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import CELLS
from gpurnn.dtypes import ITEMSIZE

from . import nvrtc, sass
from .gate import parse_log

CLOCK = 1.98e9
H200 = schedules.Device(90, 132, 227 * 1024, CLOCK)
EDGE = 1.4e-6  # seconds from one launch of a graph to the next, published for an H100
HOP = 0.6e-6  # seconds from a store to the poll that sees it: 0.56 to 0.65 us, published for an H100
KINDS = {  # name -> dtype, how it is multiplied
    "float32": ("float32", {}), "fma": ("float32", {"fma": True}), "tf32": ("float32", {"tf32": True}),
    "bfloat16": ("bfloat16", {}),
}  # fmt: skip
HIDDEN, BATCHES = (128, 256, 512, 768, 1024), (1, 16, 64, 128)


def cases(hidden=HIDDEN, batches=BATCHES):
    """(cell, H, B, kind, backward) of every row."""
    return list(itertools.product(("lstm", "gru"), hidden, batches, KINDS, (False, True)))


def name_of(cell, H, B, kind, backward):
    return f"{cell} H{H} B{B} {kind} {'backward' if backward else 'forward'}"


def problem_of(cell, H, B, kind, backward):
    dtype, how = KINDS[kind]
    return schedules.Problem(CELLS[cell], H, 512, B, 1, dtype, False, backward, **how)


def best(problem):
    """The best candidate of each kernel file that the cost model offers."""
    found, _ = schedules.candidates(problem, H200)
    by_schedule = {}
    for candidate in found:
        if candidate.schedule != "step" and (candidate.schedule != "fused" or problem.B * problem.H >= 1 << 15):
            by_schedule.setdefault(candidate.schedule, candidate)
    return list(by_schedule.values())


def estimate(problem, candidate):
    """The row of one kernel: what was counted, and the microseconds that follow."""
    file, expression, struct = kernel_of(problem, candidate)
    program = nvrtc.compile(kernel_source(file, struct), file=file, arch=90, expressions=(expression,))
    name = program.lowered[expression]
    resources = parse_log(program.log)[name]
    found = sass.instructions(sass.nvdisasm(program.cubin), name)
    if candidate.schedule == "fused":
        return {"kernel": expression} | _launch(problem, candidate, *found) | _fits(resources, candidate)
    body, inner = sass.time_loop(*found)
    timing = sass.timing(body, round(_hop(problem, candidate)))
    loops = [body[begin:end] for begin, end in inner]
    count = len(body) + sum((_turns(problem, candidate, loop) - 1) * len(loop) for loop in loops)
    warps = -(-candidate.threads // 128)  # of each of the 4 parts of a multiprocessor
    sharing = 2 if candidate.kernel == "grid_mma" and candidate.numbers[4] == 2 else 1
    matrix = sum(one.op.startswith("HMMA") for one in body)
    busy = warps * sharing * max(count, matrix * sass.ISSUE_HMMA)
    cycles = max(timing.cycles + count - len(body), busy)
    tiles = -(-max(problem.B, 1) // candidate.rows)
    at_once = getattr(candidate, "at_once", 1) * (getattr(candidate, "groups", 0) or min(tiles, H200.multiprocessors))
    return {
        "kernel": expression, "instructions": count, "waits": timing.waits, "waited": timing.waited,
        "cycles": round(cycles), "busy": round(busy), "bytes": exchanged(problem, candidate),
        "us": round(cycles / CLOCK * 1e6 * -(-tiles // at_once), 3),
    } | _fits(resources, candidate)  # fmt: skip


def _fits(resources, candidate):
    """The rest of a row: what the compiler and the cost model say."""
    spills = resources.spill_stores + resources.spill_loads
    return {"registers": resources.registers, "spills": spills, "model_us": round(candidate.seconds * 1e6, 3)}


def _launch(problem, candidate, code, jumps):
    """The row of a launch of ``fused``: its loop over panels, and the code before and behind it once."""
    (U, R, C, _, parts), blocks = candidate.numbers, candidate.grid[0] * candidate.grid[1]
    loops = [(to, at + 1) for at, to in jumps if to <= at and sass.products(code[to : at + 1])]
    with_barrier = [one for one in loops if any(single.op.startswith("BAR") for single in code[slice(*one)])]
    begin, end = min(with_barrier, key=lambda loop: loop[1] - loop[0])
    panel, rest = code[begin:end], code[:begin] + code[end:]
    for to, at in loops:  # the halves of a panel, where they are a loop
        if begin <= to and at <= end and (to, at) != (begin, end):
            panel = panel[: at - begin] + panel[to - begin :]
    panels, cells = -(-candidate.panels // C), max(1, U * R // C // THREADS // 4)  # turns of up to four cells
    stage = PANEL * (R + (U if problem.backward else problem.products * U)) * parts
    matrix, warps = sum(one.op.startswith("HMMA") for one in panel), THREADS // 128
    read = stage / min(ONE_READS, EXCHANGE_BYTES * max(1, H200.multiprocessors / blocks))
    each = max(sass.timing(panel).cycles, warps * len(panel), warps * matrix * sass.ISSUE_HMMA, read)
    timing = sass.timing(rest)
    cycles = panels * each + max(timing.cycles, warps * len(rest)) * cells
    waves = -(-blocks // H200.multiprocessors)
    return {
        "instructions": len(rest) * cells + panels * len(panel), "waits": timing.waits, "waited": timing.waited,
        "cycles": round(cycles), "busy": round(panels * warps * max(len(panel), matrix * sass.ISSUE_HMMA)),
        "bytes": panels * stage, "us": round((EDGE + waves * cycles / CLOCK) * 1e6, 3),
    }  # fmt: skip


def exchanged(problem, candidate):
    """Bytes that a thread block receives from others in a timestep."""
    if candidate.schedule == "cluster":
        C, warps, _, R = candidate.numbers
        units = C * warps * (4 if problem.products > 2 else 8)
        return units * R * (4 if problem.backward else ITEMSIZE[problem.dtype])
    if candidate.schedule != "grid":
        return 0
    size = 8 if candidate.kernel == "grid" else ITEMSIZE[problem.dtype]
    parts = problem.products if candidate.kernel == "grid_mma" and problem.backward else 1
    return candidate.rows * problem.H * size * parts


def _hop(problem, candidate):
    """Cycles from what a thread block sends until others have it, of a cluster with all bytes."""
    if candidate.schedule == "cluster":
        return CLUSTER_HOP + exchanged(problem, candidate) / CLUSTER_BYTES
    return HOP * CLOCK


def _turns(problem, candidate, loop):
    """How often a loop within the time loop runs in a timestep: more than once where it multiplies by shared memory."""
    if candidate.kernel not in ("block", "grid") or sass.products(loop) < 4:
        return 1
    blocks = getattr(candidate, "blocks", 1)
    multiplied = problem.products * problem.H**2 * candidate.rows / (candidate.threads * blocks)
    return max(1, round(multiplied * (1 - candidate.held) / sass.products(loop)))


COLUMNS = ("instructions", "waits", "waited", "cycles", "bytes", "registers", "spills", "us")
HEAD = """# A timestep on an H200: an estimate, nothing here was measured

Made by `python -m cuda_on_cpu.steps` from the machine code for sm_90 (NVRTC {version}), T 512, one direction. Each
kernel is the one that the cost model would choose of its schedule{before}.

instructions: of a warp in a timestep, all branches counted, so at most. waits: how many of them wait for the result of
an earlier one that takes longer than the instructions between; waited: the cycles of that, with published latencies and
{hop:.2f} us for a number from another thread block, within a cluster {near} cycles and its bytes. cycles: of a
timestep, the longer of that warp's and of what all warps issue; of a kernel that has two tiles at once those of both.
bytes: that a thread block receives in it, of `fused` that it reads. us: at {clock:.2f} GHz, times the tiles that a
group has one after another. `fused`, shown where B times H is 32768 or more, is a launch for each timestep: its us have
{edge:.1f} us more, an edge of a graph.
model: what the cost model says.

| case | kernel | {columns} | model us |
|---|---|{lines}---:|"""


def print_table(rows, before, to=print):
    to(HEAD.format(
        version=".".join(map(str, nvrtc.version())), hop=HOP * 1e6, near=CLUSTER_HOP, edge=EDGE * 1e6,
        clock=CLOCK / 1e9,
        columns=" | ".join(COLUMNS), lines="---:|" * len(COLUMNS),
        before="; before -> after a change, where a figure changed" if before else "",
    ))  # fmt: skip
    for key, row in rows.items():
        old = before.get(key, row)
        figures = [f"{old[name]} -> {row[name]}" if old[name] != row[name] else f"{row[name]}" for name in COLUMNS]
        case, _, _ = key.partition(", ")
        to(f"| {case} | `{row['kernel']}` | {' | '.join(figures)} | {row['model_us']} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the rows as JSON, too")
    parser.add_argument("--before", type=Path, help="rows that another version saved: show both")
    parser.add_argument("--only", default="", help="cases with this in their name, as 'lstm H768 B16 tf32 forward'")
    parser.add_argument("--hidden", type=int, action="append", help=f"H, may be repeated  [default: {HIDDEN}]")
    parser.add_argument("--batch", type=int, action="append", help=f"B, may be repeated  [default: {BATCHES}]")
    given = parser.parse_args()
    asked = [case for case in cases(given.hidden or HIDDEN, given.batch or BATCHES) if given.only in name_of(*case)]
    if not asked:
        parser.error(f"--only: no case has {given.only!r} in its name; names are like {name_of(*cases()[0])!r}")
    jobs = {}
    for case in asked:
        for candidate in best(problem_of(*case)):
            jobs[f"{name_of(*case)}, {candidate.schedule}"] = problem_of(*case), candidate
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = dict(zip(jobs, pool.map(lambda job: estimate(*job), jobs.values()), strict=True))
    if given.save:
        given.save.write_text(json.dumps(rows, indent=1))
    print_table(rows, json.loads(given.before.read_text()) if given.before else {})


if __name__ == "__main__":
    main()
