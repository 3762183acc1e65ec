"""Every kernel of ``kernels/`` with the types it is compiled for. test_cuda_gate.py fails where one is missing."""

from gpurnn import schedules
from gpurnn.cuda_ops import CELLS, TYPES, kernel_names

# .cu file -> name expressions
KERNELS = {}
for _file, _expression in kernel_names():
    KERNELS.setdefault(_file, []).append(_expression)

# A schedule with tiles is compiled for the tile of one size; test_cuda_block.py compiles others.
_DEVICE = schedules.Device(multiprocessors=132, shared_bytes=227 * 1024)
_GATES = {"LstmCell": 4, "GruCell": 3, "RnnTanh": 1, "RnnRelu": 1}
for _kernel in CELLS:
    for _dtype in TYPES:
        for _backward in (False, True):
            _work = schedules.Work(_kernel, _GATES.get(_kernel, 3), 64, 100, 16, 1, _dtype, False, _backward)
            _tile = schedules.block(_work, _DEVICE)
            if isinstance(_tile, schedules.Block):
                _way = "backward" if _backward else "forward"
                _types = ", ".join((_kernel, TYPES[_dtype], *_tile.types))
                KERNELS.setdefault("block.cu", []).append(f"block_{_way}<{_types}>")
