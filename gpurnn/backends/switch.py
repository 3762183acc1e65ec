"""The backend switch: which backends this machine has, and the one place that imports CuPy.

| name | arrays | what runs |
|---|---|---|
| ``"numpy"`` | NumPy | the generic code; the reference |
| ``"cpu"`` | NumPy | compiled code (cpu/) where it was built, else what ``"numpy"`` does |
| ``"cupy"`` | CuPy | the same generic code on a GPU, unfused |
| ``"cuda"`` | CuPy | hand-written kernels, cuBLAS for the matrix products |
| ``"auto"`` | | ``"cuda"`` where it works, else ``"cpu"``; says once which, through ``logging`` |

A layer asks once, when it is built: argument, else ``use_backend``, else ``GPURNN_BACKEND``, else ``"auto"``.
"""

import contextlib
import contextvars
import copyreg
import ctypes
import functools
import importlib
import logging
import os
import sys

import numpy as np

from ..errors import BackendError

NAMES = ("numpy", "cpu", "cupy", "cuda")
_requested = contextvars.ContextVar("gpurnn_backend", default=None)
_log = logging.getLogger("gpurnn")


@contextlib.contextmanager
def use_backend(name):
    """Layers built inside the ``with`` block, and given no ``backend`` or ``"auto"``, use this one.

    Holds for the current thread or asyncio task; blocks nest. ``use_backend("auto")`` overrules ``GPURNN_BACKEND``.
    Raises ValueError for an unknown name, TypeError for what is not a name.

    >>> with gpurnn.use_backend("numpy"):
    ...     layer = gpurnn.LSTM(3, 5)
    """
    token = _requested.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def get_backend(name=None):
    """The ``Ops`` of a backend: ``name``, else ``use_backend``, else ``GPURNN_BACKEND``, else ``"auto"``.

    An ``Ops`` given as ``name`` is returned as it is. ``name="auto"`` is the layers' default and means the same as
    None. Raises ValueError for an unknown name, TypeError for what is not a name, BackendError where ``"cupy"`` or
    ``"cuda"`` cannot work; never falls back unless it came to ``"auto"``.
    """
    if hasattr(name, "xp"):
        copyreg.pickle(type(name), _pickled)
        return name
    name = "auto" if name is None else _checked(name, "backend")
    if name == "auto":
        name = _requested.get() or _checked(os.environ.get("GPURNN_BACKEND") or "auto", "GPURNN_BACKEND")
    return _auto() if name == "auto" else _build(name)


def backends():
    """What this machine has: backend name -> None where it works, else the reason why not (a string).

    >>> gpurnn.backends()["numpy"] is None
    True
    """
    return {"numpy": None, "cpu": None, "cupy": _gpu_problem(), "cuda": _cuda_problem()}


def empty_cache():
    """Give back to the system what the backends in use keep for later calls: memory of arrays that are gone, and on a
    GPU the recorded time loops that nobody uses.

    >>> gpurnn.empty_cache()
    """
    for ops in list(_built.values()):
        ops.empty_cache()


def array_ops(*arrays):
    """The ``Ops`` of the arrays given to a function that belongs to no layer (losses, metrics).

    CuPy arrays give ``"cuda"``, all else ``"cpu"``; a mixture raises BackendError.
    """
    cupy = sys.modules.get("cupy")  # an array of CuPy cannot exist before somebody has imported it
    on_gpu = [cupy is not None and isinstance(array, cupy.ndarray) for array in arrays]
    if any(on_gpu) and not all(on_gpu):
        raise BackendError("some of these arrays are on the GPU and some are not: move them to one device first")
    return _build("cuda" if any(on_gpu) else "cpu")


def _checked(name, source):
    """``name``, which is one; ``source`` says in the error where it came from."""
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected the name of a backend, got {type(name).__name__}")
    if name not in (*NAMES, "auto"):
        expected = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {expected}")
    return name


_built = {}  # name -> the primitives that ``_build`` has made


def _build(name):
    if name not in _built:
        ops = _make(name)
        copyreg.pickle(type(ops), _pickled)
        _built.setdefault(name, ops)  # two threads may come this far: both get what one of them made
    return _built[name]


def _pickled(ops):
    """What stands in a pickle for the primitives: their name, which is looked up where the pickle is loaded."""
    return _named, (ops.name, ops.tf32)


