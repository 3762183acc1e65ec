"""backends/cuda/device.py and what it loads with, without a GPU: compiled kernels on disk, launches, recordings."""

import ctypes
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.cuda import Cuda
from helpers import needs_nvrtc

from gpurnn.backends import sources
from gpurnn.backends.cuda import cubins, schedules
from gpurnn.backends.cuda import device as device_module
from gpurnn.backends.cuda import nvrtc as _nvrtc
from gpurnn.backends.cuda.device import CupyDevice
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.ops import CudaOps
from gpurnn.backends.cuda.schedules import Device, Problem
from gpurnn.backends.sources import kernel_files, kernel_source
from gpurnn.cells import CELLS
from gpurnn.errors import BackendError


def fake_cupy(RawModule=None, **cuda):
    """CuPy as far as loading goes; its kernels and streams are what a test gives."""
    return types.SimpleNamespace(RawModule=RawModule, __version__="14.0", cuda=types.SimpleNamespace(**cuda))


class Modules:
    """``cupy.RawModule`` that remembers what it was asked for. kernel: what ``get_function`` gives."""

    def __init__(self, kernel=None):
        self.asked, self.kernel = [], kernel or (lambda grid, block, args, shared_mem=0: None)

    def __call__(self, *, path, enable_cooperative_groups):
        assert type(path) is str  # CuPy takes nothing else

        def get_function(name):
            self.asked.append((path, enable_cooperative_groups, name))
            return self.kernel

        return types.SimpleNamespace(get_function=get_function)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def device_of(modules, arch=90):
    device = CupyDevice(fake_cupy(modules))
    device.arch = arch
    return device


# ---- compiled kernels on disk

DONE = "step_done"


@needs_nvrtc
def test_a_kernel_is_compiled_once(cache, monkeypatch):
    modules = Modules()
    device_of(modules).load("step.cu", DONE)
    compiled = []
    monkeypatch.setattr(_nvrtc, "compile", lambda *a: compiled.append(a))
    device_of(modules).load("step.cu", DONE)
    assert not compiled and modules.asked[0] == modules.asked[1]
    path, cooperative, name = modules.asked[0]
    assert os.path.dirname(os.path.dirname(path)) == str(cache) and not cooperative and "step_done" in name
    assert Path(path).read_bytes()[:4] == b"\x7fELF"
    assert (cache.stat().st_mode & 0o777) == 0o700


@needs_nvrtc
def test_what_decides_the_machine_code_decides_the_place(monkeypatch):
    source = kernel_source("step.cu")
    first, name, spilled = cubins.find(source, DONE, 90)
    assert cubins.find(source, DONE, 90) == (first, name, spilled) and spilled == 0
    others = [
        cubins.find(source, DONE, 80)[0], cubins.find(source + "\n", DONE, 90)[0],
        cubins.find(source, "step_project<float>", 90)[0],
    ]  # fmt: skip
    monkeypatch.setattr(_nvrtc, "version", lambda: (99, 0))
    others.append(cubins.find(source, DONE, 90)[0])
    assert len({first, *others}) == 5


@needs_nvrtc
@pytest.mark.parametrize("damage", ["cut", "another name", "no name", "not JSON", "gone"])
def test_a_damaged_kernel_is_compiled_anew(damage):
    source = kernel_source("step.cu")
    path, name, _ = cubins.find(source, DONE, 90)
    whole, about = path.read_bytes(), path.with_name("about.json")
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "another name":
        about.write_text(json.dumps({"name": "x", "sha256": "0"}))
    elif damage == "no name":
        about.write_text(json.dumps({"sha256": json.loads(about.read_text())["sha256"]}))
    elif damage == "not JSON":
        about.write_text("{")
    else:
        path.unlink()
    again, name_again, _ = cubins.find(source, DONE, 90)
    assert again.read_bytes() == whole and name_again == name
    assert cubins.find(source, DONE, 90)[0].read_bytes() == whole


@needs_nvrtc
def test_a_damaged_kernel_is_replaced_for_good(monkeypatch):
    source = kernel_source("step.cu")
    path, _, _ = cubins.find(source, DONE, 90)
    path.write_bytes(b"broken")
    cubins.find(source, DONE, 90)
    monkeypatch.setattr(_nvrtc, "compile", None)
    assert cubins.find(source, DONE, 90)[0] == path and path.read_bytes()[:4] == b"\x7fELF"


@needs_nvrtc
def test_a_gpu_that_the_compiler_does_not_know_gets_ptx():
    assert cubins.find(kernel_source("step.cu"), DONE, 130)[0].read_bytes().startswith(b"//")


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path / "file"))
    path, name, _ = cubins.find(kernel_source("step.cu"), DONE, 90)
    assert path.read_bytes()[:4] == b"\x7fELF" and name


