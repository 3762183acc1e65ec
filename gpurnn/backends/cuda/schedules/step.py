"""The schedule ``step``: a fused kernel and a GEMM for each timestep. It fits every size."""

from ....dtypes import ITEMSIZE
from .constants import EXCHANGE_BYTES, MEMORY_BYTES, STEP_SECONDS
from .cost import cells_bytes, gemm_rate, weights_seconds
from .problem import Candidate


def step_candidates(problem, device):
    """The one candidate of the schedule ``step``."""
    cells = problem.B * problem.H * problem.directions
    multiplied = 2 * cells * problem.products * problem.H / gemm_rate(problem, device)
    products = 2 * problem.products * max(4, ITEMSIZE[problem.dtype])  # W_hh h, written and read again, from L2
    clocks = cells * (cells_bytes(problem) / MEMORY_BYTES + products / EXCHANGE_BYTES) / device.multiprocessors
    multiplied = max(multiplied, weights_seconds(problem, device, ITEMSIZE[problem.dtype]))
    return [Candidate("step", STEP_SECONDS + multiplied + clocks / device.clock)]
