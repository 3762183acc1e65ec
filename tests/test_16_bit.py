"""float16 and bfloat16 layers: sizes at which memory is taken from a pool, derivatives of the rounded states."""

import numpy as np
import pytest
from cuda_on_cpu import emulator
from optional import needs

import gpurnn
from gpurnn.check import CELLS
from gpurnn.ops import Ops

pytestmark = needs("ml_dtypes")
DTYPES = ("float16", "bfloat16")
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}

EMULATED = [
    pytest.param(name, marks=pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing())))
    for name in ("cupy", "cuda step", "cuda block", "cuda grid")
]


def primitives(name):
    """(primitives, options of a layer) of a backend, ``cuda`` with a schedule, on the emulated device."""
    name, _, schedule = name.partition(" ")
    if name in ("numpy", "cpu"):
        return name, {}
    from test_cuda_layers import cuda_ops

    ops = cuda_ops(checked=False)
    return (Ops(ops.xp, "cupy"), {}) if name == "cupy" else (ops, {"schedule": schedule})


@pytest.fixture(params=["numpy", "cpu", *EMULATED])
def place(request):
    return primitives(request.param)


def on_host(array):
    return array.get() if hasattr(array, "get") else array


# ---- arrays of 128 KiB and more, whose memory the backend cpu takes from its pool


@pytest.mark.parametrize("option", [{}, {"bidirectional": True}, {"num_layers": 2, "dropout": 0.3}])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_arrays_keep_their_dtype(dtype, kind, option):
    """Equal bits on "numpy" and "cpu", whose 16-bit layers are the same array code."""
    layer_class, own = CELLS[kind]
    own = own | ({"proj_size": 64} if "proj_size" in own else {})
    found = []
    for backend in ("numpy", "cpu"):
        layer = layer_class(64, 72, backend=backend, dtype=dtype, seed=1, **own, **option)
        x = np.random.default_rng(0).standard_normal((40, 32, 64)).astype(layer.dtype)
        for lengths in (None, np.arange(32)):
            output, _, backward, steps = layer.forward(x, lengths=lengths, return_all=True)
            dx, _ = backward(np.ones_like(output))
            found.append(
                [output, dx, layer.flat_grads.copy(), *(h for step in steps for h in (step.h, *step.gates.values()))]
            )
            assert min(output.nbytes, dx.nbytes) >= 1 << 17
    for one, other in zip(found[0] + found[1], found[2] + found[3], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_knows_every_dtype(dtype):
    dtype = gpurnn.module.check_dtype(dtype)
    array = gpurnn.cpu_ops.Store().empty((300, 300), dtype)
    assert array.dtype == dtype and array.shape == (300, 300) and array.flags.c_contiguous
    array[...] = 1.5
    assert float(array[-1, -1]) == 1.5


# ---- relu: what a rounded state says of the derivative


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_has_the_derivatives_of_the_states_that_it_computed(dtype, place):
    """Rounding may carry a unit whose pre-activation is close to 0 over the kink of relu. Its derivative is then another
    than in float64, and gradients differ by up to 0.3 of their size, in this library and in torch alike: of 341,127
    units of random bfloat16 layers this happened to 172 here and to 191 there. So the gradients are compared with those
    of the states that were computed.

    Allowed: d is rounded once in each step that it has come through.
    """
    ops, options = place
    T, B, I, H = 12, 5, 4, 11
    layer = gpurnn.RNN(I, H, nonlinearity="relu", backend=ops, dtype=dtype, seed=3, **options)
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal(shape).astype(layer.dtype) for shape in ((T, B, I), (T, B, H)))
    output, _, backward = layer.forward(layer.xp.asarray(x))
    backward(layer.xp.asarray(dy))
    h = on_host(output).astype(np.float64)
    W = on_host(layer.params["weight_hh_l0"]).astype(layer.dtype).astype(np.float64)
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    grads, sizes = ({"ih": 0, "hh": 0} for _ in range(2))
    dh, size = np.zeros((B, H)), np.zeros((B, H))
    for t in reversed(range(T)):
        d, whole = (dy[t] + dh) * (h[t] > 0), (np.abs(dy[t]) + size) * (h[t] > 0)
        for name, by in (("ih", x[t]), ("hh", h[t - 1] if t else np.zeros((B, H)))):
            grads[name] += d.T @ by
            sizes[name] += whole.T @ np.abs(by)
        dh, size = d @ W, whole @ np.abs(W)
    for name, exact in grads.items():
        got = on_host(layer.grads[f"weight_{name}_l0"])
        assert (np.abs(got - exact) <= (T + 1) * EPS[dtype] / 2 * sizes[name] + 1e-6).all(), name
