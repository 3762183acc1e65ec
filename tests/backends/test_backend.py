"""The backend switch: who decides, what is said where a GPU cannot be used, and arrays from elsewhere."""

import contextvars
import ctypes
import importlib.metadata
import logging
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from helpers import ROOT
from optional import optional

import gpurnn
from gpurnn import BackendError, DtypeError, get_backend, use_backend
from gpurnn.backends import switch as backend
from gpurnn.backends.cuda import libraries
from gpurnn.backends.ops import Ops

torch = optional("torch")

CPU = get_backend("cpu").name  # "numpy" where no compiler was found
INSTALL_12 = 'pip install "gpurnn[cuda12]"'
INSTALL_13 = 'pip install "gpurnn[cuda13]"'


class FakeArray(np.ndarray):
    """Stands for an array on the GPU."""

    data = property(lambda self: types.SimpleNamespace(ptr=self.ctypes.data))

    def get(self):
        return np.array(self)


def fake_cupy():
    """As much of CuPy as the backend switch touches, over NumPy."""
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.ndarray = FakeArray
    cupy.arange = lambda *args, **kwargs: np.arange(*args, **kwargs).view(FakeArray)
    cupy.asarray = lambda value, **kwargs: np.asarray(value, **kwargs).view(FakeArray)
    return cupy


