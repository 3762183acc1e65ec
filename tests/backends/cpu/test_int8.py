"""Products with weights in 8 bits in compiled code: exact sums of whole numbers, and layers of such products."""

import shutil

import numpy as np
import pytest
from helpers import cpu_levels

import gpurnn
from gpurnn import cells
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.backends.cpu.ops import CpuOps
from gpurnn.backends.int8 import Int8Matrix
from gpurnn.module import float_model
from gpurnn.testing.allowed import worst_error
from gpurnn.testing.nested import leaves

if cpu_ops.load_native() is None:
    pytest.skip("gpurnn._native was not built", allow_module_level=True)

RNG = np.random.default_rng
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
MOST = {16: 127 * 256 + 127, 8: 127}
LEVELS = [pytest.param(CpuOps(cpu_ops.load_native()[0], level), id=f"level {level}") for level in cpu_levels()]


def product(ops, x, values, scales, bits):
    out = np.full((len(x), len(values)), np.nan, x.dtype)
    ops.int8_product(x, Int8Matrix(values, scales, bits), out)
    return out


def rounded(x, bits):
    """(whole numbers of so many bits, int64; the scale of each row): what a product makes of finite rows."""
    scales = (np.abs(x).max(axis=1) / x.dtype.type(MOST[bits])).astype(x.dtype)
    return np.rint(x / np.where(scales > 0, scales, 1)[:, None]).astype(np.int64), scales


def expected(x, values, scales, bits):
    """The product in int64; sums of up to 2,047 columns are rounded once, and added up in order."""
    whole, own = rounded(x, bits)
    K, k, total = x.shape[1], 0, np.zeros((len(x), len(values)), np.float32)
    while k < K:
        stop = K if K - k < 1984 + 64 else k + 1984
        total += (whole[:, k:stop] @ values[:, k:stop].astype(np.int64).T).astype(np.float32)
        k = stop
    return total.astype(x.dtype) * scales.astype(x.dtype) * own[:, None]


@pytest.mark.parametrize("dtype, bits", [("float32", 16), ("float64", 16), ("float32", 8), ("float64", 8)])
@pytest.mark.parametrize("ops", LEVELS)
def test_sums_are_exact(ops, dtype, bits):
    """With every instruction set, for sizes around those of vectors, of quarters of them, and of what is added up at
    once."""
    rng = RNG(0)
    for K in (1, 7, 31, 33, 63, 64, 65, 255, 257, 513, 2047, 2048, 4031, 4032):
        for N in (1, 5, 16, 37):
            values = rng.integers(-127, 128, (N, K)).astype(np.int8)
            scales = rng.uniform(0.001, 1, N).astype(np.float32)
            for B in (1, 2, 3, 5, 7, 49):
                x = rng.standard_normal((B, K)).astype(dtype)
                given = x, values, scales, bits
                np.testing.assert_array_equal(product(ops, *given), expected(*given), err_msg=f"K {K}, N {N}, B {B}")


@pytest.mark.parametrize("bits", MOST)
@pytest.mark.parametrize("ops", LEVELS)
def test_the_largest_sums_do_not_overflow(ops, bits):
    for K in (2047, 2048, 4031, 4032, 9000):
        values = np.where(np.arange(6)[:, None] % 2, 127, -127).repeat(K, 1).astype(np.int8)
        scales = np.ones(6, np.float32)
        x = np.array([[3.0], [-3.0]], np.float32).repeat(K, 1)
        found = product(ops, x, values, scales, bits)
        np.testing.assert_array_equal(found, expected(x, values, scales, bits))
        np.testing.assert_allclose(found[0], 3.0 * values.sum(axis=1, dtype=int), rtol=1e-6)


