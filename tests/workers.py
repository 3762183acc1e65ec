"""What a process of pytest does before NumPy and torch are imported: the first plugin that pyproject.toml names."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processors: the BLAS of NumPy and of torch takes one thread in each, not all, and waits for no
    # other. The library's own threads stay.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collecting makes almost a million objects that stay until the end. To look again and again for cycles among them
    takes a third of its time, so nothing is looked for meanwhile, and these are left out afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
