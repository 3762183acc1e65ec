"""gpurnn.testing: what is right passes with room to spare, each kind of error is seen and named, nothing is changed."""

import doctest
import re

import numpy as np
import pytest
from helpers import cuda_ops

import gpurnn
from gpurnn import GRU, LSTM, BatchNorm, Dropout, DtypeError, Embedding, LayerNorm, Linear, Pooling, Sequential, testing
from gpurnn.testing import check_gradients, check_parity, check_ragged, check_repeat

F64 = {"backend": "numpy", "dtype": "float64", "seed": 1}
LENGTHS = [4, 0, 6]
X = np.random.default_rng(0).normal(size=(6, 3, 4))


def test_the_examples_run():
    results = doctest.testmod(testing.checks, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 10 and results.failed == 0


# ---- gradients


@pytest.mark.parametrize(
    "make",
    [
        lambda: LSTM(4, 5, num_layers=2, bidirectional=True, dropout=0.3, **F64),
        lambda: GRU(4, 5, learn_state=True, **F64),
        lambda: gpurnn.RNN(4, 5, nonlinearity="relu", num_layers=2, **F64),
        lambda: Sequential(Linear(4, 5, **F64), BatchNorm(5, **F64), Dropout(0.5, **F64), GRU(5, 3, **F64)),
    ],
    ids=["lstm", "gru with a learned state", "relu", "sequential"],
)
def test_right_gradients_pass_and_nothing_is_changed(make):
    layer = make()
    layer.forward(X)[-1](np.ones_like(layer(X)[0]))
    before = layer.flat_params.copy(), layer.flat_grads.copy(), layer.state_dict(), layer.random_state()
    assert check_gradients(layer, X, lengths=LENGTHS) < 0.1
    state = testing.draw_like(layer(X)[1], np.random.default_rng(1))
    before = before[:3] + (layer.random_state(),)
    assert check_gradients(layer, X, state) < 0.1
    assert before[3] == layer.random_state()
    np.testing.assert_array_equal(before[0], layer.flat_params)
    np.testing.assert_array_equal(before[1], layer.flat_grads)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[2][name])


class Wrong(LSTM):
    """The gradient of ``part``, an input or a parameter, is off by the share ``off``."""

    def __init__(self, part, off):
        super().__init__(4, 5, **F64)
        self.part, self.off = part, off

    def forward(self, x, state=None, lengths=None):
        output, final, backward = super().forward(x, state, lengths)

        def wrong(doutput=None, dstate=None):
            dx, (dh, dc) = backward(doutput, dstate)
            if self.part in self.grads:
                self.grads[self.part] *= 1 + self.off
            scale = {part: 1 + self.off * (part == self.part) for part in ("x", "h", "c")}
            return dx * scale["x"], (dh * scale["h"], dc * scale["c"])

        return output, final, wrong


