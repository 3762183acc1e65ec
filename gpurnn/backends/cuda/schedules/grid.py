"""The schedule ``grid``: the weights are spread over a group of thread blocks, which exchange h once a timestep.

grid.cu; on tensor cores grid_mma.cu.
"""

from dataclasses import dataclass, replace

from ....dtypes import ITEMSIZE
from .block import Block
from .constants import (
    BACKWARD,
    BARRIERS,
    CONVERT_RATE,
    EFFICIENCY,
    EXCHANGE_BYTES,
    FMA_RATE,
    HOP_SECONDS,
    LOAD_SECONDS,
    ONE_READS,
    SECOND_TILE,
    SHARED_BYTES,
    THIRDS_TILE,
    THIRDS_WORDS,
    mma_rate,
)
from .cost import extra_registers, has_tensor_cores, refusal, thread_registers

FEWEST = 8  # units of a thread block
UNITS = (FEWEST, 16, 32)


@dataclass(frozen=True)
class Grid(Block):
    """A kernel of schedule ``grid`` and what its launch needs.

    blocks: thread blocks of a group. groups: groups of each direction, which all run at once. words: 32-bit or 64-bit
    words of the exchange that one group needs. at_once: tiles that a group has at once.
    """

    waits = True
    blocks: int = 1
    groups: int = 1
    words: int = 0
    at_once: int = 1

    def __str__(self):
        groups = "1 group" if self.groups == 1 else f"{self.groups} groups"
        how = ", two tiles at once" if self.at_once == 2 else ""
        if self.kernel == "grid_mma":
            how += ", on tensor cores"
            how += ", two on a multiprocessor" if self.numbers[4] == 2 else ""
        return f"{super().__str__()}, {groups} of {self.blocks} thread blocks{how}"