@pytest.mark.parametrize("dtype, bits", [("float32", 16), ("float64", 16), ("float32", 8)])
@pytest.mark.parametrize("ops", LEVELS)
def test_rows_of_zeros_and_of_infinity(ops, dtype, bits):
    """A row that is not finite gives NaN alone; one of tiny numbers, whose scale has no room in the dtype, zeros."""
    rng, limits = RNG(1), np.finfo(dtype)
    values = rng.integers(-127, 128, (20, 45)).astype(np.int8)
    values[3], scales = 0, np.append(np.zeros(1), np.ones(19)).astype(np.float32)
    x = rng.standard_normal((9, 45)).astype(dtype)
    plain = product(ops, x, values, scales, bits)
    x[1], x[2, 44], x[3, 0], x[4, 7] = 0, np.inf, -np.inf, np.nan
    x[5] *= limits.tiny
    x[6] *= limits.max / 1e4 / np.abs(x[6]).max()
    with np.errstate(all="ignore"):
        got, huge = product(ops, x, values, scales, bits), expected(x[6:7], values, scales, bits)
        numpy = x @ Int8Matrix(values, scales, bits).rounding_floats(dtype).T
    assert np.isnan(got[[2, 3, 4]]).all()
    np.testing.assert_array_equal(got[[1, 5]], 0)
    np.testing.assert_array_equal(got[6:7], huge)
    np.testing.assert_array_equal(got[[0, 7, 8]], plain[[0, 7, 8]])
    assert np.isfinite(huge).all() and not got[[0, 7, 8]][:, [0, 3]].any()
    if bits == 8:  # array code rounds likewise
        assert np.isnan(numpy[[2, 3, 4]]).all() and not numpy[[1, 5]].any()
        np.testing.assert_allclose(numpy[[0, 6, 7, 8]], got[[0, 6, 7, 8]], rtol=0, atol=1e-5 * np.abs(got[6]).max())


def test_rows_that_are_not_contiguous_and_none():
    ops, rng = LEVELS[-1].values[0], RNG(2)
    values, scales = rng.integers(-127, 128, (5, 12)).astype(np.int8), np.ones(5, np.float32)
    x = rng.standard_normal((6, 24)).astype("float32")[::2, ::2]
    np.testing.assert_array_equal(product(ops, x, values, scales, 16), expected(x, values, scales, 16))
    assert product(ops, x[:0], values, scales, 16).shape == (0, 5)


# ---- layers


class Rounding(np.ndarray):
    """Weights whose products with a matrix of states round each of its columns first."""

    bits = None

    def __array_finalize__(self, source):
        self.bits = self.bits or getattr(source, "bits", None)

    def __array_ufunc__(self, ufunc, method, first, second=None, out=None):
        assert ufunc is np.matmul and method == "__call__"
        whole, scales = rounded(np.ascontiguousarray(second.T), first.bits)
        return np.matmul(first.view(np.ndarray), whole.T * scales, out=out[0] if out else None)


def simulated(layer, x, bits, **given):
    """What ``layer``, in float64 on NumPy, computes with all that it multiplies rounded to so many bits."""
    for w in layer._weights(0):
        w.hh, w.hr = (None if array is None else array.view(Rounding) for array in (w.hh, w.hr))
        for array in filter(lambda array: array is not None, (w.hh, w.hr)):
            array.bits = bits
    whole, scales = rounded(x.reshape(-1, layer._weights(0)[0].ih.shape[1]), bits)  # a head may read a part of a row
    return layer((whole * scales[:, None]).reshape(x.shape), **given)