@needs_nvrtc
@pytest.mark.slow
def test_processes_that_compile_the_same_kernel_at_once(cache):
    code = (
        "from gpurnn.backends.cuda import cubins; from gpurnn.backends.sources import kernel_source\n"
        "path, name, _ = cubins.find(kernel_source('step.cu'), 'step_forward<lstm, float>', 90)\n"
        "assert path.read_bytes()[:4] == bytes([127]) + b'ELF'; print(path)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    told = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(told) == 1
    assert [path.name for path in cache.iterdir()] == [os.path.basename(os.path.dirname(told.pop().strip()))]


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
    float held[64];
    for (int k = 0; k < 64; k++) held[k] = x[threadIdx.x + 1024 * k];
    for (int n = 0; n < 50; n++) {
#pragma unroll
        for (int k = 0; k < 64; k++) held[k] = held[k] * held[(k + 7) % 64] + y[n];
    }
    for (int k = 0; k < 64; k++) y[threadIdx.x + 1024 * k] = held[k];
}
"""


@needs_nvrtc
def test_what_does_not_fit_into_registers_is_known():
    spilled = cubins.find(SPILLS, "spills", 90)[2]
    assert spilled > 0 and cubins.find(SPILLS, "spills", 90)[2] == spilled  # from disk, too


def test_eight_bytes_are_a_spill(monkeypatch, tmp_path):
    for spilled in (0, 8):
        monkeypatch.setattr(cubins, "find", lambda *a, spilled=spilled: (tmp_path / "kernel.cubin", "name", spilled))
        assert device_of(Modules()).spills("block.cu", "any") == spilled


@pytest.mark.parametrize("kernel", ["block", "block_mma", "grid", "grid_mma", "cluster"])
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_that_spill_hold_less(kernel, backward):
    """As much less as this compiler needs; the rest of the weights lies in shared memory, the tile stays the same."""
    limits = Device(90, 132, 227 * 1024)
    H, dtype = (96 if "block" in kernel else 512), "float32" if kernel in ("block", "grid") else "bfloat16"
    problem = Problem(CELLS["lstm"], H, 100, 16, 1, dtype, False, backward)
    candidates = [
        candidate
        for candidate in schedules.candidates(problem, limits)[0]
        if getattr(candidate, "kernel", "") == kernel and candidate.held > 0.2
    ]
    tried, spilling = [], {kernel_of(problem, candidates[0])[1]}

    def spills(file, expression, struct):
        tried.append(expression)
        return len(tried) < 3

    ops = CudaOps(types.SimpleNamespace(xp=np, limits=limits, spills=spills, address=None))
    less = ops.without_spills(problem, candidates[0])
    assert len(set(tried)) == 3 and tried[0] in spilling and kernel_of(problem, less)[1] == tried[2]
    assert less.held < candidates[0].held and less.rows == candidates[0].rows
    assert (less.threads, less.seconds, less.key.partition("<")[0]) == (
        candidates[0].threads,
        candidates[0].seconds,
        kernel,
    )
    ops.device.spills = lambda file, expression, struct: 1  # whatever is held: it stays as it was
    assert ops.without_spills(problem, candidates[0]) == candidates[0]
    ops.device.spills = lambda file, expression, struct: 0
    assert ops.without_spills(problem, candidates[0]) == candidates[0]


def test_the_target_is_machine_code_where_the_compiler_knows_it(monkeypatch):
    monkeypatch.setattr(_nvrtc, "architectures", lambda: [75, 80, 86, 90, 100, 120])
    wanted = {75: "sm_75", 87: "sm_86", 90: "sm_90", 103: "sm_100", 121: "sm_120"}
    ptx = {70: "compute_75", 110: "compute_100", 130: "compute_120"}  # a GPU of another generation: the driver's work
    for arch, option in (wanted | ptx).items():
        assert _nvrtc.target(arch) == f"-arch={option}"


# ---- loading and launching


@needs_nvrtc
def test_a_compiler_error_is_a_backend_error_with_its_line(monkeypatch):

    text = kernel_source("step.cu") + '\n#line 7 "broken.cu"\n__global__ void broken() { nothing; }\n'
    monkeypatch.setattr(sources, "kernel_source", lambda file, struct: text)
    with pytest.raises(BackendError, match=r"for sm_75 with CuPy 14.0:\nbroken\.cu\(7\): error.*nothing"):
        device_of(Modules(), 75).load("step.cu", "broken")


def test_a_driver_that_refuses_the_code_is_a_backend_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "find", lambda *a: (tmp_path / "kernel.cubin", "name", 0))

    def module(**options):
        raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")

    with pytest.raises(BackendError, match="INVALID_IMAGE"):
        device_of(module).load("step.cu", DONE)


def test_blocks_that_cannot_be_there_at_once_are_a_backend_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "find", lambda *a: (tmp_path / "kernel.cubin", "name", 0))

    def kernel(grid, block, args, shared_mem=0):
        raise ValueError("too large")

    modules = Modules(kernel)
    device = device_of(modules)
    with pytest.raises(BackendError, match=r"grid_forward<.*: \(1, 132, 1\) blocks cannot run at once: too large"):
        device.load("grid.cu", "grid_forward<lstm, float>")((1, 132, 1), (256,), (), cooperative=True)
    with pytest.raises(ValueError, match="too large"):
        device.load("step.cu", "step_project<float>")((1, 1, 1), (256,), ())
    assert [cooperative for _, cooperative, _ in modules.asked] == [True, False]


def test_kernels_whose_blocks_wait_for_one_another_are_launched_together(monkeypatch, tmp_path):
    """Every file that uses the exchange between blocks, and no other: else a launch may wait for ever."""
    monkeypatch.setattr(cubins, "find", lambda *a: (tmp_path / "kernel.cubin", "name", 0))
    modules = Modules()
    files = [file.rpartition("/")[2] for file in kernel_files() if file.endswith(".cu")]
    for file in files:
        device_of(modules).load(file, "any")
    together = {file for file, (_, cooperative, _) in zip(files, modules.asked, strict=True) if cooperative}
    assert together == {file for file in files if "exchange.cuh" in kernel_source(file)} == {"grid.cu", "grid_mma.cu"}


def test_large_clusters_are_asked_for_once_and_a_refusal_is_a_backend_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "find", lambda *a: (tmp_path / "kernel.cubin", "name", 0))
    asked = []

    class Kernel:
        kernel = types.SimpleNamespace(ptr=77)

        def __call__(self, grid, block, args, shared_mem=0):
            if grid[1] > 16:
                raise RuntimeError("CUDA_ERROR_INVALID_CLUSTER_SIZE")

    modules = Modules(Kernel())
    device = device_of(modules)
    device.xp.cuda.driver = types.SimpleNamespace(funcSetAttribute=lambda *how: asked.append(how))
    run = device.load("cluster.cu", "any")
    for blocks, found in ((8, []), (16, [(77, 14, 1)]), (16, [(77, 14, 1)])):
        run((1, blocks, 2), (256,), ())
        assert asked == found
    with pytest.raises(BackendError, match="INVALID_CLUSTER_SIZE"):
        run((1, 32, 1), (256,), ())
    assert [cooperative for _, cooperative, _ in modules.asked] == [False]


class FakeDriver:
    """``cuLaunchKernelEx`` that reads its arguments as the driver does, by the offsets that cuda.h gives."""

    def __init__(self, status=0):
        self.launches = []

        class Launch:
            argtypes = None

            def __call__(this, config, function, params, extra):
                raw = ctypes.string_at(ctypes.addressof(config._obj), 56)
                numbers, (stream, attributes) = struct.unpack_from("7I", raw), struct.unpack_from("2Q", raw, 32)
                assert struct.unpack_from("I", raw, 48) == (1,) and extra is None
                kind, _, value = struct.unpack_from("iii", ctypes.string_at(attributes, 72))
                first, last = (ctypes.string_at(params[k], 4) for k in (0, len(params) - 1))
                address = struct.unpack("Q", ctypes.string_at(params[1], 8))[0]
                self.launches.append((function, numbers, stream, kind, value, first, address, last))
                return status

        self.cuLaunchKernelEx = Launch()


def test_a_dependent_launch_is_given_to_the_driver_as_cuda_h_has_it(monkeypatch, tmp_path, caplog):
    """sizeof(CUlaunchConfig) is 56, of an attribute 72; its value begins at 8."""
    monkeypatch.setattr(cubins, "find", lambda *a: (tmp_path / "kernel.cubin", "name", 0))
    ordinary = []

    class Kernel:
        kernel = types.SimpleNamespace(ptr=77)

        def __call__(self, grid, block, args, shared_mem=0):
            ordinary.append(grid)

    array = types.SimpleNamespace(data=types.SimpleNamespace(ptr=0x7F00))
    args = np.int32(-5), array, np.float32(0.5)
    expected = (77, (3, 2, 1, 256, 1, 1, 1024), 17, 6, 1, struct.pack("i", -5), 0x7F00, struct.pack("f", 0.5))

    def run_on(driver, arch=90, version=13000):
        device = device_of(Modules(Kernel()), arch)
        device.xp.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=17)
        device.xp.cuda.runtime = types.SimpleNamespace(driverGetVersion=lambda: version)
        monkeypatch.setattr(device_module.libraries, "driver", lambda: driver)
        run = device.load("fused.cu", "any")
        run((3, 2), (256,), args, shared_mem=1024)
        for _ in range(2):
            run((3, 2), (256,), args, shared_mem=1024, dependent=True)

    driver = FakeDriver()
    run_on(driver)
    assert driver.launches == [expected] * 2 and ordinary == [(3, 2)]
    for arch, version in ((80, 13000), (120, 13000), (90, 12020)):  # no such launches, or none in a graph
        ordinary.clear()
        run_on(FakeDriver(), arch, version)
        assert ordinary == [(3, 2)] * 3
    refusing = FakeDriver(status=801)
    ordinary.clear()
    run_on(refusing)
    assert len(refusing.launches) == 1 and ordinary == [(3, 2)] * 3
    assert "refuses dependent launches (status 801)" in caplog.text
    ordinary.clear()
    run_on(types.SimpleNamespace())  # an older driver
    assert ordinary == [(3, 2)] * 3


def test_shared_memory_is_asked_for_where_it_grows(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "find", lambda *a: (tmp_path / "kernel.cubin", "name", 0))

    class Kernel:
        asked = []

        def __call__(self, grid, block, args, shared_mem=0):
            assert shared_mem <= max([48 * 1024, *self.asked])

        def __setattr__(self, name, value):
            assert name == "max_dynamic_shared_size_bytes"
            self.asked.append(value)

    run = device_of(Modules(Kernel())).load("block.cu", "any")
    for kilobytes in (10, 48, 100, 60, 100, 227):
        run((1, 1, 1), (32,), (), shared_mem=kilobytes * 1024)
    assert Kernel.asked == [100 * 1024, 227 * 1024]


# ---- recording


class FakeStream:
    """A stream with CuPy's manners: a capture that CUDA has invalidated must be ended, and is_capturing() raises."""

    state, ptr = "idle", 17

    def __init__(self, non_blocking):
        assert non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def begin_capture(self):
        FakeStream.state = "capturing"

    def end_capture(self):
        before, FakeStream.state = FakeStream.state, "idle"
        if before != "capturing":
            raise RuntimeError(f"cudaErrorStreamCapture: {before}")
        return "graph"

    def is_capturing(self):
        if FakeStream.state == "invalidated":
            raise RuntimeError("the stream was capturing, but an error has invalidated the capture sequence")
        return FakeStream.state == "capturing"


