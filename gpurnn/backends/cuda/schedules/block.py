"""The schedule ``block``: one thread block runs the whole time loop for a few sequences.

Its weights lie in registers and shared memory (block.cu; on tensor cores block_mma.cu).
"""

import math
from dataclasses import dataclass, replace

from ....dtypes import ITEMSIZE
from .constants import (
    BARRIERS,
    CONVERT_RATE,
    EFFICIENCY,
    FETCH,
    FMA_RATE,
    LATENCY,
    LOAD_SECONDS,
    MEANS,
    SHARED_BYTES,
    mma_rate,
)
from .cost import extra_registers, has_tensor_cores, padded, refusal, step_seconds, takes_inputs, thread_registers
from .problem import Tile


@dataclass(frozen=True)
class Block(Tile):
    """A kernel of schedule ``block`` and what its launch needs.

    kernel: "block" or "block_mma". rows: sequences of a tile. threads: of a block. held: fraction of the weights that
    is in registers, or None where there are none. like: for a kernel that multiplies x itself, the key of the same
    kernel without that. parts: thread blocks that share the units of a tile.
    """

    rows: int = 0
    threads: int = 0
    held: float | None = 0.0
    inputs: int = 0
    like: str = ""
    parts: int = 1

    @property
    def key(self):
        return self.like or super().key

    def __str__(self):
        tiles = "tiles of 1 sequence" if self.rows == 1 else f"tiles of {self.rows} sequences"
        if self.held is None:
            return f"no recurrent weights, {tiles}"
        held = math.floor(100 * self.held)
        inputs = ", W_ih x within the launch" if self.inputs else ""
        split = ", float32 as three bfloat16 numbers" if "mma" in self.kernel and self.numbers[-1] == 3 else ""
        return f"{held} % of the recurrent weights in registers, {tiles}{inputs}{split}"


def block_candidates(problem, device):
    """All tiles that fit, or a sentence that says why none does."""
    refused = refusal(problem)
    if refused:
        return f"block {refused}"
    if not problem.products:
        one = _without_product(problem, device)
        if problem.stages and one.parts > 1:
            return (
                f"block: means need all units of a sequence in one thread block, and {problem.H} of a cell without "
                f"recurrent weights are spread over {one.parts}"
            )
        return [one]
    tiles = list(_fma_tiles(problem, device))
    if has_tensor_cores(problem, device):
        tiles += _mma_tiles(problem, device)
    fitting = [tile for tile in tiles if tile.shared <= device.shared_bytes]
    if not fitting:
        HP = padded(problem.H)
        size = problem.products * HP * HP * ITEMSIZE[problem.dtype]
        if problem.stages and not tiles and size <= device.shared_bytes:
            return "block: what a thread hands on from mean to mean does not fit into its registers"
        return f"block: {size / 1024:.0f} KB of recurrent weights do not fit on one multiprocessor"
    return fitting


# ---- means over the units (means.cuh)


