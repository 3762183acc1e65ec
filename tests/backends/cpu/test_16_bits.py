"""16-bit numbers in compiled code: every conversion, layers against array code and float64, products, steps."""

import tracemalloc

import numpy as np
import pytest
from helpers import compare, results
from optional import needs

import gpurnn
from gpurnn import get_backend
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.check import CELLS, OPTIONS
from gpurnn.dtypes import EPSILON, check_dtype

pytestmark = needs("ml_dtypes")
if cpu_ops.load_native() is None:
    pytest.skip("gpurnn._native was not built", allow_module_level=True)

DTYPES = ("float16", "bfloat16")
both = pytest.mark.parametrize("dtype", DTYPES)


def all_numbers(dtype):
    """Each of the 65,536 numbers of a dtype."""
    return np.arange(1 << 16, dtype=np.uint16).view(check_dtype(dtype))


# ---- conversions


@both
def test_every_number_becomes_the_same_float(dtype, level):
    """Sums of one term each. Subnormal numbers of float16 are normal in float32; those of bfloat16 count as zero."""
    numbers = all_numbers(dtype)
    for part in (numbers, numbers[:13], numbers[-257:]):
        with np.errstate(invalid="ignore"):  # on Arm NumPy warns of NaNs that signal
            expected = part.astype(np.float32)
        expected[np.abs(expected) < np.finfo(np.float32).tiny] = 0
        np.testing.assert_array_equal(get_backend("cpu").sum_steps(part[None]), expected)


def near(dtype):
    """Floats where rounding decides: the numbers of a dtype, what lies half between neighbors, and floats next to both;
    what overflows, what vanishes, and numbers of all sizes."""
    with np.errstate(invalid="ignore"):  # as above
        numbers = all_numbers(dtype)[: 1 << 15].astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    middle = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    first_infinite = 65520 if dtype == "float16" else (2 - 2.0**-8) * 2.0**127
    found = np.concatenate([numbers, middle, [np.float32(first_infinite)]])
    found = np.concatenate([found, np.nextafter(found, np.float32(0)), np.nextafter(found, np.float32(np.inf))])
    found = np.append(found, np.array([np.finfo(np.float32).max, np.inf], np.float32))
    bits = np.random.default_rng(0).integers(0, 1 << 31, 100_000).astype(np.uint32)
    found = np.concatenate([found, bits.view(np.float32)])
    return np.concatenate([found, -found])


