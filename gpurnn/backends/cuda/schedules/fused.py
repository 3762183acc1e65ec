"""The schedule ``fused``: a launch for each timestep, which multiplies on tensor cores and computes the cells.

fused.cu says how.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ....dtypes import ITEMSIZE
from ..dependent import may_depend
from .constants import (
    CELL_TURN,
    CLUSTER_BYTES,
    CLUSTER_HOP,
    DEPENDENT_SECONDS,
    EFFICIENCY,
    EXCHANGE_BYTES,
    GEMM_SECONDS,
    HOP_SECONDS,
    MEMORY_BYTES,
    ONE_READS,
    SHARED_BYTES,
    STEP_SECONDS,
    mma_rate,
)
from .cost import cells_bytes, refusal, weights_seconds
from .problem import Tile

THREADS, PANEL = 256, 128  # as in fused.cuh; bytes of a row that a stage holds
UNITS, SEQUENCES, CLUSTERS = (16, 32, 64), (32, 64, 128), (1, 2, 4, 8)
MOST_STAGES = 4  # of shared memory
MOST_REGISTERS = 112  # of a thread, for sums and operands: with more the compiler spills
OFFERED = 4  # candidates of a problem, the ones that should be fastest


@dataclass(frozen=True)
class Fused(Tile):
    """A kernel of schedule ``fused`` and what its launch needs.

    numbers: U, R, C, STAGES, PARTS.
    grid: thread blocks along the units, along the sequences. panels: of a row of the weights, gates included.
    """

    kernel: str = "fused"
    grid: tuple = ()
    panels: int = 0

    @property
    def waits(self):
        return self.numbers[2] > 1

    def __str__(self):
        U, R, C, _, parts = self.numbers
        shared = f", shared by {C} thread blocks" if C > 1 else ""
        split = ", float32 as three bfloat16 numbers" if parts == 3 else ""
        return f"tiles of {U} units and {R} sequences{shared}{split}"


def fused_candidates(problem, device):
    """The tiles that should be fastest, or a sentence that says why none fits."""
    refused = refusal(problem) or _refusal(problem, device)
    if refused:
        return f"fused {refused}"
    sizes = itertools.product(UNITS, SEQUENCES, CLUSTERS if device.clusters and device.capability >= 90 else (1,))
    found = [tile for tile in (fused_tile(problem, device, *size) for size in sizes) if tile]
    if not found:
        tile = f"a tile of {UNITS[0]} units, with the {problem.products} gates of each that multiply h,"
        return f"fused: {tile} does not fit into the registers and {device.shared_bytes // 1024} KB of a thread block"
    return sorted(found, key=lambda tile: tile.seconds)[:OFFERED]


def _refusal(problem, device):
    """Why this schedule cannot serve a problem, or None."""
    if problem.stages:
        return "has no means over the units of a sequence"
    if not problem.products:
        return "is a product with W_hh, and this cell multiplies nothing by it"
    if problem.cell.inner_first:
        return "multiplies h, and this cell multiplies what it makes of it"
    if device.capability < 80:
        return "needs tensor cores of compute capability 8.0 or later"
    if problem.fma:
        return "multiplies on tensor cores, and precision='fma' asks for multiply-adds"
    return None


def _fragments(m, n):
    """Fragments of a warp along the rows and along the sequences, of m and n; as warps_along_rows in fused.cuh."""
    fitting = [(m // k, n * k // 8) for k in (1, 2, 4, 8) if m % k == 0 and n * k % 8 == 0]
    return min(fitting, key=lambda one: 2 * one[0] + one[1], default=(0, 0))


def fused_tile(problem, device, U, R, C, stages=None):
    """The ``Fused`` of fused.cu with U units and R sequences per tile, shared by C thread blocks.

    None where it does not fit. stages: of shared memory, by default as many as fit.
    """
    Q, parts = problem.products, problem.parts
    rows, size = (U if problem.backward else Q * U), problem.multiplied_bytes // parts
    panels = -(-problem.H * size // PANEL) * (Q if problem.backward else 1)
    M, N = _fragments(rows // 16, R // 8)
    registers = 4 * M * N * (2 if parts == 3 else 1) + 4 * N * parts  # of sums and operands
    if not N or panels < C or registers > MOST_REGISTERS:
        return None
    stage = PANEL * (rows + R) * parts
    most = min(MOST_STAGES, device.shared_bytes // stage) if stages is None else stages
    shared = max(most * stage, 4 * R * (rows + 4))
    if most < 2 or shared > device.shared_bytes:
        return None
    grid = -(-problem.H // U), -(-max(problem.B, 1) // R) * C
    blocks = grid[0] * grid[1] * problem.directions
    steps = -(-panels // C)  # panels of a thread block
    numbers = steps * PANEL // size
    from_l2 = steps * stage / min(ONE_READS, EXCHANGE_BYTES * max(1, device.multiprocessors / blocks))
    operands = steps * 8 * 4 * (M * 512 + N * 256) * parts / SHARED_BYTES
    cycles = max(2 * rows * R * numbers / mma_rate(size, parts), from_l2, operands) / EFFICIENCY
    if C > 1:
        cycles += 2 * CLUSTER_HOP + 4 * rows * R * (C - 1) / C / CLUSTER_BYTES
    cells = U * R / C
    moved = cells * cells_bytes(problem) / MEMORY_BYTES
    cycles += max(moved, -(-cells // THREADS) * CELL_TURN * THREADS / 32 / 4)  # 4 warps issue at once
    waves = -(-blocks // device.multiprocessors)
    weights = problem.directions * Q * problem.H**2 * (ITEMSIZE[problem.dtype] + problem.multiplied_bytes)
    before = GEMM_SECONDS + weights / (device.multiprocessors * device.clock * MEMORY_BYTES)
    least = weights_seconds(problem, device, problem.multiplied_bytes)
    edge = DEPENDENT_SECONDS if may_depend(device.capability) else STEP_SECONDS / 2 + HOP_SECONDS
    seconds = edge + max(least, waves * cycles / device.clock)
    return Fused(
        "fused", seconds, before, numbers=(U, R, C, most, parts), shared=shared, grid=grid, panels=panels,
    )  # fmt: skip
