"""The functions of kernels/c: accuracy over the whole range, products of every size and form."""

import ctypes

import numpy as np
import pytest
from c_models import Compiled, compiled, needs_compiler, pointer
from c_zoo import FORMS
from helpers import assert_close

import gpurnn
from gpurnn.interop.c.sources import functions
from gpurnn.quantization import dequantize_rows, quantize_rows

pytestmark = needs_compiler
HEADER = "#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n"


def sigmoid(x):
    return np.where(x < 0, np.exp(x), 1) / (1 + np.exp(-np.abs(x)))


# name -> the function in float64, and ulp that ours may be off by
FUNCTIONS = {
    "exp": (np.exp, 2), "expm1": (np.expm1, 3), "sigmoid": (sigmoid, 4), "tanh": (np.tanh, 4), "log": (np.log, 2),
    "log1p": (np.log1p, 3), "softplus": (lambda x: np.logaddexp(0, x), 4), "sqrt": (np.sqrt, 2),
    "fabs": (np.abs, 0), "relu": (lambda x: np.where(x < 0, 0, x), 0),
}  # fmt: skip
SMALLEST = np.finfo(np.float32).smallest_normal


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    code = HEADER + functions(FUNCTIONS, "own")
    for name in FUNCTIONS:
        head = f"void all_{name}(const float *x, float *y, size_t n)"
        code += f"\n{head};\n{head} {{\n    for (size_t k = 0; k < n; ++k) y[k] = own_{name}(x[k]);\n}}\n"
    return ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("functions"), code)))


def points():
    """Numbers of every exponent, those where functions bend, and those that are not finite."""
    rng = np.random.default_rng(0)
    every = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = rng.uniform(-110, 110, 100_000).astype(np.float32)
    small = (rng.normal(size=50_000) * 10.0 ** rng.uniform(-8, 1, 50_000)).astype(np.float32)
    single = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 88.72, -87.4, 1e-45, SMALLEST, 3.4e38], np.float32)
    return np.concatenate([every, near, small, single])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact_to_a_few_ulp(name, library):
    x, (function, most) = points(), FUNCTIONS[name]
    y = np.empty_like(x)
    getattr(library, f"all_{name}")(pointer(x), pointer(y), ctypes.c_size_t(x.size))
    with np.errstate(all="ignore"):
        expected = function(x.astype(np.float64))
        expected[(name == "log") & (x > 0) & (x < SMALLEST)] = -np.inf  # as the series of the compiled CPU code has it
        single = expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(single), err_msg=name)
    infinite = np.isinf(single) | np.isinf(y)
    np.testing.assert_array_equal(y[infinite], single[infinite], err_msg=name)
    there = np.isfinite(single) & np.isfinite(y)
    if name == "sigmoid":  # below, it is a subnormal number or 0
        assert (y[x < -88] < SMALLEST).all()
        there &= x >= -88
    ulp = np.maximum(np.spacing(np.abs(single[there])), SMALLEST * np.finfo(np.float32).eps)
    off = np.abs(y[there] - expected[there]) / ulp
    worst = off.argmax()
    assert off[worst] <= most, f"{name}({x[there][worst]!r}): off by {off[worst]:.2f} ulp"


# ---- products

SIZES = [(1, 1), (7, 3), (9, 5), (32, 33), (41, 2), (75, 129)]


def linear(rows, columns, share, bias=True):
    """A Linear of which only a share of the blocks of 8 rows and 4 columns is not zero."""
    layer = gpurnn.Linear(columns, rows, bias, backend="numpy", seed=rows)
    there = np.random.default_rng(columns).random((-(-rows // 8), -(-columns // 4))) < share
    layer.params["weight"][...] *= np.kron(there, np.ones((8, 4)))[:rows, :columns]
    return layer


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    models = {f"p{rows}_{columns}_{int(10 * share)}{end}": (linear(rows, columns, share, share != 0.5), options)
              for rows, columns in SIZES for share in (1, 0.5, 0) for end, options in FORMS.items()}  # fmt: skip
    return Compiled(tmp_path_factory.mktemp("products"), models)


def beyond_rounding(got, expected, x, weight):
    """The results, less what x in 16 bits explains: half of what 1 counts, for each number of x."""
    half = np.abs(x).max(axis=1) / min(32767, (2**31 - 1) // (127 * x.shape[1])) / 2
    return expected + np.maximum(np.abs(got - expected) - half[:, None] * np.abs(weight).sum(axis=1), 0)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [1, 0.5, 0])
@pytest.mark.parametrize("rows, columns", SIZES)
def test_products_of_every_size_and_form(rows, columns, share, form, products):
    layer = linear(rows, columns, share, share != 0.5)
    weight = layer.params["weight"] if not form else dequantize_rows(quantize_rows(layer.params["weight"]))
    x = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + (layer.params["bias"] if layer.bias else 0)
    got = products.run(f"p{rows}_{columns}_{int(10 * share)}{form}", x, rows)
    if form == "_int16":
        got = beyond_rounding(got, expected, x, weight)
    assert_close(got, expected, columns + 3, f"{rows} x {columns}", "float32")


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_whole_and_zero_blocks_of_a_matrix_are_not_there(form, tmp_path):
    """A table of an embedding is looked up row by row, so that zeros stay; those of a plain matrix are left out."""
    table = gpurnn.Embedding(40, 12, backend="numpy", seed=1)
    models = {"tied": gpurnn.Sequential(table, gpurnn.TiedLinear(table)), "plain": linear(40, 12, 0.4)}
    table.params["weight"][8:] = 0
    library, text = Compiled(tmp_path, {name: (model, FORMS[form]) for name, model in models.items()}), {}
    for name in models:
        text[name] = (tmp_path / f"{name}.h").read_text()
    assert "_weight_blocks[" in text["plain"] and "_blocks" not in text["tied"]
    weight = table.params["weight"] if not form else dequantize_rows(quantize_rows(table.params["weight"]))
    got, x = library.run("tied", np.array([3, 20]), 40), weight[[3, 20]].astype(np.float64)
    if form == "_int16":
        got = beyond_rounding(got, x @ weight.T, x, weight)
    assert_close(got, x @ weight.T, 12 + 3, form, "float32")


def test_sums_of_16_bits_stay_within_32(tmp_path):
    """The largest sum that there can be: all weights and all numbers of x the largest."""
    layer = gpurnn.Linear(40_000, 1, bias=False, backend="numpy")
    layer.params["weight"][...] = -1
    compiled_layer = Compiled(tmp_path, {"longest": (layer, FORMS["_int16"])})
    got = compiled_layer.run("longest", np.full((1, 40_000), 3, np.float32), 1)
    assert_close(got, np.array([[-120_000.0]]), 4, "longest", "float32")


@pytest.mark.long
def test_numbers_that_are_not_finite_reach_the_result(products):
    for bad in (np.nan, np.inf):
        x = np.ones((1, 33), np.float32)
        x[0, 5] = bad
        for form in FORMS:
            assert not np.isfinite(products.run(f"p32_33_10{form}", x, 32)).any()