LAYERS = {
    "tanh": (gpurnn.RNN, {}),
    "relu": (gpurnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (gpurnn.LSTM, {}),
    "gru": (gpurnn.GRU, {}),
    "original": (gpurnn.GRU, {"reset_after": False}),
    "projection": (gpurnn.LSTM, {"proj_size": 9}),
    "means": (gpurnn.LSTM, {"layer_norm": True}),
    "heads": (gpurnn.GRU, {"heads": 3}),
    "heads apart": (gpurnn.LSTM, {"heads": 3, "mix_heads": False}),
    "no biases": (gpurnn.LSTM, {"bias": False}),
    "four states": (lambda *sizes, **options: gpurnn.Recurrent(cells.slstm, *sizes, **options), {}),
}
COMPILED = [pytest.param(name, marks=needs_compiler if name in ("means", "four states") else ()) for name in LAYERS]


def layers(name, I=12, H=21, bits=16, **options):
    """(the quantized layer, the same weights as floats in float64 on NumPy)."""
    make, more = LAYERS[name]
    small = make(I, H, seed=3, backend="cpu", **more, **options).quantize(activations=f"int{bits}")
    plain = make(I, H, seed=3, backend="numpy", dtype="float64", **more, **options)
    plain.load_state_dict(float_model(small).state_dict())
    return small, plain.eval()


@pytest.mark.parametrize("bidirectional, bits", [(False, 16), (True, 16), (True, 8)])
@pytest.mark.parametrize("name", COMPILED)
def test_a_layer_is_as_close_as_rounding_allows(name, bidirectional, bits):
    """To float64 with the same weights: its errors are at most twice those of rounding alone. Array code on NumPy
    rounds to 8 bits, too."""
    small, plain = layers(name, bits=bits, bidirectional=bidirectional)
    x, lengths = RNG(4).standard_normal((8, 5, 12)), [8, 0, 3, 7, 1]
    assert small.plan(8, 5).schedule == "compiled"
    reset = RNG(5).random((8, 5)) < 0.2

    def results(layer, x, run=None):
        output, state = (run or layer.__call__)(x, lengths=lengths, reset=reset)
        return {"output": output} | {f"state {n}": part for n, part in enumerate(leaves(state))}

    exact = results(plain, x)
    plain._made.clear()
    roundings = results(plain, x, lambda *args, **given: simulated(plain, *args, bits, **given))
    assert 0 < np.abs(roundings["output"] - exact["output"]).max() < {16: 1e-3, 8: 0.2}[bits]
    make, more = LAYERS[name]
    twin = make(12, 21, backend="numpy", dtype="float64", bidirectional=bidirectional, **more)
    twin = twin.quantize(activations=f"int{bits}")
    twin.load_state_dict(small.state_dict())
    for key, array in results(twin, x).items():  # whose weights are not rounded to float32 on the way
        np.testing.assert_allclose(array, (roundings if bits == 8 else exact)[key], rtol=0, atol=1e-6)
    found = results(small, x.astype("float32"))
    share, detail = worst_error(found, roundings, exact, "float32", None)
    assert share <= 1, detail
    if bits == 8:  # it does round, but for a few numbers to the same
        error, rounding = (np.abs(one - roundings["output"]).mean() for one in (found["output"], exact["output"]))
        assert error < rounding / 10


@pytest.mark.parametrize("name", ["lstm", "gru", "original", "projection"])
def test_a_layer_has_the_same_bits_for_any_number_of_threads(name, monkeypatch):
    for B, bits in ((1, 16), (1, 8), (30, 16)):
        small, _ = layers(name, 70, 256, bits)
        x = RNG(5).standard_normal((16, B, 70)).astype("float32")
        found = []
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("GPURNN_NUM_THREADS", threads)
            found.append(small(x)[0])
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("bits", MOST)
@pytest.mark.parametrize("name", COMPILED)
def test_a_sequence_has_the_same_bits_in_any_batch(name, bits):
    small, _ = layers(name, bits=bits)
    x = RNG(6).standard_normal((6, 55, 12)).astype("float32")
    whole, _ = small(x)
    for part in (slice(0, 1), slice(7, 10), slice(20, 55)):
        np.testing.assert_array_equal(small(np.ascontiguousarray(x[:, part]))[0], whole[:, part])
    state = None
    for t in range(6):  # and one timestep after another
        y, state = small.step(x[t], state)
        np.testing.assert_array_equal(y, whole[t])


@pytest.mark.parametrize("bits", MOST)
@pytest.mark.parametrize("name", COMPILED)
def test_a_stepper_has_the_bits_of_a_call(name, bits):
    small, _ = layers(name, bits=bits)
    model = gpurnn.Sequential(small, gpurnn.Linear(small(np.zeros((1, 1, 12), "float32"))[0].shape[2], 33, seed=1))
    model = model.quantize(activations=f"int{bits}").eval()
    x, stepper = RNG(7).standard_normal((5, 3, 12)).astype("float32"), model.stepper(3)
    assert stepper.compiled == (name != "heads apart")
    np.testing.assert_array_equal(np.stack([stepper.step(one) for one in x]), model(x)[0])


def test_nan_stays_in_its_sequence():
    small, _ = layers("gru")
    x = RNG(8).standard_normal((4, 3, 12)).astype("float32")
    clean, _ = small(x)
    x[2, 1, 5] = np.inf
    y, _ = small(x)
    assert np.isnan(y[2:, 1]).all()
    np.testing.assert_array_equal(y[:, [0, 2]], clean[:, [0, 2]])
    np.testing.assert_array_equal(y[:2, 1], clean[:2, 1])
