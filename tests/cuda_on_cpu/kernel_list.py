"""Every kernel of ``kernels/`` with the types it is compiled for. test_cuda_gate.py fails where one is missing."""

import itertools

from gpurnn import schedules
from gpurnn.cuda_ops import CELLS, TYPES, kernel_names

# .cu file -> first architecture, where it uses what older ones have not
FIRST = {"block_mma.cu": 80}

# .cu file -> name expressions
KERNELS = {}
for _file, _expression in kernel_names():
    KERNELS.setdefault(_file, []).append(_expression)

# A schedule with tiles is compiled for the best tile of one size; test_cuda_block.py compiles others.
_DEVICES = schedules.Device(90, 132, 227 * 1024), schedules.Device(75, 40, 64 * 1024)
_GATES = {"LstmCell": 4, "GruCell": 3, "RnnTanh": 1, "RnnRelu": 1}


def _best(kernel, dtype, tf32, backward, device):
    work = schedules.Work(kernel, _GATES.get(kernel, 3), 64, 100, 16, 1, dtype, False, backward, tf32)
    tiles = schedules.block_ways(work, device)
    return None if isinstance(tiles, str) else min(tiles, key=lambda tile: tile.seconds)


for _kernel, _dtype, _backward, _device in itertools.product(CELLS, TYPES, (False, True), _DEVICES):
    for _tf32 in (False, True) if _dtype == "float32" else (False,):
        _tile = _best(_kernel, _dtype, _tf32, _backward, _device)
        if _tile:
            _types = ", ".join((_kernel, TYPES[_dtype], *_tile.types))
            _name = f"{_tile.kernel}_{'backward' if _backward else 'forward'}<{_types}>"
            if _name not in KERNELS.setdefault(f"{_tile.kernel}.cu", []):
                KERNELS[f"{_tile.kernel}.cu"].append(_name)
