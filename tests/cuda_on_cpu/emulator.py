"""Runs CUDA kernels on the CPU: NVRTC's PTX, translated to C++, one fiber per CUDA thread, every access checked.

    emu = Emulator(arch=90, policy="random", seed=3)
    kernel = emu.load(source, name="scale<float>")
    y = emu.empty((8, 8), "float32", "y")
    kernel((4,), (32,), (np.int32(64), x, y))

The call is CuPy's ``RawKernel`` call, so code that launches on a GPU launches here unchanged.
"""

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from . import nvrtc
from .translate import cpp_name, translate

HERE = Path(__file__).resolve().parent
POLICIES = ("ascending", "descending", "random")

# Largest shared memory of a block: CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB
# Kernels are compiled with -O0, as compiling takes most of the time of their tests and running little. No contraction:
# PTX says itself where a multiply-add is fused.
FLAGS = ("-std=c++17", "-fPIC", "-fwrapv", "-ffp-contract=off", "-frounding-math", "-w")


class KernelError(Exception):
    """A launch that a GPU would not survive, or might not: what, where, in which thread, at which source line."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("cooperative", ctypes.c_int32),
        ("policy", ctypes.c_int32),
        ("residency", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("preemption", ctypes.c_double),
        ("tensor_block", ctypes.c_int32),
        ("tensor_bits", ctypes.c_int32),
        ("asynchronous", ctypes.c_uint32),
        ("dependent", ctypes.c_uint32),
        ("gaps", ctypes.POINTER(ctypes.c_uint32)),
        ("gap_count", ctypes.c_uint32),
    ]


def missing():
    """Why kernels cannot be run here, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    return nvrtc.missing()


