"""CupyDevice: one GPU through CuPy. Everything that the library asks of a GPU beside CuPy's arrays is here."""

import contextlib
import functools
import threading

import numpy as np

from ...errors import BackendError
from . import cubins, cublas, launch, nvrtc
from .schedules.problem import Device

COOPERATIVE = ("grid.cu", "grid_mma.cu")  # whose kernels need all their blocks at once


class CupyDevice:
    """The current CUDA device: arrays, kernels, matrix products, recorded launches."""

    def __init__(self, cupy):
        self.xp, self._streams = cupy, []
        self._recording = threading.Lock()

    @functools.cached_property
    def arch(self):
        """Compute capability as one number, 90 for 9.0."""
        return int(self.xp.cuda.Device().compute_capability)

    @functools.cached_property
    def limits(self):
        """What schedules must know: multiprocessors, and the shared memory that one block may ask for."""
        device = self.xp.cuda.Device()
        attributes, name = device.attributes, self.xp.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        most = attributes["MaxSharedMemoryPerBlockOptin"]
        return Device(
            self.arch, attributes["MultiProcessorCount"], most, attributes.get("ClockRate", 1.7e6) * 1e3, name
        )

    @property
    def stream(self):
        """Address of the current stream, where everything here is launched."""
        return self.xp.cuda.get_current_stream().ptr

    @property
    def queue(self):
        """What is equal where launches come one after another: the current stream, and where that is the default stream
        of each thread (2), which is another in each thread, the thread."""
        stream = self.stream
        return stream, threading.get_ident() if stream == 2 else 0

    @functools.cached_property
    def blas(self):
        """The ``Cublas`` of this device."""
        return cublas.load(self.xp, self.arch)

    @staticmethod
    def address(array):
        """Where an array's first number lies in the device's memory."""
        return array.data.ptr

    # ---- kernels

    def compile(self, file, expression):
        """``cubins.find`` of a kernel for this device: compiles it now unless it is on disk, and loads nothing.

        Threads may do so side by side. Raises BackendError with the compiler's first errors, which name our files and
        lines.
        """
        try:
            return cubins.find(launch.kernel_source(file), expression, self.arch, file)
        except (nvrtc.CompileError, OSError) as error:
            raise self._refused(file, expression, error) from error

    def _refused(self, file, expression, error):
        lines = [line for line in str(error).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line] or lines
        return BackendError(
            f"{expression} of {file} does not compile or load for sm_{self.arch} with CuPy {self.xp.__version__}:\n"
            + "\n".join(errors[:5])
        )

    def spills(self, file, expression):
        """Whether a kernel keeps registers in memory; False where it does not compile, which ``load`` will say."""
        try:
            return self.compile(file, expression)[2] > 0
        except BackendError:
            return False

    def load(self, file, expression):
        """The kernel of a name expression such as ``step_forward<LstmCell, float>``, compiled now unless it is cached.

        Returns ``kernel(grid, block, args, shared_mem=0)``. Raises BackendError as ``compile`` does.
        """
        cooperative = file in COOPERATIVE
        path, name, _ = self.compile(file, expression)
        try:
            module = self.xp.RawModule(path=str(path), enable_cooperative_groups=cooperative)
            kernel = module.get_function(name)
        except RuntimeError as error:  # CUDA's
            raise self._refused(file, expression, error) from error
        allowed = 48 * 1024  # bytes of dynamic shared memory; more must be asked for

        def run(grid, block, args, shared_mem=0, cooperative=cooperative):
            nonlocal allowed
            if shared_mem > allowed:
                kernel.max_dynamic_shared_size_bytes = allowed = shared_mem
            try:
                kernel(grid, block, args, shared_mem=shared_mem)
            except (ValueError, RuntimeError) as error:  # CuPy's own check, or the driver's
                if not cooperative:
                    raise
                raise BackendError(f"{expression}: {grid} blocks cannot be there at once: {error}") from error

        return run

    # ---- products

    def product(self, a, b, out, accumulate=False, tf32=False):
        """As ``Cublas.product``: a function that computes ``out (+)= a @ b``."""
        return self.blas.product(a, b, out, accumulate, tf32)

    def gemm(self, a, b, out, accumulate=False, tf32=False):
        """``out = a @ b``, or ``out += a @ b``, now; arguments and errors as in ``Cublas.product``."""
        self.product(a, b, out, accumulate, tf32)()

    # ---- the host's view

    def mirror(self, array):
        """``(host, refresh)``: a NumPy array that shows what ``array`` held once ``refresh()`` has come through, which
        is asked for on the current stream and not waited for."""
        pinned = self.xp.cuda.alloc_pinned_memory(array.nbytes)
        host = np.frombuffer(pinned, array.dtype, array.size)
        host[...] = 0

        def refresh():
            array.data.copy_to_host_async(host.ctypes.data, array.nbytes, self.xp.cuda.get_current_stream())

        return host, refresh

    def free_memory(self):
        """Give back to the driver what CuPy keeps unused."""
        self.xp.get_default_memory_pool().free_all_blocks()
        self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def synchronize(self):
        """Wait until everything on the current stream is done."""
        self.xp.cuda.get_current_stream().synchronize()

    # ---- graphs and streams

    def record(self, function):
        """What ``function`` launches, as a CUDA graph for the current stream: nothing runs now, ``.launch()`` runs it.

        ``function`` may only launch kernels and products: no allocation, no copy, no look at a result. Raises
        BackendError where it cannot be recorded; the stream is usable again then.
        """
        with self._recording:
            try:
                stream = self._recorder
                self.blas.lend_workspace(stream.ptr, self.stream)
                with stream:
                    stream.begin_capture()
                    try:
                        function()
                    except BaseException:  # a capture must be ended, one that CUDA has invalidated too
                        with contextlib.suppress(Exception):
                            stream.end_capture()
                        raise
                    return stream.end_capture()
            except Exception as error:  # CUDA's errors and ours alike
                raise BackendError(f"launches cannot be recorded as a CUDA graph ({error})") from error

    @functools.cached_property
    def _recorder(self):
        """The stream that captures; nothing ever runs on it."""
        return self.xp.cuda.Stream(non_blocking=True)

    def streams(self, count):
        """So many streams besides the current one, the same at every call."""
        while len(self._streams) < count:
            self._streams.append(self.xp.cuda.Stream(non_blocking=True))
        return self._streams[:count]

    def wait(self, stream, other):
        """``stream`` does not go on before all that ``other`` was given so far is done. None: the current stream."""
        current = self.xp.cuda.get_current_stream()
        (stream or current).wait_event((other or current).record())
