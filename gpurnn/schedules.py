"""How a layer's time loop is laid out on a GPU: the schedules in a table, whether they fit, what they should cost.

``step``: a fused kernel and a product for each timestep, any size. ``block``: one thread block runs the whole time loop
for a few sequences, its weights in registers and shared memory (block.cu; on tensor cores block_mma.cu).
``grid``: the weights are spread over a group of thread blocks, which exchange h once a step (grid.cu, grid_mma.cu).

Times here are estimates from published figures, not measurements; they only rank what fits. ``gpurnn tune`` measures on
a machine (tuning.py), and what it has measured counts in their place.
"""

import functools
import math
from dataclasses import dataclass, replace

from .dtypes import ITEMSIZE
from .errors import check_choice

_REGISTERS = 65536  # of a multiprocessor
_STEP_SECONDS = 4e-6  # two launches within a CUDA graph, 1.4 us each at least, and the product between them
_GEMM_SECONDS = 2.5e-6  # of a product before the time loop, besides its arithmetic: launch, ramp and tail
_MEMORY_BYTES = 10  # a clock and multiprocessor, from or to the GPU's memory
_MOST_INPUTS = 32  # columns of W_ih that a kernel of schedule block takes
_LOAD_SECONDS = 6e-6  # of a block's weights, before the first step
_EFFICIENCY = 0.7  # of the arithmetic's peak, in a product
_HOP_SECONDS = 0.65e-6  # from one multiprocessor to another through L2, by published measurements
_EXCHANGE_BYTES = 30  # a clock and multiprocessor, when all read L2
_LATENCY = 30  # cycles of what hides behind nothing: an operand from shared memory
_FETCH = 8  # cycles that a block spends on each number that its threads fetch, by its machine code
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
class Problem:
    """The time loop of one layer. directions: how many run at once; tf32: whether float32 may be multiplied as tf32.
    I: the size of its input; 0: the product with W_ih is left out of account. share: how many time loops are on the
    device at once, each on its part of the multiprocessors."""

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
    I: int = 0
    concurrent: int = 1


@dataclass(frozen=True)
class Candidate:
    """One candidate for a problem: a schedule with its tile.

    seconds: per timestep. before: per call, ahead of the first timestep. measured: whether these two were measured;
    else they are estimates. product: estimated seconds of all W_ih x GEMMs. It is negative where the kernel multiplies
    x itself, because it then loads nothing.
    """

    schedule: str
    seconds: float
    before: float = 0.0
    measured: bool = False
    product: float = 0.0
    inputs = 0  # columns of W_ih whose products the kernel makes; 0: W_ih x is ready before it starts

    def total(self, T):
        return self.before + T * self.seconds + self.product

    def price(self, T):
        """What T timesteps cost, in words."""
        first = f" after {self.before * 1e6:.1f} us" if self.before else ""
        known = "measured" if self.measured else "estimated"
        product = f", and {self.product * 1e6:.1f} us for W_ih x" if self.product and not self.inputs else ""
        seconds = self.seconds + (self.product / T if self.inputs and T else 0.0)
        return f"{self.schedule}: {T} timesteps of {seconds * 1e6:.2f} us{first}, {known}{product}"

    @property
    def key(self):
        """What distinguishes this candidate from the others for the same problem."""
        return self.schedule

    def __str__(self):
        return ""


@dataclass(frozen=True)
class Block(Candidate):
    """A kernel of schedule ``block`` and what its launch needs.

    kernel: "block" or "block_mma", the .cu file and the start of the names; numbers: its template arguments behind cell
    and storage. rows: sequences of a tile; held: share of the weights in registers. like: the key of the same loop
    without the products W_ih x, where this one makes them.
    """

    kernel: str = ""
    numbers: tuple = ()
    rows: int = 0
    threads: int = 0
    shared: int = 0
    held: float = 0.0
    inputs: int = 0
    like: str = ""

    @property
    def types(self):
        return tuple(map(str, self.numbers))

    @property
    def key(self):
        return self.like or f"{self.kernel}<{', '.join(self.types)}>"

    def __str__(self):
        held = math.floor(100 * self.held)
        inputs = ", W_ih x within the launch" if self.inputs else ""
        return f"{held} % of the recurrent weights in registers, tiles of {self.rows} sequences{inputs}"


