"""What CudaOps has beside the time loop, executed on the CPU: sums, the embedding's gradient, masks, other layers."""

import itertools

import numpy as np
import pytest
from cuda_on_cpu import emulator
from helpers import OPTIMIZERS, THREAD_ORDERS, assert_close, cuda_ops

import gpurnn
from gpurnn import rng
from gpurnn.dtypes import DTYPES, EPSILON

pytestmark = pytest.mark.emulated

# ---- sums over all steps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_steps(dtype):
    draw = np.random.default_rng(0)
    steps = {1: "ascending", 3: "random", 130: "interrupted"}
    for T, B, M, wider in itertools.product(steps, (1, 5), (1, 31, 33, 64), (0, 7)):
        ops = cuda_ops(**THREAD_ORDERS[steps[T]])
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
    orders = {1: "ascending", 63: "random", 64: "interrupted", 65: "ascending", 128: "random", 300: "interrupted"}
    for N, H in itertools.product(orders, (1, 33)):
        V = {"random": 7, "one": 1, "distinct": N, "frequent": 50}[ids]
        index = draw.permutation(N) if ids == "distinct" else draw.integers(0, V, N)
        if ids == "frequent":
            index[draw.random(N) < 0.5] = 9
        d, grad = draw.normal(size=(N, H)).astype(dtype), draw.normal(size=(V, H)).astype(dtype)
        exact = grad.astype(np.longdouble)
        np.add.at(exact, index, d.astype(np.longdouble))
        ops = cuda_ops(**THREAD_ORDERS[orders[N]])
        got = ops.xp.asarray(grad)
        ops.accumulate_rows(got, ops.xp.asarray(index), ops.xp.asarray(d))
        allowed = 2 * np.finfo(dtype).eps * (np.abs(exact) + np.abs(exact - grad) + 1e-9)
        np.testing.assert_array_less(np.abs(got.get() - exact), allowed.astype(float) + 1e-14)


# ---- masks


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 3, 111), (0, 3)])
def test_masks_are_numpys(shape, rate):
    ops = cuda_ops()
    got = ops.dropout_mask(shape, rate, 2**63 + 12345, 0xDEADBEEF, 2**31 + 7)
    np.testing.assert_array_equal(got.get(), rng.dropout_mask(shape, rate, 2**63 + 12345, 0xDEADBEEF, 2**31 + 7))


# ---- the other layers, whole: the same code, CuPy's rules, kernels where there are some

LAYERS = {
    "linear": (lambda o: gpurnn.Linear(6, 5, **o), "floats"),
    "embedding": (lambda o: gpurnn.Embedding(9, 6, padding_idx=2, **o), "ids"),
    "dropout": (lambda o: gpurnn.Dropout(0.4, **o), "floats"),
    "variational dropout": (lambda o: gpurnn.Dropout(0.4, variational=True, **o), "floats"),
    "layer norm": (lambda o: gpurnn.LayerNorm(6, **o), "floats"),
    "batch norm": (lambda o: gpurnn.BatchNorm(6, **o), "floats"),
    "last pooling": (lambda o: gpurnn.Pooling(6, "last", 2, **o), "floats"),
    "mean pooling": (lambda o: gpurnn.Pooling(6, "mean", **o), "floats"),
    "max pooling": (lambda o: gpurnn.Pooling(6, "max", **o), "floats"),
    "attention pooling": (lambda o: gpurnn.Pooling(6, "attention", **o), "floats"),
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
        tolerance = {"rtol": EPSILON.get(dtype, eps), "atol": 64 * eps * 28}
        np.testing.assert_allclose(y.get().astype(float), expected.astype(float), **tolerance)
        if plain_dx is not None:
            np.testing.assert_allclose(dx.get().astype(float), plain_dx.astype(float), **tolerance)
        np.testing.assert_allclose(layer.flat_grads.get(), plain.flat_grads, **tolerance)
        assert layer.flat_grads.dtype == layer.compute_dtype and y.dtype == layer.dtype


# ---- softmax cross-entropy


def test_ctc_needs_only_what_cupy_has(monkeypatch):
    ops, draw = cuda_ops(), np.random.default_rng(0)
    logits, targets = draw.normal(size=(7, 4, 5)), [[1, 1, 2], [], [4, 3, 2, 1, 1, 2], [3]]
    lengths = [7, 4, 7, 0]  # the last two do not fit
    results = []
    for device in (ops, gpurnn.get_backend("numpy")):
        monkeypatch.setattr(gpurnn.losses.common, "array_ops", lambda *arrays, device=device: device)
        x = device.xp.asarray(logits)
        loss, backward = gpurnn.ctc_loss(x, targets, lengths=lengths, zero_infinity=True)
        found = gpurnn.ctc_greedy(x, lengths=lengths), gpurnn.ctc_beam_search(x, 3, lengths=lengths)
        results.append((float(loss), device.to_numpy(backward()), found))
    (loss, dlogits, found), (exact, dexact, expected) = results
    assert loss == pytest.approx(exact, rel=1e-14) and found == expected
    assert_close(dlogits, dexact, 64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("V", [1, 5, 128, 300])
def test_cross_entropy_rows(V, dtype):
    draw = np.random.default_rng(5)
    plain = gpurnn.get_backend("numpy")
    for N, smoothing, some, order in (
        (1, 0.0, False, "ascending"), (1, 0.0, True, "random"), (1, 0.2, False, "interrupted"),
        (1, 0.2, True, "ascending"), (7, 0.0, False, "random"), (7, 0.0, True, "interrupted"),
        (7, 0.2, False, "ascending"), (7, 0.2, True, "random"),
    ):  # fmt: skip
        ops = cuda_ops(**THREAD_ORDERS[order])
        logits = (5 * draw.normal(size=(N, V))).astype(dtype)
        rows = np.flatnonzero(draw.random(N) < 0.5) if some else None
        if some:
            skipped = np.setdiff1d(np.arange(N), rows)
            logits[skipped] = np.nan
        labels = draw.integers(0, V, N if rows is None else rows.size)
        dlosses = draw.normal(size=(N, 1)).astype(dtype)
        results = []
        for target, number in ((ops, dtype), (plain, dtype), (plain, "float64")):
            here = [None if a is None else target.xp.asarray(a) for a in (logits.astype(number), rows, labels)]
            losses, highest, total = target.softmax_forward(*here, smoothing)
            scale = target.xp.asarray(dlosses.astype(number))
            d = target.softmax_backward(*here, smoothing, highest, total, scale)
            in_place = target.softmax_backward(*here, smoothing, highest, total, scale, here[0])
            assert in_place is here[0]
            np.testing.assert_array_equal(target.to_numpy(in_place), target.to_numpy(d))
            results.append([target.to_numpy(a).astype(np.float64) for a in (losses, d)])
        for got, allowed, expected in zip(*results, strict=True):
            bound = 2 * np.abs(allowed - expected).max(initial=0) + 2 * EPSILON[dtype] * np.abs(expected).max(initial=1)
            assert np.abs(got - expected).max(initial=0) <= bound
        if some:
            assert (results[0][1][skipped] == 0).all()


def test_a_logit_that_is_nan_stays_nan():
    ops = cuda_ops()
    logits = np.zeros((2, 200), "float32")
    logits[0, 150] = np.nan
    losses, _, _ = ops.softmax_forward(ops.xp.asarray(logits), None, ops.xp.asarray(np.zeros(2, int)), 0.0)
    assert np.isnan(losses.get()).tolist() == [True, False]


# ---- optimisers and the norm


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_give_numpys_bits(name, dtype):
    draw = np.random.default_rng(3)
    for features, order in ((1, "ascending"), (16, "random")):  # 2 and 272 parameters
        ops = cuda_ops(**THREAD_ORDERS[order])
        layer, plain = (
            gpurnn.Linear(features, features, backend=backend, dtype=dtype, seed=1) for backend in (ops, "numpy")
        )
        optimisers = [OPTIMIZERS[name](model) for model in (layer, plain)]
        for _ in range(3):
            grads = draw.normal(size=plain.flat_grads.shape).astype(dtype)
            layer.flat_grads[...] = ops.xp.asarray(grads)
            plain.flat_grads[...] = grads
            for optimizer in optimisers:
                optimizer.step()
            np.testing.assert_array_equal(layer.flat_params.get(), plain.flat_params)
        states = [optimizer.state_dict()["arrays"] for optimizer in optimisers]
        for key, value in states[1].items():
            np.testing.assert_array_equal(states[0][key], value)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 17, 70])  # the largest has more than one chunk
