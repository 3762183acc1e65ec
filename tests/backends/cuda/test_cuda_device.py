"""The emulated device: CuPy's rules, memory that knows what was written, products, recording."""

import inspect

import numpy as np
import pytest
from cuda_on_cpu import emulator
from cuda_on_cpu.device import _METHODS, CREATORS, FUNCTIONS, Array, EmulatedDevice

from gpurnn.errors import BackendError

pytestmark = pytest.mark.emulated


@pytest.fixture
def device():
    return EmulatedDevice(emulator.Emulator())


# ---- the rules


def test_nothing_is_converted_silently(device):
    xp = device.xp
    a, host = xp.zeros((2, 3), "float32"), np.ones((2, 3), np.float32)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(a)
    for mixed in (
        lambda: a + host,
        lambda: host + a,
        lambda: xp.add(a, host),
        lambda: np.add(a, host),
        lambda: xp.concatenate([a, host]),
        lambda: a.__setitem__(Ellipsis, host),
        lambda: a.__iadd__(host),
    ):
        with pytest.raises(TypeError, match="Unsupported type"):
            mixed()
    assert isinstance(a + 1, Array) and isinstance(np.float32(2) * a, Array) and isinstance(np.add(a, 1), Array)
    assert a.sum().shape == () and float(xp.asarray(host).sum()) == 6


def test_only_what_cupy_has(device):
    xp = device.xp
    a = xp.zeros(3)
    for missing in (lambda: xp.vdot, lambda: a.dot, lambda: xp.add.at):
        with pytest.raises(AttributeError):
            missing()
    with pytest.raises(TypeError, match="takes no keyword 'where'"):
        a.sum(where=True)


def test_the_tables_are_cupys():
    cupy = pytest.importorskip("cupy")
    for name, keywords in (FUNCTIONS | CREATORS).items():
        function = getattr(cupy, name)
        if not isinstance(function, cupy.ufunc):
            known = inspect.signature(function).parameters
            assert all(keyword in known or "kwargs" in known for keyword in keywords), name
    for name in _METHODS:
        assert hasattr(cupy.ndarray, name), name


def test_views_share_memory_and_copies_do_not(device):
    xp = device.xp
    a = xp.zeros((4, 3))
    a[1:3].T[0] = 5
    assert a.tolist() == [[0, 0, 0], [5, 0, 0], [5, 0, 0], [0, 0, 0]]
    b = a[xp.asarray(np.array([1, 2]))]
    b[...] = 7
    assert float(a.max()) == 5
    number = a[1, 0]
    a[1, 0] = 9
    assert number.shape == () and float(number) == 9  # a view, as in CuPy
    a += 1
    assert float(a.sum()) == 12 + 14


# ---- memory

COPY = """
__global__ void copy(int n, const float* x, float* y) { for (int k = 0; k < n; k++) y[k] = x[k]; }
"""


@pytest.fixture
def copy(device):
    kernel = device.emulator.load(COPY, name="copy", file="copy.cu")

    def run(x):
        y = device.xp.empty(x.size, "float32")
        kernel((1,), (1,), (np.int32(x.size), x._host, y._host))
        return y

    return run


def test_a_kernel_may_read_what_the_host_wrote_and_no_more(device, copy):
    xp = device.xp
    for write in (
        lambda a: a.fill(1),
        lambda a: a.__setitem__(Ellipsis, 1),
        lambda a: a.__setitem__(slice(None), xp.zeros(6, "float32")),
        lambda a: xp.multiply(xp.zeros(6, "float32"), 2, out=a),
        lambda a: xp.copyto(a, xp.zeros(6, "float32")),
        lambda a: a.reshape(2, 3).__setitem__((slice(None), slice(None)), 1),
    ):
        a = xp.empty(6, "float32")
        write(a)
        copy(a)
    a = xp.empty(6, "float32")
    a[:5] = 1
    with pytest.raises(emulator.KernelError, match="uninitialised"):
        copy(a)
    a = xp.empty((2, 3), "float32")
    a[:, ::2] = 1
    with pytest.raises(emulator.KernelError, match="uninitialised: .*byte 4 "):
        copy(a.reshape(6))
    a[:, 1] = 1
    copy(a.reshape(6))


def test_16_bit_neighbours_are_written_one_by_one(device):
    source = "__global__ void read(int k, const unsigned short* x, int* y) { *y = x[k]; }"
    kernel = device.emulator.load(source, name="read", file="read.cu")
    x, y = device.xp.empty(4, "uint16"), device.xp.empty(1, "int32")
    x[1] = 7
    kernel((1,), (1,), (np.int32(1), x._host, y._host))
    assert y.tolist() == [7]
    for k in (0, 2):
        with pytest.raises(emulator.KernelError, match="uninitialised"):
            kernel((1,), (1,), (np.int32(k), x._host, y._host))