class Machine:
    """A pretended machine: set what it has, then ask for backends. A whole GPU machine to begin with."""

    def __init__(self, monkeypatch):
        self.driver = (13, 0)
        self.packages = ["cupy-cuda13x"]
        self.devices = 1
        self.cupy = fake_cupy()
        self.imports = 0
        self.libraries = {"nvrtc", "cublas"}
        monkeypatch.setattr(libraries, "load", self.load)
        monkeypatch.setattr(backend, "_driver_cuda_version", lambda: self.driver)
        monkeypatch.setattr(backend, "_cupy_packages", lambda: self.packages)
        monkeypatch.setattr(backend, "_device_count", lambda: self.devices)
        monkeypatch.setattr(backend, "_import_cupy", self.import_cupy)

    def load(self, name):
        if name not in self.libraries:
            raise OSError(f"CUDA's library {name} was not found")

    def import_cupy(self):
        self.imports += 1
        if isinstance(self.cupy, Exception):
            raise self.cupy
        return self.cupy


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Each test asks anew what the machine has, with no GPURNN_BACKEND set."""
    monkeypatch.delenv("GPURNN_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_built", {})
    caches = (backend._gpu_problem, backend._cuda_problem, backend._auto)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


# ---- names


@pytest.mark.parametrize(
    "name, expected", [("numpy", "numpy"), ("cpu", CPU), ("cupy", "cupy"), ("cuda", "cuda"), ("auto", "cuda")]
)
def test_names(machine, name, expected):
    ops = get_backend(name)
    assert ops.name == expected
    assert ops.xp is (np if expected in ("numpy", CPU) else machine.cupy)
    assert get_backend(name) is ops
    assert repr(ops) == f"Ops({expected!r})"


def test_unknown_names_are_refused_with_their_source(monkeypatch):
    expected = "unknown backend 'gpu', expected one of 'auto', 'numpy', 'cpu', 'cupy', 'cuda'"
    with pytest.raises(ValueError, match=f"^backend: {expected}"):
        get_backend("gpu")
    with pytest.raises(ValueError, match=f"^backend: {expected}"):
        gpurnn.LSTM(2, 3, backend="gpu")
    with pytest.raises(ValueError, match=f"^use_backend: {expected}"), use_backend("gpu"):
        pytest.fail("entered")
    monkeypatch.setenv("GPURNN_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"^GPURNN_BACKEND: {expected}"):
        get_backend()
    assert get_backend("cpu").name == CPU


@pytest.mark.parametrize("name", [3, ["cpu"], np])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(TypeError, match="^backend: expected the name of a backend, got "):
        get_backend(name)
    with pytest.raises(TypeError, match="^use_backend: expected the name of a backend, got "), use_backend(name):
        pytest.fail("entered")


# ---- who decides


@pytest.mark.parametrize("environment", [None, "", "auto", "numpy", "cupy", "cuda"])
@pytest.mark.parametrize("context", [None, "auto", "numpy", "cupy", "cuda"])
@pytest.mark.parametrize("argument", [None, "auto", "numpy", "cupy", "cuda"])
def test_precedence(machine, monkeypatch, argument, context, environment):
    """Argument, else use_backend, else GPURNN_BACKEND, else auto; an argument "auto" leaves it to the others."""
    if environment is not None:
        monkeypatch.setenv("GPURNN_BACKEND", environment)
    if argument not in (None, "auto"):
        expected = argument
    elif context is not None:
        expected = "cuda" if context == "auto" else context
    else:
        expected = environment if environment in ("numpy", "cupy") else "cuda"
    if context is None:
        assert get_backend(argument).name == expected
    else:
        with use_backend(context):
            assert get_backend(argument).name == expected


def test_layers_follow_the_same_rule(machine, monkeypatch):
    monkeypatch.setenv("GPURNN_BACKEND", "cpu")
    assert gpurnn.Linear(2, 3).ops.name == CPU
    assert gpurnn.LSTM(2, 3, backend="auto").ops.name == CPU
    machine.driver = None
    with use_backend("cuda"), pytest.raises(BackendError, match="'cuda' cannot work here"):
        gpurnn.Linear(2, 3)


def test_use_backend_nests_and_ends(machine):
    def current():
        return get_backend().name

    with use_backend("numpy"):
        with use_backend("cupy"):
            assert current() == "cupy"
            with use_backend("cpu"):
                assert current() == CPU
            assert current() == "cupy"
        assert current() == "numpy"
        with pytest.raises(KeyError), use_backend("cupy"):
            raise KeyError
        assert current() == "numpy"
    assert current() == "cuda"


def test_use_backend_as_a_statement(machine, monkeypatch):
    """It holds until the next call; a block that begins later ends where the call was made; a wrong name is refused."""
    monkeypatch.setenv("GPURNN_BACKEND", "cpu")
    cpu = get_backend().name

    def statements():
        assert get_backend().name == cpu
        use_backend("numpy")
        assert get_backend().name == "numpy"
        with pytest.raises(ValueError, match="^use_backend: unknown backend"):
            use_backend("nunpy")
        assert get_backend().name == "numpy"
        chosen = use_backend("cpu")
        use_backend("numpy")
        for _ in range(2):
            with chosen:
                assert get_backend().name == cpu
            assert get_backend().name == "numpy"
        with use_backend("cpu"), chosen:
            assert get_backend().name == cpu
        assert get_backend().name == "numpy"

    contextvars.copy_context().run(statements)
    assert get_backend().name == cpu


def test_use_backend_as_a_decorator(machine):
    before = get_backend("cpu").name

    @use_backend("numpy")
    def inside(depth):
        return get_backend().name if not depth else inside(depth - 1)

    with use_backend("cpu"):
        assert [inside(2), get_backend().name, inside.__name__] == ["numpy", before, "inside"]


def test_use_backend_asks_nothing_of_the_machine(machine):
    """Only building a layer does: a script may name its backend before it knows whether it needs one."""
    machine.driver = None
    with use_backend("cuda"):
        assert get_backend("cpu").name == CPU


def test_use_backend_belongs_to_its_context(machine):
    """Another thread is not touched, unless it is given a copy of the context."""
    seen = {}

    def look(where):
        seen[where] = get_backend().name

    with use_backend("cupy"):
        inside = contextvars.copy_context()
    outside = contextvars.copy_context()
    with use_backend("numpy"):
        threads = [
            threading.Thread(target=contextvars.Context().run, args=(look, "fresh")),
            threading.Thread(target=inside.run, args=(look, "inside")),
            threading.Thread(target=outside.run, args=(look, "outside")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        look("here")
    assert seen == {"fresh": "cuda", "inside": "cupy", "outside": "cuda", "here": "numpy"}


def test_threads_do_not_disturb_each_other(machine):
    barrier = threading.Barrier(2, timeout=10)
    seen = {}

    def work(name):
        with use_backend(name):
            barrier.wait()  # both are inside
            seen[name] = get_backend().name
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("numpy", "cupy")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"numpy": "numpy", "cupy": "cupy"}


def test_auto_says_once_which(machine, caplog):
    caplog.set_level(logging.INFO, "gpurnn")
    for _ in range(3):
        assert get_backend().name == "cuda"
    assert caplog.messages == ["backend 'auto' is 'cuda' on this machine"]


def test_auto_says_once_why_not_the_gpu(machine, caplog):
    machine.devices = 0
    caplog.set_level(logging.INFO, "gpurnn")
    for _ in range(3):
        assert get_backend().name == CPU
    (message,) = caplog.messages
    assert message.startswith(f"backend 'auto' is {CPU!r} on this machine: the NVIDIA driver shows no GPU")


def test_a_named_backend_says_nothing(machine, caplog):
    caplog.set_level(logging.INFO, "gpurnn")
    get_backend("cuda")
    get_backend("cpu")
    assert not caplog.messages


# ---- why not, and the command that mends it


def broken_import():
    """What CuPy raises where a library is missing: the reason is the cause."""
    error = ImportError("CuPy is not correctly installed ... many lines")
    error.__cause__ = ImportError("libcudart.so.12: cannot open shared object file")
    return error


CASES = {
    "no driver": (dict(driver=None), ["no NVIDIA driver", "nvidia-smi", INSTALL_12, "backend='cpu'"]),
    "driver too old": (dict(driver=(11, 8)), ["driver supports CUDA 11.8, CuPy needs 12.0", "Update the driver"]),
    "no CuPy, CUDA 12": (
        dict(driver=(12, 4), packages=[], cupy=ModuleNotFoundError("No module named 'cupy'", name="cupy")),
        [f"CuPy is not installed. Run {INSTALL_12}"],
    ),
    "no CuPy, CUDA 13": (
        dict(packages=[], cupy=ModuleNotFoundError("No module named 'cupy'", name="cupy")),
        [f"CuPy is not installed. Run {INSTALL_13}"],
    ),
    "no CuPy, CUDA to come": (
        dict(driver=(14, 1), packages=[], cupy=ModuleNotFoundError("No module named 'cupy'", name="cupy")),
        [f"CuPy is not installed. Run {INSTALL_13}"],
    ),
    "CuPy newer than the driver": (
        dict(driver=(12, 8)),
        [
            "cupy-cuda13x is for CUDA 13, the NVIDIA driver supports CUDA 12.8",
            f"Run pip uninstall -y cupy-cuda13x, then {INSTALL_12}; or update the driver",
        ],
    ),
    "two CuPy": (
        dict(packages=["cupy-cuda12x", "cupy-cuda13x"]),
        [
            "several CuPy packages overwrite each other: cupy-cuda12x, cupy-cuda13x",
            f"Run pip uninstall -y cupy-cuda12x cupy-cuda13x, then {INSTALL_13}",
        ],
    ),
    "no device": (dict(devices=0), ["shows no GPU to this process", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
    "CuPy does not import": (
        dict(cupy=broken_import()),
        [
            "CuPy does not import (libcudart.so.12: cannot open shared object file)",
            f"Run pip uninstall -y cupy-cuda13x, then {INSTALL_13}",
        ],
    ),
    "CuPy's files are gone": (
        dict(cupy=ModuleNotFoundError("No module named 'cupy'", name="cupy")),
        ["CuPy does not import (No module", f"Run pip uninstall -y cupy-cuda13x, then {INSTALL_13}"],
    ),
    "what CuPy needs is gone": (
        dict(packages=[], cupy=ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock")),
        [f"CuPy does not import (No module named 'fastrlock'). Run {INSTALL_13}"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_reasons(machine, case):
    """Every backend that cannot work says why, and what to do; none falls back."""
    settings, expected = CASES[case]
    vars(machine).update(settings)
    available = gpurnn.backends()
    assert list(available) == ["numpy", "cpu", "cupy", "cuda"]
    assert available["numpy"] is None and available["cpu"] is None
    for name in ("cupy", "cuda"):
        with pytest.raises(BackendError) as caught:
            get_backend(name)
        assert str(caught.value) == f"backend {name!r} cannot work here: {available[name]}"
        for part in expected:
            assert part in str(caught.value)
    assert get_backend("auto").name == CPU
    assert machine.imports == isinstance(machine.cupy, Exception)  # asked once, and only where nothing spoke against it


def test_cupy_that_does_not_compute(machine):
    def arange(*args, **kwargs):
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    machine.cupy.arange = arange
    with pytest.raises(BackendError) as caught:
        get_backend("cuda")
    assert "CuPy 14.2.0 does not compute on this GPU (libnvrtc.so.13: cannot open" in str(caught.value)
    assert f"then run {INSTALL_13}" in str(caught.value)


def test_a_machine_that_has_it_all(machine):
    assert gpurnn.backends() == dict.fromkeys(("numpy", "cpu", "cupy", "cuda"))


@pytest.mark.parametrize("packages", [["cupy"], ["cupy-cuda12x"], []])
def test_cupy_built_from_source_or_for_an_older_cuda_will_do(machine, packages):
    machine.packages = packages
    assert get_backend("cuda").xp is machine.cupy


# ---- the questions themselves


class FakeDriver:
    """libcuda: answers through pointers, returns 0 for success."""

    def __init__(self, version=12040, devices=2, failing=()):
        self.answers = {"cuDriverGetVersion": version, "cuDeviceGetCount": devices, "cuInit": None}
        self.failing = failing

    def __getattr__(self, function):
        def call(argument):
            if function in self.failing:
                return 100  # CUDA_ERROR_NO_DEVICE
            if self.answers[function] is not None:
                argument._obj.value = self.answers[function]
            return 0

        return call


def test_driver_version(monkeypatch):
    for version, expected in ((12040, (12, 4)), (13000, (13, 0)), (11080, (11, 8)), (12100, (12, 10))):
        monkeypatch.setattr(backend, "_load_driver", lambda version=version: FakeDriver(version))
        assert backend._driver_cuda_version() == expected
    monkeypatch.setattr(backend, "_load_driver", lambda: FakeDriver(failing=["cuDriverGetVersion"]))
    assert backend._driver_cuda_version() is None


def test_device_count(monkeypatch):
    for failing, expected in (((), 2), (("cuInit",), 0), (("cuDeviceGetCount",), 0)):
        monkeypatch.setattr(backend, "_load_driver", lambda failing=failing: FakeDriver(failing=failing))
        assert backend._device_count() == expected


def test_a_missing_driver_is_no_error(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert backend._driver_cuda_version() is None
    assert "no NVIDIA driver" in gpurnn.backends()["cuda"]


def test_cupy_packages(monkeypatch):
    installed = ["numpy", "CuPy_CUDA12x", "cupy-cuda12x", "cupy", "cupyx-helper", None]
    distributions = [types.SimpleNamespace(metadata={"Name": name}) for name in installed]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions)
    assert backend._cupy_packages() == ["cupy", "cupy-cuda12x"]


def test_cpu_asks_for_no_gpu():
    """backend="cpu" neither imports CuPy nor loads the driver, whatever the environment asks for."""
    code = """