@pytest.mark.parametrize("part", ["x", "h", "c", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_gradient_that_is_off_by_a_millionth_is_seen_and_named(part):
    state = testing.draw_like(LSTM(4, 5, **F64)(X)[1], np.random.default_rng(1))
    assert check_gradients(Wrong(part, 0), X, state) < 0.01
    name = "state" if part in "hc" else part
    with pytest.raises(AssertionError, match=f"^{name}: the derivative .* off by .*, allowed"):
        check_gradients(Wrong(part, 1e-6), X, state)


def test_the_share_is_that_of_what_is_allowed():
    """An error planted at a share of what is allowed is reported as that share, and refused above 1."""
    _, detail = testing.gradient_error(Wrong("x", 0), (X,))
    slope, allowed = (float(re.search(rf"{words} (\S+?),?(:|$| )", detail)[1].rstrip(":,"))
                      for words in ("direction is", "allowed"))  # fmt: skip

    def everything_off(share):
        layer = LSTM(4, 5, **F64)
        forward = layer.forward

        def wrong_forward(*arguments, **options):
            *outputs, backward = forward(*arguments, **options)

            def wrong(*doutputs):
                dx, dstate = backward(*doutputs)
                layer.flat_grads[...] *= 1 + share * allowed / slope
                return dx * (1 + share * allowed / slope), dstate

            return (*outputs, wrong)

        layer.forward = wrong_forward
        return layer

    assert check_gradients(everything_off(0.8), X) == pytest.approx(0.8, abs=0.02)
    with pytest.raises(AssertionError, match=r"allowed \d"):
        check_gradients(everything_off(1.3), X)


def test_the_old_name_works_and_warns():
    with pytest.warns(DeprecationWarning, match="check_gradients"):
        assert testing.check_gradient(LSTM(4, 5, **F64), X, lengths=LENGTHS) <= 1
    with pytest.warns(DeprecationWarning), pytest.raises(AssertionError):
        testing.check_gradient(Wrong("x", 1e-6), X)


def test_missing_gradients_and_wrong_shapes_are_named():
    with pytest.raises(AssertionError, match=r"dx: expected a gradient of shape \(6, 3, 4\), got none"):
        check_gradients(lambda x: (2 * x, lambda dy: None), X)
    with pytest.raises(AssertionError, match=r"dx: expected a gradient of shape \(6, 3, 4\), got \(3, 4\)"):
        check_gradients(lambda x: (2 * x, lambda dy: dy[0]), X)


def test_differences_that_say_nothing_are_refused():
    draw = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="equal calls differ, or there is no derivative"):
        check_gradients(lambda x: (x * draw.normal(), lambda dy: dy), X)
    with pytest.raises(AssertionError, match="there is no derivative"):
        check_gradients(lambda x: (np.cbrt(x), lambda dy: dy), np.zeros((3, 3)))


def test_a_gradient_of_nan_is_wrong():
    with pytest.raises(AssertionError):
        check_gradients(lambda x: (2 * x, lambda dy: dy * np.nan), X)


def test_frozen_parameters_do_not_move():
    layer = Sequential(Linear(4, 5, **F64), Linear(5, 3, **F64))
    layer.freeze("0.weight")
    assert check_gradients(layer, X) < 0.1


def test_gradients_need_float64():
    with pytest.raises(DtypeError, match="layer: expected float64.*got float32"):
        check_gradients(Linear(4, 5, backend="numpy"), X)
    with pytest.raises(DtypeError, match="inputs: expected float64.*got float32"):
        check_gradients(Linear(4, 5, **F64), X.astype("float32"))


def test_inputs_of_several_kinds():
    ids = np.array([[1, 2], [0, 4]])
    assert check_gradients(Embedding(5, 3, **F64), ids) < 0.1
    assert (
        check_gradients(lambda logits: gpurnn.cross_entropy(logits, ids, lengths=[2, 1]), X[:2, :2, :].repeat(2, 2))
        < 0.1
    )
    cell = gpurnn.LSTMCell(4, 5, **F64)
    assert check_gradients(cell, X[0], (np.ones((3, 5)), np.zeros((3, 5)))) < 0.1
    attention = gpurnn.Attention(4, 4, "general", **F64)
    assert check_gradients(attention, X, X + 1, LENGTHS) < 0.1


# ---- parity


def linear(backend, dtype):
    return Linear(4, 5, backend=backend, dtype=dtype, seed=1)


def lstm(backend, dtype):
    return LSTM(4, 5, num_layers=2, backend=backend, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("make", [linear, lstm])
def test_backends_agree(make, dtype):
    for backend in ("numpy", "cpu"):
        assert check_parity(make, X, backend=backend, dtype=dtype) <= 1


def test_a_given_function_is_the_reference():
    weights = linear("numpy", "float32").state_dict()
    for off, right in ((0, True), (1e-12, False)):

        def function(x, off=off):
            return x @ weights["weight"].T.astype("float64") * (1 + off) + weights["bias"]

        if right:
            check_parity(linear, X, reference=function)
        else:
            with pytest.raises(AssertionError, match="^output: off by .*, allowed"):
                check_parity(linear, X, reference=function)


def test_an_error_of_one_array_is_named(monkeypatch):
    class Coarse(Linear):
        def forward(self, x):
            y, backward = super().forward(x)

            def coarse(dy):
                dx = backward(dy)
                self.grads["bias"] *= 1 + 1e-4
                return dx

            return y, coarse

    def make(backend, dtype):
        return (Coarse if backend == "cpu" else Linear)(4, 5, backend=backend, dtype=dtype, seed=1)

    with pytest.raises(AssertionError, match="^d bias: off by .*, allowed"):
        check_parity(make, X)


def test_outputs_that_backward_overwrites_are_seen():
    class Spent(Linear):
        def forward(self, x):
            y, backward = super().forward(x)
            return y, lambda dy: (backward(dy), y.fill(0))[0]

    def make(backend, dtype):
        return (Spent if backend == "cpu" else Linear)(4, 5, backend=backend, dtype=dtype, seed=1)

    with pytest.raises(AssertionError, match="^output: off by"):
        check_parity(make, X)


# ---- equal bits


def test_runs_that_differ_are_named():
    calls = []

    class Drifting(Linear):
        def forward(self, x):
            y, backward = super().forward(x)
            calls.append(y)
            return y + 1e-15 * len(calls), backward

    assert check_repeat(Sequential(Dropout(0.5, **F64), Linear(4, 5, **F64)), X) == 0
    with pytest.raises(AssertionError, match="two runs differ in output$"):
        check_repeat(Drifting(4, 5, **F64), X)


# ---- ragged batches


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: LSTM(4, 5, num_layers=2, bidirectional=True, **o),
        lambda **o: GRU(4, 5, batch_first=True, learn_state=True, **o),
        lambda **o: Pooling(4, "last", 2, **o),
        lambda **o: Pooling(4, "attention", **o),
        lambda **o: BatchNorm(4, **o),
        lambda **o: Sequential(LayerNorm(4, **o), Dropout(0.5, **o), GRU(4, 5, **o)),
    ],
    ids=["lstm", "batch first", "last", "attention", "batch norm", "sequential"],
)
def test_ragged_batches_pass(make, dtype):
    layer = make(backend="cpu", dtype=dtype, seed=1)
    x = X.swapaxes(0, 1).copy() if getattr(layer, "batch_first", False) else X
    before = x.copy()
    assert check_ragged(layer, x, LENGTHS) <= 1
    np.testing.assert_array_equal(x, before)
    assert layer.training


