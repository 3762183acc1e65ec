"""The kernels: sources, signatures, checked launches, the device. The one file that knows ``.cu`` files and NVRTC.

``kernels/`` is a top-level folder of the repository and is installed as package data of ``gpurnn.kernels``; it is read
by path, never imported.
"""

import contextlib
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BackendError, DtypeError, ShapeError
from .schedules import Device


def kernel_dir():
    """Folder of the CUDA sources: inside the package where it is installed, beside it in a source checkout.

    A source checkout is an editable install or the bare repository. Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(f"the CUDA sources of gpurnn are missing from {package}: install gpurnn again")


def kernel_files():
    """Names of all CUDA sources relative to ``kernel_dir()``, sorted, with forward slashes.

    >>> "common.cuh" in kernel_files()
    True
    """
    folder = kernel_dir()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".cu", ".cuh"))


def kernel_source(file):
    """The text of a kernel file with our own headers in place of its ``#include "..."`` lines, ready for NVRTC.

    One text, because CuPy's cache knows only the text it is given: a header that NVRTC finds by itself could change
    unseen. ``#line`` keeps every line under its file's own name in messages. Each header is taken once.
    """
    seen = set()

    def text(name):
        if name in seen:
            return ""
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((kernel_dir() / name).read_text(encoding="utf-8").splitlines(), 1):
            header = re.match(r'\s*#include "([^"]+)"', line)
            lines += [text(header[1]), f'#line {number + 1} "{name}"'] if header else [line]
        return "\n".join(lines) + "\n"

    return text(file)


# ---- signatures

# C++ type -> NumPy dtype name
_DTYPES = {
    "float": "float32", "double": "float64", "__half": "float16", "__nv_bfloat16": "bfloat16", "bool": "bool",
    "int": "int32", "unsigned": "uint32", "unsigned int": "uint32", "long long": "int64",
    "unsigned long long": "uint64", "unsigned char": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel: dtype is a NumPy name; optional: a pointer that may be null."""

    name: str
    dtype: str
    pointer: bool
    optional: bool


@functools.cache
def signature(file, kernel, types):
    """The arguments of a kernel of a ``.cu`` file with the template arguments ``types``: a tuple of ``Argument``.

    A pointer may be null where the comment behind it says "or null". Raises KeyError where the file has no such kernel.

    >>> signature("step.cu", "step_project", ("float",))[0]
    Argument(name='T_', dtype='int32', pointer=False, optional=False)
    """
    text = (kernel_dir() / file).read_text(encoding="utf-8")
    head = rf"(?:template <((?:[^<>]|<[^<>]*>)*)>\s*)?__global__ void (?:__launch_bounds__\([^)]*\) )?{kernel}\("
    found = re.search(head, text)
    if not found:
        raise KeyError(f"{file} has no kernel {kernel}")
    template = re.sub(r"<[^<>]*>", "", found[1] or "")
    parameters = [part.split()[-1] for part in template.split(",") if part.strip()]
    if len(parameters) != len(types):
        raise TypeError(f"{kernel}: expected template arguments for {', '.join(parameters)}, got {types}")
    bound = dict(zip(parameters, types, strict=True))
    arguments = []
    for line in text[found.end() :].splitlines():
        code, _, comment = line.partition("//")
        code, end, _ = code.replace("__restrict__", "").partition(")")
        for piece in filter(None, (part.strip() for part in code.split(","))):
            kind, name = re.fullmatch(r"(.*?)(\w+)", piece).groups()
            of, pointer = re.sub(r"\b(const|typename)\b|\*", "", kind).strip(), "*" in kind
            computed = re.fullmatch(r"Compute<(\w+)>::real", of)
            if computed:
                of = "double" if bound.get(computed[1], computed[1]) == "double" else "float"
            arguments.append(Argument(name, _DTYPES[bound.get(of, of)], pointer, pointer and "or null" in comment))
        if end:
            break
    return tuple(arguments)


