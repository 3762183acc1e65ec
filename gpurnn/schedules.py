"""Which way a layer walks through time on a GPU: the schedules in a table, whether they fit, what they should cost.

``step``: a fused kernel and a product for each timestep, any size. ``block``: one thread block walks all of time for a
few sequences, its weights in registers and shared memory (kernels/block.cu; for 16-bit numbers block_mma.cu, on tensor
cores). Times here are estimates from published figures, not measurements; they only rank the schedules.
"""

import functools
import math
from dataclasses import dataclass

from .errors import check_choice

SCHEDULES = ("auto", "step", "block")
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_REGISTERS = 65536  # of a multiprocessor
_STEP_SECONDS = 4e-6  # two launches within a CUDA graph, 1.4 us each at least, and the product between them
_LOAD_SECONDS = 6e-6  # of a block's weights, before the first step
_EFFICIENCY = 0.7  # of the arithmetic's peak, in a product
_BARRIERS = 350  # cycles of a block's step besides its product: two barriers, the cell, loads and stores


@dataclass(frozen=True)
class Device:
    """What a schedule must know of a GPU. capability: 90 for 9.0; shared_bytes: the most that one block may ask for."""

    capability: int
    multiprocessors: int
    shared_bytes: int
    clock: float = 1.7e9


@dataclass(frozen=True)
class Work:
    """One walk of one layer. directions: how many walk at once."""

    kernel: str
    gates: int
    H: int
    T: int
    B: int
    directions: int
    dtype: str
    projected: bool
    backward: bool


@dataclass(frozen=True)
class Block:
    """A kernel of schedule ``block`` and what its launch needs.

    kernel: "block" or "block_mma", the .cu file and the start of the names; numbers: its template arguments behind cell
    and storage. rows: sequences of a tile; held: share of the weights in registers; seconds: estimated, of a timestep.
    """

    kernel: str
    numbers: tuple
    rows: int
    threads: int
    shared: int
    held: float
    seconds: float

    @property
    def types(self):
        return tuple(map(str, self.numbers))


@functools.lru_cache(maxsize=4096)  # asked at every call of a layer
def block(work, device):
    """The best ``Block`` for this work, or a sentence why there is none."""
    if work.dtype == "float64":
        return "block computes in float32"
    if work.projected:
        return "block has no projection"
    if work.kernel == "GruOriginal":
        return "block has no second product in a step"
    tiles = list(_fma_tiles(work, device))
    if ITEMSIZE[work.dtype] == 2 and device.capability >= 80:
        tiles += _mma_tiles(work, device)
    fitting = [tile for tile in tiles if tile.shared <= device.shared_bytes]
    if not fitting:
        HP = _padded(work.H)
        size = work.gates * HP * HP * ITEMSIZE[work.dtype]
        return f"block: {size / 1024:.0f} KB of recurrent weights do not fit on one multiprocessor"
    return min(fitting, key=lambda tile: tile.seconds)


