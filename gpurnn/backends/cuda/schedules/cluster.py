"""The schedule ``cluster``: a cluster of thread blocks runs the whole time loop for a few sequences, from compute
capability 9.0 on.

Its blocks hold the weights and send h into each other's shared memory once a timestep (cluster.cu).
"""

from dataclasses import dataclass

from ....dtypes import ITEMSIZE
from .block import Block
from .constants import (
    BARRIER,
    CELL_CYCLES,
    CELL_ISSUED,
    CLUSTER_BYTES,
    CLUSTER_HOP,
    LOAD_SECONDS,
    SHARED_BYTES,
    mma_rate,
)
from .cost import extra_registers, refusal, thread_registers

SIZES = (8, 16)  # thread blocks of a cluster; every GPU with clusters has 8, a kernel must opt in to 16
MOST_WARPS = 16  # of a thread block


@dataclass(frozen=True)
class Cluster(Block):
    """A kernel of schedule ``cluster`` and what its launch needs.

    blocks: thread blocks of a cluster. groups: clusters of each direction.
    """

    waits = True
    blocks: int = 1
    groups: int = 1

    def __str__(self):
        groups = "1 cluster" if self.groups == 1 else f"{self.groups} clusters"
        return f"{super().__str__()}, {groups} of {self.blocks} thread blocks, on tensor cores"


def cluster_candidates(problem, device):
    """All tiles that fit, or a sentence that says why none does."""
    refused = refusal(problem) or _refusal(problem, device)
    if refused:
        return f"cluster {refused}"
    found = [cluster_tile(problem, device, C, R) for C in SIZES for R in (1, 2, 4, 8, 16)]
    found = [tile for tile in found if tile]
    if not found:
        size = problem.products * problem.H**2 * ITEMSIZE[problem.dtype]
        return f"cluster: {size / 1024:.0f} KB of recurrent weights do not fit on {SIZES[-1]} multiprocessors"
    return found


def _refusal(problem, device):
    """Why no cluster can serve this problem, whatever its size, or None."""
    if problem.stages:
        return "has no means over the units of a sequence, which its thread blocks share"
    if not problem.products:
        return "spreads W_hh over thread blocks, and this cell multiplies nothing by it"
    if device.capability < 90:
        major, minor = divmod(device.capability, 10)
        return (
            "needs clusters of thread blocks, which GPUs have from compute capability 9.0 on; this one has "
            f"{major}.{minor}"
        )
    if ITEMSIZE[problem.dtype] != 2 and not problem.tf32:
        return "multiplies on tensor cores, and float32 would be rounded to tf32 there: ask for precision='tf32'"
    if not device.clusters:
        return "needs clusters of thread blocks, which failed on this device"
    if device.multiprocessors < SIZES[0]:
        return f"needs {SIZES[0]} multiprocessors, and there are {device.multiprocessors}"
    return None


def cluster_tile(problem, device, C, R, held=None):
    """The ``Cluster`` of cluster.cu with C thread blocks and R sequences per tile.

    None where it does not fit. held: weight tiles in a warp's registers; by default as many as fit.
    """
    Q, size = problem.products, ITEMSIZE[problem.dtype]
    units = 4 if Q > 2 else 8  # of a warp
    warps = -(-problem.H // (C * units))
    U, threads, numbers = warps * units, 32 * warps, 64 // size  # numbers: of a group of columns
    if warps > MOST_WARPS or device.multiprocessors < C:
        return None
    if problem.backward:
        M, K = -(-C * U // (16 * warps)), -(-Q * U // numbers)
    else:
        M, K = -(-Q * units // 16), -(-C * U // numbers)
    tiles, N = 2 * M * K, -(-R // 8)  # tiles of one warp
    room = thread_registers(threads) - _registers(problem, M, N, units)
    room -= 24 * (room < 4 * tiles - 8)  # what comes from shared memory
    held = min(tiles, max(0, room // 4) if held is None else held)
    operand = K * numbers * R * size
    received = C * U * R * (4 if problem.backward else size)
    buffers = 16 + 2 * (received + operand if problem.backward else operand)
    shared = max(buffers + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    if shared > device.shared_bytes:
        return None
    products = 2 * 16 * M * warps * K * numbers * 8 * N / mma_rate(size)
    loads = warps * (K * -(-R // 2) + (tiles - held) * 4)  # of 128 bytes
    cell = max(CELL_CYCLES, CELL_ISSUED * N * units // 4 * warps / 4)  # 4 warps issue at once
    cycles = max(products, loads) + cell + CLUSTER_HOP + received / CLUSTER_BYTES
    if problem.backward:
        cycles += BARRIER + received / SHARED_BYTES
    rounds, groups = _placed(problem, device, C, R)
    return Cluster(
        "cluster", rounds * cycles / device.clock, LOAD_SECONDS, kernel="cluster", numbers=(C, warps, held, R), rows=R,
        threads=threads, shared=shared, held=held / tiles, blocks=C, groups=groups,
    )  # fmt: skip


def _registers(problem, M, N, units):
    """Registers of a thread besides the weights, found by compiling: accumulators, an operand, states, addresses."""
    sequences, accumulators = N * units // 4, M * N
    chains = 4 if accumulators == 1 else 2 if accumulators < 4 else 1
    other = 4 * accumulators * chains + 8 * N + sequences * (2 * problem.gates + 12) + 56 + 8 * problem.tf32
    return other + extra_registers(problem.cell, sequences)


def _placed(problem, device, C, R):
    """How many tiles a cluster runs one after another, and how many clusters each direction has."""
    # Of clusters with 8 blocks, 15 run on 132 multiprocessors at once, by published measurements; with 16, a guess.
    resident = max(1, device.multiprocessors // C - 1)
    tiles = -(-max(problem.B, 1) // R)
    groups = min(tiles, max(1, resident // problem.directions))
    waves = -(-groups * problem.directions // resident)
    return -(-tiles // groups) * waves, groups