class Emulator:
    """A device: an architecture, an order in which threads run, memory.

    policy: which thread runs next where several can: "ascending" and "descending" by number, "random" by ``seed``.
    preemption: probability that a thread is interrupted before an access (checked flavour only).
    checked: watch every access for bounds, alignment, initialisation and races; else only run, about three times as
        fast. residency: blocks (clusters) alive at once in a launch that is not cooperative; a GPU promises only 1.
    portable: fibers by ucontext instead of the assembly for x86-64, as other processors use them.
    cut: None: tensor cores round every product and every sum, in order of k. (products that are added at once, bits
        below the largest one's last place that stay): they cut off instead, as a GPU's do; (8, 1) is an A100, (16, 2)
        an H100.
    """

    def __init__(
        self, arch=90, policy="ascending", seed=0, preemption=0.0, checked=True, residency=1, portable=False, cut=None
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {POLICIES}, got {policy!r}")
        self.arch, self.policy, self.seed, self.preemption = arch, policy, seed, preemption
        self.checked, self.residency, self.cut = checked, residency, cut or (0, 0)
        self.runtime_path = _runtime(checked, portable)
        self.runtime = _load_runtime(self.runtime_path)

    def __repr__(self):
        seed = f", seed {self.seed}, preemption {self.preemption}" if self.policy == "random" else ""
        return f"sm_{self.arch}, {'checked' if self.checked else 'fast'}, {self.policy}{seed}"

    # ---- memory

    def empty(self, shape, dtype="float32", name="array"):
        """An uninitialised array: reading it in a kernel before writing is an error; on the host it holds NaN."""
        return self._array(shape, dtype, name, initialised=False)

    def array(self, value, name="array"):
        """A copy of ``value`` in checked memory, C-contiguous."""
        value = np.asarray(value)
        value = np.ascontiguousarray(value).reshape(value.shape)  # which makes 1-D of 0-D
        array = self._array(value.shape, value.dtype, name, initialised=True)
        array[...] = value
        return array

    def zeros(self, shape, dtype="float32", name="array"):
        return self.array(np.zeros(shape, dtype), name)

    def written(self, array):
        """Say that the host has filled an ``empty`` array, or the view of a part of one."""
        if not array.size:
            return
        inner = 1  # numbers that lie side by side
        rest = array
        while rest.ndim and rest.strides[-1] == inner * array.itemsize:
            inner *= rest.shape[-1]
            rest = rest[..., 0]
        addresses = np.array(rest.ctypes.data, np.uint64)
        for size, stride in zip(rest.shape, rest.strides, strict=True):
            addresses = addresses[..., None] + np.arange(size, dtype=np.int64).astype(np.uint64) * np.uint64(stride)
        addresses = np.ascontiguousarray(addresses.reshape(-1))
        self.runtime.emulator_written(addresses.ctypes.data, addresses.size, inner * array.itemsize)

    def _array(self, shape, dtype, name, initialised):
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        bytes_ = math.prod(shape) * dtype.itemsize
        address = self.runtime.emulator_allocate(bytes_, name.encode(), int(initialised))
        if not address:
            raise MemoryError(f"{name}: the emulator's memory is full")
        memory = (ctypes.c_char * max(1, bytes_)).from_address(address)
        weakref.finalize(memory, self.runtime.emulator_free, address)
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    # ---- code

    def load(self, source, options=(), name=None, file="kernel.cu"):
        """The kernel ``name`` (a C++ name expression such as ``step<float>``) of a CUDA source, ready to be called."""
        return self.load_ptx(*self._ptx(source, options, name, file))

    def load_ptx(self, ptx, name):
        """The kernel with the entry ``name`` of a PTX text."""
        module = translate(ptx)
        library = _load_module(self._library(module))
        _place_variables(self, library, module)
        return Kernel(self, module, library, module.kernels[name])

    def build(self, source, options=(), name=None, file="kernel.cu"):
        """Have everything in the cache that ``load`` of the same arguments needs. May be called from many threads."""
        ptx, _ = self._ptx(source, options, name, file)
        self._library(translate(ptx))

    def _ptx(self, source, options, name, file):
        program = nvrtc.compile(
            source, file=file, arch=self.arch, options=tuple(options), expressions=(name,), machine_code=False
        )
        return program.ptx, program.lowered[name]

    def _library(self, module):
        return _build("module", module.code, "-O0", f"-DCHECKED={int(self.checked)}", libraries=(self.runtime_path,))


class Kernel:
    """Called as CuPy's kernels are: ``kernel(grid, block, args, shared_mem=0)``."""

    def __init__(self, emulator, module, library, kernel):
        self.emulator, self.module, self.info = emulator, module, kernel
        self.entry = ctypes.cast(getattr(library, "k_" + cpp_name(kernel.name)), ctypes.c_void_p)
        self.printed = ""  # by printf in the latest launch

    def __call__(self, grid, block, args, *, shared_mem=0, cooperative=False, dependent=False):
        emulator, info = self.emulator, self.info
        grid, block = _three("grid", grid), _three("block", block)
        self._check_launch(grid, block, shared_mem)
        params = self._pack(args)
        gaps = self.module.gaps
        how = _Launch(
            grid, block, info.cluster, shared_mem, info.shared + shared_mem, info.window + shared_mem,
            cooperative, POLICIES.index(emulator.policy), emulator.residency, emulator.seed, 2_000_000_000,
            emulator.preemption if emulator.policy == "random" else 0.0, *emulator.cut, info.asynchronous,
            dependent,
            (ctypes.c_uint32 * len(gaps))(*gaps), len(gaps) // 2,
        )  # fmt: skip
        error = ctypes.create_string_buffer(2048)
        failed = emulator.runtime.emulator_launch(self.entry, params, ctypes.byref(how), error, len(error))
        self.printed = emulator.runtime.emulator_printed().decode()
        if failed:
            raise KernelError(self._lines(error.value.decode()))

    def _lines(self, text):
        def name(match):
            packed = int(match[1])
            file = self.module.files.get(packed >> 20, "line")  # NVRTC puts the working directory before it
            return f"{os.path.basename(file)}:{packed & 0xFFFFF}"

        text = re.sub(r"@(\d+)@", name, text)
        return f"{text} [{self.info.name}; {self.emulator!r}]"

    def _check_launch(self, grid, block, shared_mem):
        info, arch = self.info, self.emulator.arch
        if min(grid) < 1 or min(block) < 1:
            raise KernelError(f"bad launch: grid {grid}, block {block}: every dimension must be 1 or more")
        if math.prod(block) > info.max_threads:
            raise KernelError(
                f"bad launch: {math.prod(block)} threads in a block, the kernel allows {info.max_threads}"
            )
        if any(g % c for g, c in zip(grid, info.cluster, strict=True)):
            raise KernelError(f"bad launch: grid {grid} is not made of whole clusters of {info.cluster}")
        limit = SHARED_LIMIT[arch] * 1024
        if info.shared > 48 * 1024 or info.shared + shared_mem > limit:
            raise KernelError(
                f"bad launch: {info.shared} bytes of static and {shared_mem} of dynamic shared memory; "
                f"sm_{arch} has {limit} a block, {48 * 1024} of them static"
            )

    def _pack(self, args):
        """Arguments in the kernel's parameter space, by CuPy's rules: int and float take 8 bytes, arrays a pointer."""
        sizes = self.info.params
        if len(args) != len(sizes):
            raise KernelError(f"wrong scalar: the kernel has {len(sizes)} parameters, got {len(args)} arguments")
        buffer = bytearray(sum(size for _, size in sizes) + 8 * len(sizes) + 16)
        for k, (arg, (offset, size)) in enumerate(zip(args, sizes, strict=True)):
            if isinstance(arg, np.ndarray):
                if not self.emulator.runtime.emulator_knows(arg.ctypes.data, arg.nbytes):
                    raise KernelError(f"bad launch: argument {k} is an array outside of the device's memory")
                data = arg.ctypes.data.to_bytes(8, "little")
            elif arg is None:
                data = bytes(8)
            elif isinstance(arg, (bool, np.bool_)):
                data = bytes([arg])
            elif isinstance(arg, np.generic):
                data = arg.tobytes()
            elif isinstance(arg, int):
                data = int(arg).to_bytes(8, "little", signed=arg < 0)
            elif isinstance(arg, float):
                data = np.float64(arg).tobytes()
            else:
                raise KernelError(f"wrong scalar: argument {k} is a {type(arg).__name__}")
            if len(data) != size:
                raise KernelError(f"wrong scalar: argument {k} has {len(data)} bytes, the kernel's parameter {size}")
            buffer[offset : offset + size] = data
        return (ctypes.c_uint8 * len(buffer)).from_buffer(buffer)


def _three(name, sizes):
    sizes = (sizes,) if isinstance(sizes, (int, np.integer)) else tuple(int(n) for n in sizes)
    if not 1 <= len(sizes) <= 3:
        raise KernelError(f"bad launch: {name} has {len(sizes)} dimensions")
    return sizes + (1,) * (3 - len(sizes))


def _place_variables(emulator, library, module):
    """Gives the module's global and constant variables their memory, once for each library."""
    if getattr(library, "placed", None) is not None:
        return
    library.placed = []
    for variable, name, _, data in module.variables:
        array = emulator.array(np.frombuffer(data, np.uint8), name)
        library.placed.append(array)
        ctypes.c_void_p.in_dll(library, variable).value = array.ctypes.data


# ---- building


def build_all(jobs):
    """Build in parallel: (emulator, arguments of its ``load``). Equal ones are built once."""
    jobs = {(emulator.arch, emulator.checked, request): emulator for emulator, request in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job[1].build(*job[0][2]), jobs.items()))


