"""The backend switch: which backends this machine has, and the one place that imports CuPy.

| name | arrays | what runs |
|---|---|---|
| ``"numpy"`` | NumPy | array code; the reference |
| ``"cpu"`` | NumPy | compiled code (cpu/) where it was built, otherwise the same as ``"numpy"`` |
| ``"cupy"`` | CuPy | the same array code on a GPU, unfused |
| ``"cuda"`` | CuPy | hand-written kernels, cuBLAS for the matrix products |
| ``"auto"`` | | ``"cuda"`` where it works, else ``"cpu"``; logs once which |

A layer chooses once, when it is built: by its argument, else ``use_backend``, else ``GPURNN_BACKEND``, else ``"auto"``.
"""

from __future__ import annotations

import contextvars
import copyreg
import ctypes
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np

from .._typing import Array, Backend
from ..errors import BackendError
from .cuda.libraries import driver as _load_driver
from .dual.array import Dual
from .dual.ops import DUAL_OPS

if TYPE_CHECKING:
    from .ops import Ops

NAMES = ("numpy", "cpu", "cupy", "cuda")
_requested = contextvars.ContextVar("gpurnn_backend", default=None)
_log = logging.getLogger("gpurnn")
P, R = ParamSpec("P"), TypeVar("R")


def use_backend(name: str) -> ChosenBackend:
    """Set the backend of layers that are built from here on without a ``backend``, or with ``"auto"``.

    In a ``with`` statement it ends with the block; blocks may be nested. As a statement of its own it holds until the
    next call, and above a function, as a decorator, for its calls. It applies to the current thread or asyncio task;
    the environment variable ``GPURNN_BACKEND`` is for the whole process.

    Parameters
    ----------
    name
        ``"numpy"``, ``"cpu"``, ``"cupy"``, ``"cuda"`` or ``"auto"``. ``"auto"`` overrules ``GPURNN_BACKEND``.

    Raises
    ------
    ValueError
        For an unknown name.
    TypeError
        For what is not a string.

    Examples
    --------
    >>> with gpurnn.use_backend("numpy"):
    ...     layer = gpurnn.LSTM(3, 5)
    """
    return ChosenBackend(name)


class ChosenBackend:
    """What ``use_backend`` returns: the choice is made already; leaving the ``with`` block undoes it."""

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "use_backend")
        self._before = [_requested.get()]  # one for each block, and for the call before the first block begins
        self._waits = True  # whether no block has begun yet
        _requested.set(name)

    def __enter__(self) -> None:
        if not self._waits:
            self._before.append(_requested.get())
        self._waits = False
        _requested.set(self.name)

    def __exit__(self, *error: object) -> None:
        _requested.set(self._before.pop())

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        _requested.set(self._before[0])  # the choice is for calls of the function alone

        @functools.wraps(function)
        def chosen(*arguments: P.args, **options: P.kwargs) -> R:
            with use_backend(self.name):
                return function(*arguments, **options)

        return chosen


def get_backend(name: str | Backend | None = None) -> Backend:
    """The ``Ops`` of a backend, the object through which layers compute.

    Parameters
    ----------
    name
        A backend's name. None and ``"auto"``, the layers' default, take that of ``use_backend``, else of
        ``GPURNN_BACKEND``, else ``"cuda"`` where it works and ``"cpu"`` where it does not. An ``Ops`` is returned
        unchanged.

    Raises
    ------
    ValueError
        For an unknown name.
    TypeError
        For what is neither a string nor an ``Ops``.
    BackendError
        Where ``"cupy"`` or ``"cuda"`` was named and cannot work here, with the reason and what to do.

    Examples
    --------
    >>> gpurnn.get_backend("numpy")
    Ops('numpy')
    """
    if hasattr(name, "xp"):
        copyreg.pickle(type(name), _pickled)
        return name
    name = "auto" if name is None else _checked(name, "backend")
    if name == "auto":
        name = _requested.get() or _checked(os.environ.get("GPURNN_BACKEND") or "auto", "GPURNN_BACKEND")
    return _auto() if name == "auto" else _build(name)


