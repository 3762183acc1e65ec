"""The functions that generated cells are written over (kernels/common.cuh), on the emulated GPU: exact to 4 last places
over their whole range, and NaN stays NaN."""

import numpy as np
import pytest
from cuda_on_cpu.emulator import Emulator

from gpurnn.backends.sources import kernel_source

pytestmark = pytest.mark.emulated

FUNCTIONS = {  # expression -> what it is of x and y, in twice the precision
    "sigmoid(x)": lambda x, y: 1 / (1 + np.exp(-x)),
    "tanh(x)": lambda x, y: np.tanh(x),
    "exp(x)": lambda x, y: np.exp(x),
    "expm1(x)": lambda x, y: np.expm1(x),
    "softplus(x)": lambda x, y: np.where(x > 0, x, 0) + np.log1p(np.exp(-np.abs(x))),
    "relu(x)": lambda x, y: np.maximum(x, 0),
    "fabs(x)": lambda x, y: np.abs(x),
    "log(fabs(x))": lambda x, y: np.log(np.abs(x)),
    "log1p(fabs(x))": lambda x, y: np.log1p(np.abs(x)),
    "sqrt(fabs(x))": lambda x, y: np.sqrt(np.abs(x)),
    "smaller(x, y)": lambda x, y: np.minimum(x, y),
    "larger(x, y)": lambda x, y: np.maximum(x, y),
    "where_greater(x, y, y, x)": lambda x, y: np.where(x > y, y, x),
    "drelu(relu(x))": lambda x, y: np.where(np.isnan(x), x, x > 0),
    "dsigmoid(x)": lambda x, y: x * (1 - x),
    "dtanh(x)": lambda x, y: (1 - x) * (1 + x),
}
KERNEL = """
template <typename real>
__global__ void apply(const int n, const real* x_, const real* y_, real* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const real x = x_[i], y = y_[i];
    BODY
}
""".replace("BODY", "\n    ".join(f"out[{k} * n + i] = {text};" for k, text in enumerate(FUNCTIONS)))


def applied(real, x, y):
    """Every function of ``FUNCTIONS`` on the emulated GPU: (functions, n)."""
    emu = Emulator(checked=False)
    kernel = emu.load(kernel_source("common.cuh") + KERNEL, name=f"apply<{real}>", file="functions.cu")
    out = emu.empty((len(FUNCTIONS), x.size), x.dtype, "out")
    kernel((-(-x.size // 128),), (128,), (np.int32(x.size), emu.array(x, "x"), emu.array(y, "y"), out))
    return dict(zip(FUNCTIONS, np.array(out), strict=True))


@pytest.mark.parametrize(
    "real, dtype, exact", [("float", np.float32, np.float64), ("double", np.float64, np.longdouble)]
)
def test_every_function_is_exact_to_four_last_places(real, dtype, exact):
    if np.finfo(exact).eps >= np.finfo(dtype).eps:
        pytest.skip("NumPy has no more exact numbers here")
    rng = np.random.default_rng(0)
    small = 10.0 ** rng.uniform(-30, 0, 400) * rng.choice([-1, 1], 400)  # where one minus something cancels
    x = np.concatenate([np.linspace(-87, 88, 701), small, [0.0]]).astype(dtype)
    y = rng.permutation(x)
    y[:50] = x[:50]  # equal ones
    with np.errstate(divide="ignore"):
        expected = {text: function(x.astype(exact), y.astype(exact)) for text, function in FUNCTIONS.items()}
    for text, got in applied(real, x, y).items():
        right = expected[text]
        assert np.array_equal(np.isfinite(got), np.isfinite(right)), text
        # below the smallest normal number float is flushed to zero; x (1 - x) as activations have them: -1 to 1
        allowed = 4 * np.finfo(dtype).eps * np.abs(right) + np.finfo(dtype).tiny
        where = np.abs(x) <= 1 if text.startswith(("dsig", "dtan")) else np.isfinite(right)
        worst = np.abs(got[where].astype(exact) - right[where]) / allowed[where]
        assert worst.max() <= 1, f"{text} of {x[where][worst.argmax()]}: {got[where][worst.argmax()]}"


@pytest.mark.parametrize("real, dtype", [("float", np.float32), ("double", np.float64)])
def test_what_is_no_number_stays_none_and_infinities_are_right(real, dtype):
    inf, nan = np.inf, np.nan
    x = np.array([nan, nan, 1.0, inf, -inf], dtype)
    y = np.array([1.0, nan, nan, 0.0, 0.0], dtype)
    got = applied(real, x, y)
    for text, values in got.items():
        if text.startswith("where"):  # a comparison with NaN is false
            np.testing.assert_array_equal(values, [nan, nan, 1, 0, -inf])
        else:
            assert np.isnan(values[:2]).all() and np.isnan(values[2]) == ("y" in text), text
    assert got["softplus(x)"][3] == inf and got["softplus(x)"][4] == 0
    assert got["sigmoid(x)"][3] == 1 and got["sigmoid(x)"][4] == 0
    assert got["expm1(x)"][4] == -1 and got["smaller(x, y)"][4] == -inf and got["larger(x, y)"][3] == inf
