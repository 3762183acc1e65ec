"""Every kernel of ``kernels/`` with the types it is compiled for. test_cuda_gate.py fails where one is missing."""

import itertools

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_names, kernels_of
from gpurnn.cells import CELLS
from gpurnn.dtypes import C_NAMES

# .cu file -> first architecture, where it uses what older ones have not
FIRST = {"block_mma.cu": 80, "grid_mma.cu": 80, "cluster.cu": 90, "fused.cu": 80}

# .cu file -> name expressions
KERNELS = {}
for _file, _expression, _ in kernel_names():
    KERNELS.setdefault(_file, []).append(_expression)

# A schedule with tiles is compiled for the best tile of one size, in float32 both by multiply-adds and on tensor cores;
# test_cuda_block.py compiles others.
_DEVICES = schedules.Device(90, 132, 227 * 1024), schedules.Device(75, 40, 64 * 1024)


for _cell, _dtype, _backward, _device in itertools.product(CELLS.values(), C_NAMES, (False, True), _DEVICES):
    for _precision in ("fma", "tf32", "float32") if _dtype == "float32" else ("",):
        _how = {} if _precision in ("", "float32") else {_precision: True}
        _work = schedules.Problem(_cell, 64, 100, 16, 1, _dtype, False, _backward, **_how)
        for _schedule in schedules.FINDERS:
            _ways = [
                candidate
                for candidate in schedules.candidates(_work, _device)[0]
                if candidate.schedule == _schedule
                and (_schedule != "fused" or not candidate.waits)  # clusters: test_cuda_fused.py
                and (_precision != "float32" or any(n in getattr(candidate, "kernel", "") for n in ("mma", "fused")))
            ]
            for _file, _expression, _ in kernels_of(_work, _ways[0]) if _ways else ():
                if _expression not in KERNELS.setdefault(_file, []):
                    KERNELS[_file].append(_expression)
