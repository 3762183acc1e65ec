"""Where CUDA's libraries and headers are: as CuPy finds them, in NVIDIA's wheels, or with the system's loader."""

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path

MAJORS = (13, 12)  # versions of CUDA, the newest first


@functools.cache
def load(name):
    """CUDA's shared library ``name`` ("nvrtc", "cublas") as a ``ctypes.CDLL``; raises OSError where there is none.

    It is searched with CUDA's own finder, which comes with CuPy 14; then in the wheels ``nvidia-...``; then by a plain
    name, which also finds a library that the process has already loaded.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib(name)
        return ctypes.CDLL(
            found.abs_path or name, handle=found._handle_uint
        )  # a library that was loaded before may have no path
    except (ImportError, RuntimeError, OSError):  # no finder, or nothing found
        pass
    for path in _in_wheels(f"lib/lib{name}.so.*", f"bin/{name}64_*.dll"):
        for part in path.parent.glob(f"lib{name}-builtins.so.*"):  # NVRTC 13.0 does not look beside itself
            ctypes.CDLL(str(part))
        return ctypes.CDLL(str(path))
    for major in MAJORS:
        try:
            return ctypes.CDLL(f"{name}64_{major}.dll" if sys.platform == "win32" else f"lib{name}.so.{major}")
        except OSError:
            continue
    raise OSError(f'no library {name} of CUDA was found: run pip install "gpurnn[cuda13]", or install the CUDA toolkit')


def driver():
    """Load the CUDA driver's library. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def include_folder():
    """The folder of cuda_fp16.h and related headers, a string, or None. 16-bit kernels need it."""
    for path in _in_wheels("include/cuda_fp16.h"):
        return str(path.parent)
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        folder = find_nvidia_header_directory("cudart")
    except (ImportError, RuntimeError, OSError):
        folder = None
    toolkits = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    for found in (folder, *(os.path.join(toolkit, "include") for toolkit in toolkits if toolkit)):
        if found and os.path.isfile(os.path.join(found, "cuda_fp16.h")):
            return str(found)
    return None


def wheel_folders():
    """Folders of NVIDIA's wheels: ``nvidia/cu13`` for CUDA 13, one folder per library for older versions."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations] if spec else []
    folders = [folder for root in roots for folder in sorted(root.iterdir(), reverse=True) if folder.is_dir()]
    return sorted(folders, key=lambda folder: not folder.name.startswith("cu1"))


def _in_wheels(*patterns):
    """Files of NVIDIA's wheels that match."""
    return [path for folder in wheel_folders() for pattern in patterns for path in sorted(folder.glob(pattern))]
