"""What decides the bits of results on the CPU besides the code: processor, NumPy, BLAS."""

import functools
import os
import platform

import numpy as np

_BLAS_SETTINGS = ("OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR")


def host_machine(backend):
    """As ``Ops.machine``, for the backend of this name."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "backend": backend,
        "processor": f"{platform.machine()} {_processor()}".strip(),
        "numpy": np.__version__,
        "blas": f"{blas.get('name')} {blas.get('version')}",
        "blas_settings": {name: os.environ[name] for name in _BLAS_SETTINGS if name in os.environ},
    }


@functools.cache
def _processor():
    """The model of this processor; empty where the system does not name it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        return platform.processor()
    return lines[0] if lines else platform.processor()