# ---- step


def step_candidates(problem, device):
    """The one candidate of the schedule ``step``."""
    flops = 2 * problem.B * problem.gates * problem.H**2 * problem.directions
    return [Candidate("step", _STEP_SECONDS + flops / _rate(problem, device))]


def _rate(problem, device):
    """Of a large product, operations a second."""
    peak = 2048 if ITEMSIZE[problem.dtype] == 2 else 1024 if problem.tf32 else 256
    return device.multiprocessors * device.clock * peak * _EFFICIENCY


# ---- block


def block_candidates(problem, device):
    """All tiles that fit, or a sentence why none does."""
    refused = _refused(problem)
    if refused:
        return f"block {refused}"
    tiles = list(_fma_tiles(problem, device))
    if (ITEMSIZE[problem.dtype] == 2 or problem.tf32) and device.capability >= 80:
        tiles += _mma_tiles(problem, device)
    fitting = [tile for tile in tiles if tile.shared <= device.shared_bytes]
    if not fitting:
        HP = _padded(problem.H)
        size = problem.gates * HP * HP * ITEMSIZE[problem.dtype]
        return f"block: {size / 1024:.0f} KB of recurrent weights do not fit on one multiprocessor"
    return fitting


def _refused(problem):
    """Why a schedule with one launch for the whole sequence cannot serve this problem, or None."""
    if problem.dtype == "float64":
        return "computes in float32"
    if problem.projected:
        return "has no projection"
    return "has no second product in a step" if problem.kernel == "GruOriginal" else None


