"""The constants of the cost model, each with its unit and its source. None was measured on a GPU of ours.

``gpurnn tune`` replaces what follows from them by measured times, and shows how far off it was.

[1] Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", arXiv 2501.12084.
[2] Microbenchmarks of an H100 that others have published: mma.sync m16n8k16 issues every 6.26 cycles; 564 to 651 ns
    from a store to the poll that sees it; 1.4 us from one graph launch to the next.
[3] CUDA C++ Programming Guide, arithmetic instructions and technical specifications.
"""

from typing import NamedTuple


class Constant(NamedTuple):
    """A number of the cost model. name: as in this module."""

    name: str
    value: float
    unit: str
    source: str


TABLE = []  # every Constant, in this order


def _constant(name, value, unit, source):
    TABLE.append(Constant(name, value, unit, source))
    return value


# ---- the machine

REGISTERS = _constant("REGISTERS", 65536, "32-bit registers of a multiprocessor", "[3]")
FMA_RATE = _constant("FMA_RATE", 128, "multiply-adds a clock and multiprocessor, in float32", "[3]")
CONVERT_RATE = _constant("CONVERT_RATE", 64, "16-bit numbers made float32 a clock and multiprocessor", "[3]")
MMA_RATE_16 = _constant("MMA_RATE_16", 2680, "operations a clock and multiprocessor, mma.sync of 16 bits", "[2]")
MMA_RATE_TF32 = _constant("MMA_RATE_TF32", 1340, "the same of tf32", "[2], half of 16 bits")
SHARED_BYTES = _constant("SHARED_BYTES", 128, "bytes of shared memory a clock and multiprocessor", "[3]")
LATENCY = _constant("LATENCY", 30, "cycles until a load from shared memory is there", "[1]: 29")
MEMORY_BYTES = _constant("MEMORY_BYTES", 10, "bytes a clock and multiprocessor, to or from global memory",
                         "4.3 TB/s of an H200 over 132 multiprocessors, 60 % of it")  # fmt: skip
EXCHANGE_BYTES = _constant("EXCHANGE_BYTES", 30, "bytes a clock and multiprocessor from L2, all reading",
                           "[1]: 3942 over 132 multiprocessors")  # fmt: skip
ONE_READS = _constant(
    "ONE_READS", 64, "bytes a clock from L2 to a multiprocessor, few reading", "[3], the width of its port"
)
L2_BYTES = _constant("L2_BYTES", 50e6, "bytes of L2", "an H100's data sheet")
HOP_SECONDS = _constant("HOP_SECONDS", 0.65e-6, "seconds from one multiprocessor to another through L2", "[2]")
CLUSTER_HOP = _constant("CLUSTER_HOP", 200, "cycles from one multiprocessor to another of its cluster",
                        "[1]: 180 to 213")  # fmt: skip
CLUSTER_BYTES = _constant("CLUSTER_BYTES", 11.4, "bytes a clock that a block receives from its cluster",
                          "[1]: 2.65 TB/s, a ring in clusters of 4, over 132 multiprocessors at 1.755 GHz")  # fmt: skip

# ---- large products

GEMM_PEAK_16 = _constant("GEMM_PEAK_16", 2048, "operations a clock and multiprocessor, 16 bits", "half of [3]'s peak")
GEMM_PEAK_TF32 = _constant("GEMM_PEAK_TF32", 1024, "the same of tf32", "half of [3]'s peak")
GEMM_PEAK = _constant("GEMM_PEAK", 256, "the same of float32", "[3]")
EFFICIENCY = _constant("EFFICIENCY", 0.7, "of the peak rate that a product reaches", "a guess")
GEMM_SECONDS = _constant(
    "GEMM_SECONDS", 2.5e-6, "seconds of a product besides its arithmetic", "a guess: launch, ramp, tail"
)
STEP_SECONDS = _constant("STEP_SECONDS", 4e-6, "seconds of a timestep of `step` besides its arithmetic",
                         "two edges of a graph, 1.4 us each by [2], and the product between them")  # fmt: skip
DEPENDENT_SECONDS = _constant("DEPENDENT_SECONDS", 1.5e-6, "seconds of a timestep of `fused` besides its work",
                              "a guess: one edge of a graph, 1.4 us by [2], and two latencies of L2, less what is "
                              "ready before it")  # fmt: skip

# ---- our kernels

LOAD_SECONDS = _constant("LOAD_SECONDS", 6e-6, "seconds to load a block's weights", "a guess")
BARRIERS = _constant("BARRIERS", 350, "cycles of a block's timestep besides its product",
                     "a guess: two barriers, the cell, loads and stores")  # fmt: skip
BACKWARD = _constant("BACKWARD", 500, "cycles more of a timestep of `grid` in backward", "counted in the machine code")
SECOND_TILE = _constant(
    "SECOND_TILE",
    750,
    "cycles of a tile besides its own where a group has two at once",
    "counted in the machine code: polls, weights in shared memory",
)
MEANS = _constant("MEANS", 220, "cycles of a stage of means",
                  "a guess: 5 shuffles of 24; a barrier, a load and a division of 30 to 40 each")  # fmt: skip
FETCH = _constant("FETCH", 8, "cycles for each number that a block's threads load", "counted in the machine code")
THIRDS_WORDS = _constant("THIRDS_WORDS", 60, "instructions of a warp for 16 numbers of 8 sequences, polled and split",
                         "counted in the machine code")  # fmt: skip
THIRDS_TILE = _constant("THIRDS_TILE", 13, "the same for a tile of weights: six products, four sums, three loads",
                        "counted in the machine code")  # fmt: skip
CELL_CYCLES = _constant(
    "CELL_CYCLES", 300, "cycles from a product's sums to what `cluster` sends", "a guess, latencies"
)
CELL_ISSUED = _constant("CELL_ISSUED", 200, "instructions of a warp there, for each sequence of a lane",
                        "counted in the machine code")  # fmt: skip
CELL_TURN = _constant("CELL_TURN", 290, "instructions of a warp of `fused` for a cell of each of its lanes",
                      "counted in the machine code")  # fmt: skip
BARRIER = _constant("BARRIER", 40, "cycles of one barrier of a thread block", "a guess")
MOST_INPUTS = 32  # most columns of W_ih that a kernel of schedule block takes: a limit, not a figure


def mma_rate(size, parts=1):
    """Operations a clock and multiprocessor of mma.sync.

    size: bytes of a number, 2 or 4 (tf32). parts: 3 where a number is three of 16 bits, which takes six products.
    """
    return MMA_RATE_16 / 6 if parts == 3 else MMA_RATE_16 if size == 2 else MMA_RATE_TF32


def gemm_peak(size, tf32):
    """Operations a clock and multiprocessor of a large product."""
    return GEMM_PEAK_16 if size == 2 else GEMM_PEAK_TF32 if tf32 else GEMM_PEAK


def markdown():
    """The table for people, as it stands in docs/kernels.md."""
    lines = ["| constant | value | unit | source |", "|---|---:|---|---|"]
    lines += [f"| `{one.name}` | {one.value:g} | {one.unit} | {one.source} |" for one in TABLE]
    return "\n".join(lines)
