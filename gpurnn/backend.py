"""The backend switch: which backends this machine has, and the one place that imports CuPy.

| name | arrays | what runs |
|---|---|---|
| ``"numpy"`` (alias ``"cpu"``) | NumPy | the generic code; the reference |
| ``"cupy"`` | CuPy | the same generic code on a GPU, unfused |
| ``"cuda"`` | CuPy | hand-written kernels; until they land, what ``"cupy"`` is |
| ``"auto"`` | | ``"cuda"`` where it works, else ``"numpy"``; says once which, through ``logging`` |

A layer asks once, when it is built: argument, else ``use_backend``, else ``GPURNN_BACKEND``, else ``"auto"``.
"""

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.metadata
import logging
import os
import sys

import numpy as np

from .errors import BackendError

NAMES = ("numpy", "cupy", "cuda")
_ALIASES = {"cpu": "numpy"}
_requested = contextvars.ContextVar("gpurnn_backend", default=None)
_log = logging.getLogger("gpurnn")


@contextlib.contextmanager
def use_backend(name):
    """Layers built inside the ``with`` block, and given no ``backend``, use this one.

    >>> with gpurnn.use_backend("numpy"):
    ...     layer = gpurnn.LSTM(3, 5)
    """
    token = _requested.set(_canonical(name))
    try:
        yield
    finally:
        _requested.reset(token)


def get_backend(name=None):
    """The ``Ops`` of a backend: ``name``, else ``use_backend``, else ``GPURNN_BACKEND``, else ``"auto"``.

    Raises ValueError for an unknown name, BackendError where ``"cupy"`` or ``"cuda"`` cannot work; never falls back
    unless asked for ``"auto"``.
    """
    if name in (None, "auto"):
        name = _requested.get() or os.environ.get("GPURNN_BACKEND") or "auto"
    name = _canonical(name)
    return _auto() if name == "auto" else _build(name)


def backends():
    """What this machine has: backend name -> None where it works, else the reason why not (a string).

    >>> gpurnn.backends()["numpy"] is None
    True
    """
    reason = _gpu_problem()
    return {"numpy": None, "cupy": reason, "cuda": reason}


def array_ops(*arrays):
    """The ``Ops`` of the arrays given to a function that belongs to no layer (losses, metrics).

    CuPy arrays give ``"cuda"``, all else NumPy; a mixture raises BackendError.
    """
    cupy = sys.modules.get("cupy")
    on_gpu = [cupy is not None and isinstance(array, cupy.ndarray) for array in arrays]
    if any(on_gpu) and not all(on_gpu):
        raise BackendError("some of these arrays are on the GPU and some are not: move them to one device first")
    return _build("cuda" if any(on_gpu) else "numpy")


def _canonical(name):
    name = _ALIASES.get(name, name)
    if name not in (*NAMES, "auto"):
        raise ValueError(f"unknown backend {name!r}: expected 'auto', 'cpu', {', '.join(map(repr, NAMES))}")
    return name


@functools.cache
def _build(name):
    from .ops import Ops

    if name == "numpy":
        return Ops(np, name)
    problem = _gpu_problem()
    if problem:
        raise BackendError(f"backend {name!r} cannot work here: {problem}")
    return Ops(importlib.import_module("cupy"), name)


@functools.cache
def _auto():
    problem = _gpu_problem()
    name = "numpy" if problem else "cuda"
    _log.info("backend 'auto' is %r on this machine%s", name, f" ({problem})" if problem else "")
    return _build(name)


@functools.cache
def _gpu_problem():
    """Why CuPy cannot use a GPU here and the command that mends it, or None where it can."""
    driver = _driver_cuda_version()
    packages = _cupy_packages()
    wanted = "cuda12" if driver is None or driver < (13, 0) else "cuda13"
    command = f"pip install 'gpurnn[{wanted}]'"
    if driver is None:
        return (
            "no NVIDIA driver was found (libcuda does not load). On a machine with an NVIDIA GPU install the driver "
            f"from your system's packages, check it with 'nvidia-smi', then run {command}; otherwise use backend='cpu'"
        )
    if len(packages) > 1:
        removal = " ".join(packages)
        return f"several CuPy packages shadow each other ({removal}). Run pip uninstall {removal}, then {command}"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        if not packages:
            return f"CuPy is not installed. Run {command}"
        return f"{packages[0]} does not import ({error}). Run pip uninstall {packages[0]}, then {command}"
    built_for = _cupy_cuda_major(packages)
    if built_for is not None and built_for > driver[0]:
        return (
            f"{packages[0]} is for CUDA {built_for}, the driver supports CUDA {driver[0]}.{driver[1]}. "
            f"Run pip uninstall {packages[0]}, then {command}, or update the driver"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        if count:
            cupy.zeros(1)
    except Exception as error:  # CuPy's own error classes differ between versions and platforms
        return f"CuPy {cupy.__version__} cannot use the GPU ({error}). Check 'nvidia-smi', then run {command}"
    return None if count else "the driver reports no GPU. Check 'nvidia-smi' and CUDA_VISIBLE_DEVICES"


def _driver_cuda_version():
    """(major, minor) of the newest CUDA that the installed driver supports, or None without a working driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    version = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _cupy_packages():
    """Names of the installed distributions that provide ``cupy``."""
    names = (dist.metadata["Name"] or "" for dist in importlib.metadata.distributions())
    return sorted({name.lower() for name in names if name.lower() == "cupy" or name.lower().startswith("cupy-cuda")})


def _cupy_cuda_major(packages):
    """CUDA major version of a ``cupy-cuda12x``-like package name, None for a build from source."""
    digits = packages[0].removeprefix("cupy-cuda").rstrip("x") if packages else ""
    return int(digits[:2]) if digits[:2].isdigit() else None
