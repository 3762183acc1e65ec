"""backends/cuda/cublas.py without a GPU: a small library in its place records what it is called with, and NumPy carries
that out on column-major memory."""

import gc
import itertools
import shutil
import threading
import time
import types
import weakref

import numpy as np
import pytest
from cuda_on_cpu.cuda import Cuda, Stream, StubCublas, last_call, multiply, stub
from helpers import assert_close

from gpurnn.backends.cuda import libraries
from gpurnn.backends.cuda.cublas import Cublas, load
from gpurnn.backends.cuda.device import CupyDevice
from gpurnn.dtypes import check_dtype
from gpurnn.errors import BackendError

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")


class FakeArray:
    """A NumPy array with CuPy's ``data.ptr``."""

    def __init__(self, host):
        self.host = host
        self.data = types.SimpleNamespace(ptr=host.ctypes.data)
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.ndim, self.itemsize, self.nbytes = host.ndim, host.itemsize, host.nbytes

    def swapaxes(self, a, b):
        return FakeArray(self.host.swapaxes(a, b))

    def fill(self, value):
        self.host.fill(value)

    def __len__(self):
        return len(self.host)


def fake_cupy():
    return types.SimpleNamespace(cuda=Cuda(), empty=lambda size, dtype: FakeArray(np.empty(size, dtype)))


def fake_blas():
    """A binding over the stub that computes at once; ``calls``: the numbers of all calls."""
    calls = []

    def did(call, multiply):
        calls.append(call)
        multiply()

    blas = StubCublas(fake_cupy(), did)
    blas.calls = calls
    return blas