def _padded(H):
    return max(32, -(-H // 32) * 32)


def _seconds(work, device, rows, cycles):
    """Of a timestep, where all tiles together may take several waves."""
    tiles = -(-max(work.B, 1) // rows) * work.directions
    return -(-tiles // device.multiprocessors) * cycles / device.clock


# ---- block_mma.cu


def _mma_tiles(work, device):
    HP = _padded(work.H)
    threads, G = 2 * HP, work.gates
    if threads > 1024:
        return
    tiles = G * HP // 16  # of one warp
    # sums, a row of gates on its way, the cell, addresses
    other = 76 + (8 * G + 16 if work.backward else 14 * G)
    held = max(0, min(tiles, (min(255, _REGISTERS // threads // 8 * 8) - other) // 4))
    warps = HP // 16
    products = 2 * G * HP * HP * 8 / 2680  # m16n8k16, by published measurements
    operands = warps * tiles / (1 if work.backward else G) / 2 * 4
    rest = warps * (tiles - held) * 4
    moved = warps * 4 * (2 * G + 3) * 2
    cycles = max(products, operands + rest) + moved + _BARRIERS
    seconds = _seconds(work, device, 8, cycles)
    yield mma_tile(work, HP, held, seconds)


def mma_tile(work, HP, held, seconds=0.0):
    """The ``Block`` of these template arguments.

    Its shared memory: what the product reads, twice, and the tiles that are not in registers; at the start the way of
    the others.
    """
    threads, tiles = 2 * HP, work.gates * HP // 16
    read = 2 * 8 * ((work.gates if work.backward else 1) * HP + 8) * 2
    shared = max(read + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    even = "true" if work.H % 2 == 0 else "false"
    return Block("block_mma", (HP, held, even), 8, threads, shared, held / tiles, seconds)


# ---- block.cu


def _fma_tiles(work, device):
    HP = _padded(work.H)
    for R in (1, 2, 4):
        for S in (1, 2, 4, 8):
            if not 64 <= HP * S <= 512 or HP // S % 4:
                continue
            KREG = _in_registers(work, HP, S, R)
            seconds = _seconds(work, device, R, _cycles(work, HP, S, KREG, R))
            yield fma_tile(work, HP, S, KREG, R, seconds)


def fma_tile(work, HP, S, KREG, R, seconds=0.0):
    """The ``Block`` of these template arguments.

    Its shared memory: what the product reads, the slices' sums, the weights that are not in registers; at the start the
    way of the others.
    """
    G, four = work.gates, 4 * ITEMSIZE[work.dtype] * HP * S
    box, parts = (R * G * HP, S * R * HP) if work.backward else (R * HP, S * G * R * HP)
    shared = max(4 * (box + parts) + (HP // S - KREG) // 4 * G * four, min(KREG // 4, 8) * four)
    return Block("block", (HP, S, KREG, R), R, HP * S, shared, KREG / (HP // S), seconds)


def _in_registers(work, HP, S, R):
    """KREG: how many columns of weights a thread can hold beside what else it needs, without spilling."""
    G, chains, mine = work.gates, 1 if work.gates * R >= 4 else 4, -(-R // S)
    # sums twice, a row of gates on its way and the cell for each own sequence, biases, addresses; what the compiler
    # likes to have on its way besides (found by compiling: test_cuda_block.py sees whether it is enough)
    other = 56 + 2 * G * R * chains + mine * (G + 8) + 2 * G
    other += 16 * work.backward + (16 if ITEMSIZE[work.dtype] == 2 else 0)
    registers = min(255, _REGISTERS // (HP * S) // 8 * 8) - other
    return max(0, min(HP // S, registers // (G * ITEMSIZE[work.dtype]) * 4))


def _cycles(work, HP, S, KREG, R):
    G, KS, warps = work.gates, HP // S, HP * S // 32
    size = ITEMSIZE[work.dtype]
    products = G * HP * HP * R / 128 + (0 if size == 4 else G * HP * HP / 64)  # 16-bit weights are widened first
    products *= max(1, (8 / warps) ** 0.5) / _EFFICIENCY  # few warps hide little
    operands = warps * KS / 4 * R * (G if work.backward else 1)  # 16 bytes, the same for a warp
    weights = (KS - KREG) * G * HP * S * size / 128
    sums = warps * S * R * G
    return max(products, operands + weights) + sums + _BARRIERS


def step_seconds(work, device):
    """Estimated seconds of a timestep by ``step``."""
    flops = 2 * work.B * work.gates * work.H**2 * work.directions
    rate = device.multiprocessors * device.clock * (256 if ITEMSIZE[work.dtype] >= 4 else 2048) * _EFFICIENCY
    return _STEP_SECONDS + flops / rate


def choose(work, device, wanted="auto"):
    """``(Block or None for step, reason)``: the schedule of this work and why not the other.

    wanted: "auto", or the schedule to take; one that does not fit is a ValueError that says why.
    """
    check_choice("schedule", wanted, SCHEDULES)
    found = block(work, device)
    if wanted == "step":
        return None, "step was asked for"
    if isinstance(found, str):
        if wanted == "block":
            raise ValueError(f"schedule: {found}")
        return None, found
    by_step = step_seconds(work, device)
    figures = f"estimated {found.seconds * 1e6:.2f} us a timestep, by step {by_step * 1e6:.2f} us"
    if wanted == "auto" and not _LOAD_SECONDS + work.T * found.seconds < work.T * by_step:
        return None, f"block would fit, but loads its weights first: {figures}, {work.T} timesteps"
    held = math.floor(100 * found.held)
    return found, f"{figures}; {held} % of the recurrent weights in registers, tiles of {found.rows} sequences"