class Kernels:
    """Checked launches on a device.

    A device is ``CupyDevice``, or another with its ``load`` and ``xp``.
    """

    def __init__(self, device):
        self.device = device
        self._ready = {}

    def launch(self, file, kernel, types, grid, block, *args, shared=0, cooperative=False):
        """Launch ``kernel<types>`` of ``kernels/file``; nothing where the grid is empty.

        args: Python numbers for scalars, cast to the declared type; for pointers C-contiguous arrays of the declared
        dtype, ``Rows(array)`` for a strided one, or None where it may be null. Raises TypeError for a wrong number of
        arguments, DtypeError, ShapeError, OverflowError naming the argument. cooperative: all blocks are there at once.
        """
        key = (file, kernel, types)
        if key not in self._ready:
            expression = f"{kernel}<{', '.join(types)}>" if types else kernel
            converters = [self._converter(kernel, argument) for argument in signature(file, kernel, types)]
            self._ready[key] = (self.device.load(file, expression), converters)
        run, converters = self._ready[key]
        if len(args) != len(converters):
            raise TypeError(f"{kernel}: expected {len(converters)} arguments, got {len(args)}")
        if 0 in grid:
            return
        if any(size > 65535 for size in grid[1:]):
            raise ValueError(f"{kernel}: the grid {grid} has more than 65535 blocks along y or z")
        given = tuple(convert(value) for convert, value in zip(converters, args, strict=True))
        run(grid, block, given, shared_mem=shared, **({"cooperative": True} if cooperative else {}))

    def _converter(self, kernel, argument):
        """The function that checks and casts one argument; made once, as launches are many."""
        name, dtype = argument.name, argument.dtype
        if not argument.pointer:
            cast = np.dtype(dtype).type
            if cast(0).dtype.kind == "f":  # rounding is what floats do; becoming an infinity is not
                most = float(np.finfo(cast).max)

                def fits(value):
                    return not most < abs(value) < np.inf
            else:
                low, high = (0, 1) if cast is np.bool_ else (np.iinfo(cast).min, np.iinfo(cast).max)

                def fits(value):
                    return low <= value <= high and cast(value) == value

            def scalar(value):
                if not fits(value):
                    raise OverflowError(f"{kernel}: {name} = {value} does not fit into {dtype}")
                return cast(value)

            return scalar
        wanted = None if dtype == "bfloat16" else np.dtype(dtype)
        ndarray, null, optional = self.device.xp.ndarray, np.uint64(0), argument.optional

        def pointer(value):
            if value is None:
                if not optional:
                    raise TypeError(f"{kernel}: {name} may not be None")
                return null
            strided = isinstance(value, Rows)
            array = value.array if strided else value
            if not isinstance(array, ndarray):
                raise TypeError(f"{kernel}: {name} should be an array on the device, got {type(array).__name__}")
            if array.dtype != wanted and array.dtype.name != dtype:  # a name is dear to ask for
                raise DtypeError(f"{kernel}: {name} should be {dtype}, got {array.dtype}")
            if not strided and not array.flags.c_contiguous:
                raise ShapeError(f"{kernel}: {name} should be C-contiguous, got strides {array.strides}")
            return array

        return pointer


@dataclass(frozen=True)
class Rows:
    """A strided array for a kernel that is told the stride."""

    array: object


# ---- matrix products