@both
def test_floats_are_rounded_to_the_nearest_even(dtype, level, threads):
    ops, dtype, floats = get_backend("cpu"), check_dtype(dtype), near(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(dtype)
    nan = np.isnan(floats)
    for count in (1, 3):
        threads(count)
        found = ops.rounded(floats, dtype)
        assert found.dtype == dtype and np.isnan(found[nan].astype(np.float32)).all()
        np.testing.assert_array_equal(found[~nan].view(np.uint16), expected[~nan].view(np.uint16))
    for size in range(1, 40):  # parts of a vector
        assert np.array_equal(ops.rounded(floats[:size], dtype).view(np.uint16), expected[:size].view(np.uint16))


# ---- layers


SIZES = ((1, 1, 1), (16, 5, 7), (33, 3, 13), (40, 1, 3))  # H, T, B as in test_cpu_ops.py


@pytest.mark.long
@both
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_and_option_is_no_worse_than_array_code(cell, dtype, threads):
    for number, (name, options) in enumerate(OPTIONS.items()):
        for place, (H, T, B) in enumerate(SIZES):
            if (number + place) % 2 == 0:  # every option at two sizes
                threads(1 + place % 3)
                sized = {} if "hidden_size" in options else {"H": max(H, 5) if "projected" in cell else H}
                marked = {"marked": True, "masked_output": "repeat"} if place == 1 and name != "bidirectional" else {}
                ragged = (number + place) % 4 == 0
                compare(cell, "cpu", dtype, T, B, ragged, name != "learned state", **marked, **options, **sized)


@both
@pytest.mark.parametrize("cell", ["lstm", "gru original"])
def test_on_every_instruction_set(cell, dtype, level, threads):
    threads(2)
    compare(cell, "cpu", dtype, 3, 9, H=300)  # past CHUNK_COLUMNS, with groups of rows
    compare(cell, "cpu", dtype, 4, 5, True, H=21, I=7, bidirectional=True)  # an odd number of columns


@both
@pytest.mark.parametrize("T, B, H", [(6, 11, 19), (1, 11, 19), (5, 2, 64)])
@pytest.mark.parametrize("cell", CELLS)
def test_equal_bits_for_any_number_of_threads(cell, T, B, H, dtype, threads):
    rng, (layer_class, own) = np.random.default_rng(0), CELLS[cell]
    layer = layer_class(5, H, backend="cpu", dtype=dtype, seed=1, **own)
    x = rng.standard_normal((T, B, 5)).astype(layer.dtype)
    doutput = rng.standard_normal(layer(x)[0].shape).astype(layer.dtype)
    found = []
    for count, by_units in ((1, False), (2, False), (2, True), (3, True)):
        threads(count, by_units)
        found.append(results(layer, x, doutput, rng.integers(0, T + 1, B) * 0 + T))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@both
@pytest.mark.parametrize("cell", CELLS)
def test_pieces_and_neighbors_have_the_same_bits(cell, dtype):
    """States go from piece to piece as they are within a call: h in 16 bits, the others in float32."""
    layer_class, own = CELLS[cell]
    layer = layer_class(4, 10, backend="cpu", dtype=dtype, seed=1, **own)
    x = np.random.default_rng(0).standard_normal((9, 8, 4)).astype(layer.dtype)
    whole, final = layer(x)
    state, outputs = None, []
    for part in (slice(0, 2), slice(2, 6), slice(6, 9)):
        output, state = layer(x[part], state)
        outputs.append(output)
    np.testing.assert_array_equal(np.concatenate(outputs), whole)
    for one, other in zip(*((s if isinstance(s, tuple) else (s,)) for s in (state, final)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    for b in (0, 4, 7):
        np.testing.assert_array_equal(layer(x[:, b : b + 1].copy())[0][:, 0], whole[:, b])


@both
@pytest.mark.parametrize("kind", [gpurnn.LSTM, gpurnn.GRU])
def test_rebuilt_gates_have_the_same_bits(kind, dtype):
    reset, found = np.random.default_rng(0).random((9, 5)) < 0.2, []
    for memory in (None, "states", "sqrt"):
        layer = kind(4, 20, 2, backend="cpu", dtype=dtype, seed=1, memory=memory)
        x, doutput = (
            np.random.default_rng(n).standard_normal((9, 5, F)).astype(layer.dtype) for n, F in ((1, 4), (2, 20))
        )
        output, _, backward = layer.forward(x, reset=reset)
        found.append([output, backward(doutput)[0], layer.flat_grads.copy()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@both
@pytest.mark.parametrize("kind, share", [(gpurnn.GRU, 1 / 2), (gpurnn.LSTM, 7 / 12)])
def test_a_call_takes_half_the_memory(kind, share, dtype):
    """For inference and training, and so says the plan. c of the LSTM, one number of six, is float32."""
    T, B, H = 60, 16, 128
    found = []
    for name in (dtype, "float32"):
        layer = kind(H, H, backend="cpu", dtype=name, seed=1)
        x = np.ones((T, B, H), layer.dtype)
        layer.forward(x[:2])[2](x[:2])  # what the first call allocates once
        sizes = [layer.plan(T, B).cache_bytes]
        for call in (layer.forward, layer):
            layer.ops.empty_cache()
            tracemalloc.start()
            held = call(x)
            sizes += [tracemalloc.get_traced_memory()[0], tracemalloc.get_traced_memory()[1]]
            tracemalloc.stop()
            del held
        found.append(sizes)
        assert layer.plan(T, B).schedule == "compiled"
    for size, whole in zip(*found, strict=True):
        assert size <= 1.03 * share * whole
    packed = [kind(512, 512, backend="cpu", dtype=name).plan(50, 1).packed_bytes for name in (dtype, "float32")]
    assert packed[0] <= 0.6 * packed[1]


@both
def test_large_numbers_become_infinite_and_nan_stays(dtype):
    """c of an LSTM is float32, so that only h is rounded; a relu's h may overflow."""
    rnn = gpurnn.RNN(1, 40, nonlinearity="relu", bias=False, backend="cpu", dtype=dtype, seed=1)
    rnn.params["weight_ih_l0"], rnn.params["weight_hh_l0"] = 1, 0
    largest = float(np.finfo(np.float16).max) if dtype == "float16" else 3.3895e38
    for value, expected in ((largest, largest), (np.nan, np.nan), (np.inf, np.inf)):
        found = rnn(np.full((2, 3, 1), value).astype(rnn.dtype))[0][0].astype(np.float32)
        np.testing.assert_array_equal(found, np.full(found.shape, np.asarray(expected).astype(rnn.dtype)).astype("f"))
    rnn.params["weight_ih_l0"] = 2
    assert np.isinf(rnn(np.full((2, 3, 1), largest).astype(rnn.dtype))[0][0].astype(np.float32)).all()


# ---- products


STRIDES = {
    "plain": lambda a: a,
    "turned": lambda a: np.ascontiguousarray(a.T).T,
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "columns apart": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
}


@both
@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize(
    "M, K, N", [(1, 1, 1), (5, 3, 17), (8, 33, 64), (49, 40, 16), (100, 1100, 33), (13, 0, 4), (50, 300, 64)]
)
def test_products_of_any_strides(M, K, N, in_float32, dtype, threads):
    """Sums are of float32, and what is stored in 16 bits is rounded once."""
    rng, dtype = np.random.default_rng(M + K + N), check_dtype(dtype)
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (K, N), (M, N)))
    c = c.astype(np.float32) if in_float32 else c
    exact = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)) + np.abs(c.astype(np.float64))
    for count, (name, accumulate) in enumerate((name, again) for name in STRIDES for again in (False, True)):
        threads(1 + count % 3)
        out = STRIDES["turned" if name == "turned" else "plain"](c.copy())
        get_backend("cpu").product(STRIDES[name](a), STRIDES[name](b), out, accumulate=accumulate)
        expected = exact + (c.astype(np.float64) if accumulate else 0)
        allowed = (K + 2) * EPSILON["float32"] * size + (
            0 if in_float32 else EPSILON[dtype.name] / 2 * np.abs(expected)
        )
        assert (np.abs(out.astype(np.float64) - expected) <= allowed).all(), (name, accumulate)


@both
def test_sums_over_steps(dtype, level, threads):
    d = np.random.default_rng(0).standard_normal((50, 40, 24)).astype(check_dtype(dtype))
    exact = d[:, :, :9].astype(np.float64).sum(axis=(0, 1))
    for count in (1, 2):
        threads(count)
        sums = get_backend("cpu").sum_steps(d[:, :, :9])
        assert sums.dtype == np.float32
        assert np.abs(sums - exact).max() <= EPSILON["float32"] * np.abs(exact).max()


@both
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("cell", CELLS)
def test_a_stepper_has_the_bits_of_the_layer(cell, B, dtype):
    """Of a call of several timesteps: both pack the weights. 45 columns are no whole vectors."""
    layer_class, own = CELLS[cell]
    layer = layer_class(45, 40, backend="cpu", dtype=dtype, seed=1, **own).eval()
    stepper = layer.stepper(B)
    x = np.random.default_rng(0).standard_normal((3, B, 45)).astype(layer.dtype)
    for one, y in zip(x, layer(x)[0], strict=True):
        np.testing.assert_array_equal(stepper.step(one), y)
