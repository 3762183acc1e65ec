"""How a layer's time loop is laid out on a GPU: which schedules fit, and what they should cost.

``step``: a fused kernel and a GEMM for each timestep, of any size. ``block``: one thread block runs the whole time loop
for a few sequences. ``grid``: the weights are spread over a group of thread blocks. ``cluster``: over the blocks of a
cluster. ``fused``: a launch for each timestep, without a GEMM. problem.py says what is chosen between, cost.py
estimates, choose.py chooses. ``gpurnn tune`` measures (tuning.py); tuned_table.py stores what it has measured, which
replaces the estimates.
"""

from .block import Block, block_candidates, fma_tile, mma_tile
from .choose import FINDERS, SCHEDULES, candidates, choose, hold_less
from .cluster import Cluster, cluster_candidates, cluster_tile
from .fused import Fused, fused_candidates, fused_tile
from .grid import Grid, grid_candidates, grid_mma_tile, grid_tile
from .problem import Candidate, Device, Problem
from .step import step_candidates

__all__ = [
    "FINDERS",
    "SCHEDULES",
    "Block",
    "Candidate",
    "Cluster",
    "Device",
    "Fused",
    "Grid",
    "Problem",
    "block_candidates",
    "candidates",
    "choose",
    "cluster_candidates",
    "cluster_tile",
    "fma_tile",
    "fused_candidates",
    "fused_tile",
    "grid_candidates",
    "grid_mma_tile",
    "grid_tile",
    "hold_less",
    "mma_tile",
    "step_candidates",
]
