"""Which way a layer walks through time on a GPU: the schedules in a table, whether they fit, what they should cost.

``step``: a fused kernel and a product for each timestep, any size. ``block``: one thread block walks all of time for a
few sequences, its weights in registers and shared memory (kernels/block.cu; on tensor cores block_mma.cu).

Times here are estimates from published figures, not measurements; they only rank what fits. ``gpurnn tune`` measures on
a machine (tuning.py), and what it has measured counts in their place.
"""

import functools
import math
from dataclasses import dataclass, replace

from .errors import check_choice

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
    name: str = ""


@dataclass(frozen=True)
class Work:
    """One walk of one layer. directions: how many walk at once; tf32: whether float32 may be multiplied as tf32."""

    kernel: str
    gates: int
    H: int
    T: int
    B: int
    directions: int
    dtype: str
    projected: bool
    backward: bool
    tf32: bool = False


@dataclass(frozen=True)
class Way:
    """One way to do a work: a schedule with its tile. seconds: of a timestep, before: of a call, before the first;
    measured: whether these two are, or else estimated."""

    schedule: str
    seconds: float
    before: float = 0.0
    measured: bool = False

    def total(self, T):
        return self.before + T * self.seconds

    def price(self, T):
        """What T timesteps cost, in words."""
        first = f" after {self.before * 1e6:.1f} us" if self.before else ""
        known = "measured" if self.measured else "estimated"
        return f"{self.schedule}: {T} timesteps of {self.seconds * 1e6:.2f} us{first}, {known}"

    @property
    def key(self):
        """What tells this way from the others of the same work."""
        return self.schedule

    def __str__(self):
        return ""


@dataclass(frozen=True)
class Block(Way):
    """A kernel of schedule ``block`` and what its launch needs.

    kernel: "block" or "block_mma", the .cu file and the start of the names; numbers: its template arguments behind cell
    and storage. rows: sequences of a tile; held: share of the weights in registers.
    """

    kernel: str = ""
    numbers: tuple = ()
    rows: int = 0
    threads: int = 0
    shared: int = 0
    held: float = 0.0

    @property
    def types(self):
        return tuple(map(str, self.numbers))

    @property
    def key(self):
        return f"{self.kernel}<{', '.join(self.types)}>"

    def __str__(self):
        held = math.floor(100 * self.held)
        return f"{held} % of the recurrent weights in registers, tiles of {self.rows} sequences"


# ---- step


def step_ways(work, device):
    """The schedule ``step`` does everything in one way."""
    flops = 2 * work.B * work.gates * work.H**2 * work.directions
    peak = 2048 if ITEMSIZE[work.dtype] == 2 else 1024 if work.tf32 else 256
    rate = device.multiprocessors * device.clock * peak * _EFFICIENCY
    return [Way("step", _STEP_SECONDS + flops / rate)]


# ---- block


def block_ways(work, device):
    """All tiles that fit, or a sentence why none does."""
    if work.dtype == "float64":
        return "block computes in float32"
    if work.projected:
        return "block has no projection"
    if work.kernel == "GruOriginal":
        return "block has no second product in a step"
    tiles = list(_fma_tiles(work, device))
    if (ITEMSIZE[work.dtype] == 2 or work.tf32) and device.capability >= 80:
        tiles += _mma_tiles(work, device)
    fitting = [tile for tile in tiles if tile.shared <= device.shared_bytes]
    if not fitting:
        HP = _padded(work.H)
        size = work.gates * HP * HP * ITEMSIZE[work.dtype]
        return f"block: {size / 1024:.0f} KB of recurrent weights do not fit on one multiprocessor"
    return fitting


