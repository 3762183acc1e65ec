"""NVRTC through ctypes: it compiles CUDA C++ to machine code and PTX. It needs no GPU and no driver.

CuPy's own wrapper would do, but its disk cache forgets kernels with template arguments before CuPy 14, and the tests
compile on machines without CuPy. ctypes releases the GIL, so several threads compile at the same time.
"""

import ctypes
import functools
from dataclasses import dataclass

from . import libraries

# -ftz=true, as CuPy compiles: in float, kernels flush subnormal numbers (below 2^-126) to zero.
OPTIONS = ("--std=c++17", "-ftz=true")


class CompileError(Exception):
    """NVRTC refused the source; the text is its log."""


@dataclass(frozen=True)
class Program:
    """One source compiled for one architecture."""

    ptx: str
    cubin: bytes  # empty where the options ask for PTX only
    log: str  # with -Xptxas -v: registers, stack, spills, shared memory of every kernel
    lowered: dict  # name expression -> mangled name


@functools.cache
def library():
    """NVRTC's shared library. Raises OSError."""
    found = libraries.load("nvrtc")
    found.nvrtcGetErrorString.restype = ctypes.c_char_p
    return found


@functools.cache
def version():
    """(major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def architectures():
    """Compute capabilities that this NVRTC compiles for, as numbers, ascending."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(found))
    return sorted(found)


def target(arch):
    """The option that compiles for a GPU of compute capability ``arch``.

    It asks for machine code where NVRTC knows an architecture of the same major version that is not newer. Otherwise it
    asks for PTX, which the driver compiles.

    ``target(90)`` is '-arch=sm_90'.
    """
    known = [number for number in architectures() if number <= arch]
    if known and known[-1] // 10 == arch // 10:
        return f"-arch=sm_{known[-1]}"
    return f"-arch=compute_{known[-1] if known else architectures()[0]}"


def include_options():
    """``-I`` for the folder of cuda_fp16.h, where that is installed."""
    folder = libraries.include_folder()
    return () if folder is None else (f"-I{folder}",)


def compile(source, options, expressions=(), file="kernel.cu"):
    """Compile a source.

    options: all options, ``OPTIONS`` and ``include_options()`` among them. expressions: kernels to instantiate, such as
    ``step<float>``; ``Program.lowered`` has their mangled names. file: the name that messages and line tables show.

    Returns a ``Program``. Raises CompileError with NVRTC's log.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), file.encode(), 0, None, None))
    try:
        for expression in expressions:
            _check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        argv = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), argv)
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


def _check(status):
    if status:
        raise CompileError(library().nvrtcGetErrorString(status).decode())


def _bytes(size_of, get, program):
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _text(size_of, get, program):
    return _bytes(size_of, get, program).rstrip(b"\0").decode()
