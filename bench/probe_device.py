"""The GPU as the measurements of ``gpurnn bench probe`` see it, and how the time of one step is taken."""

import functools
import re
import statistics
from pathlib import Path

import numpy as np

from gpurnn.backends.sources import kernel_source

SOURCE, RING = (Path(__file__).with_name(name) for name in ("probe.cu", "probe_ring.cu"))
STEPS = 100, 1100  # of a short and of a long launch
THREADS = 256


def source(kernel):
    """The text that has a kernel, our own headers in place of its ``#include "..."`` lines."""
    text = (RING if kernel == "ring" else SOURCE).read_text(encoding="utf-8")
    return re.sub(r'#include "([^"]+)"', lambda found: kernel_source(found[1]), text)


class Gpu:
    """The current CUDA device through CuPy, with what the measurements need of it."""

    steps = STEPS
    polls = 1 << 22  # until a block of the exchange gives up: some seconds

    def __init__(self):
        import cupy

        self.xp, self.loaded = cupy, {}
        device = cupy.cuda.Device()
        self.capability = int(device.compute_capability)
        self.multiprocessors = device.attributes["MultiProcessorCount"]

    def load(self, name, *options, cooperative=False):
        """The kernel ``name`` of probe.cu (``ring``: of probe_ring.cu): call it with (grid, block, arguments,
        shared_mem=)."""
        key = name, options, cooperative
        if key not in self.loaded:
            self.loaded[key] = self._load(*key)
        return self.loaded[key]

    def _load(self, name, options, cooperative):
        module = self.xp.RawModule(
            code=source(name), options=("--std=c++17", *options), enable_cooperative_groups=cooperative
        )
        kernel = module.get_function(name)

        def run(grid, block, arguments, shared_mem=0):
            if shared_mem > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = shared_mem
            kernel(grid, block, arguments, shared_mem=shared_mem)

        run.kernel = kernel
        return run

    def zeros(self, shape, dtype):
        return self.xp.zeros(shape, dtype)

    def filled(self, shape, dtype, value):
        return self.xp.full(shape, value, dtype)

    def chain(self, count, stride):
        """Word i holds (i + stride) % count, a power of two."""
        return (self.xp.arange(count, dtype="uint32") + np.uint32(stride)) & np.uint32(count - 1)

    def gemm(self, a, b, out):
        """A product by the library's own call of cuBLAS."""
        self.library.gemm(a, b, out)

    def record(self, function):
        """What ``function`` launches, as a graph of the library's making."""
        return self.library.record(function)

    @functools.cached_property
    def library(self):
        """The device as the library's kernels have it."""
        from gpurnn.backends.cuda.device import CupyDevice

        return CupyDevice(self.xp)

    def host(self, array):
        return self.xp.asnumpy(array)

    def seconds(self, action):
        """The device's seconds for what ``action`` launches."""
        start, stop = self.xp.cuda.Event(), self.xp.cuda.Event()
        start.record()
        action()
        stop.record()
        stop.synchronize()
        return self.xp.cuda.get_elapsed_time(start, stop) / 1e3

    def together(self, actions):
        """The device's seconds for several actions, each on a stream of its own."""
        streams = [self.xp.cuda.Stream(non_blocking=True) for _ in actions]
        current = self.xp.cuda.get_current_stream()

        def all_of_them():
            begun = current.record()
            for stream, action in zip(streams, actions, strict=True):
                stream.wait_event(begun)
                with stream:
                    action()
                current.wait_event(stream.record())

        return self.seconds(all_of_them)


def summed(samples, **extra):
    return {"seconds": statistics.median(samples), "samples": samples} | extra


def per_step(device, launch, check, repeats=7):
    """Seconds of one step. launch(steps) -> arrays; check(arrays, steps) raises ValueError where they are wrong."""
    short, long = device.steps
    samples = []
    for _ in range(repeats + 1):
        took = []
        for steps in (short, long):
            found = []
            took.append(device.seconds(lambda steps=steps, found=found: found.extend(launch(steps))))
            check(found, steps)
        samples.append((took[1] - took[0]) / (long - short))
    return summed(samples[1:])  # the first compiles and warms up


def all_equal(device, expected=None):
    def check(arrays, steps):
        out, *lost = map(device.host, arrays)
        if lost and lost[0].any():
            raise ValueError("a block waited in vain")
        wanted = steps if expected is None else expected(steps)
        if not (out == wanted).all():
            raise ValueError(f"expected {wanted} everywhere, got {out.min()} to {out.max()}")

    return check