# ---- recording


def test_recorded_launches_run_when_asked(device):
    xp = device.xp
    a, b, out = xp.ones((2, 2)), xp.ones((2, 2)), xp.zeros((2, 2))
    graph = device.record(lambda: device.gemm(a, b, out))
    assert float(out.sum()) == 0
    a[...] = 3
    graph.launch()
    assert float(out.sum()) == 24


def test_memory_of_the_common_pool_cannot_be_recorded(device):
    xp = device.xp
    a = xp.zeros(3)
    for problem in (lambda: xp.empty(3), lambda: a + 1, lambda: xp.zeros(3), lambda: a[xp.arange(2)]):
        with pytest.raises(BackendError, match="while a graph is recorded: it will be given to others"):
            device.record(problem)
    assert device.xp.cuda.captured is None


def test_array_code_is_recorded_and_replayed(device):
    """Nothing runs under capture; a replay reads what lies there then."""
    xp = device.xp
    a, ids, out, few = xp.ones((2, 3)), xp.asarray(np.array([1, 0, 1])), xp.zeros((3, 3)), xp.zeros(2)

    def work():
        rows = a[ids] * 2
        out[...] = xp.maximum(rows, xp.zeros((), "float64")) + xp.stack([rows[0]])
        few.fill(3)
        xp.copyto(few, a[:, 0], where=a[:, 0] > 4)
        nonlocal made
        made = rows

    made, memory = None, device.private_memory()
    graph = device.record(work, memory)
    assert not out.get().any() and not few.get().any() and np.isnan(made.get()).all()
    for first, second in ((1, 1), (1, 5), (7, 2)):
        a[0], a[1] = first, second
        graph.launch()
        np.testing.assert_array_equal(out.get()[:, 0], np.array([second, first, second]) * 2 + second * 2)
        np.testing.assert_array_equal(few.get(), [first if first > 4 else 3, second if second > 4 else 3])


def test_a_graph_holds_no_memory_but_its_own(device):
    xp = device.xp
    given, out = [xp.ones(3)], xp.zeros(3)
    graph = device.record(lambda: xp.add(given[0], 1, out=out))
    graph.launch()
    given.clear()
    with pytest.raises(RuntimeError, match="given back to the pool"):
        graph.launch()


def test_a_captured_stream_must_come_back(device):
    (other,) = device.streams(1)
    a = device.xp.zeros(3)

    def work(back):
        device.wait(other, None)
        with other:
            a.fill(1)
        if back:
            device.wait(None, other)

    device.record(lambda: work(True)).launch()
    assert a.get().all()
    with pytest.raises(BackendError, match="has not come back"):
        device.record(lambda: work(False))
    assert other.captured is None


def test_what_cupy_refuses_under_capture():
    """In CuPy's words; the same things work on a stream that does not capture."""
    device = EmulatedDevice(emulator.Emulator())
    xp = device.xp
    a, (_, refresh) = xp.ones((2, 2), "float32"), device.mirror(xp.zeros(1, "int32"))
    cublas = "calling cuBLAS API during stream capture is currently unsupported"
    to_host = "the current stream is capturing, so D2H transfers are disallowed"
    from_host = to_host.replace("D2H", "H2D")
    memory, counted = device.private_memory(), xp.asarray(np.ones((2, 2), bool))
    for problem, words in (
        (lambda: a @ a, cublas),
        (lambda: xp.matmul(a, a), cublas),
        (lambda: xp.cuda.cublas.gemmEx(0), cublas),
        (refresh, to_host),
        (a.get, to_host),
        (lambda: float(a.sum()), to_host),
        (lambda: xp.flatnonzero(a), to_host),
        (lambda: a[counted], to_host),
        (lambda: a.__setitem__(counted, 0), to_host),
        (lambda: xp.asarray([1.0]), from_host),
        (lambda: a.set(np.ones((2, 2), "float32")), from_host),
        (lambda: device.load("dropout.cu", "dropout_mask"), "loaded while a graph is recorded"),
        (device.synchronize, "not permitted when stream is capturing"),
        (xp.cuda.get_current_stream().begin_capture, "default"),
    ):
        with pytest.raises(BackendError, match=words):
            device.record(problem, memory)
    assert float((a @ a).sum()) == 8
    refresh()
    device.synchronize()