import sys
from gpurnn.backends import switch as backend
from gpurnn.backends.cuda import libraries
class NoCuPy:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "cupy", "CuPy was imported"
sys.meta_path.insert(0, NoCuPy())
def no_driver():
    raise AssertionError("the driver was loaded")
backend._load_driver = no_driver
import gpurnn, numpy as np
for name in ("cpu", "numpy"):
    lstm = gpurnn.LSTM(2, 3, backend=name)
    output, state, backward = lstm.forward(np.zeros((4, 1, 2), "float32"))
    loss, dloss = gpurnn.mse(output, np.zeros_like(output))
    backward(dloss())
with gpurnn.use_backend("cpu"):
    gpurnn.GRU(2, 3)
assert "cupy" not in sys.modules
"""
    environment = os.environ | {"GPURNN_BACKEND": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the backend of arrays that belong to no layer


def test_array_ops(machine, monkeypatch):
    host, device = np.zeros(2), machine.cupy.arange(2)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert backend.array_ops(host, [1.0], torch.zeros(2)) is backend.get_backend("cpu")
    monkeypatch.setitem(sys.modules, "cupy", machine.cupy)
    assert backend.array_ops(host, [1.0]) is backend.get_backend("cpu")
    assert backend.array_ops(device, device).name == "cuda"
    for mixture in ((host, device), (device, [1.0]), (device, device, host)):
        with pytest.raises(BackendError, match="some of these arrays are on the GPU and some are not"):
            backend.array_ops(*mixture)


@pytest.mark.parametrize("name", ["numpy", "cpu", "cuda"])
def test_empty_cache_asks_the_backends_in_use_and_no_others(machine, monkeypatch, name):
    asked = []
    ops = get_backend(name)
    monkeypatch.setattr(ops, "empty_cache", lambda: asked.append(ops))
    gpurnn.empty_cache()
    assert asked and set(asked) == set(backend._built.values()) == {ops}


# ---- arrays from elsewhere


class OnGPU:
    """An array on a GPU that offers itself the one way or the other."""

    def __init__(self, dlpack):
        if dlpack:
            self.__dlpack_device__ = lambda: (2, 0)  # kDLCUDA
        else:
            self.__cuda_array_interface__ = {"shape": (2,), "typestr": "<f4", "data": (0, False), "version": 3}


class HostOnly:
    """A host array that offers nothing but DLPack."""

    def __init__(self, array):
        self.array = array
        self.__dlpack__ = array.__dlpack__
        self.__dlpack_device__ = array.__dlpack_device__


def test_asarray_of_numpy_is_the_array_itself():
    ops = get_backend("cpu")
    for array in (np.arange(3), np.zeros((2, 3), "float32").T, np.zeros((0, 2))):
        assert ops.asarray(array) is array
    read_only = np.arange(3)
    read_only.flags.writeable = False
    assert ops.asarray(read_only) is read_only


@pytest.mark.parametrize("value", [[[1, 2], [3, 4]], ([1.5, 2], (3, 4)), [np.ones(2), np.zeros(2)], 3.5, np.float32(2)])
def test_asarray_of_lists_and_scalars(value):
    array = get_backend("cpu").asarray(value)
    assert type(array) is np.ndarray
    np.testing.assert_array_equal(array, np.array(value))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 3)])
def test_asarray_of_torch(dtype, shape):
    tensor = torch.ones(shape, dtype=getattr(torch, dtype))
    array = get_backend("cpu").asarray(tensor)
    assert type(array) is np.ndarray
    np.testing.assert_array_equal(array, tensor.numpy(), strict=True)
    if tensor.numel():
        assert array.ctypes.data == tensor.data_ptr()  # no copy


def test_asarray_of_torch_views():
    ops = get_backend("cpu")
    tensor = torch.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(ops.asarray(tensor), tensor.numpy())
    np.testing.assert_array_equal(ops.asarray(tensor.t()[::2]), tensor.numpy().T[::2])
    np.testing.assert_array_equal(ops.asarray(tensor.requires_grad_().detach()), tensor.detach().numpy())


def test_a_layer_takes_torch_tensors():
    lstm = gpurnn.LSTM(3, 4, backend="cpu", dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((5, 2, 3))
    output, _ = lstm(torch.from_numpy(x))
    np.testing.assert_array_equal(output, lstm(x)[0])


def test_asarray_of_host_dlpack():
    array = np.arange(6.0).reshape(2, 3)
    taken = get_backend("cpu").asarray(HostOnly(array))
    np.testing.assert_array_equal(taken, array)
    assert np.shares_memory(taken, array)


@pytest.mark.parametrize("dlpack", [True, False])
def test_gpu_arrays_are_refused_by_name(dlpack):
    with pytest.raises(BackendError, match=f"^targets: is on a GPU, but the layer's backend is {CPU!r}"):
        get_backend("cpu").asarray(OnGPU(dlpack), "targets")
    lstm = gpurnn.LSTM(2, 3, backend="cpu")
    with pytest.raises(BackendError, match=f"is on a GPU, but the layer's backend is {CPU!r}"):
        lstm(OnGPU(dlpack))


@pytest.mark.parametrize("kind", ["bfloat16", "sparse"])
def test_what_dlpack_cannot_hand_over_is_refused_by_name(kind):
    tensor = torch.ones(2).to_sparse() if kind == "sparse" else torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="^targets: cannot be handed over by Tensor"):
        get_backend("cpu").asarray(tensor, "targets")


def test_host_arrays_reach_the_gpu(machine):
    """CuPy's own from_dlpack refuses host memory: it goes through NumPy. (The fake has no from_dlpack at all.)"""
    ops = Ops(machine.cupy, "cupy")
    for value in (np.ones(2), [1.0, 1.0], torch.ones(2, dtype=torch.float64), HostOnly(np.ones(2))):
        array = ops.asarray(value)
        assert type(array) is FakeArray
        np.testing.assert_array_equal(ops.to_numpy(array), np.ones(2))


