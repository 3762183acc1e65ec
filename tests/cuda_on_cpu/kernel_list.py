"""Every kernel of ``kernels/`` with the types it is compiled for. test_cuda_gate.py fails where one is missing."""

from gpurnn.cuda_ops import kernel_names

# .cu file -> name expressions
KERNELS = {}
for _file, _expression in kernel_names():
    KERNELS.setdefault(_file, []).append(_expression)
