"""Every kernel of ``kernels/`` with the types it is compiled for. test_cuda_gate.py fails where one is missing."""

from gpurnn import schedules
from gpurnn.cuda_ops import CELLS, TYPES, kernel_names

# .cu file -> first architecture, where it uses what older ones have not
FIRST = {"block_mma.cu": 80}

# .cu file -> name expressions
KERNELS = {}
for _file, _expression in kernel_names():
    KERNELS.setdefault(_file, []).append(_expression)

# A schedule with tiles is compiled for the tile of one size; test_cuda_block.py compiles others.
_DEVICES = schedules.Device(90, 132, 227 * 1024), schedules.Device(75, 40, 64 * 1024)
_GATES = {"LstmCell": 4, "GruCell": 3, "RnnTanh": 1, "RnnRelu": 1}
for _kernel in CELLS:
    for _dtype in TYPES:
        for _backward in (False, True):
            _work = schedules.Work(_kernel, _GATES.get(_kernel, 3), 64, 100, 16, 1, _dtype, False, _backward)
            for _device in _DEVICES:
                _tile = schedules.block(_work, _device)
                if isinstance(_tile, schedules.Block):
                    _types = ", ".join((_kernel, TYPES[_dtype], *_tile.types))
                    _name = f"{_tile.kernel}_{'backward' if _backward else 'forward'}<{_types}>"
                    if _name not in KERNELS.setdefault(f"{_tile.kernel}.cu", []):
                        KERNELS[f"{_tile.kernel}.cu"].append(_name)
