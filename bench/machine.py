"""The machine: its versions and its clocks."""

import ctypes
import functools
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np


def environment(packages, ask_torch=True):
    """Versions and hardware, JSON-ready. packages: of rivals, all installed. ask_torch: for its CUDA and cuDNN, which
    takes a process and seconds."""
    import gpurnn

    found = {
        "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu(), "cpus": os.cpu_count(),
        "numpy": np.__version__, "blas": _blas(), "gpurnn": gpurnn.__version__, "commit": _commit(),
        "gpu": None, "torch": None, "cudnn": None,
    }  # fmt: skip
    found |= {name: metadata.version(name) for name in packages}
    if gpurnn.backends()["cuda"] is None:
        found["gpu"] = gpu()
        if found["torch"] and ask_torch:  # which alone knows its CUDA and cuDNN
            asked = "import json, torch; print(json.dumps([torch.version.cuda, torch.backends.cudnn.version()]))"
            done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
            if done.returncode == 0:
                found["torch_cuda"], found["cudnn"] = json.loads(done.stdout)
    return found


def gpu():
    """The current CUDA device through CuPy: name, driver, versions, sizes."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "name": properties["name"].decode(), "capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"], "l2_bytes": properties["l2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"], "cupy": cupy.__version__, "driver": driver_version(),
        "driver_cuda": runtime.driverGetVersion(), "cuda": runtime.runtimeGetVersion(),
    }  # fmt: skip


def _blas():
    """NumPy's BLAS as it was built, and as it runs where threadpoolctl is there to ask."""
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    found = " ".join(filter(None, (built.get("name"), built.get("version"))))
    try:
        import threadpoolctl
    except ImportError:
        return found
    running = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return " ".join([found, *(str(pool.get("architecture")) for pool in running[:1])])


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit():
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    asked = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return asked.stdout.strip() or None


# ---- what only NVIDIA's management library knows


@functools.cache
def _nvml():
    """(library, device handle) or None."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None
    return library, handle


def clocks():
    """{"sm_mhz", "memory_mhz"} of the first GPU at this moment, empty where nobody can say."""
    if _nvml() is None:
        return {}
    library, handle = _nvml()
    found = {}
    for name, kind in (("sm_mhz", 1), ("memory_mhz", 2)):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
        value = ctypes.c_uint()
        if not library.nvmlDeviceGetClockInfo(handle, kind, ctypes.byref(value)):
            found[name] = value.value
    return found


def driver_version():
    """The driver's version as text, or None."""
    if _nvml() is None:
        return None
    text = ctypes.create_string_buffer(96)
    return None if _nvml()[0].nvmlSystemGetDriverVersion(text, 96) else text.value.decode()