def invalidate(error):
    """What a forbidden call does under capture; the library may see its error or not."""
    FakeStream.state = "invalidated"
    if error:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")


def test_a_failed_recording_ends_the_capture():
    device = CupyDevice(fake_cupy(Stream=FakeStream, get_current_stream=lambda: FakeStream(True)))
    device.blas = types.SimpleNamespace(lend_workspace=lambda stream, lender: None)
    assert device.record(lambda: None) == "graph"
    for function, words in (
        (lambda: 1 / 0, "division by zero"),
        (lambda: invalidate(error=True), "cudaErrorStreamCaptureUnsupported"),
        (lambda: invalidate(error=False), "cudaErrorStreamCapture: invalidated"),
    ):
        with pytest.raises(BackendError, match=f"cannot be recorded.*{words}"):
            device.record(function)
        assert FakeStream.state == "idle"
    assert device.record(lambda: None) == "graph"


def test_the_stream_is_the_current_one():
    device = CupyDevice(types.SimpleNamespace(cuda=Cuda()))
    assert device.stream == 0
    with device.streams(1)[0] as stream:
        assert device.stream == stream.ptr > 2


def test_a_mirror_shows_the_device():
    device = CupyDevice(types.SimpleNamespace(cuda=Cuda()))
    host_side = np.arange(3, dtype=np.int32)
    array = types.SimpleNamespace(
        nbytes=12, dtype=host_side.dtype, size=3,
        data=types.SimpleNamespace(copy_to_host_async=lambda to, size, stream: ctypes.memmove(
            to, host_side.ctypes.data, size)),
    )  # fmt: skip
    seen, refresh = device.mirror(array)
    assert seen.tolist() == [0, 0, 0]
    refresh()
    assert seen.tolist() == [0, 1, 2]
