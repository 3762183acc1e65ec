"""Strict float32 on tensor cores: floats as three bfloat16 numbers each, beside multiply-adds, on the emulated GPU.

An error is measured against the exact sum, as a share of the sum of the products' absolute values. The largest of many
sums may be at most twice the largest of multiply-adds over the same numbers, whether tensor cores round or cut off what
they add.
"""

import functools

import numpy as np
import pytest
from cuda_on_cpu.emulator import Emulator

from gpurnn.backends.sources import kernel_source

pytestmark = pytest.mark.emulated

# C [tiles, 16, 8] = A [tiles, 16, K] times B [tiles, 8, K] transposed: a warp for each tile, or a thread for each sum.
KERNELS = """
__global__ void by_thirds(const int K, const float* A, const float* B, float* C) {
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2, tile = blockIdx.x;
    const float *a = A + (tile * 16 + row) * K, *b = B + (tile * 8 + row) * K;
    float high[4] = {}, low[4] = {};
    for (int k = column; k < K; k += 16) {
        uint4 weights[3];
        uint2 operands[3];
        for (int p = 0; p < 3; p++) {
            auto two = [&](const float* from) { return word_of_part<float, 3>(p, [&](int n) { return from[n]; }); };
            weights[p] = make_uint4(two(a + k), two(a + 8 * K + k), two(a + k + 8), two(a + 8 * K + k + 8));
            operands[p] = make_uint2(two(b + k), two(b + k + 8));
        }
        mma_thirds(high, low, weights, operands);
    }
    for (int i = 0; i < 4; i++) C[(tile * 16 + row + i / 2 * 8) * 8 + column + i % 2] = join_thirds(high[i], low[i]);
}

__global__ void by_halves(const int K, const float* A, const float* B, float* C) {  // three products of tf32 numbers
    const int row = threadIdx.x / 4, column = threadIdx.x % 4, tile = blockIdx.x;
    const float *a = A + (tile * 16 + row) * K, *b = B + (tile * 8 + row) * K;
    float high[4] = {}, low[4] = {};
    for (int k = column; k < K; k += 8) {
        const float numbers[6] = {a[k], a[8 * K + k], a[k + 4], a[8 * K + k + 4], b[k], b[k + 4]};
        unsigned h[6], l[6];
        for (int i = 0; i < 6; i++) h[i] = tf32(numbers[i]), l[i] = tf32(numbers[i] - __uint_as_float(h[i]));
        const uint4 a_high = make_uint4(h[0], h[1], h[2], h[3]), a_low = make_uint4(l[0], l[1], l[2], l[3]);
        float highest[4] = {};
        mma(low, a_low, make_uint2(h[4], h[5]), 0.0f);
        mma(low, a_high, make_uint2(l[4], l[5]), 0.0f);
        mma(highest, a_high, make_uint2(h[4], h[5]), 0.0f);
        for (int i = 0; i < 4; i++) high[i] += highest[i];
    }
    for (int i = 0; i < 4; i++) C[(tile * 16 + row + i / 2 * 8) * 8 + column * 2 + i % 2] = high[i] + low[i];
}

__global__ void by_fma(const int K, const float* A, const float* B, float* C) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8, tile = blockIdx.x;
    float sum = 0.0f;
    for (int k = 0; k < K; k++) sum = fmaf(A[(tile * 16 + row) * K + k], B[(tile * 8 + column) * K + k], sum);
    C[(tile * 16 + row) * 8 + column] = sum;
}
"""
CUTS = {"rounded": None, "A100": (8, 1), "H100": (16, 2)}  # how tensor cores add


def source(edits=()):
    text = "".join(kernel_source(file) for file in ("common.cuh", "words.cuh", "tensor.cuh")) + KERNELS
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def products(kernel, a, b, cut=None, edits=()):
    """The sums of one of ``KERNELS``, (tiles, 16, 8)."""
    emu = Emulator(checked=False, cut=cut)
    out = emu.empty((len(a), 16, 8), "float32", "C")
    arrays = emu.array(a, "A"), emu.array(b, "B"), out
    load = emu.load(source(edits), name=kernel, file="thirds.cu")
    load((len(a),), (128 if kernel == "by_fma" else 32,), (np.int32(a.shape[2]), *arrays))
    return np.array(out)


