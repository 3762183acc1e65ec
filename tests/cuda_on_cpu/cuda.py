"""What stands for ``cupy.cuda``: streams, captures, copies, and a cuBLAS that is called as the real one.

Under capture it refuses what CuPy 14.2 refuses, in CuPy's words: calls of CuPy's own cuBLAS wrapper
(cupy_backends/cuda/libs/cublas.pyx, setStream), copies from and to the host (cupy/cuda/memory.pyx), a capture of the
default stream (cupy/cuda/stream.pyx). It also refuses what CuPy lets through and what then goes wrong: memory from the
common pool, which is given to others while the graph still uses it (cupy/cuda/memory.pyx: a pool knows of no graph),
and a capture whose streams have not all come back (CUDA Programming Guide, cross-stream dependencies).
"""

import contextlib
import ctypes
import weakref

import numpy as np

from gpurnn.backends.cuda.cublas import Cublas
from gpurnn.dtypes import check_dtype

from . import emulator as _emulator
from .fixtures import round_tf32

# Records the arguments of a call and returns the status that it is told to.
STUB = """
#include <cstddef>
#include <cstdint>
extern "C" {
static int64_t last[32];
static int count = 0, status = 0;
static int64_t handles = 0;
__attribute__((visibility("default"))) int stub_last(int64_t* to) {
    for (int k = 0; k < count; k++) to[k] = last[k];
    return count;
}
__attribute__((visibility("default"))) void stub_fail(int with) { status = with; }
static int note(int n, const int64_t* values) {
    for (count = 0; count < n; count++) last[count] = values[count];
    return status;
}
const char* cublasGetStatusString(int) { return "CUBLAS_STATUS_OF_THE_STUB"; }
int cublasCreate_v2(void** handle) { *handle = (void*)++handles; return status; }
int cublasSetStream_v2(void* handle, void* stream) {
    const int64_t values[] = {1, (int64_t)handle, (int64_t)stream};
    return note(3, values);
}
int cublasSetWorkspace_v2(void* handle, void* memory, size_t bytes) {
    const int64_t values[] = {2, (int64_t)handle, (int64_t)memory, (int64_t)bytes};
    return note(4, values);
}
int cublasSetMathMode(void* handle, int mode) {
    const int64_t values[] = {3, (int64_t)handle, mode};
    return note(3, values);
}
int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* A, int A_type,
                 int lda, const void* B, int B_type, int ldb, const void* beta, void* C, int C_type, int ldc,
                 int compute, int algorithm) {
    const int64_t values[] = {
        4, (int64_t)handle, op_a, op_b, m, n, k, (int64_t)alpha, (int64_t)A, A_type, lda, 0, (int64_t)B, B_type, ldb, 0,
        (int64_t)beta, (int64_t)C, C_type, ldc, 0, 1, compute, algorithm};
    return note(24, values);
}
int cublasGemmStridedBatchedEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* A,
                               int A_type, int lda, long long A_apart, const void* B, int B_type, int ldb,
                               long long B_apart, const void* beta, void* C, int C_type, int ldc, long long C_apart,
                               int batch, int compute, int algorithm) {
    const int64_t values[] = {
        4, (int64_t)handle, op_a, op_b, m, n, k, (int64_t)alpha, (int64_t)A, A_type, lda, A_apart, (int64_t)B, B_type,
        ldb, B_apart, (int64_t)beta, (int64_t)C, C_type, ldc, C_apart, batch, compute, algorithm};
    return note(24, values);
}
}
"""

TYPES = {0: "float32", 1: "float64", 2: "float16", 14: "bfloat16"}
COMPUTE = {68: "float32", 77: "float32", 70: "float64"}


def stub():
    """The library that stands for cuBLAS."""
    return ctypes.CDLL(str(_emulator._build("cublas", STUB)))


def last_call(library):
    """The numbers of the latest call of the stub."""
    values = (ctypes.c_int64 * 32)()
    return list(values[: library.stub_last(values)])