def matrix_layout(array, name):
    """How BLAS sees a matrix (or a batch of them): (stored by rows, leading dimension in elements).

    Raises ValueError where neither rows nor columns are contiguous and apart: BLAS could not read it.
    """
    rows, columns = array.shape[-2:]
    down, across = (stride // array.itemsize for stride in array.strides[-2:])
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return True, max(down, columns, 1)
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return False, max(across, rows, 1)
    raise ValueError(f"{name}: BLAS needs contiguous rows or columns, got {array.shape} with strides {array.strides}")


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


# ---- the device


COOPERATIVE = ("grid.cu", "grid_mma.cu")  # whose kernels need all their blocks at once


class CupyDevice:
    """The current CUDA device through CuPy: arrays, kernels, matrix products, recorded launches.

    ``-ftz=true`` is CuPy's own: in float, kernels count what is smaller than 2^-126 as zero. Compiled kernels stay in
    CuPy's cache (``CUPY_CACHE_DIR``, by default ``~/.cupy/kernel_cache``), keyed by source, options, architecture and
    NVRTC's version.
    """

    def __init__(self, cupy):
        self.xp, self._streams = cupy, []
        # cuBLAS reads its factors on the host: 1 and 0 in the type of the sum
        self._factors = {kind: (np.ones(1, kind), np.zeros(1, kind)) for kind in ("float32", "float64")}

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

    @functools.cached_property
    def _kinds(self):
        """dtype, or tf32 -> what cuBLAS calls it, what it is computed in, and the factors for that."""
        cublas, runtime = self.xp.cuda.cublas, self.xp.cuda.runtime
        single = cublas.CUBLAS_COMPUTE_32F, self._factors["float32"]
        return {
            "float32": (runtime.CUDA_R_32F, *single),  # never tf32 by itself
            "tf32": (runtime.CUDA_R_32F, cublas.CUBLAS_COMPUTE_32F_FAST_TF32, self._factors["float32"]),
            "float64": (runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F, self._factors["float64"]),
            "float16": (runtime.CUDA_R_16F, *single),
            "bfloat16": (runtime.CUDA_R_16BF, *single),
        }

    def load(self, file, expression):
        """The kernel of a name expression such as ``step_forward<LstmCell, float>``, compiled now unless cached.

        Returns ``kernel(grid, block, args, shared_mem=0)``. Raises BackendError with the compiler's first errors, which
        name our files and lines.
        """
        source, options = kernel_source(file), ("--std=c++17",)
        cooperative = file in COOPERATIVE
        module = self.xp.RawModule(
            code=source, options=options, name_expressions=(expression,), enable_cooperative_groups=cooperative
        )
        try:
            kernel = module.get_function(expression)
        except Exception as error:  # CompileException, or a CUDA error on loading; their classes differ by version
            lines = [line for line in str(error).splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line] or lines
            raise BackendError(
                f"{expression} of {file} does not compile or load for sm_{self.arch} with CuPy {self.xp.__version__}:\n"
                + "\n".join(errors[:5])
            ) from error

        def run(grid, block, args, shared_mem=0, cooperative=cooperative):
            if shared_mem > 48 * 1024:  # more must be asked for
                kernel.max_dynamic_shared_size_bytes = shared_mem
            try:
                kernel(grid, block, args, shared_mem=shared_mem)
            except (ValueError, RuntimeError) as error:  # CuPy's own check, or the driver's
                if not cooperative:
                    raise
                raise BackendError(f"{expression}: {grid} blocks cannot be there at once: {error}") from error

        return run

    def gemm(self, a, b, out, accumulate=False, tf32=False):
        """``out = a @ b``, or ``out += a @ b``: one call of cuBLAS into memory that is there.

        a: (M, K), b: (K, N), out: (M, N), or all with an equal leading batch axis; each with contiguous rows or
        columns. out has the dtype of a and b, or is float32 for 16-bit ones; 16-bit products are summed in float32.
        tf32: whether float32 may be rounded to tf32 before it is multiplied. Raises ValueError.
        """
        check_product(a, b, out)
        if 0 in out.shape:
            return
        if a.shape[-1] == 0:
            if not accumulate:
                out.fill(0)
            return
        by_rows, ld_out = matrix_layout(out, "out")
        if not by_rows:  # cuBLAS writes columns: ours by rows is theirs transposed, out^T = b^T a^T
            a, b, out = b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2)
        (a_rows, ld_a), (b_rows, ld_b) = matrix_layout(a, "a"), matrix_layout(b, "b")
        cublas = self.xp.cuda.cublas
        kind, compute, (one, zero) = self._kinds["tf32" if tf32 and a.dtype == np.float32 else a.dtype.name]
        kind_out = self._kinds[out.dtype.name][0]
        alpha, beta = one.ctypes.data, (one if accumulate else zero).ctypes.data
        op_a, op_b = (cublas.CUBLAS_OP_N if rows else cublas.CUBLAS_OP_T for rows in (a_rows, b_rows))
        (M, N), K = out.shape[-2:], a.shape[-1]
        handle = self.xp.cuda.device.get_cublas_handle()  # every call of it goes to the current stream
        if a.ndim == 2:
            cublas.gemmEx(
                handle, op_b, op_a, N, M, K, alpha, b.data.ptr, kind, ld_b, a.data.ptr, kind, ld_a, beta,
                out.data.ptr, kind_out, ld_out, compute, cublas.CUBLAS_GEMM_DEFAULT,
            )  # fmt: skip
            return
        apart = [array.strides[0] // array.itemsize for array in (b, a, out)]
        cublas.gemmStridedBatchedEx(
            handle, op_b, op_a, N, M, K, alpha, b.data.ptr, kind, ld_b, apart[0], a.data.ptr, kind, ld_a, apart[1],
            beta, out.data.ptr, kind_out, ld_out, apart[2], len(out), compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    def mirror(self, array):
        """``(host, refresh)``: a NumPy array that shows what ``array`` held once ``refresh()`` has come through, which
        is asked for on the current stream and not waited for."""
        pinned = self.xp.cuda.alloc_pinned_memory(array.nbytes)
        host = np.frombuffer(pinned, array.dtype, array.size)
        host[...] = 0

        def refresh():
            array.data.copy_to_host_async(host.ctypes.data, array.nbytes, self.xp.cuda.get_current_stream())

        return host, refresh

    def record(self, function):
        """What ``function`` launches, as a CUDA graph: nothing runs now, ``.launch()`` runs it on the current stream.

        ``function`` may only launch kernels and products: no allocation, no copy, no look at a result. Raises
        BackendError where it cannot be recorded; the stream is usable again then.
        """
        stream = self.xp.cuda.Stream(non_blocking=True)
        with stream:
            try:
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

    def streams(self, count):
        """So many streams besides the current one, the same at every call."""
        while len(self._streams) < count:
            self._streams.append(self.xp.cuda.Stream(non_blocking=True))
        return self._streams[:count]

    def wait(self, stream, other):
        """``stream`` does not go on before all that ``other`` was given so far is done. None: the current stream."""
        current = self.xp.cuda.get_current_stream()
        (stream or current).wait_event((other or current).record())

    def synchronize(self):
        """Wait until everything on the current stream is done."""
        self.xp.cuda.get_current_stream().synchronize()