def test_ragged_ids():
    ids = np.random.default_rng(0).integers(0, 5, (6, 3))
    model = Sequential(Embedding(5, 4, **F64), LSTM(4, 5, **F64))
    assert check_ragged(model, ids, LENGTHS) <= 1


def leaky(what):
    class Leaky(GRU):
        def forward(self, x, state=None, lengths=None):
            if what == "reads padding" and lengths is not None:
                x = x + np.nan_to_num(x).max() * 1e-3
            output, final, backward = super().forward(x, state, lengths)
            if what == "writes padding" and lengths is not None:
                output = np.where(output == 0, 1e-9, output)
            if what == "wrong state" and lengths is not None:
                final = final[:, ::-1]
            if what == "wrong bias":

                def wrong(doutput=None, dstate=None):
                    dx, dstate = backward(doutput, dstate)
                    self.grads["bias_hh_l0"] += 1e-6
                    return dx, dstate

                return output, final, wrong
            return output, final, backward

    return Leaky(4, 5, **F64)


@pytest.mark.parametrize(
    "what, message",
    [
        ("reads padding", r"sequence of length \d, output: off by .*, allowed"),
        ("writes padding", "output past the end of the sequence of length 4 is not zero"),
        ("wrong state", r"sequence of length \d, state: off by"),
        ("wrong bias", "d bias_hh_l0: off by .*, allowed"),
    ],
)
def test_a_ragged_batch_that_is_wrong_is_named(what, message):
    with pytest.raises(AssertionError, match=message):
        check_ragged(leaky(what), X, LENGTHS)


# ---- on a GPU


@pytest.mark.emulated
def test_all_checks_on_the_emulated_gpu():
    ops = cuda_ops(checked=False)

    def make(backend, dtype):
        return Sequential(*(layer(4, 4, backend=backend, dtype=dtype, seed=1) for layer in (Linear, GRU)))

    assert check_gradients(make(ops, "float64"), X, lengths=LENGTHS) < 0.1
    assert check_parity(make, X, backend=ops, dtype="float32", lengths=LENGTHS) <= 1
    assert check_parity(make, X, backend=ops, dtype="float64") <= 1
    assert check_repeat(make(ops, "float32"), X) == 0
    assert check_ragged(make(ops, "float32"), X, LENGTHS) <= 1