def scaled(rng, shape, most):
    """Numbers of sizes from 2^-most to 2^most, each size as likely as any other."""
    return rng.normal(size=shape) * 2 ** rng.uniform(-most, most, shape)


def normal(rng, *shape):
    return rng.normal(size=shape)


def cancelling(rng, tiles, rows, K):
    """Two halves whose products cancel each other but for their last places."""
    half = rng.normal(size=(tiles, rows, K // 2))
    sign = -1 if rows == 8 else 1
    return np.concatenate([half, sign * half * (1 + 1e-6 * rng.normal(size=half.shape) * (rows == 8))], 2)


def of_one_sign(rng, *shape):
    """Positive numbers that are above the nearest bfloat16, so that all lower thirds are positive."""
    high = rng.integers(128, 256, shape) * 2.0**-7
    return high + 2.0**-9 * rng.uniform(0.8, 1.9, shape)


FAMILIES = {  # name -> (K, how the numbers are drawn)
    "normal": (64, normal),
    "positive": (2048, lambda *size: abs(normal(*size))),
    "lower thirds of one sign": (512, of_one_sign),
    "sizes from 2^-60 to 2^60": (48, lambda rng, *shape: scaled(rng, shape, 60)),
    "one product": (16, lambda rng, *shape: normal(rng, *shape) * (np.arange(16) == 5)),
    "tiny": (32, lambda rng, *shape: scaled(rng, shape, 8) * 2.0**-40),
    "huge": (32, lambda rng, *shape: scaled(rng, shape, 8) * 2.0**50),
    "cancelling": (64, cancelling),
}


@functools.cache
def family(name):
    """float32 A and B, the exact sums, the sums of absolute values."""
    K, draw = FAMILIES[name]
    rng, tiles = np.random.default_rng(0), -(-1500 // K)
    a, b = (draw(rng, tiles, rows, K).astype(np.float32) for rows in (16, 8))
    if name == "cancelling":  # the same numbers in each row, so that products of a row and a column cancel
        a[:], b[:] = a[:, :1], b[:, :1]
        a, b = (x * 2.0 ** rng.integers(-3, 4, (tiles, x.shape[1], 1)).astype(np.float32) for x in (a, b))
    terms = a.astype(np.longdouble)[:, :, None] * b.astype(np.longdouble)[:, None]
    return a, b, terms.sum(3), abs(terms).sum(3)


def error(name, kernel, cut=None, edits=()):
    """The largest error of a family, in units of 2^-24 of the sum of absolute values."""
    a, b, exact, size = family(name)
    return float((abs(products(kernel, a, b, cut, edits) - exact) / size).max() * 2**24)


fma_error = functools.cache(lambda name: error(name, "by_fma"))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_error_is_at_most_twice_that_of_multiply_adds(name, cut):
    assert error(name, "by_thirds", CUTS[cut]) <= 2 * fma_error(name)


def test_three_tf32_products_would_not_be_enough():
    """They are exact enough where many products are of one size, and not where one is much larger than the others."""
    assert error("normal", "by_halves") <= 2 * fma_error("normal")
    for name in ("one product", "sizes from 2^-60 to 2^60"):
        assert error(name, "by_halves") > 2 * fma_error(name)


def test_a_float_is_its_thirds_to_the_bit():
    """1 x is x, for numbers of all sizes that have three thirds."""
    rng = np.random.default_rng(1)
    x = (rng.uniform(-2, 2, (40, 8)) * 2.0 ** rng.integers(-90, 127, (40, 8))).astype(np.float32)
    a, b = np.zeros((40, 16, 16), np.float32), np.zeros((40, 8, 16), np.float32)
    a[:, :, 3], b[:, :, 3] = 1, x
    np.testing.assert_array_equal(products("by_thirds", a, b), np.broadcast_to(x[:, None], (40, 16, 8)))
    a[:, :8, 3] = x
    b[:, :, 3] = 1
    np.testing.assert_array_equal(products("by_thirds", a, b)[:, :8], np.broadcast_to(x[:, :, None], (40, 8, 8)))


INF, NAN = float("inf"), float("nan")
SPECIAL = [  # of one row and one column the numbers at the same place: (weight, operand)
    [(INF, 1.3)], [(1.3, INF)], [(1.3, -INF)], [(INF, INF)], [(-INF, 1.0)], [(1.0, INF), (-1.7, 2.3)],
    [(INF, 0.0)], [(0.0, INF)], [(NAN, 1.0)], [(1.0, NAN)], [(0.0, NAN)], [(NAN, INF)],
    [(1.3, INF), (1.7, -INF)], [(1.3, INF), (-1.7, -INF)], [(1e30, 1e30)], [(1e30, -1e30)], [(3e38, 1.0)],
    [(1e-38, 1e-38)], [(1e-40, 1.0)], [(3.39e38, 0.5)],
]  # fmt: skip


def test_special_values_are_those_of_multiply_adds():
    """Infinity stays so although its lower thirds are NaN, and subnormal numbers count as 0."""
    a, b = np.zeros((len(SPECIAL), 16, 16), np.float32), np.zeros((len(SPECIAL), 8, 16), np.float32)
    for tile, places in enumerate(SPECIAL):
        for k, (weight, operand) in enumerate(places):
            a[tile, 5, 7 * k + 1], b[tile, 2, 7 * k + 1] = weight, operand
    for cut in CUTS.values():
        got, expected = products("by_thirds", a, b, cut)[:, 5, 2], products("by_fma", a, b)[:, 5, 2]
        np.testing.assert_allclose(got, expected, rtol=2**-22, atol=0)


def test_what_is_not_as_multiply_adds_have_it():
    """As tensor.cuh says: what rounds to no bfloat16 is infinite; of a tiny number some thirds are flushed to zero."""
    a, b = np.zeros((2, 16, 16), np.float32), np.zeros((2, 8, 16), np.float32)
    a[:, 0, 0], b[:, 0, 0] = (0.5, 2.0**100), (3.4e38, 1.2387654 * 2.0**-120)
    got, expected = (products(kernel, a, b)[:, 0, 0] for kernel in ("by_thirds", "by_fma"))
    assert got[0] == INF and expected[0] < INF
    assert 0 < abs(got[1] - expected[1]) < 2.0 ** (100 - 126)


MUTATIONS = {  # planted error -> where it shows, how tensor cores add, piece of the source, what it becomes
    **{
        f"without {which}": ("one product", "rounded", f"    mma(low, {which}, Third());\n", "")
        for which in ("a[2], b[0]", "a[0], b[2]", "a[1], b[1]", "a[1], b[0]", "a[0], b[1]")
    },
    "the highest twice": ("normal", "rounded", "mma(low, a[1], b[0], Third())", "mma(low, a[0], b[0], Third())"),
    "summed on the tensor core": ("positive", "A100", "mma(highest, a[0]", "mma(high, a[0]"),
    "cut off instead of rounded": ("one product", "rounded", "cvt.rn.bf16x2", "cvt.rz.bf16x2"),
    "neighbours swapped": ("normal", "rounded", '"f"(b), "f"(a));', '"f"(a), "f"(b));'),
    "a third of the wrong neighbour": ("one product", "rounded", "a -= __uint_as_float(thirds[p] << 16)",
                                       "a -= __uint_as_float(thirds[p] & 0xffff0000u)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation):
    name, cut, old, new = MUTATIONS[mutation]
    with np.errstate(invalid="ignore"):
        assert not error(name, "by_thirds", CUTS[cut], [(old, new)]) <= 2 * fma_error(name)


def test_infinity_is_lost_where_its_lower_thirds_are_added():
    a, b = np.zeros((1, 16, 16), np.float32), np.zeros((1, 8, 16), np.float32)
    a[0, 0, 0], b[0, 0, 0] = 1.3, INF
    edits = [("fabsf(low) <= 3.4028235e38f ? high + low : high", "high + low")]
    assert np.isnan(products("by_thirds", a, b, edits=edits)[0, 0, 0])
