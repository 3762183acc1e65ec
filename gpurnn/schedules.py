"""Which way a layer walks through time on a GPU: the schedules in a table, whether they fit, what they should cost.

``step``: a fused kernel and a product for each timestep, any size. ``block``: one thread block walks all of time for a
few sequences, its weights in registers and shared memory (kernels/block.cu). Times here are estimates from published
figures, not measurements; they only rank the schedules.
"""

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
    """What a schedule must know of a GPU: shared_bytes is the most that one block may ask for."""

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
    """Template arguments of kernels/block.cu, and what a launch needs. seconds: estimated, of one timestep."""

    HP: int
    S: int
    KREG: int
    R: int
    shared: int
    seconds: float

    @property
    def types(self):
        return tuple(map(str, (self.HP, self.S, self.KREG, self.R)))

    @property
    def threads(self):
        return self.HP * self.S


def block(work, device):
    """The best ``Block`` for this work, or a sentence why there is none."""
    if work.dtype == "float64":
        return "block computes in float32"
    if work.projected:
        return "block has no projection"
    if work.kernel == "GruOriginal":
        return "block has no second product in a step"
    HP = max(32, -(-work.H // 32) * 32)
    best = None
    for R in (1, 2, 4):
        tiles = -(-max(work.B, 1) // R) * work.directions
        waves = -(-tiles // device.multiprocessors)
        for S in (1, 2, 4, 8):
            if not 64 <= HP * S <= 512 or HP // S % 4:
                continue
            KREG = _in_registers(work, HP, S, R)
            shared = shared_bytes(work, HP, S, KREG, R)
            if shared > device.shared_bytes:
                continue
            found = Block(HP, S, KREG, R, shared, waves * _cycles(work, HP, S, KREG, R) / device.clock)
            if best is None or found.seconds < best.seconds:
                best = found
    if best is None:
        size = work.gates * HP * HP * ITEMSIZE[work.dtype]
        return f"block: {size / 1024:.0f} KB of recurrent weights do not fit on one multiprocessor"
    return best


def _in_registers(work, HP, S, R):
    """KREG: how many columns of weights a thread can hold beside what else it needs, without spilling."""
    G, chains, mine = work.gates, 1 if work.gates * R >= 4 else 4, -(-R // S)
    # sums twice, a row of gates on its way and the cell for each own sequence, biases, addresses; what the compiler
    # likes to have on its way besides (found by compiling: test_cuda_block.py sees whether it is enough)
    other = 56 + 2 * G * R * chains + mine * (G + 8) + 2 * G
    other += 16 * work.backward + (16 if ITEMSIZE[work.dtype] == 2 else 0)
    registers = min(255, _REGISTERS // (HP * S) // 8 * 8) - other
    return max(0, min(HP // S, registers // (G * ITEMSIZE[work.dtype]) * 4))


def shared_bytes(work, HP, S, KREG, R):
    """Shared memory of a block: what the product reads, the slices' sums, the weights that are not in registers; at the
    start the way of the others into registers."""
    G, four = work.gates, 4 * ITEMSIZE[work.dtype] * HP * S
    box, parts = (R * G * HP, S * R * HP) if work.backward else (R * HP, S * G * R * HP)
    return max(4 * (box + parts) + (HP // S - KREG) // 4 * G * four, min(KREG // 4, 8) * four)


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
    held = math.floor(100 * found.KREG / (found.HP // found.S))
    return found, f"{figures}; {held} % of the recurrent weights in registers, tiles of {found.R} sequences"
