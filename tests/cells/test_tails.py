"""The functions of equations as array code, and their derivatives: from 1e-8 to 88 on both sides, in longdouble."""

import math

import numpy as np
import pytest

import gpurnn
from gpurnn import cells
from gpurnn.dtypes import EPSILON

if np.finfo(np.longdouble).nmant < 60:
    pytest.skip("nothing here is more exact than float64", allow_module_level=True)


def exact_sigmoid(x):
    return np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x)))


def exact_softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


# name -> (in longdouble, its derivative, rounding units of the value, whether its argument has to be above -1, 0)
EXACT = {
    "sigmoid": (exact_sigmoid, lambda x: exact_sigmoid(x) * exact_sigmoid(-x), 4, -math.inf),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2, 4, -math.inf),
    "exp": (np.exp, np.exp, 4, -math.inf),
    "expm1": (np.expm1, np.exp, 4, -math.inf),
    "log": (np.log, lambda x: 1 / x, 4, 0),
    "log1p": (np.log1p, lambda x: 1 / (1 + x), 4, -1),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x), 1, 0),
    "softplus": (exact_softplus, exact_sigmoid, 4, -math.inf),
    "log_sigmoid": (lambda x: -exact_softplus(-x), lambda x: exact_sigmoid(-x), 4, -math.inf),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0, 0, -math.inf),
    "fabs": (np.abs, np.sign, 0, -math.inf),
    "softsign": (lambda x: x / (1 + np.abs(x)), lambda x: 1 / (1 + np.abs(x)) ** 2, 2, -math.inf),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(x)), lambda x: np.where(x > 0, 1, np.exp(x)), 4, -math.inf),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1, 0.01), 2, -math.inf),
    "silu": (lambda x: x * exact_sigmoid(x), None, 5, -math.inf),
}
# Their derivatives are made of the value, which has lost what is below its own last place where it is close to 1 or -1.
FROM_VALUE = ("sigmoid", "tanh", "expm1", "elu", "softsign")


def arguments(dtype, above):
    x = np.concatenate([np.geomspace(1e-8, 88, 400), np.linspace(0.01, 20, 200)])
    x = np.concatenate([-x, x]).astype(dtype)
    return x[x > above]


def values(name, x):
    """The function of each x, and its derivative."""
    cell = gpurnn.cell("z", "h y")(lambda ax, ah, s: (ax.z, getattr(cells, name)(s.h)))
    layer = gpurnn.Recurrent(cell, 1, x.size, dtype=x.dtype.name, backend="numpy", bias=False)
    start = x[None, None], np.zeros((1, 1, x.size), x.dtype)
    _, (_, y), backward = layer.forward(np.zeros((1, 1, 1), x.dtype), start)
    _, (dx, _) = backward(None, (None, np.ones_like(y)))
    return y[0, 0], dx[0, 0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXACT)
def test_values_and_derivatives(name, dtype):
    exact, derivative, ulps, above = EXACT[name]
    x = arguments(dtype, above)
    got, slope = values(name, x)
    right = exact(x.astype(np.longdouble))
    smallest = np.finfo(dtype).smallest_normal
    assert (np.abs(got - right) <= ulps * EPSILON[dtype] * np.abs(right) + smallest).all()
    if derivative is None:
        return
    right = derivative(x.astype(np.longdouble))
    lost = EPSILON[dtype] if name in FROM_VALUE else 0
    allowed = (2 * ulps + 3) * EPSILON[dtype] * np.abs(right) + 4 * lost * (np.abs(got) > 0.1) + smallest
    worst = np.argmax(np.abs(slope - right) / allowed)
    assert (np.abs(slope - right) <= allowed).all(), (x[worst], slope[worst], right[worst])


@pytest.mark.parametrize("name", EXACT)
def test_nan_stays_nan_and_what_is_saturated_is_no_nan(name):
    with np.errstate(all="ignore"):
        got, slope = values(name, np.array([math.nan, 1000.0, 1.0]))
    assert np.isnan(got[0]) and (
        np.isnan(slope[0]) or name in ("elu", "leaky_relu")
    )  # whose slope is a choice between two
    assert not np.isnan(got[1:]).any() and not np.isnan(slope[2])


def test_zero_is_no_trouble():
    for name in ("sigmoid", "tanh", "expm1", "log1p", "softplus", "log_sigmoid", "relu", "fabs", "softsign", "silu"):
        with np.errstate(all="ignore"):
            got, slope = values(name, np.array([0.0, -0.0]))
        assert np.isfinite(got).all() and np.isfinite(slope).all()