def _named(name, tf32):
    """The ``Ops`` of a pickle; raises BackendError where this backend cannot work here."""
    ops = get_backend(name)
    return ops.with_tf32() if tf32 else ops


def _make(name):
    from .ops import Ops

    if name in ("numpy", "cpu"):
        from .cpu.native import load_native
        from .cpu.ops import CpuOps, HostOps

        native = load_native()
        if name == "cpu":
            return CpuOps(*native) if native else _build("numpy")
        return HostOps(name, *native) if native else Ops(np, name)
    problem = _cuda_problem() if name == "cuda" else _gpu_problem()
    if problem:
        raise BackendError(f"backend {name!r} cannot work here: {problem}")
    cupy = _import_cupy()
    if name == "cupy":
        return Ops(cupy, name)
    from .cuda.device import CupyDevice
    from .cuda.ops import CudaOps
    from .cuda.schedules.tuned_table import read

    return CudaOps(CupyDevice(cupy), measured=read())


@functools.cache
def _auto():
    problem = _cuda_problem()
    ops = _build("cpu" if problem else "cuda")
    _log.info("backend 'auto' is %r on this machine%s", ops.name, f": {problem}" if problem else "")
    return ops


# ---- what this machine has, cheapest question first; CuPy is imported only where nothing speaks against it


@functools.cache
def _gpu_problem():
    """Why CuPy cannot use a GPU here and the command that mends it, or None where it can."""
    driver = _driver_cuda_version()
    if driver is None:
        return (
            "no NVIDIA driver was found (libcuda is missing or does not answer). On a machine with an NVIDIA GPU "
            'install the driver, check it with nvidia-smi, then run pip install "gpurnn[cuda12]"; otherwise use '
            "backend='cpu'"
        )
    supported = f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}"
    if driver < (12, 0):
        return f"{supported}, CuPy needs 12.0 or newer. Update the driver, check it with nvidia-smi"
    install = f'pip install "gpurnn[cuda{min(driver[0], 13)}]"'
    packages = _cupy_packages()
    reinstall = f"Run pip uninstall -y {' '.join(packages)}, then {install}"
    if len(packages) > 1:
        return f"several CuPy packages overwrite each other: {', '.join(packages)}. {reinstall}"
    built_for = packages[0].removeprefix("cupy-cuda")[:2] if packages else ""
    if built_for.isdigit() and int(built_for) > driver[0]:
        return f"{packages[0]} is for CUDA {built_for}, {supported}. {reinstall}; or update the driver"
    if not _device_count():
        return "the NVIDIA driver shows no GPU to this process. Check nvidia-smi and CUDA_VISIBLE_DEVICES"
    try:
        cupy = _import_cupy()
    except Exception as error:  # a broken binary fails with whatever error it likes
        if not packages and isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed. Run {install}"
        return f"CuPy does not import ({error.__cause__ or error}). {reinstall if packages else f'Run {install}'}"
    try:
        _compute(cupy)
    except Exception as error:  # CuPy's error classes differ between versions and platforms
        return f"CuPy {cupy.__version__} does not compute on this GPU ({error}). Check nvidia-smi, then run {install}"
    return None


@functools.cache
def _cuda_problem():
    """Why the kernels cannot work here, or None: what stands against CuPy, or a library that they call themselves."""
    problem = _gpu_problem()
    if problem is None:
        from .cuda import libraries

        try:
            for name in ("nvrtc", "cublas"):
                libraries.load(name)
        except OSError as error:
            return str(error)
    return problem


def _load_driver():
    """The CUDA driver's library; raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _driver_cuda_version():
    """(major, minor) of the newest CUDA that the installed driver supports, or None without a driver."""
    version = ctypes.c_int()
    try:
        failed = _load_driver().cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def _device_count():
    """How many GPUs the driver shows to this process."""
    driver, count = _load_driver(), ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def _cupy_packages():
    """Names of the installed distributions that provide ``cupy``."""
    import importlib.metadata  # a quarter of the time that importing gpurnn would take

    names = ((dist.metadata["Name"] or "").lower().replace("_", "-") for dist in importlib.metadata.distributions())
    return sorted({name for name in names if name == "cupy" or name.startswith("cupy-cuda")})


def _import_cupy():
    return importlib.import_module("cupy")


def _compute(cupy):
    """Do what every layer needs: compile a kernel, multiply matrices, copy the result back; raises where one fails."""
    a = cupy.arange(4, dtype=np.float32).reshape(2, 2)
    (a @ a).get()
