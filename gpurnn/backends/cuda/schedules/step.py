"""The schedule ``step``: a fused kernel and a GEMM for each timestep. It fits every size."""

from .constants import STEP_SECONDS
from .cost import gemm_rate
from .problem import Candidate


def step_candidates(problem, device):
    """The one candidate of the schedule ``step``."""
    flops = 2 * problem.B * problem.products * problem.H**2 * problem.directions
    return [Candidate("step", STEP_SECONDS + flops / gemm_rate(problem, device))]
