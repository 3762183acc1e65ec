"""cuBLAS through ctypes: matrix products into existing memory, which a CUDA graph may contain.

CuPy's wrapper refuses every call while a stream is capturing (``setStream`` in cupy_backends/cuda/libs/cublas.pyx).
cuBLAS itself can be captured; with a workspace of the caller's it then allocates nothing, and gives equal bits where
several streams compute at once (cuBLAS documentation, sections on CUDA graphs and on reproducibility).
"""

import ctypes
import threading

import numpy as np

from ...errors import BackendError
from . import libraries

# cublas_api.h and library_types.h
_OP_N, _OP_T = 0, 1
_PLANS = 4096  # products whose arguments are remembered
_MOST = (1 << 31) - 1  # its sizes are int
_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT
_MATH = 16  # CUBLAS_DEFAULT_MATH, and CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}

# Factors are read on the host: 1 and 0 in the type of the sum.
_FACTORS = {kind: (np.ones(1, kind), np.zeros(1, kind)) for kind in ("float32", "float64")}
_ONE, _ZERO = ({kind: pair[k].ctypes.data for kind, pair in _FACTORS.items()} for k in (0, 1))


def matrix_layout(array, name):
    """How BLAS sees a matrix, or a batch of them: (whether it is stored by rows, leading dimension in elements).

    Raises ValueError where neither the rows nor the columns are contiguous and disjoint: BLAS cannot read it.
    """
    (rows, columns), (down, across), size = array.shape[-2:], array.strides[-2:], array.itemsize
    down, across = down // size, across // size
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return True, max(down, columns, 1)
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return False, max(across, rows, 1)
    raise ValueError(f"{name}: BLAS needs contiguous rows or columns, got {array.shape} with strides {array.strides}")


def is_matrix(array):
    """Whether BLAS can read this matrix as it is stored."""
    try:
        matrix_layout(array, "array")
    except ValueError:
        return False
    return True


def check_product(a, b, out):
    """Raise ValueError unless ``out = a @ b`` is a product that cuBLAS offers."""
    if a.dtype != b.dtype or (out.dtype != a.dtype and not (a.dtype.itemsize == 2 and out.dtype == np.float32)):
        raise ValueError(f"a product of {a.dtype} and {b.dtype} cannot go to {out.dtype}")
    if (
        a.ndim not in (2, 3)
        or not a.ndim == b.ndim == out.ndim
        or (*a.shape[:-1], b.shape[-1]) != out.shape
        or (*a.shape[:-2], a.shape[-1]) != b.shape[:-1]
    ):
        raise ValueError(f"shapes do not fit: {a.shape} @ {b.shape} -> {out.shape}")