def _padded(H):
    return max(32, -(-H // 32) * 32)


def _seconds(work, device, rows, cycles):
    """Of a timestep, where all tiles together may take several waves."""
    tiles = -(-max(work.B, 1) // rows) * work.directions
    return -(-tiles // device.multiprocessors) * cycles / device.clock


def _registers(threads):
    """Of a thread, where such a block has a multiprocessor to itself: a quarter of them for a quarter of its warps."""
    warps = -(-threads // 128)
    return min(255, _REGISTERS // 4 // (32 * warps) // 8 * 8)


# ---- block_mma.cu


def _mma_tiles(work, device):
    HP, G, size = _padded(work.H), work.gates, ITEMSIZE[work.dtype]
    threads = 2 * HP
    if threads > 1024:
        return
    tiles = G * HP * size // 32  # of one warp
    for N in (1, 2):
        # for sums, a row of gates on its way, the cell, addresses; found by compiling
        other = {4: 84, 3: 72, 1: 84}[G] if work.backward else {4: 120, 3: 84, 1: 92}[G]
        other += (N - 1) * 60 + 4 * (size == 4)
        held = max(0, min(tiles, (_registers(threads) - other) // 4))
        if N > 1 and not held:
            continue
        warps = HP // 16
        products = 2 * G * HP * HP * 8 * N / (2680 if size == 2 else 1340)  # by published measurements
        operands = warps * N * tiles / (1 if work.backward else G) / 2 * 4
        rest = warps * (tiles - held) * 4
        moved = warps * N * 4 * (2 * G + 3) * size
        cycles = max(products, operands + rest) + moved + _BARRIERS
        yield mma_tile(work, HP, held, N, _seconds(work, device, 8 * N, cycles))


def mma_tile(work, HP, held, N=1, seconds=0.0):
    """The ``Block`` of these template arguments.

    Its shared memory: what the product reads, twice, and the tiles that are not in registers; at the start the way of
    the others.
    """
    size = ITEMSIZE[work.dtype]
    threads, tiles = 2 * HP, work.gates * HP * size // 32
    read = 2 * 8 * N * ((work.gates if work.backward else 1) * HP * size + 16)
    shared = max(read + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    even = "true" if work.H % 2 == 0 else "false"
    numbers = HP, held, N, even
    return Block("block", seconds, _LOAD_SECONDS, False, "block_mma", numbers, 8 * N, threads, shared, held / tiles)


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
    held = KREG / (HP // S)
    return Block("block", seconds, _LOAD_SECONDS, False, "block", (HP, S, KREG, R), R, HP * S, shared, held)


def _in_registers(work, HP, S, R):
    """KREG: how many columns of weights a thread can hold beside what else it needs, without spilling."""
    G, chains, mine = work.gates, 1 if work.gates * R >= 4 else 4, -(-R // S)
    # sums twice, a row of gates on its way and the cell for each own sequence, biases, addresses; what the compiler
    # likes to have on its way besides (found by compiling: test_cuda_block.py sees whether it is enough)
    other = (70 if G * R > 1 else 32) + 2 * G * R * chains + mine * (G + 8) + 2 * G
    other += 8 * work.backward + (16 if ITEMSIZE[work.dtype] == 2 else 0)
    registers = _registers(HP * S) - other
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


# ---- the table, and the choice

WAYS = {"step": step_ways, "block": block_ways}  # schedule -> function(work, device): ways, or why there is none
SCHEDULES = ("auto", *WAYS)


@functools.lru_cache(maxsize=4096)  # asked at every call of a layer
def ways(work, device, measured=None):
    """``(ways, refusals)``: all ways of a work, the quickest first, and schedule -> why it has none.

    measured: a ``tuning.Table`` or None. Where it knows this work, only ways that it has measured are left, with its
    seconds in place of estimates, and those of schedules that it has not.
    """
    found, refusals = [], {}
    for schedule, find in WAYS.items():
        some = find(work, device)
        if isinstance(some, str):
            refusals[schedule] = some
        else:
            found += some
    known = measured.known(work, device) if measured else {}
    timed = {way.schedule for way in found if way.key in known}
    found = [way for way in found if way.key in known or way.schedule not in timed]
    found = [_timed(way, *known[way.key]) if way.key in known else way for way in found]
    return sorted(found, key=lambda way: way.total(work.T)), refusals


def _timed(way, seconds, before):
    return replace(way, seconds=seconds, before=before, measured=True)


def choose(work, device, wanted="auto", measured=None):
    """``(Way, reason)``: how this work is done and why not otherwise.

    wanted: "auto", or the schedule to take; one that does not fit is a ValueError that says why.
    """
    check_choice("schedule", wanted, SCHEDULES)
    found, refusals = ways(work, device, measured)
    if wanted in refusals:
        raise ValueError(f"schedule: {refusals[wanted]}")
    mine = [way for way in found if wanted in ("auto", way.schedule)]
    told = ["" if wanted == "auto" else f"{wanted} was asked for", str(mine[0])]
    best = {way.schedule: way for way in reversed(found)}
    told += [best[schedule].price(work.T) for schedule in sorted(best, key=lambda name: best[name].total(work.T))]
    return mine[0], "; ".join(filter(None, (*told, *refusals.values())))