class StubCublas(Cublas):
    """The library's own binding over the stub. did(call, multiply): a product was asked for; ``multiply`` does it."""

    def __init__(self, xp, did, workspace_bytes=1024):
        super().__init__(xp, stub(), workspace_bytes)
        self.did = did

    def _call(self, function, arguments):
        super()._call(function, arguments)
        numbers = last_call(self._library)
        self.did(numbers, lambda: multiply(numbers))


def multiply(call):
    """Carry out a product from the arguments of its call, on column-major memory, as cuBLAS documents it: the matrices
    that were written, as NumPy arrays."""
    _, _, op_a, op_b, m, n, k, alpha, *rest = call
    (A, A_type, lda, A_apart), (B, B_type, ldb, B_apart) = rest[:4], rest[4:8]
    beta, C, C_type, ldc, C_apart, batch, compute, _ = rest[8:]
    wide = np.dtype(COMPUTE[compute])
    alpha, beta = (np.frombuffer(ctypes.string_at(address, wide.itemsize), wide)[0] for address in (alpha, beta))
    rounded = round_tf32 if compute == 77 else np.asarray
    written = []
    for number in range(batch):
        a = _matrix(A, A_type, number * A_apart, *((k, m) if op_a else (m, k)), lda)
        b = _matrix(B, B_type, number * B_apart, *((n, k) if op_b else (k, n)), ldb)
        c = _matrix(C, C_type, number * C_apart, m, n, ldc)
        a, b = (rounded(x.T if op else x) for x, op in ((a.astype(wide), op_a), (b.astype(wide), op_b)))
        with np.errstate(all="ignore"):
            product = alpha * np.matmul(a, b)
            c[...] = product if beta == 0 else product + beta * c.astype(wide)
        written.append(c)
    return written


def _matrix(address, kind, first, rows, columns, leading):
    """The matrix (rows, columns) that BLAS sees ``first`` numbers behind an address."""
    dtype = check_dtype(TYPES[kind])
    assert leading >= max(1, rows), "a leading dimension shorter than a column"
    count = leading * (columns - 1) + rows
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address + first * dtype.itemsize)
    strides = dtype.itemsize, leading * dtype.itemsize
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, dtype), (rows, columns), strides)


# ---- streams


class Stream:
    """As ``cupy.cuda.Stream``. Everything is done at once here; what a stream has waited for is kept in ``clock``, for
    tests to ask: stream -> how much of what it was given."""

    def __init__(self, cuda, ptr):
        self.cuda, self.ptr = cuda, ptr
        self.clock = {ptr: 0}
        self.captured = None  # the list of launches while it captures

    def __enter__(self):
        self.cuda.entered.append(self)
        return self

    def __exit__(self, *error):
        self.cuda.entered.pop()

    def record(self):
        return Event(self)

    def wait_event(self, event):
        for ptr, ticks in event.items():
            self.clock[ptr] = max(self.clock.get(ptr, 0), ticks)
        captured = event.captured
        if captured is None:
            return
        if self.captured is None:  # this stream is captured, too, from here on
            self.captured = captured
            captured.joined.append(self)
            captured.away.add(self.ptr)
        elif self is captured.stream:
            captured.away.discard(event.stream)

    def synchronize(self):
        if self.captured is not None:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")

    def begin_capture(self):
        if self.ptr in (0, 1):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.captured is not None:
            raise RuntimeError("cudaErrorIllegalState: the stream is capturing")
        self.captured = Capture(self)

    def end_capture(self):
        if self.captured is None:
            raise RuntimeError("cudaErrorIllegalState: the stream does not capture")
        captured = self.captured
        for stream in (self, *captured.joined):
            stream.captured = None
        if captured.away:
            raise RuntimeError("cudaErrorStreamCaptureUnjoined: a captured stream has not come back")
        return Graph(captured)

    def is_capturing(self):
        return self.captured is not None


class Event(dict):
    """How much of what streams were given is done: stream -> ticks; and the capture that it belongs to, or None."""

    def __init__(self, stream):
        super().__init__(stream.clock)
        self.stream, self.captured = stream.ptr, stream.captured


