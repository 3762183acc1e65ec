"""Activation, Merge, First and Masked: against finite differences and against what they are made of."""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_close, cuda_ops

import gpurnn
from gpurnn.dtypes import check_dtype
from gpurnn.errors import DtypeError, ShapeError
from gpurnn.interop.keras import Activation, First, Masked, Merge
from gpurnn.interop.keras.layers import ACTIVATIONS
from gpurnn.testing import check_gradients, check_repeat

F64 = {"backend": "numpy", "dtype": "float64"}
KW = {"backend": "numpy", "seed": 1}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


DEFINITIONS = {
    "identity": lambda x: x, "relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "sigmoid": sigmoid,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "softsign": lambda x: x / (1 + abs(x)),
    "softplus": lambda x: np.log1p(np.exp(x)), "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "silu": lambda x: x * sigmoid(x), "softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    layer, x = Activation(name, **F64), 4 * numbers(5, 3, 4)
    assert_close(layer(x), DEFINITIONS[name](x), 8, each=True)
    check_gradients(layer, x)
    check_repeat(layer, x)
    assert layer(np.zeros((0, 3))).shape == (0, 3)
    extremes = Activation(name, backend="numpy")(np.array([[-1e4, 0, 1e4]], "float32"))
    assert np.isfinite(extremes).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_of_activations(name, dtype):
    """Computed in float32, and rounded once; so is the gradient."""
    x = (2 * numbers(4, 2, 3)).astype(check_dtype(dtype))
    layer, exact = Activation(name, backend="numpy", dtype=dtype), Activation(name, **F64)
    y, backward = layer.forward(x)
    expected, exact_backward = exact.forward(x.astype("float64"))
    terms = 8 if dtype == "float32" else 1.01
    assert_close(y.astype("float64"), expected, terms, dtype=dtype, each=True)
    dx = backward(x)
    assert_close(dx.astype("float64"), exact_backward(x.astype("float64")), terms, dtype=dtype, each=True)
    assert y.dtype == dx.dtype == layer.dtype


@pytest.mark.parametrize("mode", ["sum", "mul", "ave"])
def test_merges(mode):
    layer, x = Merge(6, mode, **F64), numbers(4, 2, 6)
    first, second = x[..., :3], x[..., 3:]
    expected = {"sum": first + second, "mul": first * second, "ave": (first + second) / 2}[mode]
    assert_close(layer(x), expected, 1)
    check_gradients(layer, x)
    x = x.astype(check_dtype("bfloat16"))
    assert_close(Merge(6, mode, backend="numpy", dtype="bfloat16")(x).astype("float64"),
                 layer(x.astype("float64")), 1.01, dtype="bfloat16", each=True)  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
def test_first(batch_first):
    """The last output of a layer in reverse, whatever is masked; zeros where nothing is there."""
    x, mask = numbers(5, 3, 2), np.ones((5, 3), bool)
    mask[:3, 0] = mask[:, 1] = False
    lengths = [5, 5, 2]
    layer = First(2, batch_first=batch_first, **F64)
    given = (x.swapaxes(0, 1), lengths) if batch_first else (x, lengths)
    y = layer(*given, mask=mask.T if batch_first else mask)
    assert np.array_equal(y, [x[3, 0], [0, 0], x[0, 2]])
    check_gradients(layer, given[0], lengths=lengths)
    rnn = gpurnn.GRU(2, 3, reverse=True, batch_first=batch_first, dtype="float64", **KW)
    output, h = rnn(*given[:1], lengths=lengths, mask=mask.T if batch_first else mask)
    got = First(3, batch_first=batch_first, **F64)(output, lengths, mask=mask.T if batch_first else mask)
    assert np.array_equal(got, h[0])


def masked(ids, **options):
    kw = KW | options
    first = gpurnn.Embedding(5, 3, **kw) if ids else gpurnn.Linear(3, 3, **kw)
    layers = {
        "first": first,
        "rnn": gpurnn.GRU(3, 4, bidirectional=True, **kw),
        "last": gpurnn.Pooling(8, "last", 2, **kw),
    }
    return Masked(layers, mask_value=None if ids else -1.0), gpurnn.Sequential(copy.deepcopy(layers))


@pytest.mark.parametrize("ids", [True, False])
def test_masks_from_the_data(ids):
    """Results and gradients are those of the mask given, or of both masks."""
    model, plain = masked(ids, dtype="float64")
    rng = np.random.default_rng(0)
    happens = rng.random((6, 4)) < 0.6
    x = (
        np.where(happens, rng.integers(1, 5, (6, 4)), 0)
        if ids
        else np.where(happens[..., None], numbers(6, 4, 3), -1.0)
    )
    more, lengths = rng.random((6, 4)) < 0.7, [6, 2, 0, 5]
    for given in (None, more):
        mask = happens if given is None else happens & given
        assert np.array_equal(model(x, mask=given)[0], plain(x, mask=mask)[0])
        y, _, backward = model.forward(x, lengths=lengths, mask=given)
        expected, _, plain_backward = plain.forward(x, lengths=lengths, mask=mask)
        assert np.array_equal(y, expected)
        for one in (model, plain):
            one.zero_grad()
        got, theirs = backward(np.ones_like(y))[0], plain_backward(np.ones_like(y))[0]
        assert ids or np.array_equal(got, theirs)
        assert np.array_equal(model.flat_grads, plain.flat_grads)
    if not ids:  # at a fixed mask: where all features are -1, the slightest change makes a timestep of it
        check_gradients(model, numbers(6, 4, 3), mask=happens)
    assert np.array_equal(pickle.loads(pickle.dumps(model))(x)[0], model(x)[0])
    assert np.array_equal(copy.deepcopy(model)(x)[0], model(x)[0])


def test_one_feature_is_enough():
    model, plain = masked(False)
    x = np.full((2, 1, 3), -1, "float32")
    x[1, 0, 2] = 0
    assert np.array_equal(model(x)[0], plain(x, mask=[[False], [True]])[0])


@pytest.mark.emulated
def test_on_a_gpu():
    """The array code on what CuPy offers."""
    ops, x = cuda_ops(), numbers(3, 2, 4).astype("float32")
    for name in ACTIVATIONS:
        layer = Activation(name, backend=ops)
        y, backward = layer.forward(ops.xp.asarray(x))
        expected, plain = Activation(name, backend="numpy").forward(x)
        assert_close(ops.to_numpy(y), expected, 8, name, "float32", each=True)
        assert_close(
            ops.to_numpy(backward(ops.xp.asarray(np.ones_like(x)))),
            plain(np.ones_like(x)),
            8,
            name,
            "float32",
            each=True,
        )
    merge = Merge(4, "mul", backend=ops)
    assert_close(ops.to_numpy(merge(ops.xp.asarray(x))), x[..., :2] * x[..., 2:], 1, dtype="float32")
    model = Masked({"rnn": gpurnn.GRU(4, 3, backend=ops, seed=1), "first": First(3, backend=ops)}, mask_value=0.0)
    plain = Masked({"rnn": gpurnn.GRU(4, 3, **KW), "first": First(3, backend="numpy")}, mask_value=0.0)
    x[0] = x[2, 1] = 0
    assert_close(
        ops.to_numpy(model(ops.xp.asarray(x))[0]), plain(x)[0], gpurnn.testing.count_terms(plain, 3), dtype="float32"
    )


def test_second_derivatives():
    """A product with second derivatives goes through the layers."""
    model = gpurnn.Sequential(gpurnn.Linear(3, 4, **F64, seed=1), Merge(4, "mul", **F64), Activation("silu", **F64))
    x, direction = numbers(5, 3), {"0.bias": numbers(4)}

    def gradient(model):
        y, backward = model.forward(x)
        backward(y)

    product = gpurnn.hvp(model, gradient, direction)
    step, slopes = 1e-4, []  # the error of a central difference: step^2, and 1e-16 / step
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        moved.params["0.bias"] = model.params["0.bias"] + sign * step * direction["0.bias"]
        gradient(moved)
        slopes.append(moved.grads["0.weight"].copy())
    assert np.abs((slopes[0] - slopes[1]) / (2 * step) - product["0.weight"]).max() < 1e-6


def test_errors():
    with pytest.raises(ValueError, match="function should be one of 'identity', .*, got 'gelu'"):
        Activation("gelu")
    with pytest.raises(ShapeError, match=r"x: expected shape \(..., classes\), got \(\)"):
        Activation("softmax", backend="numpy")(np.float32(1))
    with pytest.raises(DtypeError, match="x: "):
        Activation("tanh", backend="numpy")(np.zeros(3))
    with pytest.raises(ValueError, match="features should be a multiple of 2, got 5"):
        Merge(5, "sum")
    with pytest.raises(ValueError, match="mode should be one of 'sum', 'mul', 'ave', got 'concat'"):
        Merge(4, "concat")
    with pytest.raises(ShapeError, match=r"x: expected shape \(..., 4\), got \(3, 5\)"):
        Merge(4, "sum", backend="numpy")(np.zeros((3, 5), "float32"))
    model, _ = masked(True)
    with pytest.raises(ShapeError, match=r"mask: expected shape \(6, 4\), got \(6, 1\)"):
        model(np.ones((6, 4), int), mask=np.ones((6, 1), bool))
    with pytest.raises(ShapeError, match="rnn: GRU reads 3 features, but first: Linear before it gives 2"):
        Masked({"first": gpurnn.Linear(3, 2, **KW), "rnn": gpurnn.GRU(3, 4, **KW)}, mask_value=0.0)
    with pytest.raises(ValueError, match="mask_value should be a finite number"):
        Masked({"rnn": gpurnn.GRU(3, 4, **KW)}, mask_value=np.nan)


def test_no_exporter_takes_them_for_others():
    """First and Masked derive from layers that ONNX has, and are others."""
    pytest.importorskip("onnx")
    from gpurnn.interop.onnx import export_onnx

    for model in (First(3, backend="numpy"), masked(False)[0], Activation("relu", backend="numpy")):
        with pytest.raises(ValueError, match="cannot be exported"):
            export_onnx(model, "model.onnx")
