"""What a worker of xdist does before NumPy and torch are imported: the first of pytest's plugins in pyproject.toml."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processors: the BLAS of NumPy and of torch takes one thread in each, not all, and waits for no
    # other. The library's own threads stay.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