def _means_bytes(problem, threads, sequences, apart=1):
    """Shared memory for the sums of warps; sequences: of a thread. As vectors_of_means in means.cuh."""
    return -(-(threads // 32 * sequences * sum(problem.stages) * apart) // 4) * 16


def _means_registers(problem, units):
    """Registers of a thread for what stages hand on, besides ``extra_registers``. units: of all its sequences.

    Found by compiling layer-normalized cells: forward most of it is what is saved anyhow.
    """
    forward, backward = problem.cell.locals
    if not problem.backward:
        return units * forward // 2
    return units * backward + (16 if units > 1 else 0)


def _means_cycles(problem, warps, sequences, of_a_sequence):
    """Cycles of all stages of means in a timestep. warps: that have sequences. of_a_sequence: warps that share one."""
    each = 10 + 2 * of_a_sequence + 12  # instructions: shuffles and sums of lanes, loads and sums of warps, a division
    return len(problem.stages) * MEANS + warps * sequences * sum(problem.stages) * each / 4


# ---- block_mma.cu


def _mma_tiles(problem, device):
    """Every tile of block_mma.cu, whether it fits or not."""
    HP, G, Q, size = padded(problem.H), problem.gates, problem.products, ITEMSIZE[problem.dtype]
    K, threads = _mma_columns(problem), 2 * HP
    if threads > 1024:
        return
    for N in (1,) if problem.parts == 3 else (1, 2):  # the sums of thirds of 16 sequences do not fit into registers
        plain = None
        for IP in (0, padded(problem.I, K)) if takes_inputs(problem) else (0,):
            tiles = (Q * HP + G * IP) * problem.multiplied_bytes // 32  # weight tiles of one warp
            other = _mma_registers(problem, N) + (N - 1) * 64 + 4 * (size == 4)
            other += 3 * -(-8 * N * padded(IP, 2 * K) // threads) if IP else 0  # x and its addresses
            other += 4 * (problem.H % 2 or device.capability < 90) if IP else 0
            room = thread_registers(threads) - other
            held = max(0, min(tiles, room // 4))
            if (N > 1 and not held) or (problem.stages and room < 0):
                continue
            if problem.parts == 3 and held < tiles:  # the compiler then loads so many weights early that it spills
                continue
            warps = HP // 16
            products = 2 * HP * (Q * HP + G * IP) * 8 * N / mma_rate(size, problem.parts)
            operands = warps * N * tiles / (1 if problem.backward else Q) / 2 * 4
            rest = warps * (tiles - held) * 4
            moved = warps * N * 4 * ((1 if IP else 2) * G + 3) * size  # the SASS agrees (steps.py)
            means = _means_cycles(problem, warps, 2 * N, warps)
            seconds = step_seconds(problem, device, 8 * N, max(products, operands + rest) + moved + means + BARRIERS)
            if not IP:
                plain = mma_tile(problem, HP, held, N, seconds)
                yield plain
            elif plain:
                more = problem.T * (seconds - plain.seconds)
                yield replace(mma_tile(problem, HP, held, N, plain.seconds, IP), product=more, like=plain.key)


def _mma_columns(problem):
    """K of tensor.cuh: columns of a tile of weights."""
    return 32 * problem.parts // problem.multiplied_bytes


def _mma_registers(problem, N):
    """Registers of a thread besides the weights: accumulators, one row of gates in flight (or x), states, addresses.

    Found by compiling RNN, LSTM and GRU; ``CudaOps.without_spills`` corrects what does not fit for another cell.
    """
    cell, chained = problem.cell, problem.products == 1
    if problem.backward:
        registers = 84 if chained or len(cell.states) > 1 else 72
    else:
        registers = 120 if len(cell.states) > 1 else 92 if chained else 84
    if problem.parts == 3 and problem.backward:
        registers += 40 if chained else 16
    elif problem.parts == 3:
        registers += 12 if chained else 24 if len(cell.states) > 1 else 48
    if problem.stages:
        return registers + extra_registers(cell, 2 * N, 2) + _means_registers(problem, 4 * N)
    return registers + extra_registers(cell, 2, 2)


def mma_tile(problem, HP, held, N=1, seconds=0.0, IP=0):
    """The ``Block`` of these template arguments.

    Its shared memory: the double-buffered operand, and the weight tiles that did not fit in registers. While weights
    are loaded, the staging buffer.
    """
    size, parts = problem.multiplied_bytes, problem.parts
    threads, tiles = 2 * HP, (problem.products * HP + problem.gates * IP) * size // 32
    columns = problem.products * HP if problem.backward else HP + (padded(IP, 2 * _mma_columns(problem)) if IP else 0)
    read = 2 * 8 * N * (columns * size + 16 * parts)
    shared = max(read + (tiles - held) * threads * 16, min(held, 8) * threads * 16)
    shared += _means_bytes(problem, threads, 2 * N, 4)
    even = "true" if problem.H % 2 == 0 else "false"
    numbers = (HP, held, N, even, parts) if problem.backward else (HP, held, N, IP, even, parts)
    in_registers = held / tiles
    return Block(
        "block", seconds, LOAD_SECONDS, kernel="block_mma", numbers=numbers, rows=8 * N, threads=threads,
        shared=shared, held=in_registers, inputs=IP,
    )  # fmt: skip


# ---- block.cu


def _fma_tiles(problem, device):
    """Every tile of block.cu, whether it fits or not."""
    HP = padded(problem.H)
    for R in (1, 2, 4):
        for S in (1, 2, 4, 8):
            if not 64 <= HP * S <= 512 or HP // S % 4:
                continue
            KREG = _in_registers(problem, HP, S, R)
            if KREG is None:
                continue
            plain = fma_tile(
                problem, HP, S, KREG, R, step_seconds(problem, device, R, _cycles(problem, HP, S, KREG, R))
            )
            yield plain
            if takes_inputs(problem):
                IP = padded(problem.I, 4)
                cycles = problem.gates * HP * IP * R / FMA_RATE / EFFICIENCY + LATENCY
                cycles -= FETCH * problem.gates * -(-R // S)  # W_ih x is not loaded
                more = problem.T * step_seconds(problem, device, R, cycles)
                yield replace(fma_tile(problem, HP, S, KREG, R, plain.seconds, IP), product=more, like=plain.key)


def fma_tile(problem, HP, S, KREG, R, seconds=0.0, IP=0):
    """The ``Block`` of these template arguments.

    Its shared memory: the operand, the partial sums of the slices, and the weights that did not fit in registers. While
    weights are loaded, the staging buffer.
    """
    G, Q, size = problem.gates, problem.products, ITEMSIZE[problem.dtype]
    # as sums_of in time_loop.cuh
    four, sums = 4 * size * HP * S, Q + (G - max(0, Q - len(problem.cell.apart)) if IP else 0)
    operand, partial_sums = (R * Q * HP, S * R * HP) if problem.backward else (R * (HP + IP), S * sums * R * HP)
    shared = 4 * (operand + partial_sums) + G * IP * HP * size + (HP // S - KREG) // 4 * Q * four
    shared = max(shared, min(KREG // 4, 8) * four) + _means_bytes(problem, HP * S, -(-R // S))
    numbers, held = (HP, S, KREG, R) if problem.backward else (HP, S, KREG, R, IP), KREG / (HP // S)
    return Block(
        "block", seconds, LOAD_SECONDS, kernel="block", numbers=numbers, rows=R, threads=HP * S, shared=shared,
        held=held, inputs=IP,
    )  # fmt: skip


def _in_registers(problem, HP, S, R):
    """KREG: how many columns of weights fit into a thread's registers without spills.

    None where not even the stages of a cell with means do.
    """
    G, Q, sequences = problem.gates, problem.products, -(-R // S)
    chains = 1 if Q * R >= 4 else 4
    # accumulators twice, one row of gates in flight and the cell state for each sequence of the thread, biases,
    # addresses, plus the compiler's slack (found by compiling: test_cuda_block.py checks that it is enough)
    other = (70 if Q * R > 1 else 32) + 2 * Q * R * chains + sequences * (G + 8) + 2 * G
    other += 8 * problem.backward + (16 if ITEMSIZE[problem.dtype] == 2 else 0)
    registers = thread_registers(HP * S) - other - extra_registers(problem.cell, sequences)
    if problem.stages:
        registers -= _means_registers(problem, sequences)
        if registers < 0:
            return None
    return max(0, min(HP // S, registers // (Q * ITEMSIZE[problem.dtype]) * 4))


def _without_product(problem, device):
    """The ``Block`` of a cell that multiplies nothing by W_hh: 64 units of 4 sequences, a thread for each."""
    cycles = BARRIERS + 4 * FETCH * problem.gates + _means_cycles(problem, 8, 1, 2)
    parts = -(-problem.H // 64)
    seconds = step_seconds(problem, device, 4 / parts, cycles)
    shared = _means_bytes(problem, 256, 1)
    return replace(fma_tile(problem, 64, 4, 0, 4, seconds), shared=shared, held=None, parts=parts)


def _cycles(problem, HP, S, KREG, R):
    """Cycles of one timestep of block.cu."""
    G, KS, warps = problem.products, HP // S, HP * S // 32
    size = ITEMSIZE[problem.dtype]
    products = G * HP * HP * R / FMA_RATE + (0 if size == 4 else G * HP * HP / CONVERT_RATE)
    products *= max(1, (8 / warps) ** 0.5) / EFFICIENCY  # few warps hide little latency
    operands = warps * KS / 4 * R * (G if problem.backward else 1)  # 16 bytes, the same for a warp
    weights = (KS - KREG) * G * HP * S * size / SHARED_BYTES
    sums = warps * S * R * G
    means = _means_cycles(problem, HP // 32 * min(R, S), -(-R // S), HP // 32)
    return max(products, operands + weights) + sums + means + BARRIERS