def backends() -> dict[str, str | None]:
    """Which backends work on this machine.

    Returns
    -------
    dict
        Backend name -> None where it works, else a string that says why not and what to do.

    Examples
    --------
    >>> gpurnn.backends()["numpy"] is None
    True
    """
    return {"numpy": None, "cpu": None, "cupy": _gpu_problem(), "cuda": _cuda_problem()}


def empty_cache() -> None:
    """Return unused memory to the system.

    That is the memory which the backends in use hold for later calls: of arrays that are gone, and on a GPU of recorded
    time loops that are not in use.

    Examples
    --------
    >>> gpurnn.empty_cache()
    """
    for ops in list(_built.values()):
        ops.empty_cache()


def array_ops(*arrays: Array) -> Ops:
    """The ``Ops`` for the arguments of a function that belongs to no layer (losses, metrics).

    CuPy arrays give ``"cuda"``, everything else ``"cpu"``. Raises BackendError for a mixture.
    """
    if any(isinstance(array, Dual) for array in arrays):
        return DUAL_OPS
    cupy = sys.modules.get("cupy")  # an array of CuPy cannot exist before somebody has imported it
    on_gpu = [cupy is not None and isinstance(array, cupy.ndarray) for array in arrays]
    if any(on_gpu) and not all(on_gpu):
        raise BackendError("some of these arrays are on the GPU and some are not: move them to one device first")
    return _build("cuda" if any(on_gpu) else "cpu")


def _checked(name, source):
    """``name``, where it is a backend's or "auto"; ``source`` names it in the error."""
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected the name of a backend, got {type(name).__name__}")
    if name not in (*NAMES, "auto"):
        expected = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {expected}")
    return name


_built = {}  # name -> its ``Ops``


def _build(name):
    """The one ``Ops`` of a backend."""
    if name not in _built:
        ops = _make(name)
        copyreg.pickle(type(ops), _pickled)
        _built.setdefault(name, ops)  # two threads may get here: both return the same one
    return _built[name]


def _pickled(ops):
    """How an ``Ops`` is pickled: by its name, which is looked up where the pickle is loaded."""
    return _named, (ops.name, ops.precision)


def _named(name, precision):
    """The ``Ops`` of a pickle. Raises BackendError where this backend cannot work here."""
    return get_backend(name).with_precision(precision)


def _make(name):
    from .ops import Ops

    if name in ("numpy", "cpu"):
        from .cpu.native import load_native
        from .cpu.ops import CpuOps, HostOps
        from .cpu.uncompiled import UncompiledOps, why_uncompiled

        native = load_native()
        if native:
            return CpuOps(*native) if name == "cpu" else HostOps(name, *native)
        if name == "cpu":
            _log.warning("backend 'cpu' is array code: %s", why_uncompiled())
            return _build("numpy")
        return UncompiledOps(np, name)
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
    """The ``Ops`` of "auto"."""
    problem = _cuda_problem()
    ops = _build("cpu" if problem else "cuda")
    _log.info("backend 'auto' is %r on this machine%s", ops.name, f": {problem}" if problem else "")
    return ops


# ---- what this machine has: the cheapest test first, and CuPy is imported only after all others have passed


@functools.cache
def _gpu_problem():
    """Why CuPy cannot use a GPU here and the command that fixes it, or None where it can."""
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
    except Exception as error:  # a broken binary may raise any error
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
    """Why the kernels cannot work here: CuPy's problem, or a missing library that they call directly. Else None."""
    problem = _gpu_problem()
    if problem is None:
        from .cuda import libraries

        try:
            for name in ("nvrtc", "cublas"):
                libraries.load(name)
        except OSError as error:
            return str(error)
    return problem


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
    """Compile a kernel, multiply matrices and copy the result back, as every layer needs. Raises where one fails."""
    a = cupy.arange(4, dtype=np.float32).reshape(2, 2)
    (a @ a).get()
