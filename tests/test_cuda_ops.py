"""What CudaOps has beside the time loop, executed on the CPU: sums, the embedding's gradient, masks, other layers."""

import itertools

import numpy as np
import pytest
from cuda_on_cpu import emulator
from test_cuda_layers import DTYPES, EPS, SCHEDULES, cuda_ops

import gpurnn
from gpurnn import rng

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# ---- sums over all steps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_steps(dtype):
    draw = np.random.default_rng(0)
    for k, (T, B, M, wider) in enumerate(itertools.product((1, 3, 130), (1, 5), (1, 31, 33, 64), (0, 7))):
        ops = cuda_ops(**SCHEDULES[k % 3])
        host = draw.normal(size=(T, B, M + wider)).astype(dtype)
        got = ops.sum_steps(ops.xp.asarray(host)[:, :, :M])
        exact = host[:, :, :M].astype(np.longdouble).sum(axis=(0, 1))
        assert got.dtype == dtype
        additions = T * B / 8 + 8 + 3  # one behind the other: in a thread, over the threads, over the chunks
        in_double = additions * np.finfo("float64").eps * np.abs(host).sum(axis=(0, 1))[:M]
        assert (np.abs(got.get() - exact) <= np.finfo(dtype).eps * np.abs(exact) + in_double).all()


def test_sums_of_nothing_are_zero():
    ops = cuda_ops()
    assert ops.sum_steps(ops.xp.zeros((0, 3, 4), "float32")).tolist() == [0] * 4


# ---- the embedding's gradient


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ids", ["random", "one", "distinct", "frequent"])
def test_rows_are_added_by_id(ids, dtype):
    draw = np.random.default_rng(1)
    for k, (N, H) in enumerate(itertools.product((1, 63, 64, 65, 128, 300), (1, 33))):
        V = {"random": 7, "one": 1, "distinct": N, "frequent": 50}[ids]
        index = draw.permutation(N) if ids == "distinct" else draw.integers(0, V, N)
        if ids == "frequent":
            index[draw.random(N) < 0.5] = 9
        d, grad = draw.normal(size=(N, H)).astype(dtype), draw.normal(size=(V, H)).astype(dtype)
        exact = grad.astype(np.longdouble)
        np.add.at(exact, index, d.astype(np.longdouble))
        ops = cuda_ops(**SCHEDULES[k % 3])
        got = ops.xp.asarray(grad)
        ops.accumulate_rows(got, ops.xp.asarray(index), ops.xp.asarray(d))
        allowed = 2 * np.finfo(dtype).eps * (np.abs(exact) + np.abs(exact - grad) + 1e-9)
        np.testing.assert_array_less(np.abs(got.get() - exact), allowed.astype(float) + 1e-14)


# ---- masks


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 3, 111), (0, 3)])
def test_masks_are_numpys(shape, rate):
    ops = cuda_ops()
    got = ops.keep_mask(shape, rate, 2**63 + 12345, 0xDEADBEEF, 2**31 + 7)
    np.testing.assert_array_equal(got.get(), rng.keep_mask(shape, rate, 2**63 + 12345, 0xDEADBEEF, 2**31 + 7))


# ---- the other layers, whole: the same code, CuPy's rules, kernels where there are some

LAYERS = {
    "linear": (lambda o: gpurnn.Linear(6, 5, **o), "floats"),
    "embedding": (lambda o: gpurnn.Embedding(9, 6, padding_idx=2, **o), "ids"),
    "dropout": (lambda o: gpurnn.Dropout(0.4, **o), "floats"),
    "variational dropout": (lambda o: gpurnn.Dropout(0.4, variational=True, **o), "floats"),
    "layer norm": (lambda o: gpurnn.LayerNorm(6, **o), "floats"),
    "batch norm": (lambda o: gpurnn.BatchNorm(6, **o), "floats"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_other_layers(name, dtype):
    make, kind = LAYERS[name]
    ops = cuda_ops()
    layer, plain = (make({"backend": backend, "dtype": dtype, "seed": 3}) for backend in (ops, "numpy"))
    draw = np.random.default_rng(2)
    x = draw.integers(0, 9, (7, 4)) if kind == "ids" else draw.normal(size=(7, 4, 6)).astype(layer.dtype)
    for _ in range(2):
        (y, backward), (expected, plain_backward) = layer.forward(ops.xp.asarray(x)), plain.forward(x)
        dy = draw.normal(size=expected.shape).astype(layer.dtype)
        dx, plain_dx = backward(ops.xp.asarray(dy)), plain_backward(dy)
        # At most 28 numbers below 64 are added anywhere, in float32 or float64; then one more rounding to the storage.
        eps = np.finfo("float64" if dtype == "float64" else "float32").eps
        tolerance = {"rtol": EPS.get(dtype, eps), "atol": 64 * eps * 28}
        np.testing.assert_allclose(y.get().astype(float), expected.astype(float), **tolerance)
        if plain_dx is not None:
            np.testing.assert_allclose(dx.get().astype(float), plain_dx.astype(float), **tolerance)
        np.testing.assert_allclose(layer.flat_grads.get(), plain.flat_grads, **tolerance)
        assert layer.flat_grads.dtype == layer.wide and y.dtype == layer.dtype


MUTATIONS = {
    "a row of the chunk left out": ("sums", "n = start + threadIdx.y", "n = start + 1 + threadIdx.y"),
    "no barrier before the tree": ("sums", "    __syncthreads();\n", ""),
    "a run that goes on": ("rows", "if (from_before || (last && goes_on))", "if (from_before)"),
    "the owner of a long run": ("rows", "return;  // it began earlier", ";"),
    "a round of Philox": ("mask", "round < 10", "round < 9"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation, monkeypatch):
    what, old, new = MUTATIONS[mutation]
    import test_cuda_ops

    plain = test_cuda_ops.cuda_ops
    monkeypatch.setattr(test_cuda_ops, "cuda_ops", lambda **how: plain(edits=[(old, new)], **how))
    test = {
        "sums": lambda: test_cuda_ops.test_sums_of_steps("float32"),
        "rows": lambda: test_cuda_ops.test_rows_are_added_by_id("one", "float32"),
        "mask": lambda: test_cuda_ops.test_masks_are_numpys((5, 3), 0.3),
    }[what]
    with pytest.raises((AssertionError, emulator.KernelError)):
        test()
