"""Which way a layer walks through time on a GPU: the schedules in a table, whether they fit, what they should cost.

``step``: a fused kernel and a product for each timestep, any size. ``block``: one thread block walks all of time for a
few sequences, its weights in registers and shared memory (kernels/block.cu; on tensor cores block_mma.cu). ``grid``:
the weights are spread over a group of thread blocks, which exchange h once a step (kernels/grid.cu).

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
_HOP_SECONDS = 0.65e-6  # from one multiprocessor to another through L2, by published measurements
_EXCHANGE_BYTES = 30  # a clock and multiprocessor, when all read L2
_BARRIERS = 350  # cycles of a block's step besides its product: two barriers, the cell, loads and stores


@dataclass(frozen=True)
class Device:
    """What a schedule must know of a GPU. capability: 90 for 9.0; shared_bytes: the most that one block may ask for;
    cooperative: whether blocks may wait for one another."""

    capability: int
    multiprocessors: int
    shared_bytes: int
    clock: float = 1.7e9
    name: str = ""
    cooperative: bool = True


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
    refused = _refused(work)
    if refused:
        return f"block {refused}"
    tiles = list(_fma_tiles(work, device))
    if (ITEMSIZE[work.dtype] == 2 or work.tf32) and device.capability >= 80:
        tiles += _mma_tiles(work, device)
    fitting = [tile for tile in tiles if tile.shared <= device.shared_bytes]
    if not fitting:
        HP = _padded(work.H)
        size = work.gates * HP * HP * ITEMSIZE[work.dtype]
        return f"block: {size / 1024:.0f} KB of recurrent weights do not fit on one multiprocessor"
    return fitting


def _refused(work):
    """Why a schedule that walks all of time in one launch does not do this work, or None."""
    if work.dtype == "float64":
        return "computes in float32"
    if work.projected:
        return "has no projection"
    return "has no second product in a step" if work.kernel == "GruOriginal" else None


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


# ---- grid


@dataclass(frozen=True)
class Grid(Block):
    """A kernel of schedule ``grid``. blocks: of a group; groups: of each direction, all there at once."""

    blocks: int = 1
    groups: int = 1

    def __str__(self):
        groups = f"{self.groups} group" + "s" * (self.groups > 1)
        return f"{super().__str__()}, {groups} of {self.blocks} thread blocks"


def grid_ways(work, device):
    """All tiles that fit, or a sentence why none does."""
    refused = _refused(work)
    if refused:
        return f"grid {refused}"
    if not device.cooperative:
        return "grid needs thread blocks that wait for one another, which failed on this device"
    found, quads = [], -(-work.H // 128) * 32
    sizes = [quads * S for S in (1, 2, 4, 8) if quads * S <= 768] if work.backward else (128, 256, 512)
    for U in (8, 16, 32):
        N = -(-work.H // U)
        if not 2 <= N <= device.multiprocessors // work.directions:
            continue
        for R in (1, 2, 4):
            for threads in sizes:
                tile = grid_tile(work, device, U, R, threads)
                if tile and tile.shared + 16 <= device.shared_bytes:  # 16: what the kernel has besides
                    found.append(tile)
    if not found:
        size = work.gates * work.H**2 * ITEMSIZE[work.dtype] * work.directions / 1e6
        return f"grid: {size:.1f} MB of recurrent weights do not fit on {device.multiprocessors} multiprocessors"
    return found


def grid_tile(work, device, U, R, threads, KREG=None):
    """The ``Grid`` of U units a block, R sequences a tile, and so many threads; None where these do not go together.

    KREG: as in the kernel, by default as many as fit.
    """
    G, size, KP = work.gates, ITEMSIZE[work.dtype], -(-work.H // 128) * 128
    four = 4 * size
    S = threads * 4 // KP if work.backward else threads // U
    if not S or (threads != KP // 4 * S if work.backward else KP % (4 * S)) or threads % (R * U):
        return None
    # what else it needs, found by compiling
    other = (92 if work.backward else 116) if G * R > 1 else 64
    other += 16 * (G == 1 and R > 1) + 2 * G * R + (16 if size == 2 else 0)
    room = _registers(threads) - other
    if work.backward:
        rows = -(-G * U // (4 * S)) * 4
        held = rows if KREG is None else KREG
        if KREG is None and rows * size > room - 2 * R:
            held = max(0, (room - 2 * R) // size // 4 * 4)
        each, fours = held, rows
        memory = R * S * rows + S * R * KP + max(threads // 32, threads // (R * U)) * R * U
    else:
        KS = KP // S
        held = max(0, min(KS, room // (G * size) * 4)) if KREG is None else min(KREG, KS)
        each, fours = held // 4 * G, KS // 4 * G
        memory = R * S * (KS + 4) + -(-threads // max(32, U)) * G * R * U
    staged = min(8, held if work.backward else held // 4)
    shared = max(4 * memory + (fours - each) * threads * four, staged * threads * four)
    N, tiles = -(-work.H // U), -(-max(work.B, 1) // R)
    groups = max(1, min(tiles, device.multiprocessors // (N * work.directions)))
    warps = threads // 32
    products = G * U * KP * R / 128 + (0 if size == 4 else G * U * KP / 64)
    operands = warps * fours / 4 * R if work.backward else warps * (KP // S) / 4 * R * 2
    weights = (fours - each) * threads * four / 128
    sums = (S * R * KP / 32 + 4 * warps * R) if work.backward else warps * G * R * 8
    moved = R * work.H * 8 * (2 if work.backward else 1) / _EXCHANGE_BYTES
    cycles = max(products / _EFFICIENCY, operands + weights) + sums + moved + _BARRIERS
    seconds = -(-tiles // groups) * (cycles / device.clock + _HOP_SECONDS)
    numbers = U, KP, S, held, R
    return Grid("grid", seconds, _LOAD_SECONDS, False, "grid", numbers, R, threads, shared, each / fours, N, groups)


# ---- the table, and the choice

# schedule -> function(work, device): its ways, or a sentence why it has none
WAYS = {"step": step_ways, "block": block_ways, "grid": grid_ways}
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
