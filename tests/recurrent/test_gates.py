"""The logistic function and its derivative as layers compute them, in relative terms, on every backend.

A gate that is nearly shut decides what is left after many timesteps: what counts is its relative error.
"""

import math

import numpy as np
import pytest
from helpers import cuda_ops
from optional import needs

import gpurnn
from gpurnn import get_backend
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.backends.ops import Ops

LAST_PLACES = 4
# What this backend counts as zero: numbers below the smallest normal one. "cuda" does so in float alone.
FLUSHES = {"numpy": (), "cupy": (), "cpu": ("float32", "float64"), "cuda": ("float32",)}
# Where the logistic function is still a number of the dtype: exp(88) is, and exp(89) is not; likewise 708 and 710.
RANGE = {"float32": 88.0, "float64": 708.0}


def levels():
    native = cpu_ops.load_native()
    return [f"cpu {level}" for level in range(native[1] + 1)] if native else []


EMULATED = [pytest.param(name, marks=pytest.mark.emulated) for name in ("cupy", "cuda step", "cuda block", "cuda grid")]


@pytest.fixture(params=["numpy", *levels(), *EMULATED])
def place(request, monkeypatch):
    """(name of the backend, its primitives, options of a layer)."""
    name, _, detail = request.param.partition(" ")
    if name == "numpy":
        return name, "numpy", {}
    if name == "cpu":
        monkeypatch.setattr(get_backend("cpu"), "level", int(detail))
        return name, "cpu", {}
    ops = cuda_ops(checked=False)
    return (name, ops, {"schedule": detail}) if name == "cuda" else (name, Ops(ops.xp, "cupy"), {})


def numbers(dtype, places):
    """Pre-activations from one end of the range to the other, more of them near 0."""
    rng, most = np.random.default_rng(0), RANGE[dtype]
    x = np.concatenate(
        [
            np.linspace(-most, most, places),
            rng.uniform(-20, 20, places),
            rng.normal(size=places),
            [0.0, 18, -18, -16.65],
        ]
    )
    return x.astype(dtype)


def logistic(x):
    return 1 / (1 + np.exp(-x.astype(np.longdouble)))


def last_places(got, exact, name):
    """The largest error in last places of ``exact``; what is below the smallest normal number may be zero where the
    backend counts it as zero."""
    dtype = got.dtype
    with np.errstate(under="ignore"):
        rounded = np.abs(exact).astype(dtype)
    error = np.abs(got - exact) / np.spacing(rounded)
    if dtype.name in FLUSHES[name]:
        error = np.where((rounded < 2 * np.finfo(dtype).tiny) & (got == 0), 0, error)
    return float(error.max())


def layer_of(kind, place, dtype, H=1, **more):
    """A layer without recurrent weights and biases whose every pre-activation is x."""
    name, ops, options = place
    layer = kind(1, H, bias=False, backend=ops, dtype=dtype, seed=1, **options, **more)
    layer.flat_params[...] = 0
    layer.params["weight_ih_l0"] = 1
    return layer


def on_host(array):
    return array.get() if hasattr(array, "get") else array


