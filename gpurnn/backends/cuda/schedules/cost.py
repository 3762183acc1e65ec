"""What a time loop should cost on a GPU, by published figures; not measured. The estimates only rank what fits."""

from ....dtypes import ITEMSIZE
from .constants import (
    EFFICIENCY,
    EXCHANGE_BYTES,
    GEMM_SECONDS,
    L2_BYTES,
    MEMORY_BYTES,
    MOST_INPUTS,
    REGISTERS,
    gemm_peak,
)


def gemm_rate(problem, device):
    """Operations per second of a large matrix product."""
    peak = gemm_peak(ITEMSIZE[problem.dtype], problem.tf32)
    return device.multiprocessors * device.clock * peak * EFFICIENCY


def weights_seconds(problem, device, size):
    """Seconds to read all recurrent weights once, of ``size`` bytes each."""
    weights = problem.directions * problem.products * problem.H**2 * size
    rate = EXCHANGE_BYTES if weights < L2_BYTES else MEMORY_BYTES
    return weights / (rate * device.multiprocessors * device.clock)


def cells_bytes(problem):
    """Bytes of a cell in a timestep, to and from memory: W_ih x and what it saves, states and outputs."""
    return (2 * problem.gates + 3) * ITEMSIZE[problem.dtype]


def has_tensor_cores(problem, device):
    """Whether tensor cores may multiply the numbers of a problem."""
    return device.capability >= 80 and not problem.fma


def refusal(problem):
    """Why a schedule with one launch for the whole sequence cannot serve this problem, or None."""
    if problem.dtype == "float64":
        return "computes in float32"
    if problem.projected:
        return "has no projection"
    second = problem.cell.first < problem.products and not problem.cell.inner_first
    return "has no second product in a timestep" if second else None


def padded(H, to=32):
    """H rounded up to a multiple of ``to``, at least ``to``."""
    return max(to, -(-H // to) * to)


def step_seconds(problem, device, rows, cycles):
    """Seconds of one timestep. Where the tiles outnumber the multiprocessors, they run in several waves."""
    tiles = -(-max(problem.B, 1) // rows) * problem.directions
    return -(-tiles // device.multiprocessors) * cycles / device.clock


def product_before(problem, device):
    """Seconds of W_ih x for all timesteps.

    It is one matrix product for each direction, whose result the time loop reads back.
    """
    if problem.backward or not problem.I:
        return 0.0
    numbers = problem.B * problem.gates * problem.H * problem.directions
    moved = numbers * ITEMSIZE[problem.dtype] / (device.multiprocessors * device.clock * MEMORY_BYTES)
    multiplied = 2 * numbers * problem.I / gemm_rate(problem, device)
    return problem.directions * GEMM_SECONDS + problem.T * (max(multiplied, moved) + moved)


def takes_inputs(problem):
    """Whether a kernel of schedule block can multiply x itself."""
    return not problem.backward and 0 < problem.I <= MOST_INPUTS


def extra_registers(cell, sequences, units=1):
    """A bound on the registers that a thread needs for what its cell has beyond an LSTM: of more states, of more blocks
    that forward saves or backward makes, of own parameters, of masks."""
    more = 3 * max(0, len(cell.states) - 2) + max(0, cell.saved_blocks - 4) + max(0, len(cell.gates) - 4)
    return units * (sequences * (more + len(cell.draws)) + cell.vectors)


def thread_registers(threads):
    """Registers of one thread of a block that has a multiprocessor to itself.

    Each quarter of the multiprocessor holds a quarter of the registers and of the warps.
    """
    warps = -(-threads // 128)
    return min(255, REGISTERS // 4 // (32 * warps) // 8 * 8)