def _padded(H, to=32):
    return max(to, -(-H // to) * to)


def _seconds(problem, device, rows, cycles):
    """Of a timestep, where all tiles together may take several waves."""
    tiles = -(-max(problem.B, 1) // rows) * problem.directions
    return -(-tiles // device.multiprocessors) * cycles / device.clock


def _product_before(problem, device):
    """Seconds of W_ih x for all timesteps as one matrix product for each direction, and of reading it in the time
    loop."""
    if problem.backward or not problem.I:
        return 0.0
    numbers = problem.B * problem.gates * problem.H * problem.directions
    moved = numbers * ITEMSIZE[problem.dtype] / (device.multiprocessors * device.clock * _MEMORY_BYTES)
    multiplied = 2 * numbers * problem.I / _rate(problem, device)
    return problem.directions * _GEMM_SECONDS + problem.T * (max(multiplied, moved) + moved)


def _takes_inputs(problem):
    return not problem.backward and 0 < problem.I <= _MOST_INPUTS


def _registers(threads):
    """Of a thread, where such a block has a multiprocessor to itself: a quarter of them for a quarter of its warps."""
    warps = -(-threads // 128)
    return min(255, _REGISTERS // 4 // (32 * warps) // 8 * 8)


# ---- block_mma.cu


def _mma_tiles(problem, device):
    HP, G, size = _padded(problem.H), problem.gates, ITEMSIZE[problem.dtype]
    threads = 2 * HP
    if threads > 1024:
        return
    for N in (1, 2):
        plain = None
        for IP in (0, _padded(problem.I, 32 // size)) if _takes_inputs(problem) else (0,):
            tiles = G * (HP + IP) * size // 32  # of one warp
            # registers besides the weights: accumulators, one row of gates in flight (or x), cell state, addresses.
            # Found by compiling
            other = {4: 84, 3: 72, 1: 84}[G] if problem.backward else {4: 120, 3: 84, 1: 92}[G]
            other += (N - 1) * 60 + 4 * (size == 4)
            other += 3 * -(-8 * N * _padded(IP, 64 // size) // threads) if IP else 0  # x and its addresses
            other += 4 * (problem.H % 2 or device.capability < 90) if IP else 0
            held = max(0, min(tiles, (_registers(threads) - other) // 4))
            if N > 1 and not held:
                continue
            warps = HP // 16
            products = 2 * G * HP * (HP + IP) * 8 * N / (2680 if size == 2 else 1340)  # by published measurements
            operands = warps * N * tiles / (1 if problem.backward else G) / 2 * 4
            rest = warps * (tiles - held) * 4
            moved = warps * N * 4 * ((1 if IP else 2) * G + 3) * size  # the machine code agrees (steps.py)
            seconds = _seconds(problem, device, 8 * N, max(products, operands + rest) + moved + _BARRIERS)
            if not IP:
                plain = mma_tile(problem, HP, held, N, seconds)
                yield plain
            elif plain:
                more = problem.T * (seconds - plain.seconds)
                yield replace(mma_tile(problem, HP, held, N, plain.seconds, IP), product=more, like=plain.key)


def mma_tile(problem, HP, held, N=1, seconds=0.0, IP=0):
    """The ``Block`` of these template arguments.

    Its shared memory: the double-buffered operand, and the weight tiles that did not fit in registers. While weights
    are loaded, the staging buffer.
    """
    size = ITEMSIZE[problem.dtype]
    threads, tiles = 2 * HP, problem.gates * (HP + IP) * size // 32
    columns = problem.gates * HP if problem.backward else HP + (_padded(IP, 64 // size) if IP else 0)
    read = 2 * 8 * N * (columns * size + 16)
    shared = max(read + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    even = "true" if problem.H % 2 == 0 else "false"
    numbers = (HP, held, N, even) if problem.backward else (HP, held, N, IP, even)
    in_registers = held / tiles
    return Block(
        "block", seconds, _LOAD_SECONDS, False, 0.0, "block_mma", numbers, 8 * N, threads, shared, in_registers, IP
    )


# ---- block.cu


def _fma_tiles(problem, device):
    HP = _padded(problem.H)
    for R in (1, 2, 4):
        for S in (1, 2, 4, 8):
            if not 64 <= HP * S <= 512 or HP // S % 4:
                continue
            KREG = _in_registers(problem, HP, S, R)
            plain = fma_tile(problem, HP, S, KREG, R, _seconds(problem, device, R, _cycles(problem, HP, S, KREG, R)))
            yield plain
            if _takes_inputs(problem):
                IP = _padded(problem.I, 4)
                cycles = problem.gates * HP * IP * R / 128 / _EFFICIENCY + _LATENCY
                cycles -= _FETCH * problem.gates * -(-R // S)  # of ready sums, which are not fetched
                more = problem.T * _seconds(problem, device, R, cycles)
                yield replace(fma_tile(problem, HP, S, KREG, R, plain.seconds, IP), product=more, like=plain.key)


def fma_tile(problem, HP, S, KREG, R, seconds=0.0, IP=0):
    """The ``Block`` of these template arguments.

    Its shared memory: the operand, the partial sums of the slices, and the weights that did not fit in registers. While
    weights are loaded, the staging buffer.
    """
    G, size = problem.gates, ITEMSIZE[problem.dtype]
    four, sums = 4 * size * HP * S, G + (IP > 0 and G == 3)
    operand, partial_sums = (R * G * HP, S * R * HP) if problem.backward else (R * (HP + IP), S * sums * R * HP)
    shared = 4 * (operand + partial_sums) + G * IP * HP * size + (HP // S - KREG) // 4 * G * four
    shared = max(shared, min(KREG // 4, 8) * four)
    numbers, held = (HP, S, KREG, R) if problem.backward else (HP, S, KREG, R, IP), KREG / (HP // S)
    return Block("block", seconds, _LOAD_SECONDS, False, 0.0, "block", numbers, R, HP * S, shared, held, IP)


def _in_registers(problem, HP, S, R):
    """KREG: how many columns of weights a thread can hold beside what else it needs, without spilling."""
    G, chains, mine = problem.gates, 1 if problem.gates * R >= 4 else 4, -(-R // S)
    # accumulators twice, one row of gates in flight and the cell state for each sequence of the thread, biases,
    # addresses, plus the compiler's slack (found by compiling: test_cuda_block.py checks that it is enough)
    other = (70 if G * R > 1 else 32) + 2 * G * R * chains + mine * (G + 8) + 2 * G
    other += 8 * problem.backward + (16 if ITEMSIZE[problem.dtype] == 2 else 0)
    registers = _registers(HP * S) - other
    return max(0, min(HP // S, registers // (G * ITEMSIZE[problem.dtype]) * 4))


def _cycles(problem, HP, S, KREG, R):
    G, KS, warps = problem.gates, HP // S, HP * S // 32
    size = ITEMSIZE[problem.dtype]
    products = G * HP * HP * R / 128 + (0 if size == 4 else G * HP * HP / 64)  # 16-bit weights are widened first
    products *= max(1, (8 / warps) ** 0.5) / _EFFICIENCY  # few warps hide little
    operands = warps * KS / 4 * R * (G if problem.backward else 1)  # 16 bytes, the same for a warp
    weights = (KS - KREG) * G * HP * S * size / 128
    sums = warps * S * R * G
    return max(products, operands + weights) + sums + _BARRIERS


# ---- grid


@dataclass(frozen=True)
class Grid(Block):
    """A kernel of schedule ``grid``. blocks: of a group; groups: of each direction, all there at once; words: of the
    exchange, for one group."""

    blocks: int = 1
    groups: int = 1
    words: int = 0

    def __str__(self):
        groups = f"{self.groups} group" + "s" * (self.groups > 1)
        how = ", on tensor cores" * (self.kernel == "grid_mma")
        how += ", two on a multiprocessor" * (self.kernel == "grid_mma" and self.numbers[-1] == 2)
        return f"{super().__str__()}, {groups} of {self.blocks} thread blocks{how}"


def grid_candidates(problem, device):
    """All tiles that fit, or a sentence why none does."""
    refused = _refused(problem)
    if refused:
        return f"grid {refused}"
    if not device.cooperative:
        return "grid needs thread blocks that wait for one another, which failed on this device"
    found, quads = [], -(-problem.H // 128) * 32
    sizes = [quads * S for S in (1, 2, 4, 8) if quads * S <= 768] if problem.backward else (128, 256, 512)
    for U in (8, 16, 32):
        for R in (1, 2, 4):
            found += [grid_tile(problem, device, U, R, threads) for threads in sizes]
        if (ITEMSIZE[problem.dtype] == 2 or problem.tf32) and device.capability >= 80:
            found += [grid_mma_tile(problem, device, U, R, P) for R in (1, 2, 4, 8, 16) for P in (1, 2)]
    found = [tile for tile in found if tile and tile.blocks > 1]
    if not found:
        size = problem.gates * problem.H**2 * ITEMSIZE[problem.dtype] * problem.directions / 1e6
        return f"grid: {size:.1f} MB of recurrent weights do not fit on {device.multiprocessors} multiprocessors"
    return found


def grid_tile(problem, device, U, R, threads, KREG=None):
    """The ``Grid`` of U units a block, R sequences a tile, and so many threads; None where these do not go together or
    do not fit.

    KREG: as in the kernel, by default as many as fit.
    """
    G, size, KP = problem.gates, ITEMSIZE[problem.dtype], -(-problem.H // 128) * 128
    four = 4 * size
    S = threads * 4 // KP if problem.backward else threads // U
    if not S or (threads != KP // 4 * S if problem.backward else KP % (4 * S)) or threads % (R * U):
        return None
    # what else it needs, found by compiling
    other = (92 if problem.backward else 116) if G * R > 1 else 64
    other += 16 * (G == 1 and R > 1) + 2 * G * R + (16 if size == 2 else 0)
    if not problem.backward:
        other += 16 * (device.capability < 90 and G > 1) + 24 * (size == 4 and G == 3 and R == 1)
    room = _registers(threads) - other
    if problem.backward:
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
    staged = min(8, held if problem.backward else held // 4)
    shared = max(4 * memory + (fours - each) * threads * four, staged * threads * four)
    warps = threads // 32
    products = G * U * KP * R / 128 + (0 if size == 4 else G * U * KP / 64)
    operands = warps * fours / 4 * R if problem.backward else warps * (KP // S) / 4 * R * 2
    weights = (fours - each) * threads * four / 128
    sums = (S * R * KP / 32 + 4 * warps * R) if problem.backward else warps * G * R * 8
    moved = R * problem.H * 8 * (2 if problem.backward else 1)
    cycles = max(products / _EFFICIENCY, operands + weights) + sums
    N = -(-problem.H // U)
    words = 2 * (N * N * R * U if problem.backward else problem.H * R)
    return _grid(
        problem, device, "grid", (U, KP, S, held, R), R, threads, shared, each / fours, N, words, cycles, moved
    )


def _grid(problem, device, kernel, numbers, rows, threads, shared, held, blocks, words, cycles, moved, P=1):
    """The ``Grid`` of a tile whose step takes so many cycles besides what every step does and moves so many bytes, P of
    them on a multiprocessor; None where it does not fit."""
    most = (device.shared_bytes + 1024) // P - 1024  # the system keeps 1 KB of each block for itself
    room = device.multiprocessors * P // (blocks * problem.directions)
    if not room or shared > most:
        return None
    tiles = -(-max(problem.B, 1) // rows)
    groups = min(tiles, room)
    blocks_in_all = blocks * groups * problem.directions
    crowded = blocks_in_all > device.multiprocessors
    rate = min(64, _EXCHANGE_BYTES * device.multiprocessors / min(blocks_in_all, device.multiprocessors))
    busy = (cycles + moved / rate + _BARRIERS) / device.clock
    # where two share a multiprocessor, one computes while the other waits
    seconds = -(-tiles // groups) * max(_HOP_SECONDS + busy, 2 * busy * crowded)
    how = seconds, _LOAD_SECONDS, False, 0.0, kernel, numbers, rows, threads, shared, held
    return Grid("grid", *how, blocks=blocks, groups=groups, words=words)


# ---- grid_mma.cu


def grid_mma_tile(problem, device, U, R, P=1, held=None):
    """The ``Grid`` of U units a block, R sequences a tile, P blocks on a multiprocessor; None where it does not fit.

    held: tiles of a warp's weights in registers, by default as many as fit.
    """
    G, size, KP = problem.gates, ITEMSIZE[problem.dtype], -(-problem.H // 128) * 128
    threads, N, fragments = 256, -(-R // 8), size // 2
    rows, columns = (U, G * KP) if problem.backward else (G * U, KP)
    M, K = -(-rows // 16), columns // 16
    chains = 1 if M >= 4 else 2 if M > 1 else 4
    tiles = M * K // 8 * fragments  # of one warp
    # sums, what is asked for at once, the cell of each own sequence, addresses; found by compiling
    other = 4 * (M * N * chains + min(8 // P, K // 8 * N) + size) + -(-R * U // threads) * (2 * G + 12) + 56
    if P == 1:
        other += 8 * (size == 4 and device.capability < 90) + problem.backward * (4 if K < 320 else 24)
    room = (_registers(threads) if P == 1 else 112) - other
    if room < 0:
        return None
    held = min(tiles, max(0, room // 4) if held is None else held)
    parts = 8 * 8 * N * (16 * M + 4) * 4
    shared = max(parts + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    products = 16 * M * columns * 8 * N * 2 / (2680 if size == 2 else 1340)  # by published measurements
    rest = (tiles - held) * threads * 16 / 128
    sums = 8 * M * N * 4 + -(-R * U // 32) * rows // U * 8
    moved = (G if problem.backward else 1) * problem.H * R * size
    numbers = U, KP, held, R, P
    cycles, blocks, words = max(products, rest) + sums, -(-problem.H // U), 32 * K * 16 * 8 * N * size // 4
    return _grid(
        problem, device, "grid_mma", numbers, R, threads, shared, held / tiles, blocks, words, cycles, moved, P
    )


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


# ---- the table, and the choice

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
    product = _product_before(problem, device)
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
