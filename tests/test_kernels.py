"""gpurnn/_kernels.py without a GPU: signatures, checked launches, and what CupyDevice asks of cuBLAS and of CuPy."""

import ctypes
import itertools
import types

import numpy as np
import pytest

from gpurnn import _kernels
from gpurnn._kernels import Argument, CupyDevice, Kernels, Rows, signature
from gpurnn.errors import BackendError, DtypeError, ShapeError


class Device:
    """Takes any launch and remembers it; its arrays are NumPy's."""

    xp = types.SimpleNamespace(ndarray=np.ndarray)

    def __init__(self):
        self.launches, self.loads = [], []

    def load(self, file, expression):
        self.loads.append((file, expression))
        return lambda grid, block, args, shared_mem=0: self.launches.append((grid, block, args, shared_mem))


# ---- signatures


def test_signatures_come_from_the_source():
    found = {a.name: a for a in signature("step.cu", "step_forward", ("LstmCell", "__half"))}
    assert found["T_"] == Argument("T_", "int32", pointer=False, optional=False)
    assert found["gates"] == Argument("gates", "float16", pointer=True, optional=False)
    assert found["lengths"] == Argument("lengths", "int32", pointer=True, optional=True)
    assert found["ah"] == Argument("ah", "float32", pointer=True, optional=False)
    assert signature("step.cu", "step_forward", ("LstmCell", "double"))[9].dtype == "float64"


def test_every_kernel_has_a_signature():
    from cuda_on_cpu.kernel_list import KERNELS

    for file, expressions in KERNELS.items():
        for expression in expressions:
            kernel, _, inside = expression.partition("<")
            assert signature(file, kernel, tuple(filter(None, map(str.strip, inside[:-1].split(",")))))


def test_unknown_kernels_and_wrong_template_arguments():
    with pytest.raises(KeyError, match="no kernel step_sideways"):
        signature("step.cu", "step_sideways", ("float",))
    with pytest.raises(TypeError, match="CellOf, T"):
        signature("step.cu", "step_forward", ("float",))


# ---- launches

PROJECT = ("step.cu", "step_project", ("float",), (1, 1, 1), (32, 4))


def project(*changes):
    h, output = np.zeros((1, 4, 2, 3), np.float32), np.zeros((3, 2, 3), np.float32)
    args = [3, 2, 3, 0, 0, None, h, output]
    for place, value in changes:
        args[place] = value
    device = Device()
    Kernels(device).launch(*PROJECT, *args)
    return device.launches[0]


def test_scalars_are_cast_and_null_is_an_address():
    _, _, args, _ = project()
    assert [type(arg) for arg in args[:6]] == [np.int32] * 5 + [np.uint64]
    assert args[5] == 0


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(OverflowError, match="P = 2147483648 does not fit into int32"):
        project((2, 2**31))
    with pytest.raises(OverflowError, match="P = 2.5 does not fit into int32"):
        project((2, 2.5))
    with pytest.raises(OverflowError, match="P = nan does not fit into int32"):
        project((2, float("nan")))
    with pytest.raises(DtypeError, match="h should be float32, got float64"):
        project((6, np.zeros((1, 4, 2, 3))))
    with pytest.raises(ShapeError, match="h should be C-contiguous"):
        project((6, np.zeros((1, 4, 3, 2), np.float32).swapaxes(2, 3)))
    project((6, Rows(np.zeros((1, 4, 3, 2), np.float32).swapaxes(2, 3))))
    with pytest.raises(TypeError, match="h may not be None"):
        project((6, None))
    with pytest.raises(TypeError, match="should be an array on the device, got list"):
        project((6, [1.0]))
    with pytest.raises(TypeError, match="expected 8 arguments, got 1"):
        Kernels(Device()).launch(*PROJECT, 1)