def test_gpu_arrays_reach_the_gpu(machine):
    device = OnGPU(dlpack=True)
    machine.cupy.from_dlpack = lambda value: machine.cupy.arange(2) if value is device else pytest.fail("another")
    np.testing.assert_array_equal(Ops(machine.cupy, "cupy").asarray(device), [0, 1])
    mine = machine.cupy.arange(3)
    assert Ops(machine.cupy, "cupy").asarray(mine) is mine


def test_asfloat_names_the_argument_and_the_conversion():
    ops = get_backend("cpu")
    x = np.ones(2, "float32")
    assert ops.asfloat(x, np.dtype("float32"), "x") is x
    with pytest.raises(DtypeError, match=r"^x: dtype \(float32\) .*\(float64\).*x = x.astype\('float64'\)"):
        ops.asfloat(x, np.dtype("float64"), "x")


@pytest.mark.gpu
def test_a_real_gpu():
    """What the fakes stand for."""
    cupy = get_backend("cuda").xp
    ops = get_backend("cupy")
    for value in (np.ones(2), [1.0, 1.0], torch.ones(2, dtype=torch.float64), cupy.ones(2)):
        array = ops.asarray(value)
        assert isinstance(array, cupy.ndarray)
        np.testing.assert_array_equal(ops.to_numpy(array), np.ones(2))
    ops.synchronize()
    with pytest.raises(BackendError, match="x: is on a GPU"):
        get_backend("cpu").asarray(cupy.ones(2), "x")
    with pytest.raises(BackendError, match="some of these arrays"):
        backend.array_ops(cupy.ones(2), np.ones(2))


@pytest.mark.parametrize("missing", ["nvrtc", "cublas"])
def test_kernels_need_libraries_of_their_own(machine, missing):
    """CuPy may do without: the generic code on the GPU still works then."""
    machine.libraries.remove(missing)
    found = gpurnn.backends()
    assert found["cupy"] is None and found["cuda"] == f"CUDA's library {missing} was not found"
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot work here: CUDA's library {missing} was not found"):
        get_backend("cuda")
    assert get_backend("cupy").name == "cupy" and get_backend("auto").name == CPU
