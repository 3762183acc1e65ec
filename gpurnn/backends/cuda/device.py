"""CupyDevice: one GPU through CuPy. Beside CuPy's arrays, the library uses a GPU only through it."""

import contextlib
import functools
import threading

import numpy as np

from ...errors import BackendError
from .. import sources
from . import cubins, cublas, libraries, nvrtc
from .dependent import dependent_launches
from .schedules.problem import Device

COOPERATIVE = ("grid.cu", "grid_mma.cu")  # their kernels need all blocks to run at once
CLUSTERED = ("cluster.cu", "fused.cu")  # theirs are in clusters along y, whose size is compiled in
PORTABLE_CLUSTER = 8  # blocks of a cluster that every GPU with clusters takes; a kernel must opt in to more
ALLOW_LARGE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED (cuda.h)


class CupyDevice:
    """The current CUDA device: arrays, kernels, matrix products, recorded launches."""

    def __init__(self, cupy):
        self.xp, self._streams = cupy, []
        self._recording = threading.Lock()
        self._recorded_for = None  # while ``record`` runs, the ``queue`` that will run the graph
        self._of_thread = threading.local()

    @functools.cached_property
    def arch(self):
        """Compute capability as one number, 90 for 9.0."""
        return int(self.xp.cuda.Device().compute_capability)

    @functools.cached_property
    def limits(self):
        """The ``schedules.Device`` of this GPU."""
        device = self.xp.cuda.Device()
        attributes, name = device.attributes, self.xp.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        most = attributes["MaxSharedMemoryPerBlockOptin"]
        return Device(
            self.arch, attributes["MultiProcessorCount"], most, attributes.get("ClockRate", 1.7e6) * 1e3, name
        )

    @property
    def stream(self):
        """Address of the current stream. Everything here is launched there."""
        return self.xp.cuda.get_current_stream().ptr

    @property
    def queue(self):
        """A key for the order of launches: those with equal keys run one after another.

        It is the address of the current stream. Address 2 means the default stream of each thread, so the thread is
        part of the key there. While launches are recorded it is that of the stream that will run them.
        """
        stream = self.stream
        if self._recorded_for is not None and stream == self._recorder.ptr:
            return self._recorded_for
        return stream, threading.get_ident() if stream == 2 else 0

    @functools.cached_property
    def dependent(self):
        """The ``DependentLaunches`` of this device, or None."""
        return dependent_launches(self.xp, libraries.driver, self.arch, self.address)

    @property
    def recording(self):
        """The ``Recording`` of a whole update while this thread makes it, else None."""
        return getattr(self._of_thread, "recording", None)

    @recording.setter
    def recording(self, value):
        self._of_thread.recording = value

    @functools.cached_property
    def blas(self):
        """The ``Cublas`` of this device."""
        return cublas.load(self.xp, self.arch)

    @staticmethod
    def address(array):
        """The address of an array's first number in the device's memory."""
        return array.data.ptr

    # ---- kernels

    def compile(self, file, expression, struct=None):
        """``cubins.find`` of a kernel for this device: compile it now unless it is on disk, and load nothing.

        struct: as in ``sources.kernel_source``. Several threads may compile at the same time. Raises BackendError with
        the compiler's first errors, which name our files and lines.
        """
        try:
            return cubins.find(sources.kernel_source(file, struct), expression, self.arch, file)
        except (nvrtc.CompileError, OSError) as error:
            raise self._refused(file, expression, error) from error

    def _refused(self, file, expression, error):
        """A BackendError with the compiler's or the driver's first errors."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line] or lines
        return BackendError(
            f"{expression} of {file} does not compile or load for sm_{self.arch} with CuPy {self.xp.__version__}:\n"
            + "\n".join(errors[:5])
        )

    def spills(self, file, expression, struct=None):
        """Bytes of registers that a thread of a kernel spills to memory. 0 where it does not compile; ``load`` raises
        that error."""
        try:
            return self.compile(file, expression, struct)[2]
        except BackendError:
            return 0

    def load(self, file, expression, struct=None):
        """Load the kernel of a name expression such as ``step_forward<lstm, float>``; compile it first if need be.

        Returns ``kernel(grid, block, args, shared_mem=0, dependent=False)``. dependent: as in ``Kernels.bind``.
        Raises BackendError as ``compile`` does.
        """
        cooperative, clustered = file in COOPERATIVE, file in CLUSTERED
        path, name, _ = self.compile(file, expression, struct)
        try:
            module = self.xp.RawModule(path=str(path), enable_cooperative_groups=cooperative)
            kernel = module.get_function(name)
        except RuntimeError as error:  # CUDA's
            raise self._refused(file, expression, error) from error
        allowed = 48 * 1024  # bytes of dynamic shared memory; a kernel must opt in to more
        large = False  # whether it has opted in to large clusters

        def run(grid, block, args, shared_mem=0, cooperative=cooperative, dependent=False):
            nonlocal allowed, large
            if shared_mem > allowed:
                kernel.max_dynamic_shared_size_bytes = allowed = shared_mem
            try:
                if file == "cluster.cu" and grid[1] > PORTABLE_CLUSTER and not large:
                    self.xp.cuda.driver.funcSetAttribute(kernel.kernel.ptr, ALLOW_LARGE_CLUSTERS, 1)
                    large = True
                early = dependent and self.dependent is not None and self.dependent.usable
                if not (early and self.dependent.launch(kernel.kernel.ptr, grid, block, args, shared_mem)):
                    kernel(grid, block, args, shared_mem=shared_mem)
            except (ValueError, RuntimeError) as error:  # CuPy's own check, or the driver's
                if not (cooperative or clustered):
                    raise
                raise BackendError(f"{expression}: {grid} blocks cannot run at once: {error}") from error

        return run

    # ---- products

    def product(self, a, b, out, accumulate=False, tf32=False):
        """As ``Cublas.product``: return a function that computes ``out (+)= a @ b``."""
        return self.blas.product(a, b, out, accumulate, tf32)

    def gemm(self, a, b, out, accumulate=False, tf32=False):
        """Compute ``out = a @ b``, or ``out += a @ b``; arguments and errors as in ``Cublas.product``."""
        self.product(a, b, out, accumulate, tf32)()

    # ---- the host's view

    def mirror(self, array):
        """A copy of ``array`` on the host that a function refreshes.

        Returns ``(host, refresh)``. ``refresh()`` queues a copy on the current stream and does not wait for it; the
        NumPy array ``host`` holds the numbers once that copy is done.
        """
        host = self.pinned(array.size, array.dtype)

        def refresh():
            array.data.copy_to_host_async(host.ctypes.data, array.nbytes, self.xp.cuda.get_current_stream())

        return host, refresh

    def pinned(self, shape, dtype):
        """Zeros on the host, from where and to where the GPU copies without waiting."""
        count, dtype = int(np.prod(shape, dtype=np.int64)), np.dtype(dtype)
        memory = self.xp.cuda.alloc_pinned_memory(max(count * dtype.itemsize, 1))
        host = np.frombuffer(memory, np.uint8, count * dtype.itemsize).view(dtype).reshape(shape)
        host[...] = 0
        return host

    def free_memory(self):
        """Return CuPy's unused memory to the driver."""
        self.xp.get_default_memory_pool().free_all_blocks()
        self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def synchronize(self):
        """Wait until everything on the current stream is done."""
        self.xp.cuda.get_current_stream().synchronize()

    # ---- graphs and streams

    def record(self, function, memory=None):
        """Record what ``function`` launches as a CUDA graph. Nothing runs now: ``.launch()`` runs it.

        memory: a pool, from ``private_memory``, that lives as long as the graph; what ``function`` allocates lies
        there. None: it may allocate nothing. It may not copy from or to the host, nor wait for a result. Raises
        BackendError where recording fails; the stream is usable again then.
        """
        with self._recording:
            try:
                stream, self._recorded_for = self._recorder, self.queue
                self.blas.lend_workspace(stream.ptr, self.stream)
                allocated = self.xp.cuda.using_allocator(memory.malloc) if memory else contextlib.nullcontext()
                with stream, allocated:
                    return self._captured(stream, function)
            except Exception as error:  # CUDA's errors and ours alike
                raise BackendError(f"launches cannot be recorded as a CUDA graph ({error})") from error
            finally:
                self._recorded_for = None

    @staticmethod
    def _captured(stream, function):
        """The graph of what ``function`` launches on ``stream``."""
        stream.begin_capture()
        try:
            function()
        except BaseException:  # a capture must be ended, even one that CUDA has invalidated
            with contextlib.suppress(Exception):
                stream.end_capture()
            raise
        return stream.end_capture()

    def private_memory(self):
        """A pool of memory that nothing else is given."""
        return self.xp.cuda.MemoryPool()

    def is_capturing(self):
        """Whether what is launched now is recorded, and does not run."""
        return self._recorded_for is not None and self.xp.cuda.get_current_stream().is_capturing()

    @functools.cached_property
    def _recorder(self):
        """The stream that captures. Nothing ever runs on it."""
        return self.xp.cuda.Stream(non_blocking=True)

    def streams(self, count):
        """``count`` streams besides the current one, the same at every call."""
        while len(self._streams) < count:
            self._streams.append(self.xp.cuda.Stream(non_blocking=True))
        return self._streams[:count]

    def wait(self, stream, other):
        """Make ``stream`` wait for everything queued on ``other`` so far. None means the current stream."""
        current = self.xp.cuda.get_current_stream()
        (stream or current).wait_event((other or current).record())