def layouts(shape, dtype, rng):
    """The same numbers by rows, by columns, and as a part of something wider; batches also with gaps."""
    values = rng.normal(size=shape).astype(dtype)
    for by_rows, wider in itertools.product((True, False), (0, 3)):
        *batch, rows, columns = shape
        inner = (rows, columns + wider) if by_rows else (columns, rows + wider)
        memory = np.full((*[2 * size for size in batch], *inner), np.nan, dtype)
        view = memory[..., :columns] if by_rows else memory[..., :rows].swapaxes(-1, -2)
        view = view[::2] if batch else view
        view[...] = values
        yield FakeArray(view)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("types_", ["float32", "float64", "float16", "float16 to float32", "bfloat16 to float32"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_products_reach_cublas_rightly(batch, shape, types_, accumulate):
    rng = np.random.default_rng(0)
    M, N, K = shape
    dtype, _, out_dtype = types_.partition(" to ")
    dtype = check_dtype(dtype)
    blas = fake_blas()
    for a, b, out in itertools.product(
        layouts((*batch, M, K), dtype, rng),
        layouts((*batch, K, N), dtype, rng),
        layouts((*batch, M, N), out_dtype or dtype, rng),
    ):
        wide = np.float64
        product = a.host.astype(wide) @ b.host.astype(wide)
        expected = product + out.host.astype(wide) if accumulate else product
        blas.product(a, b, out, accumulate)()
        assert_close(out.host.astype(wide), expected, K + 2, dtype=out.dtype.name)  # K products, what was there, out


def test_products_of_nothing():
    blas = fake_blas()
    out = FakeArray(np.ones((2, 3), np.float32))
    empty = FakeArray(np.ones((2, 0), np.float32)), FakeArray(np.ones((0, 3), np.float32))
    blas.product(*empty, out, accumulate=True)()
    assert (out.host == 1).all()
    blas.product(*empty, out)()
    assert (out.host == 0).all()
    blas.product(*(FakeArray(np.ones(s, np.float32)) for s in ((0, 2), (2, 3), (0, 3))))()
    assert blas.calls == []


def test_products_that_cublas_has_not():
    blas = fake_blas()

    def array(shape, dtype=np.float32):
        return FakeArray(np.ones(shape, dtype))

    with pytest.raises(ValueError, match="shapes do not fit"):
        blas.product(array((2, 3)), array((4, 5)), array((2, 5)))
    with pytest.raises(ValueError, match="cannot go to float64"):
        blas.product(array((2, 3)), array((3, 5)), array((2, 5), np.float64))
    with pytest.raises(ValueError, match="a: BLAS needs contiguous rows or columns"):
        blas.product(FakeArray(np.ones((4, 6), np.float32)[::2, ::2]), array((3, 5)), array((2, 5)))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_vectors_that_repeat_or_run_backwards_are_refused(shape, batch):
    """BLAS would read what lies behind their first number."""
    blas = fake_blas()
    M, K = shape
    b, out = np.ones((*batch, K, 3), np.float32), np.zeros((*batch, M, 3), np.float32)
    values = np.ones((*batch, *shape), np.float32)
    repeated = np.broadcast_to(np.float32(2), values.shape)
    for a in (repeated, values[..., ::-1, :] if M > 1 else values[..., ::-1]):
        with pytest.raises(ValueError, match="a: BLAS needs contiguous rows or columns"):
            blas.product(FakeArray(a), FakeArray(b), FakeArray(out))
    assert blas.calls == []


def test_float32_is_computed_in_tf32_only_where_asked():
    for dtype, compute, by_tf32 in (("float32", 68, 77), ("float64", 70, 70), ("float16", 68, 68)):
        for tf32, expected in ((False, compute), (True, by_tf32)):
            blas = fake_blas()
            blas.product(*(FakeArray(np.ones((2, 2), dtype)) for _ in range(3)), tf32=tf32)()
            assert blas.calls[0][-2:] == [expected, -1]


def test_sizes_that_are_no_int_are_refused():
    """ctypes would cut them off in silence."""
    rows = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (2, 1), (2**33, 4))
    with pytest.raises(ValueError, match="cuBLAS counts to 2147483647"):
        fake_blas().product(FakeArray(rows), FakeArray(np.ones((1, 3), np.float32)), FakeArray(np.ones((2, 3), "f4")))


# ---- handles, streams, workspaces


def square(value=1.0):
    return FakeArray(np.full((2, 2), value, np.float32))


def test_each_stream_has_a_handle_and_a_workspace():
    xp, setup, seen = fake_cupy(), [], []
    blas, library = StubCublas(xp, lambda call, multiply: seen.append(call[1])), stub()

    def noted(name):
        def call(*arguments):
            setup.append((name, *(getattr(value, "value", value) for value in arguments)))
            return getattr(library, name)(*arguments)

        return call

    names = ("cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasSetMathMode")
    blas._library = types.SimpleNamespace(
        cublasCreate_v2=library.cublasCreate_v2, stub_last=library.stub_last, **{name: noted(name) for name in names}
    )
    run = blas.product(square(), square(), square())
    other = xp.cuda.Stream(non_blocking=True)
    run()
    with other:
        run()
        run()
    run()
    one, two = seen[0], seen[1]
    assert seen == [one, two, two, one] and one != two
    assert tuple(call[0] for call in setup) == 2 * names  # in this order: a stream resets the workspace
    assert [call[2] for call in setup if "Stream" in call[0]] == [0, other.ptr]
    spaces = [call[2:] for call in setup if "Workspace" in call[0]]
    assert spaces[0][0] != spaces[1][0] and spaces[0][1] == blas.workspace_bytes
    assert [call[2] for call in setup if "Math" in call[0]] == [16, 16]  # sums of 16-bit products stay float32
    setup.clear()
    blas.lend_workspace(other.ptr, 0)
    assert setup == [("cublasSetWorkspace_v2", two, *spaces[0])]


@pytest.mark.parametrize("during", ["a handle", "a matrix product"])
def test_what_cublas_refuses_is_a_backend_error(during):
    blas, library = fake_blas(), stub()
    run = blas.product(square(), square(), square())
    if during == "a matrix product":
        run()
    library.stub_fail(13)
    try:
        with pytest.raises(BackendError, match=rf"cuBLAS refuses {during}: CUBLAS_STATUS_OF_THE_STUB \(13\)"):
            run()
    finally:
        library.stub_fail(0)
    run()


def test_every_argument_arrives():
    """One product of each kind, number by number, as cublas_api.h lists them."""
    blas = fake_blas()
    a, b, out = (FakeArray(np.ones(shape, np.float32)) for shape in ((2, 3), (3, 5), (2, 5)))
    blas.product(a, b, out, accumulate=True)()
    kind, _, op_a, op_b, m, n, k, alpha, *rest = blas.calls[0]
    assert (kind, op_a, op_b, m, n, k) == (4, 0, 0, 5, 2, 3)  # out^T (5, 2) = b^T a^T: columns are our rows
    assert rest[:8] == [b.data.ptr, 0, 5, 0, a.data.ptr, 0, 3, 0]
    assert rest[9:] == [out.data.ptr, 0, 5, 0, 1, 68, -1] and rest[8] == alpha  # 1 and 1
    a, b, out = (FakeArray(np.ones(shape, np.float16)) for shape in ((4, 2, 3), (4, 3, 5), (4, 2, 5)))
    blas.product(a, b.swapaxes(1, 2).swapaxes(1, 2), out)()
    _, _, _, _, _, _, _, alpha, *rest = blas.calls[1]
    assert rest[:8] == [b.data.ptr, 2, 5, 15, a.data.ptr, 2, 3, 6]
    assert rest[9:] == [out.data.ptr, 2, 5, 10, 4, 68, -1] and rest[8] != alpha


def test_a_wrong_argument_would_be_seen():
    blas = fake_blas()
    a, b, out = (FakeArray(np.random.default_rng(0).normal(size=shape)) for shape in ((2, 3), (3, 5), (2, 5)))
    blas.product(a, b, out)()
    np.testing.assert_allclose(out.host, a.host @ b.host)
    for place in (4, 5, 8, 12, 17):  # m, n, and the three addresses
        call = list(blas.calls[0])
        call[place] += 8 if place >= 8 else -1
        out.host[...] = 0
        multiply(call)
        assert not np.allclose(out.host, a.host @ b.host)
    assert last_call(stub())[0] == 4


# ---- under capture


def captured_device(blas_of):
    xp = fake_cupy()
    device = CupyDevice(xp)

    def did(call, multiply):
        xp.cuda.captured.append(multiply) if xp.cuda.captured is not None else multiply()

    device.blas = blas_of(xp, did)
    return device


def test_products_are_recorded_and_replayed():
    device = captured_device(StubCublas)
    a, b, out = square(2), square(3), square(0)
    graph = device.record(device.product(a, b, out))
    assert (out.host == 0).all()
    a.host[...] = 1
    graph.launch()
    assert (out.host == 6).all()


def test_cupys_own_wrapper_is_refused():
    """As it was before the library had a binding of its own: no loop with a product in it was ever recorded."""

    class Wrapper(Cublas):
        def __init__(self, xp, did):
            super().__init__(xp, stub(), 1024)

        def _call(self, function, arguments):
            self.xp.cuda.cublas.gemmEx(*arguments)

    device = captured_device(Wrapper)
    with pytest.raises(BackendError, match="cuBLAS API during stream capture is currently unsupported"):
        device.record(device.product(square(), square(), square()))
    assert device.xp.cuda.captured is None


def test_a_graph_works_in_the_memory_of_the_stream_that_it_is_for():
    device = captured_device(StubCublas)
    other, lent = device.xp.cuda.Stream(non_blocking=True), []
    lend = device.blas.lend_workspace
    device.blas.lend_workspace = lambda stream, lender: (lent.append((stream, lender)), lend(stream, lender))
    product = device.product(square(), square(), square())
    device.record(product)
    with other:
        device.record(product)
    recorder = device._recorder.ptr
    assert lent == [(recorder, 0), (recorder, other.ptr)]


@pytest.mark.long
def test_the_arrays_of_a_product_live_as_long_as_it():
    blas = fake_blas()
    a, b, out = square(2), square(3), square(0)
    held = [weakref.ref(array) for array in (a, b, out)]
    run = blas.product(a, b, out)
    del a, b, out
    gc.collect()
    run()
    assert (held[2]().host == 12).all()
    del run
    gc.collect()
    assert not any(array() for array in held)


def test_one_binding_for_every_kind_of_the_same_shape():
    """What is remembered of a product is not taken for another one's."""
    blas = fake_blas()
    kinds = [("float32", False), ("float32", True), ("float64", False), ("float16", False), ("bfloat16", False)]
    for accumulate in (False, True):
        for dtype, tf32 in kinds * 2:
            arrays = [FakeArray(np.full((2, 2), value).astype(check_dtype(dtype))) for value in (1, 2, 4)]
            blas.product(*arrays, accumulate, tf32)()
            assert (arrays[2].host.astype(float) == (8 if accumulate else 4)).all()
    told = [(call[9], call[-2]) for call in blas.calls]  # the type of A, and what is computed in
    assert told == [(0, 68), (0, 77), (1, 70), (2, 68), (14, 68)] * 4


def test_two_threads_open_one_handle():
    xp, opened = fake_cupy(), []
    blas = StubCublas(xp, lambda call, multiply: None)
    plain = blas._open
    blas._open = lambda *given: (opened.append(0), time.sleep(0.05), plain(*given))[-1]
    threads = [threading.Thread(target=blas.product(square(), square(), square())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


def test_the_default_stream_of_each_thread_has_a_handle_of_its_own():
    xp = fake_cupy()
    blas = StubCublas(xp, lambda call, multiply: None)
    xp.cuda.streams[2] = xp.cuda.entered[0] = Stream(xp.cuda, 2)
    blas._of(2)
    thread = threading.Thread(target=blas._of, args=(2,))
    thread.start()
    thread.join()
    xp.cuda.runtime.getDevice = lambda: 1
    blas._of(2)
    assert len({handle.value for handle, _ in blas._handles.values()}) == 3


@pytest.mark.parametrize("arch, megabytes", [(75, 4), (89, 4), (90, 32), (100, 32), (120, 12)])
def test_workspaces_are_as_large_as_cublas_recommends(arch, megabytes, monkeypatch):
    monkeypatch.setattr(libraries, "load", lambda name: stub())
    assert load(fake_cupy(), arch).workspace_bytes == megabytes << 20

    def missing(name):
        raise OSError(f"CUDA's library {name} was not found")

    monkeypatch.setattr(libraries, "load", missing)
    with pytest.raises(BackendError, match="library cublas was not found"):
        load(fake_cupy(), arch)


def test_addresses_arrive_whole():
    """A Python int that ctypes takes for a C int would lose its upper half."""
    xp = fake_cupy()
    blas = StubCublas(xp, lambda call, multiply: None)
    high = Stream(xp.cuda, 0x7123_4567_89AB)
    for function, value in (
        (blas._library.cublasSetStream_v2, high.ptr),
        (blas._library.cublasSetWorkspace_v2, high.ptr),
    ):
        function(*((5, value) if function is blas._library.cublasSetStream_v2 else (5, value, 1 << 40)))
        kind, handle, address, *more = last_call(stub())
        assert (handle, address, more) == (5, high.ptr, [] if kind == 1 else [1 << 40])


def test_two_threads_record_one_after_the_other():
    device = captured_device(StubCublas)
    inside, most = [], []

    def slow():
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    threads = [threading.Thread(target=device.record, args=(slow,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