def build_ahead(cases):
    """Build in parallel what cases will load: (emulator, case, sizes), run as ``case(emulator, **sizes)`` later."""
    build_all((emulator, request) for emulator, case, sizes in cases for request in _asked(case, sizes))


class _Recorder:
    """Stands in for an emulator to learn what a case loads; nothing runs."""

    class Asked(Exception):
        pass

    def array(self, value, name="array"):
        return value

    def empty(self, shape, dtype="float32", name="array"):
        return np.empty(shape, dtype)

    def load(self, source, options=(), name=None, file="kernel.cu"):
        raise self.Asked(source, tuple(options), name, file)


def _asked(case, sizes):
    try:
        case(_Recorder(), **sizes)
    except _Recorder.Asked as asked:
        yield asked.args


@functools.cache
def _compiler_version():
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _build(kind, code, *flags, libraries=()):
    """Path of the shared library of a C++ text; built where the cache has none."""
    header = _header(flags)
    libraries = tuple(map(str, libraries))

    def make(new):
        (new / "code.cpp").write_text(code)
        _compile(new / "code.cpp", new / "code.so", *flags, "-shared", f"-I{header}", libraries=libraries)

    return nvrtc.cached(kind, repr((code, str(header), libraries, flags)), make) / "code.so"


@functools.cache
def _header(flags):
    """The folder of runtime.h, compiled ahead with these flags: a quarter of a second saved for each kernel."""
    text = (HERE / "runtime.h").read_text()

    def make(new):
        (new / "runtime.h").write_text(text)
        _compile(new / "runtime.h", new / "runtime.h.gch", *flags, "-x", "c++-header")

    return nvrtc.cached("header", repr((text, FLAGS, flags, _compiler_version(), os.uname().machine)), make)


def _compile(source, to, *flags, libraries=()):
    command = ["g++", *FLAGS, *flags, str(source), "-o", str(to), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ refuses {source.name}:\n{done.stderr[:4000]}")


def _runtime(checked, portable):
    flags = ("-O2", f"-DCHECKED={int(checked)}", *(("-DPORTABLE_FIBERS",) if portable else ()))
    return _build("runtime", (HERE / "runtime.cpp").read_text(), *flags)


@functools.cache
def _load_runtime(path):
    library = ctypes.CDLL(str(path))
    library.emulator_allocate.restype = ctypes.c_uint64
    library.emulator_allocate.argtypes = [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int]
    library.emulator_free.argtypes = [ctypes.c_uint64]
    library.emulator_free.restype = None
    library.emulator_written.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    library.emulator_written.restype = None
    library.emulator_knows.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.emulator_printed.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_uint64]
    if library.emulator_start():
        raise MemoryError("the emulator's address space could not be reserved")
    return library


@functools.cache
def _load_module(path):
    return ctypes.CDLL(str(path))
