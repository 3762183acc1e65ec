"""The machine: its versions, its clocks, and its ceilings, measured; the floor that they set under a case."""

import ctypes
import functools
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from . import rivals as _rivals


def environment(ask_torch=True):
    """Versions and hardware, JSON-ready. ask_torch: for its CUDA and cuDNN, which takes a process and seconds."""
    import gpurnn

    found = {
        "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu(), "cpus": os.cpu_count(),
        "numpy": np.__version__, "blas": _blas(), "gpurnn": gpurnn.__version__, "commit": _commit(),
        "gpu": None, "torch": None, "cudnn": None,
    }  # fmt: skip
    for rival, name in (
        ("torch-cpu", "torch"),
        ("jax", "jax"),
        ("onnxruntime", "onnxruntime"),
        ("flashrnn", "flashrnn"),
    ):
        if _rivals.missing(rival) is None:
            found[name] = metadata.version(name)
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


# ---- ceilings and floors


def ceilings():
    """What this machine reaches at best, measured: {"cpu": ..., "gpu": ... or None}.

    flops: by arithmetic ("float32", "tf32", ...), of a large product. bytes: of a copy, read and written, a second.
    step: seconds from one timestep to the next that depends on it, at least: on a CPU nothing, on a GPU by "block" (all
    weights on one multiprocessor: its barrier) or "grid" (one exchange between multiprocessors).
    """
    import gpurnn

    found = {"cpu": _cpu_ceilings(), "gpu": None}
    if gpurnn.backends()["cuda"] is None:
        from .probe import gpu_ceilings

        found["gpu"] = gpu_ceilings()
    return found


def _cpu_ceilings():
    a = np.ones((1024, 1024), np.float32)
    out = np.empty_like(a)
    block = np.ones(1 << 23, np.float32)
    copy = np.empty_like(block)
    gemm = _best(lambda: np.matmul(a, a, out=out))
    moved = _best(lambda: np.copyto(copy, block))
    return {"flops": {"float32": 2 * 1024**3 / gemm}, "bytes": 2 * block.nbytes / moved, "step": {}}


def _best(action, least=0.5):
    """Seconds of the fastest run within ``least`` seconds and five runs."""
    best, end, count = float("inf"), time.perf_counter() + least, 0
    while count < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def floor_seconds(case, ceilings):
    """The least time of a case on a device with these ceilings, and what sets it: (seconds, reason), or None where its
    arithmetic was not measured.

    The largest of the products at the best rate of a large one, the bytes at a copy's rate, and the dependent steps.
    """
    arithmetic = "tf32" if case.precision == "tf32" else case.dtype
    rate = ceilings["flops"].get(arithmetic)
    if rate is None:
        return None
    parts = {"products": case.flops / rate, "bytes": case.bytes / ceilings["bytes"]}
    if ceilings["step"]:
        kind = (
            "block" if case.recurrent_bytes <= 330e3 else "grid"
        )  # what one multiprocessor's registers and memory hold
        parts["steps"] = case.steps * ceilings["step"][kind]
    reason = max(parts, key=parts.get)
    return parts[reason], reason