def grid_candidates(problem, device):
    """All tiles that fit, or a sentence that says why none does."""
    refused = refusal(problem)
    if refused:
        return f"grid {refused}"
    if problem.stages:
        exchanges = "1 more exchange" if len(problem.stages) == 1 else f"{len(problem.stages)} more exchanges"
        return (
            "grid has no means over the units of a sequence, which its thread blocks share: they would take "
            f"{exchanges} of {HOP_SECONDS * 1e6:.2f} us in every timestep"
        )
    if not problem.products:
        return "grid spreads W_hh over thread blocks, and this cell multiplies nothing by it"
    if not device.cooperative:
        return "grid needs thread blocks that wait for one another, which failed on this device"
    if problem.H <= FEWEST:
        return f"grid shares the units among thread blocks, {FEWEST} or more each, and H is {problem.H}"
    found, quads = [], -(-problem.H // 128) * 32
    sizes = [quads * S for S in (1, 2, 4, 8) if quads * S <= 768] if problem.backward else (128, 256, 512)
    for U in UNITS:
        for R in (1, 2, 4):
            found += [grid_tile(problem, device, U, R, threads, AT=AT) for threads in sizes for AT in (1, 2)]
        if has_tensor_cores(problem, device):
            found += [
                grid_mma_tile(problem, device, U, R, P, AT=AT)
                for R in (1, 2, 4, 8, 16)
                for P, AT in ((1, 1), (2, 1), (1, 2))
            ]
    found = [tile for tile in found if tile and tile.blocks > 1]
    if not found:
        size = problem.products * problem.H**2 * ITEMSIZE[problem.dtype] * problem.directions / 1e6
        return f"grid: {size:.1f} MB of recurrent weights do not fit on {device.multiprocessors} multiprocessors"
    return found


def grid_tile(problem, device, U, R, threads, KREG=None, AT=1):
    """The ``Grid`` of grid.cu with U units per block, R sequences per tile and ``threads`` threads per block.

    None where these do not divide each other or do not fit. KREG: columns of weights in registers, as in the kernel; by
    default as many as fit. AT: tiles that a group has at once.
    """
    G, size, KP = problem.products, ITEMSIZE[problem.dtype], -(-problem.H // 128) * 128
    four = 4 * size
    S = threads * 4 // KP if problem.backward else threads // U
    if not S or (threads != KP // 4 * S if problem.backward else KP % (4 * S)) or threads % (R * U):
        return None
    # registers besides the weights, found by compiling
    other = (92 if problem.backward else 116) if G * R > 1 else 64
    other += 16 * (G == 1 and R > 1) + 2 * G * R + (16 if size == 2 else 0) + 4 * problem.marked
    if not problem.backward:
        other += 16 * (device.capability < 90 and G > 1) + 24 * (size == 4 and len(problem.cell.apart) > 0 and R == 1)
    room = thread_registers(threads) - other - AT * extra_registers(problem.cell, -(-R * U // threads))
    room -= (AT - 1) * _second_tile(problem, -(-R * U // threads))
    if problem.backward:
        rows = -(-G * U // (4 * S)) * 4
        held = rows if KREG is None else KREG
        if KREG is None and rows * size > room - 2 * R:
            held = max(0, (room - 2 * R) // size // 4 * 4)
        each, fours = held, rows
        memory = R * S * rows + S * R * KP + 2 * max(threads // 32, threads // (R * U)) * R * U
    else:
        KS = KP // S
        held = max(0, min(KS, room // (G * size) * 4)) if KREG is None else min(KREG, KS)
        each, fours = held // 4 * G, KS // 4 * G
        memory = R * S * (KS + 4) + -(-threads // max(32, U)) * G * R * U
    staged = min(8, held if problem.backward else held // 4)
    shared = max(4 * memory + (fours - each) * threads * four, staged * threads * four)
    warps = threads // 32
    products = G * U * KP * R / FMA_RATE + (0 if size == 4 else G * U * KP / CONVERT_RATE)
    operands = warps * fours / 4 * R if problem.backward else warps * (KP // S) / 4 * R * 2
    weights = (fours - each) * threads * four / SHARED_BYTES
    sums = (S * R * KP / 32 + 4 * warps * R) if problem.backward else warps * G * R * 8
    moved = R * problem.H * 8 * (2 if problem.backward else 1)
    cycles = max(products / EFFICIENCY, operands + weights) + sums
    N = -(-problem.H // U)
    words = 2 * (N * N * R * U if problem.backward else problem.H * R)
    tile = Grid("grid", 0.0, LOAD_SECONDS, kernel="grid", numbers=(U, KP, S, held, R, AT), rows=R, threads=threads,
                shared=shared, held=each / fours, blocks=N, words=AT * words, at_once=AT)  # fmt: skip
    return _placed(problem, device, tile, cycles, moved)


def _second_tile(problem, sequences):
    """Registers of a thread for a second tile at once: its states, what is loaded of it, its places.

    Found by compiling. sequences: of the thread.
    """
    return 24 + sequences * (2 * len(problem.cell.gates) + 8)


def _placed(problem, device, tile, cycles, moved, P=1):
    """``tile`` with the groups that fit on the device and the seconds of a timestep; None where it does not fit.

    cycles: of a timestep, besides what every timestep does. moved: bytes that a block exchanges in each. P: blocks
    per multiprocessor.
    """
    most = (device.shared_bytes + 1024) // P - 1024  # the system keeps 1 KB of each block for itself
    room = device.multiprocessors * P // (tile.blocks * problem.directions)
    if not room or tile.shared > most:
        return None
    tiles = -(-max(problem.B, 1) // tile.rows)
    if tiles <= room and tile.at_once > 1:
        return None  # each has a group of its own
    groups = min(-(-tiles // tile.at_once), room)
    blocks = tile.blocks * groups * problem.directions
    crowded = blocks > device.multiprocessors
    rate = min(ONE_READS, EXCHANGE_BYTES * device.multiprocessors / min(blocks, device.multiprocessors))
    busy = (cycles + moved / rate + BARRIERS + BACKWARD * problem.backward) / device.clock
    # where two blocks share a multiprocessor, or two tiles a block, one computes while the other waits
    one = max(HOP_SECONDS + busy, 2 * busy * crowded)
    if tile.at_once > 1:
        one = 2 * (busy + SECOND_TILE / device.clock)
    seconds = -(-tiles // (groups * tile.at_once)) * one
    return replace(tile, seconds=seconds, groups=groups)


# ---- grid_mma.cu


def grid_mma_tile(problem, device, U, R, P=1, held=None, AT=1):
    """The ``Grid`` of grid_mma.cu with U units per block, R sequences per tile and P blocks per multiprocessor.

    None where it does not fit. held: weight tiles in a warp's registers; by default as many as fit. AT: tiles that a
    group has at once.
    """
    G, size, KP = problem.products, ITEMSIZE[problem.dtype], -(-problem.H // 128) * 128
    threads, N, fragments, split = 256, -(-R // 8), problem.multiplied_bytes // 2, problem.parts == 3
    rows, columns = (U, G * KP) if problem.backward else (G * U, KP)
    M, K = -(-rows // 16), columns // 16
    chains = 1 if M * (N if split else 1) >= 4 else 2 if M > 1 else 4
    tiles = M * K // 8 * fragments  # weight tiles of one warp
    # registers besides the weights, found by compiling: accumulators, loads in flight, cell states, addresses
    other = 4 * (M * N * chains + min(8 // P, K // 8 * N) + size) + -(-R * U // threads) * (2 * G + 12) + 56
    if split:  # the sums of the highest products, the thirds of operands, and weights on their way from shared memory
        other += 4 * M * N + 6 * N + (8 + 44 * (N - 1) if problem.backward else 16 * (N - 1) + 2 * M + 28 * (M > 2))
        other += 20 * (K > 128) + 4 * (K > 128 and G > 3) if problem.backward else 16 * (N > 1 and K > 48)
    if P == 1:
        other += 8 * (size == 4 and device.capability < 90) + problem.backward * (4 if K < 320 else 24)
    if not split and K // 8 > 8 // (N * P):  # words of two batches in flight; those of thirds are half as long
        other += 48 if size == 2 else 72
    other += AT * extra_registers(problem.cell, -(-R * U // threads))
    other += (AT - 1) * _second_tile(problem, -(-R * U // threads))
    room = (thread_registers(threads) if P == 1 else 112) - other
    if room < 0:
        return None
    held = min(tiles, max(0, room // 4) if held is None else held)
    parts = 8 * 8 * N * (16 * M + 4) * 4
    shared = max(parts + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    products = 16 * M * columns * 8 * N * 2 / mma_rate(size, problem.parts)
    rest = (tiles - held) * threads * 16 / SHARED_BYTES
    sums = 8 * M * N * 4 + -(-R * U // 32) * rows // U * 8
    moved = (G if problem.backward else 1) * problem.H * R * size
    if split:  # a multiprocessor issues four instructions a clock
        products = max(products, K * N * (THIRDS_WORDS + M * THIRDS_TILE) / 4)
    numbers = U, KP, held, R, P, AT, problem.parts
    cycles, blocks, words = max(products, rest) + sums, -(-problem.H // U), 32 * K * 16 * 8 * N * size // 4
    tile = Grid("grid", 0.0, LOAD_SECONDS, kernel="grid_mma", numbers=numbers, rows=R, threads=threads,
                shared=shared, held=held / tiles, blocks=blocks, words=AT * words, at_once=AT)  # fmt: skip
    return _placed(problem, device, tile, cycles, moved, P)
