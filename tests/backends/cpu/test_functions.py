"""exp, log and their kin on vectors (kernels/cpu/functions.h): errors over the whole range; what has no number."""

import shutil

import numpy as np
import pytest

import gpurnn
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.cells import exp, expm1, fabs, log, log1p, relu, sigmoid, softplus, sqrt, tanh

pytestmark = pytest.mark.long
if cpu_ops.load_native() is None:
    pytest.skip("gpurnn._native was not built", allow_module_level=True)
if not any(map(shutil.which, ("c++", "g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)
if np.finfo(np.longdouble).nmant < 60:
    pytest.skip("nothing here is more exact than float64", allow_module_level=True)

FUNCTIONS = {  # name -> the function of cells, and in longdouble
    "exp": (exp, np.exp),
    "expm1": (expm1, np.expm1),
    "log": (log, np.log),
    "log1p": (log1p, np.log1p),
    "sqrt": (sqrt, np.sqrt),
    "softplus": (softplus, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))),
    "sigmoid": (sigmoid, lambda x: np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x)))),
    "tanh": (tanh, np.tanh),
    "relu": (relu, lambda x: np.maximum(x, 0)),
    "fabs": (fabs, np.abs),
}
ULPS = {
    "exp": 2,
    "expm1": 3,
    "log": 2,
    "log1p": 3,
    "sqrt": 0.5,
    "softplus": 4,
    "sigmoid": 4,
    "tanh": 4,
    "relu": 0,
    "fabs": 0,
}


@gpurnn.cell(gates="z", states=["h", *FUNCTIONS])
def functions(ax, ah, s):
    """Every function of the state h."""
    return ax.z, *(function(s.h) for function, _ in FUNCTIONS.values())


def values(dtype, x):
    """Name -> the function of every x, by compiled code."""
    layer = gpurnn.Recurrent(functions, 1, x.size, dtype=dtype, backend="cpu", bias=False)
    assert layer.plan(1, 1).schedule == "compiled"
    zero = np.zeros((1, 1, x.size), dtype)
    _, (_, *found) = layer(np.zeros((1, 1, 1), dtype), (x[None, None].astype(dtype), *(zero for _ in FUNCTIONS)))
    return dict(zip(FUNCTIONS, (array[0, 0] for array in found), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_few_last_places_over_the_whole_range(dtype, level):
    info, drawn = np.finfo(dtype), np.random.default_rng(0)
    most = float(np.log(info.max))
    tiny = np.geomspace(2 * info.tiny, 1, 4001, dtype=np.longdouble)
    parts = [
        drawn.uniform(-1, 1, 20000), drawn.uniform(-most, most, 20000), tiny, -tiny, 1 + tiny[2000:] / 4,
        1 - tiny[2000:] / 4,
        np.geomspace(1, info.max / 2, 4001, dtype=np.longdouble), np.linspace(-most + 2, -most + 1e-3, 999),
        np.linspace(most - 2, most - 1e-3, 999),
    ]  # fmt: skip
    x = np.concatenate([part.astype(dtype) for part in parts])
    found = values(dtype, x)
    for name, (_, function) in FUNCTIONS.items():
        with np.errstate(all="ignore"):
            exact = function(x.astype(np.longdouble))
        normal = np.isfinite(exact) & (np.abs(exact) >= info.tiny) & (np.abs(exact) <= info.max) | (exact == 0)
        spacing = np.spacing(np.abs(exact[normal]).astype(dtype)).astype(np.longdouble)
        error = np.abs(found[name][normal] - exact[normal]) / spacing
        assert normal.sum() > 10000 and error.max() <= ULPS[name], (name, x[normal][error.argmax()], error.max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_there_is_no_number(dtype, level):
    """As NumPy, but for subnormal results, which are 0."""
    info = np.finfo(dtype)
    x = np.array([0, np.inf, -np.inf, np.nan, -1, -2, 1, info.max, -info.max, 1e4, -1e4, 4 * info.tiny], dtype)
    found = values(dtype, x)
    for name, (_, function) in FUNCTIONS.items():
        with np.errstate(all="ignore"):
            exact = function(x.astype(np.longdouble))
            if name == "sigmoid":
                exact[x == np.inf], exact[x == -np.inf] = 1, 0
            exact = exact.astype(dtype)
        exact[np.abs(exact) < info.tiny] = 0
        close = np.isclose(found[name], exact, rtol=4 * info.eps, atol=0, equal_nan=True)
        assert close.all(), (name, x[~close], found[name][~close], exact[~close])
