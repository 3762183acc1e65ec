"""Dependent launches: a kernel begins while the one before it still runs, and waits for it by itself.

CuPy does not offer them, so they go through ctypes to the driver's ``cuLaunchKernelEx``. A CUDA graph contains them as
edges of their own (CUDA Programming Guide, programmatic dependent launch).
"""

import ctypes
import logging

import numpy as np

_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION (cuda.h)
_DRIVER = 12030  # of the first CUDA whose graphs know such edges
_log = logging.getLogger("gpurnn")


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class DependentLaunches:
    """Launches that may begin early, on one GPU.

    library: the driver as a ``ctypes.CDLL``. Where it refuses one, ``usable`` is False from then on.
    """

    def __init__(self, xp, library, address):
        self.xp, self.address, self._launch = xp, address, library.cuLaunchKernelEx
        self._launch.argtypes = [ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.usable, self._early = True, ctypes.pointer(_Attribute(_SERIALIZATION, b"", 1, b""))

    def launch(self, function, grid, block, args, shared):
        """Launch a kernel behind what the current stream was given last; return whether the driver took it.

        function: a ``CUfunction``. args: NumPy numbers, and arrays of the device.
        """
        # All lie in one array, 8 bytes each. An array of NumPy for each took three times as long.
        address, size = self.address, 8 * len(args)
        bits = [arg.tobytes() if isinstance(arg, np.generic) else address(arg).to_bytes(8, "little") for arg in args]
        numbers = (ctypes.c_uint64 * len(args)).from_buffer_copy(b"".join([one.ljust(8, b"\0") for one in bits]))
        start = ctypes.addressof(numbers)
        pointers = (ctypes.c_void_p * len(args))(*range(start, start + size, 8))
        three = [(ctypes.c_uint * 3)(*size, *(1,) * (3 - len(size))) for size in (grid, block)]
        stream = self.xp.cuda.get_current_stream().ptr
        config = _Config(*three, shared, stream, self._early, 1)
        status = self._launch(ctypes.byref(config), function, pointers, None)
        if status:
            self.usable = False
            _log.warning("the driver refuses dependent launches (status %d): kernels begin one after another", status)
        return not status


def may_depend(arch):
    """Whether launches may begin early on a GPU of compute capability ``arch``, 90 for 9.0.

    From 12.0 on they do not: a capture that contains one was seen to fail there (github.com/sgl-project/sglang, pull
    request 18596).
    """
    return 90 <= arch < 120


def dependent_launches(xp, library, arch, address):
    """A ``DependentLaunches``, or None where a GPU or its driver has none.

    library: a function that loads the driver. arch: as in ``may_depend``.
    """
    if not may_depend(arch) or xp.cuda.runtime.driverGetVersion() < _DRIVER:
        return None
    try:
        return DependentLaunches(xp, library(), address)
    except (OSError, AttributeError):  # no driver by that name, or one without the function
        return None