@pytest.mark.parametrize(
    "dtype, fits, others",
    [
        ("float32", [0.1, 2, float("inf"), np.float64(1e38)], [1e300, -1e300]),
        ("float64", [0.1, 1e300, float("inf")], []),
        ("bool", [True, False, 1, np.True_], [2, -1, 0.5]),
        ("uint8", [0, 255, 3.0, np.int64(7)], [-1, 256]),
        ("int64", [2**63 - 1, -(2**63)], [2**63]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_scalars_of_every_kind(dtype, fits, others):
    convert = Kernels(Device())._converter("k", Argument("rate", dtype, pointer=False, optional=False))
    for value in fits:
        assert convert(value) == np.dtype(dtype).type(value) and convert(value).dtype == dtype
    for value in others:
        with pytest.raises(OverflowError, match=f"k: rate = .* does not fit into {dtype}"):
            convert(value)


def test_nan_is_a_float():
    convert = Kernels(Device())._converter("k", Argument("rate", "float32", pointer=False, optional=False))
    assert np.isnan(convert(float("nan")))


def test_empty_and_too_large_grids():
    device = Device()
    kernels = Kernels(device)
    args = (3, 2, 3, 0, 0, None, np.zeros((1, 4, 2, 3), np.float32), None)
    kernels.launch("step.cu", "step_project", ("float",), (1, 0, 1), (32, 4), *args)
    assert not device.launches
    with pytest.raises(ValueError, match="more than 65535 blocks"):
        kernels.launch("step.cu", "step_project", ("float",), (1, 65536, 1), (32, 4), *args)
    kernels.launch("step.cu", "step_project", ("float",), (1, 1, 1), (32, 4), *args)
    kernels.launch("step.cu", "step_project", ("float",), (1, 1, 1), (32, 4), *args)
    assert device.loads == [("step.cu", "step_project<float>")]


# ---- cuBLAS: the calls are carried out by NumPy on column-major memory, as cuBLAS documents them

NUMBERS = {0: np.float32, 1: np.float64, 2: np.float16}


class Data:
    def __init__(self, ptr):
        self.ptr = ptr


class FakeArray:
    """A NumPy array with CuPy's ``data.ptr``."""

    def __init__(self, host):
        self.host = host
        self.data = Data(host.ctypes.data)
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.ndim, self.itemsize = host.ndim, host.itemsize

    def swapaxes(self, a, b):
        return FakeArray(self.host.swapaxes(a, b))

    def fill(self, value):
        self.host.fill(value)

    def __len__(self):
        return len(self.host)


def column_major(ptr, dtype, rows, columns, leading):
    """The (rows, columns) matrix that BLAS sees at an address."""
    assert leading >= max(1, rows)
    count = leading * (columns - 1) + rows
    memory = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(ptr)
    flat = np.frombuffer(memory, dtype)
    item = flat.itemsize
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (item, leading * item))


class Blas(types.SimpleNamespace):
    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT = 0, 1, -1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77

    def gemmEx(self, handle, ta, tb, m, n, k, alpha, A, At, lda, B, Bt, ldb, beta, C, Ct, ldc, compute, algo):
        wide = {68: np.float32, 70: np.float64, 77: np.float32}[compute]
        one, factor = (
            np.frombuffer((ctypes.c_char * np.dtype(wide).itemsize).from_address(p), wide)[0] for p in (alpha, beta)
        )
        a = column_major(A, NUMBERS[At], *((k, m) if ta else (m, k)), lda)
        b = column_major(B, NUMBERS[Bt], *((n, k) if tb else (k, n)), ldb)
        c = column_major(C, NUMBERS[Ct], m, n, ldc)
        product = one * ((a.T if ta else a).astype(wide) @ (b.T if tb else b).astype(wide))
        c[...] = product if factor == 0 else product + factor * c
        self.calls += 1
        self.compute = compute

    def gemmStridedBatchedEx(
        self, handle, ta, tb, m, n, k, alpha, A, At, lda, sa, B, Bt, ldb, sb, beta, C, Ct, ldc, sc, count, compute, algo
    ):
        for d in range(count):
            places = (p + d * s * np.dtype(NUMBERS[t]).itemsize for p, s, t in ((A, sa, At), (B, sb, Bt), (C, sc, Ct)))
            a, b, c = places
            self.gemmEx(handle, ta, tb, m, n, k, alpha, a, At, lda, b, Bt, ldb, beta, c, Ct, ldc, compute, algo)


def fake_cupy(**more):
    runtime = types.SimpleNamespace(CUDA_R_32F=0, CUDA_R_64F=1, CUDA_R_16F=2, CUDA_R_16BF=14)
    cuda = types.SimpleNamespace(
        runtime=runtime, cublas=Blas(calls=0), device=types.SimpleNamespace(get_cublas_handle=lambda: 0), **more
    )
    return types.SimpleNamespace(cuda=cuda, ndarray=FakeArray, __version__="14.0")


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
@pytest.mark.parametrize("types_", ["float32", "float64", "float16", "float16 to float32"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_products_reach_cublas_rightly(batch, shape, types_, accumulate):
    rng = np.random.default_rng(0)
    M, N, K = shape
    dtype, _, out_dtype = types_.partition(" to ")
    device = CupyDevice(fake_cupy())
    for a, b, out in itertools.product(
        layouts((*batch, M, K), dtype, rng),
        layouts((*batch, K, N), dtype, rng),
        layouts((*batch, M, N), out_dtype or dtype, rng),
    ):
        wide = np.float64
        product = a.host.astype(wide) @ b.host.astype(wide)
        expected = product + out.host.astype(wide) if accumulate else product
        device.gemm(a, b, out, accumulate)
        np.testing.assert_allclose(
            out.host,
            expected,
            rtol=4e-3 if out.dtype == np.float16 else 1e-5,
            atol=1e-2 if out.dtype == np.float16 else 1e-5,
        )


def test_products_of_nothing():
    device = CupyDevice(fake_cupy())
    out = FakeArray(np.ones((2, 3), np.float32))
    device.gemm(FakeArray(np.ones((2, 0), np.float32)), FakeArray(np.ones((0, 3), np.float32)), out, accumulate=True)
    assert (out.host == 1).all()
    device.gemm(FakeArray(np.ones((2, 0), np.float32)), FakeArray(np.ones((0, 3), np.float32)), out)
    assert (out.host == 0).all()
    device.gemm(*(FakeArray(np.ones(s, np.float32)) for s in ((0, 2), (2, 3), (0, 3))))
    assert device.xp.cuda.cublas.calls == 0


def test_products_that_cublas_has_not():
    device = CupyDevice(fake_cupy())

    def array(shape, dtype=np.float32):
        return FakeArray(np.ones(shape, dtype))

    with pytest.raises(ValueError, match="shapes do not fit"):
        device.gemm(array((2, 3)), array((4, 5)), array((2, 5)))
    with pytest.raises(ValueError, match="cannot go to float64"):
        device.gemm(array((2, 3)), array((3, 5)), array((2, 5), np.float64))
    with pytest.raises(ValueError, match="a: BLAS needs contiguous rows or columns"):
        device.gemm(FakeArray(np.ones((4, 6), np.float32)[::2, ::2]), array((3, 5)), array((2, 5)))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_vectors_that_repeat_or_run_backwards_are_refused(shape, batch):
    """BLAS would read what lies behind their first number."""
    device = CupyDevice(fake_cupy())
    M, K = shape
    b, out = np.ones((*batch, K, 3), np.float32), np.zeros((*batch, M, 3), np.float32)
    values = np.ones((*batch, *shape), np.float32)
    repeated = np.broadcast_to(np.float32(2), values.shape)
    for a in (repeated, values[..., ::-1, :] if M > 1 else values[..., ::-1]):
        with pytest.raises(ValueError, match="a: BLAS needs contiguous rows or columns"):
            device.gemm(FakeArray(a), FakeArray(b), FakeArray(out))
    assert device.xp.cuda.cublas.calls == 0


def test_float32_is_computed_in_tf32_only_where_asked():
    device = CupyDevice(fake_cupy())
    for dtype, compute, by_tf32 in (("float32", 68, 77), ("float64", 70, 70), ("float16", 68, 68)):
        for tf32, expected in ((False, compute), (True, by_tf32)):
            device.gemm(*(FakeArray(np.ones((2, 2), dtype)) for _ in range(3)), tf32=tf32)
            assert device.xp.cuda.cublas.compute == expected


# ---- loading and recording


def test_a_compiler_error_is_a_backend_error_with_its_line():
    class Module:
        def __init__(self, **options):
            assert options["name_expressions"] == ("step_forward<LstmCell, float>",)
            assert '#line 1 "common.cuh"' in options["code"]

        def get_function(self, name):
            raise RuntimeError('warm words\nstep.cu(12): error: identifier "x" is undefined\n1 error detected')

    cupy = fake_cupy(Device=lambda: types.SimpleNamespace(compute_capability="75"))
    cupy.RawModule = Module
    with pytest.raises(BackendError, match=r'for sm_75 with CuPy 14.0:\nstep.cu\(12\): error: identifier "x"'):
        CupyDevice(cupy).load("step.cu", "step_forward<LstmCell, float>")


def test_blocks_that_cannot_be_there_at_once_are_a_backend_error():
    asked = []

    class Module:
        def __init__(self, **options):
            asked.append(options["enable_cooperative_groups"])

        def get_function(self, name):
            def kernel(grid, block, args, shared_mem=0):
                raise ValueError("too large")

            return kernel

    device = CupyDevice(types.SimpleNamespace(RawModule=Module, __version__="14.0"))
    device.__dict__["arch"] = 90
    with pytest.raises(BackendError, match=r"grid_forward<.*: \(132, 1, 1\) blocks cannot be there at once: too large"):
        device.load("grid.cu", "grid_forward<LstmCell, float>")((132, 1, 1), (256,), (), cooperative=True)
    with pytest.raises(ValueError, match="too large"):
        device.load("step.cu", "step_project<float>")((1, 1, 1), (256,), ())
    assert asked == [True, False]


class FakeStream:
    """A stream with CuPy's manners: a capture that CUDA has invalidated must be ended, and is_capturing() raises."""

    state = "idle"

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
    device = CupyDevice(fake_cupy(Stream=FakeStream))
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


def test_the_sources_are_one_text():
    text = _kernels.kernel_source("step.cu")
    assert '\n#include "' not in text
    assert text.count("struct LstmCell") == 1


def test_the_stream_is_the_current_one():
    device = CupyDevice(fake_cupy(get_current_stream=lambda: types.SimpleNamespace(ptr=17)))
    assert device.stream == 17