def refused(place, kind, dtype, **more):
    """Schedules with one launch for the whole sequence do not exist for float64 and for the original GRU."""
    return place[2].get("schedule", "step") != "step" and (dtype == "float64" or "reset_after" in more)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind, more, gates", [
    (gpurnn.LSTM, {}, "ifo"), (gpurnn.GRU, {}, "rz"), (gpurnn.GRU, {"reset_after": False}, "rz"),
])  # fmt: skip
def test_gates_are_right_in_relative_terms(kind, more, gates, dtype, place):
    if refused(place, kind, dtype, **more):
        pytest.skip("this schedule has no such kernel")
    H = 11 if place[2].get("schedule") == "grid" else 1  # units for more than one thread block
    layer = layer_of(kind, place, dtype, H, **more)
    x = numbers(dtype, 100 if place[0] == "cuda" else 30000)
    _, _, steps = layer(layer.xp.asarray(x[None, :, None]), return_all=True)
    for gate in gates:
        got = on_host(steps[0].gates[gate])[0]
        assert (got == got[:, :1]).all()
        assert last_places(got[:, 0], logistic(x), place[0]) <= LAST_PLACES, gate


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saturated_gate_is_0_or_1_and_nan_stays(dtype, place):
    if refused(place, gpurnn.GRU, dtype):
        pytest.skip("this schedule has no such kernel")
    layer = layer_of(gpurnn.GRU, place, dtype, 11 if place[2].get("schedule") == "grid" else 1)
    x = np.array([np.inf, 1e30, 800, -800, -1e30, -np.inf, np.nan], dtype)
    _, _, steps = layer(layer.xp.asarray(x[None, :, None]), return_all=True)
    np.testing.assert_array_equal(on_host(steps[0].gates["z"])[0, :, 0], [1, 1, 1, 0, 0, 0, np.nan])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_derivative_of_a_gate_that_shuts(dtype, place):
    """f (1 - f) for the forget gate: in relative terms below 0. Above 0 it comes from 1 - f, with an error of one unit
    in the last place of 1, as torch's is."""
    if refused(place, gpurnn.LSTM, dtype):
        pytest.skip("this schedule has no such kernel")
    layer = layer_of(gpurnn.LSTM, place, dtype, 11 if place[2].get("schedule") == "grid" else 1)
    H = layer.hidden_size
    layer.params["weight_ih_l0"][:H] = 0  # of all gates the forget gate alone depends on x, and of one unit
    layer.params["weight_ih_l0"][H + 1 :] = 0
    x = numbers(dtype, 100 if place[0] == "cuda" else 30000)
    x = np.sort(x)
    ones = layer.xp.asarray(np.ones((1, x.size, H), dtype))
    zeros = layer.xp.asarray(np.zeros((1, x.size, H), dtype))
    _, _, backward = layer.forward(layer.xp.asarray(x[None, :, None]), (zeros, ones))
    dx, _ = backward(None, (zeros, ones))
    got, f = on_host(dx)[0, :, 0], logistic(x)
    exact = f * logistic(-x)
    below = x <= 0
    # f has LAST_PLACES; 1 - f and the product round once each, and a last place of f (1 - f) may be half as large
    assert last_places(got[below], exact[below], place[0]) <= 2 * (LAST_PLACES + 2)
    assert np.abs(got - exact).max() <= (LAST_PLACES + 2) * np.finfo(dtype).eps


def test_what_shut_gates_keep(place):
    """``chrono``: input gates of a millionth, whose error adds up in c."""
    if refused(place, gpurnn.LSTM, "float32"):
        pytest.skip("this schedule has no such kernel")
    T, bias = 40, math.log(1e6)
    found = []
    for where, dtype in ((place, "float32"), (("numpy", "numpy", {}), "float64")):
        layer = layer_of(gpurnn.LSTM, where, dtype, 11)
        gates = np.stack([-bias - np.arange(11.0), np.full(11, bias), np.ones(11), np.zeros(11)])
        layer.params["weight_ih_l0"][...] = layer.xp.asarray(gates.reshape(-1, 1).astype("float32").astype(dtype))
        _, (_, c) = layer(layer.xp.asarray(np.ones((T, 1, 1), dtype)))
        found.append(on_host(c).astype(np.float64))
    got, exact = found
    assert (np.abs(got - exact) / np.abs(exact)).max() <= (T + 8) * np.finfo("float32").eps  # a rounding for each sum


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gates_are_rounded_once(dtype, place):
    """They are computed in float32 and stored in 16 bits."""
    layer = layer_of(gpurnn.GRU, place, dtype, 11 if place[2].get("schedule") == "grid" else 1)
    x = np.linspace(-30, 30, 200).astype(layer.dtype)
    _, _, steps = layer(layer.xp.asarray(x[None, :, None]), return_all=True)
    got = on_host(steps[0].gates["z"])[0, :, 0].astype(np.float64)
    exact = logistic(x.astype(np.float64)).astype(np.float64)
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    smallest = {"float16": 2.0**-24, "bfloat16": 0.0}[dtype]  # float16 has no less
    assert (np.abs(got - exact) <= 1.001 * half * exact + smallest / 2).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary_cross_entropy_of_answers_that_are_nearly_right(dtype):
    """Loss and derivative are small then, on both sides: relative, as a model that is nearly perfect still learns."""
    x = np.sort(numbers(dtype, 3000))
    for target in (0, 1):
        y = np.full_like(x, target)
        losses, backward = gpurnn.binary_cross_entropy_with_logits(x, y, reduction="none")
        wide = x.astype(np.longdouble)
        exact = -logistic(-wide) if target else logistic(wide)
        assert last_places(backward(), exact, "numpy") <= LAST_PLACES
        away = -wide if target else wide
        exact = np.log1p(np.exp(-np.abs(wide))) + np.maximum(away, 0)
        assert last_places(losses, exact, "numpy") <= LAST_PLACES
