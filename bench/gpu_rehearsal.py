"""No GPU: for ``bench on-gpu --rehearse`` the kernels run on the CPU, by tests/cuda_on_cpu of the source checkout.

Its clock is made up. What it shows is that the script is whole and that the kernels compute rightly; no time taken here
says anything about a GPU.
"""

import sys
from pathlib import Path

import numpy as np

from .probe_device import source

TESTS = Path(__file__).resolve().parent.parent / "tests"


def missing():
    """Why nothing can be rehearsed here, or None."""
    if not (TESTS / "cuda_on_cpu" / "emulator.py").is_file():
        return "a rehearsal needs the source checkout, whose tests/cuda_on_cpu runs CUDA kernels on the CPU"
    return _emulator().missing()


def _emulator():
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from cuda_on_cpu import emulator

    return emulator


def device(checked=True):
    """A device for ``CudaOps``."""
    emulator = _emulator()
    from cuda_on_cpu.device import EmulatedDevice

    return EmulatedDevice(emulator.Emulator(arch=90, checked=checked))


class EmulatedGpu:
    """``probe_device.Gpu`` on the emulator: few multiprocessors and steps, a clock of 5 us a launch and 1 us a step."""

    steps = 1, 4
    polls = 2000
    multiprocessors = 4

    def __init__(self, arch=90, edits=(), **how):
        self.emulator, self.capability, self.edits = _emulator().Emulator(arch=arch, **how), arch, edits

    def load(self, name, *options, cooperative=False):
        text = source(name)
        for old, new in self.edits:
            assert old in text, f"{name}: {old!r} is not in the source"
            text = text.replace(old, new)
        kernel = self.emulator.load(text, options=("-DPATIENCE=2000", *options), name=name, file=f"{name}.cu")

        def run(grid, block, arguments, shared_mem=0):
            kernel(grid, block, arguments, shared_mem=shared_mem, cooperative=cooperative)
            self.ran = arguments[0]

        return run

    def zeros(self, shape, dtype):
        return self.emulator.zeros(shape, dtype)

    def filled(self, shape, dtype, value):
        return self.emulator.array(np.full(shape, value, dtype))

    def chain(self, count, stride):
        return self.emulator.array((np.arange(count, dtype=np.uint32) + np.uint32(stride)) & np.uint32(count - 1))

    def host(self, array):
        return np.array(array)

    def seconds(self, action):
        action()
        return (5 + self.ran) * 1e-6