class Cublas:
    """Matrix products on one GPU. library: cuBLAS as a ``ctypes.CDLL``.

    Each stream has its own handle and workspace: no other code changes a handle's settings, and products on different
    streams share no memory.
    """

    def __init__(self, xp, library, workspace_bytes):
        self.xp, self.workspace_bytes = xp, workspace_bytes
        self._handles = {}  # stream -> (handle, workspace)
        self._plans = {}  # shapes, layouts, dtypes -> what ``_plan`` made of them
        self._lock = threading.Lock()
        self._library = library
        library.cublasGetStatusString.restype = ctypes.c_char_p
        pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
        library.cublasCreate_v2.argtypes = [ctypes.POINTER(pointer)]
        library.cublasSetStream_v2.argtypes = [pointer, pointer]
        library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
        library.cublasSetMathMode.argtypes = [pointer, number]
        sizes, operand = (
            [number] * 5,
            [pointer, number, number],
        )  # operations, M, N, K; address, type, leading dimension
        self._gemm, self._batched = library.cublasGemmEx, library.cublasGemmStridedBatchedEx
        self._gemm.argtypes = [pointer, *sizes, pointer, *operand, *operand, pointer, *operand, number, number]
        apart = [*operand, long]
        self._batched.argtypes = [
            pointer, *sizes, pointer, *apart, *apart, pointer, *apart, number, number, number,
        ]  # fmt: skip

    def product(self, a, b, out, accumulate=False, tf32=False):
        """A function that computes ``out = a @ b``, or ``out += a @ b``, on the stream current at its call.

        a: (M, K), b: (K, N), out: (M, N), or all with an equal leading batch axis; each with contiguous rows or
        columns. out has the dtype of a and b, or is float32 for 16-bit ones; 16-bit products are summed in float32.
        tf32: whether float32 may be rounded to tf32 before it is multiplied. Raises ValueError; the function raises
        BackendError.
        """
        key = (
            a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype, out.shape, out.strides, out.dtype,
            accumulate, tf32,
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(a, b, out, accumulate, tf32)
        if plan is _nothing:
            return _nothing if accumulate or 0 in out.shape else lambda: out.fill(0)
        call, arguments = plan
        values = arguments(a.data.ptr, b.data.ptr, out.data.ptr)
        return lambda arrays=(a, b, out): self._call(call, values)  # the arrays live as long as the function

    def _plan(self, a, b, out, accumulate, tf32):
        """How to call cuBLAS for a product of these shapes; ``_nothing`` where there is nothing to multiply.

        Returns ``(call, arguments)``: cuBLAS's function, and a function that makes its arguments from three addresses.
        Raises ValueError as ``product`` does.
        """
        check_product(a, b, out)
        if 0 in out.shape or a.shape[-1] == 0:
            return _nothing
        by_rows, ld_out = matrix_layout(out, "out")
        if not by_rows:  # cuBLAS is column-major: compute the transpose, out^T = b^T a^T
            a, b, out = b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2)
        (a_rows, ld_a), (b_rows, ld_b) = matrix_layout(a, "a"), matrix_layout(b, "b")
        (M, N), K, kind, kind_out = out.shape[-2:], a.shape[-1], _TYPES[a.dtype.name], _TYPES[out.dtype.name]
        if max(M, N, K, ld_a, ld_b, ld_out) > _MOST:
            raise ValueError(f"cuBLAS counts to {_MOST}: {a.shape} @ {b.shape} is too large for one product")
        computed = "float64" if a.dtype == np.float64 else "float32"
        compute = (
            _COMPUTE_64F if computed == "float64" else _COMPUTE_32F
        )  # float32 is multiplied as tf32 only on request
        if tf32 and a.dtype == np.float32:
            compute = _COMPUTE_32F_FAST_TF32
        call, end, strides = self._gemm, (compute, _ALGORITHM), ((), (), ())
        if a.ndim == 3:
            call, end = self._batched, (len(out), *end)
            strides = [(array.strides[0] // array.itemsize,) for array in (a, b, out)]
        start = (_OP_N if b_rows else _OP_T), (_OP_N if a_rows else _OP_T), N, M, K, _ONE[computed]
        for_a, for_b = (kind, ld_a, *strides[0]), (kind, ld_b, *strides[1])
        end = kind_out, ld_out, *strides[2], *end
        beta = (_ONE if accumulate else _ZERO)[computed]

        def arguments(a, b, out):
            if not by_rows:
                a, b = b, a
            return *start, b, *for_b, a, *for_a, beta, out, *end

        return call, arguments

    def _call(self, function, arguments):
        status = function(self._of(self.xp.cuda.get_current_stream().ptr)[0], *arguments)
        if status:
            self._check(status, "a matrix product")

    def lend_workspace(self, stream, lender):
        """Make products on ``stream`` use the workspace of ``lender``, where what ``stream`` captures will run.

        Both are addresses of streams.
        """
        _, workspace = self._of(lender)
        self._set_workspace(self._of(stream, workspace)[0], workspace)

    def _of(self, stream, workspace=None):
        """The handle and the workspace of a stream. The per-thread default stream (2) has one for each thread.

        workspace: the workspace of a new handle, by default fresh memory.
        """
        key = self.xp.cuda.runtime.getDevice(), stream, threading.get_ident() if stream == 2 else 0
        found = self._handles.get(key)
        if found is None:
            with self._lock:
                found = self._handles.get(key) or self._open(stream, workspace)
                self._handles[key] = found
        return found

    def _open(self, stream, workspace):
        handle, library = ctypes.c_void_p(), self._library
        self._check(library.cublasCreate_v2(ctypes.byref(handle)), "a handle")
        workspace = self.xp.empty(self.workspace_bytes, np.uint8) if workspace is None else workspace
        self._check(library.cublasSetStream_v2(handle, stream), "a stream")
        self._set_workspace(handle, workspace)  # after the stream, which resets it
        self._check(library.cublasSetMathMode(handle, _MATH), "a mode")
        return handle, workspace

    def _set_workspace(self, handle, workspace):
        status = self._library.cublasSetWorkspace_v2(handle, workspace.data.ptr, workspace.nbytes)
        self._check(status, "a workspace")

    def _check(self, status, what):
        if status:
            name = self._library.cublasGetStatusString(status).decode()
            raise BackendError(f"cuBLAS refuses {what}: {name} ({status})")


def _nothing():
    """The product of empty matrices: it does nothing."""


def load(xp, arch):
    """A ``Cublas`` with the library that is installed for CuPy. Raises BackendError where there is none."""
    # workspace sizes that cuBLAS's documentation recommends for each architecture
    megabytes = 4 if arch < 90 else 32 if arch < 120 else 12
    try:
        return Cublas(xp, libraries.load("cublas"), megabytes << 20)
    except OSError as error:
        raise BackendError(str(error)) from error