def test_the_norm_is_clipped_as_numpy_does(size, dtype):
    ops = cuda_ops()
    layer, plain = (gpurnn.Linear(size, size, backend=backend, dtype=dtype, seed=1) for backend in (ops, "numpy"))
    grads = np.random.default_rng(4).normal(size=plain.flat_grads.shape).astype(dtype)
    for max_norm in (0.5, 1e6, np.inf):
        layer.flat_grads[...] = ops.xp.asarray(grads)
        plain.flat_grads[...] = grads
        norm, expected = (gpurnn.clip_grad_norm(model, max_norm) for model in (layer, plain))
        assert float(norm) == pytest.approx(float(expected), rel=1e-14)
        np.testing.assert_allclose(layer.flat_grads.get(), plain.flat_grads, rtol=2 * np.finfo(dtype).eps)
    for broken in (np.nan, np.inf):
        layer.flat_grads[0] = broken
        before = layer.flat_grads.get()
        assert not np.isfinite(float(gpurnn.clip_grad_norm(layer, 1.0)))
        np.testing.assert_array_equal(layer.flat_grads.get(), before)


MUTATIONS = {
    "a row of the chunk left out": ("sums", "n = start + threadIdx.y", "n = start + 1 + threadIdx.y"),
    "no barrier before the tree": ("sums", "    __syncthreads();\n", ""),
    "a run that goes on": ("rows", "if (from_before || (last && goes_on))", "if (from_before)"),
    "the owner of a long run": ("rows", "return;  // it began earlier", ";"),
    "a barrier of the norm's tree": (
        "norm",
        "sums[threadIdx.x + half];\n        __syncthreads();",
        "sums[threadIdx.x + half];",
    ),
    "adam's second moment": ("adam", "exp_avg_sq, g, beta2", "exp_avg_sq, exp_avg, beta2"),
    "sign of the target's share": ("loss", "d -= dloss *", "d += dloss *"),
    "a row's sum": ("loss", "log(sums[0])", "log(sums[1])"),
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
        "loss": lambda: test_cuda_ops.test_cross_entropy_rows(300, "float32"),
        "norm": lambda: test_cuda_ops.test_the_norm_is_clipped_as_numpy_does(70, "float32"),
        "adam": lambda: test_cuda_ops.test_optimisers_give_numpys_bits("adam", "float32"),
        "mask": lambda: test_cuda_ops.test_masks_are_numpys((5, 3), 0.3),
    }[what]
    with pytest.raises((AssertionError, emulator.KernelError)):
        test()