class Capture(list):
    """What was launched under a capture: functions without arguments, in order.

    joined: the other streams that are captured, too; away: those that the first one has not waited for since. memory:
    what was allocated meanwhile.
    """

    def __init__(self, stream):
        super().__init__()
        self.stream, self.joined, self.away, self.memory = stream, [], set(), []


class Graph:
    """What was launched under a capture, and what it has allocated: a private pool holds that."""

    def __init__(self, actions):
        self.actions = actions

    def launch(self):
        for action in self.actions:
            action()


def memory_of(host):
    """The object that owns the memory of a NumPy array."""
    while isinstance(host, np.ndarray):
        host = host.base
    return host.obj if isinstance(host, memoryview) else host


def held_as_a_graph_does(host, captured):
    """A function that returns an array again when a graph runs: a graph holds nothing but addresses.

    It raises RuntimeError where the memory was given back since, unless the capture itself has allocated it.
    """
    owner = memory_of(host)
    if any(owner is one for one in captured.memory):
        return lambda: host
    address, weak = host.ctypes.data - ctypes.addressof(owner), weakref.ref(owner)
    shape, dtype, strides = host.shape, host.dtype, host.strides

    def again():
        memory = weak()
        if memory is None:
            raise RuntimeError("a graph uses memory that was given back to the pool")
        return np.ndarray(shape, dtype, memory, address, strides)

    return again


class RefusingCublas:
    """CuPy's own wrapper, as far as it is known: it refuses to be captured."""

    def __init__(self, cuda):
        self._cuda = cuda

    def __getattr__(self, name):
        def call(*arguments):
            self._cuda.refuse_cublas()
            raise AttributeError(
                f"the emulated cupy.cuda.cublas computes nothing: {name} belongs to gpurnn.backends.cuda.cublas"
            )

        return call


class Runtime:
    def __init__(self, cuda):
        self._cuda = cuda

    def getDevice(self):
        return 0

    def streamIsCapturing(self, ptr):
        return self._cuda.streams[ptr].captured is not None


class Cuda:
    """The module ``cupy.cuda``, as far as the library uses it."""

    def __init__(self):
        self.streams = {0: Stream(self, 0)}
        self.entered = [self.streams[0]]
        self.runtime, self.cublas = Runtime(self), RefusingCublas(self)
        self.private = False  # whether arrays come from a pool that is not the common one

    def get_current_stream(self):
        return self.entered[-1]

    def Stream(self, non_blocking):
        ptr = len(self.streams) + 2  # 0, 1 and 2 are the default streams
        self.streams[ptr] = Stream(self, ptr)
        return self.streams[ptr]

    def alloc_pinned_memory(self, nbytes):
        return (ctypes.c_char * nbytes)()

    def MemoryPool(self):
        return Pool()

    @contextlib.contextmanager
    def using_allocator(self, allocator):
        before, self.private = self.private, True
        try:
            yield
        finally:
            self.private = before

    def allocated(self, host):
        """Note memory that a capture allocates; raises RuntimeError where it would come from the common pool."""
        captured = self.captured
        if captured is None:
            return
        if not self.private:
            raise RuntimeError("memory of the common pool while a graph is recorded: it will be given to others")
        captured.memory.append(memory_of(host))

    @property
    def captured(self):
        """The list of launches where the current stream captures, else None."""
        return self.get_current_stream().captured

    def refuse_cublas(self):
        if self.captured is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")

    def refuse_copies(self):
        if self.captured is not None:
            raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")

    def refuse_uploads(self):
        if self.captured is not None:
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")


class Pool:
    """As ``cupy.cuda.MemoryPool``: here only a name for memory that nobody else gets."""

    def malloc(self, nbytes):
        raise NotImplementedError("the emulated arrays allocate by themselves")


class Pointer:
    """As ``cupy.cuda.MemoryPointer``: where an array lies."""

    def __init__(self, cuda, host):
        self._cuda, self._host, self.ptr = cuda, host, host.ctypes.data

    def copy_to_host_async(self, address, nbytes, stream):
        self._cuda.refuse_copies()
        ctypes.memmove(address, self.ptr, nbytes)
