"""NVRTC through ctypes: CUDA C++ in; PTX, machine code and ptxas's report out. Needs no GPU and no driver.

CuPy calls the same library with the same options (``OPTIONS``); its own wrapper would do, but asks for CuPy, 150 MB, on
every machine that runs the tests.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# What CuPy 14 adds to the user's options (cupy.cuda.compiler, cupy._core.core.assemble_cupy_compiler_options), apart
# from include folders, which the kernels do not use. test_cuda_gate.py compares where CuPy is installed.
OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")


class CompileError(Exception):
    """NVRTC refused the source; the text is its log."""


@dataclass(frozen=True)
class Program:
    """One source compiled for one architecture."""

    ptx: str
    cubin: bytes  # empty where no machine code was asked for
    log: str  # with -Xptxas -v: registers, stack, spills, shared memory of every kernel
    lowered: dict  # name expression -> mangled name


def missing():
    """Why NVRTC cannot be used here, or None."""
    try:
        library()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def library():
    """The shared library, from the wheel ``nvidia-cuda-nvrtc`` or wherever the loader finds it. Raises OSError."""
    for folder in _wheel_folders():
        for path in sorted((folder / "lib").glob("libnvrtc.so.*")):
            for part in (folder / "lib").glob("libnvrtc-builtins.so.*"):  # NVRTC 13.0 does not look beside itself
                ctypes.CDLL(str(part))
            return _declare(ctypes.CDLL(str(path)))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return _declare(ctypes.CDLL(name))
        except OSError:
            continue
    raise OSError("NVRTC is not installed: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime")


def version():
    """(major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def include_options():
    """``-I`` options for cuda_fp16.h and its kind, from the wheel ``nvidia-cuda-runtime`` where it is installed."""
    return tuple(f"-I{folder / 'include'}" for folder in _wheel_folders() if (folder / "include/cuda_fp16.h").is_file())


def compile(source, *, file="kernel.cu", arch=90, options=(), expressions=(), machine_code=True):
    """``source`` compiled for ``sm_<arch>`` with CuPy's options and ``options``; results are cached on disk.

    file: the name that messages and line tables show. expressions: kernels to instantiate, such as
    ``step<float>``; their mangled names are in ``Program.lowered``. machine_code: with ptxas's work, the cubin and the
    log, or else the same PTX alone in half the time, and with ``.loc`` lines. Raises CompileError with NVRTC's log.
    """
    how = (f"-arch=sm_{arch}", "-Xptxas", "-v") if machine_code else (f"-arch=compute_{arch}", "-lineinfo")
    flags = [*OPTIONS, *how, *include_options(), *options]
    key = repr((version(), source, file, flags, tuple(expressions)))

    def make(new):
        program = _compile(source, file, flags, expressions)
        (new / "kernel.ptx").write_text(program.ptx)
        (new / "kernel.cubin").write_bytes(program.cubin)
        (new / "log").write_text(program.log)
        (new / "lowered").write_text("\n".join(program.lowered.values()))

    folder = cached("ptx", key, make)
    lowered = (folder / "lowered").read_text().splitlines()
    return Program(
        (folder / "kernel.ptx").read_text(),
        (folder / "kernel.cubin").read_bytes(),
        (folder / "log").read_text(),
        dict(zip(expressions, lowered, strict=True)),
    )


def cache_folder():
    """Where compiled things are kept between runs; GPURNN_TEST_CACHE moves it."""
    root = os.environ.get("GPURNN_TEST_CACHE") or Path(tempfile.gettempdir()) / f"gpurnn-test-cache-{os.getuid()}"
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(kind, key, make):
    """A folder of the cache, which ``make(folder)`` fills where there is none of this kind and key yet: one process
    does, others that want the same wait for it. Nobody sees half of one."""
    import fcntl  # here, because nothing is compiled where it is missing

    folder = cache_folder() / kind / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # which ends with the file or the process
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
                    new = Path(temporary) / "new"
                    new.mkdir()
                    make(new)
                    new.rename(folder)
    return folder


def _wheel_folders():
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations] if spec else []
    return [folder for root in roots for folder in sorted(root.glob("cu[0-9]*"), reverse=True) if folder.is_dir()]


def _declare(nvrtc):
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def _check(status):
    if status:
        raise CompileError(library().nvrtcGetErrorString(status).decode())


def _compile(source, file, flags, expressions):
    nvrtc, program = library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), file.encode(), 0, None, None))
    try:
        for expression in expressions:
            _check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        argv = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = nvrtc.nvrtcCompileProgram(program, len(flags), argv)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        if status:
            raise CompileError(log or nvrtc.nvrtcGetErrorString(status).decode())
        lowered = {}
        for expression in expressions:
            name = ctypes.c_char_p()
            _check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)))
            lowered[expression] = name.value.decode()
        ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        cubin = _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return Program(ptx, cubin, log, lowered)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(size_of, get, program):
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _text(size_of, get, program):
    return _bytes(size_of, get, program).rstrip(b"\0").decode()
