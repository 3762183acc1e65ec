"""What every rival is made of."""

import os
from collections.abc import Callable
from dataclasses import dataclass

RATE = 0.01  # of Adam in whole steps: large enough to see in the loss whether it was done


@dataclass
class Prepared:
    """A case, ready to run.

    run(): the timed work. results(): name -> float64 NumPy array, after a run of its own; None where there is nothing
    to compare. wait(): until the device is done. events: None, or a function that runs ``run`` n times and returns the
    device's own seconds. device_bytes(): the most device memory held so far, or None.
    """

    run: Callable
    results: Callable | None
    wait: Callable = lambda: None
    events: Callable | None = None
    device_bytes: Callable = lambda: None


def threads():
    """Threads of BLAS and torch, from the environment of the process."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def prepare_jax():
    """Tell JAX, before it is imported, to run on the CPU, on as many threads as torch and BLAS.

    XLA makes its pool as large as NPROC says. Its flag alone leaves a pool of one thread for each processor.
    """
    os.environ["JAX_PLATFORMS"], os.environ["NPROC"] = "cpu", str(threads())
    if threads() == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def is_judged(name):
    """Whether the gradient of a parameter is compared: those of recurrent layers, but for what W_ih x + b_ih has."""
    return "_l" in name and not any(part in name for part in ("weight_ih", "bias_ih"))
