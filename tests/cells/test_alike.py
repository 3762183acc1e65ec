"""Faults that were alike in no test: each is one of a kind, and here with the right value."""

import numpy as np
import pytest
from helpers import assert_close
from optional import optional

import gpurnn
from gpurnn.cells import clip, mean, sigmoid, stop_gradient, tanh, where
from gpurnn.testing import check_gradients, count_terms
from gpurnn.testing.allowed import worst_error

torch = optional("torch")
X = np.random.default_rng(0).standard_normal((5, 3, 2))


def layer_of(function, gates="z", states="h", backend="numpy", dtype="float64", **more):
    return gpurnn.Recurrent(
        gpurnn.cell(gates=gates, states=states)(function), 2, 3, backend=backend, dtype=dtype, seed=1, **more
    )


# ---- both biases, where ax and ah are more than summands: equal derivatives do not make them so

UNEQUAL = {
    "a gate of the hidden side alone": lambda ax, ah, s: tanh(ax.z + ah.z) * where(ah.z > 0, 1, 0.5),
    "compared": lambda ax, ah, s: where(ax.z > ah.z, tanh(ax.z + ah.z), 0.5 * tanh(ax.z + ah.z)),
    "stopped": lambda ax, ah, s: tanh(stop_gradient(ax.z)) * stop_gradient(ah.z) + 0 * s.h,
    "summed twice": lambda ax, ah, s: tanh(ax.z + ah.z) * sigmoid(ax.z + 2 * ah.z),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_biases_stay_on_their_side(name):
    layer = layer_of(UNEQUAL[name])
    p = {n[:-3]: torch.tensor(a.copy()) for n, a in layer.params.items()}
    h, outputs = torch.zeros(3, 3, dtype=torch.float64), []
    for x in X:
        ax = torch.tensor(x) @ p["weight_ih"].T + p["bias_ih"]
        ah = h @ p["weight_hh"].T + p["bias_hh"]
        both = torch.tanh(ax + ah)
        h = {
            "a gate of the hidden side alone": both * torch.where(ah > 0, 1.0, 0.5),
            "compared": torch.where(ax > ah, both, 0.5 * both),
            "stopped": torch.tanh(ax) * ah,
            "summed twice": both * torch.sigmoid(ax + 2 * ah),
        }[name]
        outputs.append(h)
    assert_close(layer(X)[0], torch.stack(outputs), count_terms(layer, 5))


def test_sums_with_other_terms_share_a_block():
    def equations(ax, ah, s):
        return tanh(ax.z + s.h + ah.z)

    assert layer_of(equations).cell.apart == ()


# ---- states that come back as they are, in another place


@pytest.mark.parametrize(
    "states, function",
    [
        ("h c", lambda ax, ah, s: (s.c, s.h * tanh(ax.z + ah.z))),
        ("a b c", lambda ax, ah, s: (s.b, s.c, tanh(ax.z + ah.z))),
        ("a b", lambda ax, ah, s: (s.b, s.a + ax.z + ah.z)),
    ],
)
def test_permuted_states(states, function):
    layer = layer_of(function, states=states)
    state = tuple(np.random.default_rng(k).standard_normal((1, 3, 3)) for k in range(len(states.split())))
    check_gradients(layer, X, state)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_first_state_is_the_output_whatever_its_name(dtype):
    """Stored in the layer's dtype, the others in the compute dtype: a sequence in two pieces is the whole."""
    layer = layer_of(lambda ax, ah, s: (0.5 * s.y + tanh(ax.z + ah.z), s.h + s.y), states="y h", dtype=dtype)
    x = X.astype(dtype)
    whole, (y, h) = layer(x)
    first, state = layer(x[:2])
    second, (y2, h2) = layer(x[2:], state)
    assert y.dtype == np.dtype(dtype) and h.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    np.testing.assert_array_equal(h, h2)


# ---- names in generated code, constants


def test_names_of_the_generated_code():
    def equations(ax, ah, s):
        len = sigmoid(ax.r + ah.r)
        d_inner = len * s.h
        H = tanh(ax.n + ah.n(d_inner))
        return d_inner + H * (1 - len)

    check_gradients(layer_of(equations, gates="r n"), X, np.ones((1, 3, 3)))


def test_constants_fold():
    def equations(ax, ah, s):
        always = where(s.h * 0 + 1 > 0, 1, 2)
        return tanh(ax.z + ah.z) * mean(clip(s.h * 0, 1, 2)) + always * 0

    check_gradients(layer_of(equations), X)


def test_parameters_may_not_be_called_as_buffers():
    with pytest.raises(ValueError, match="the layer has a running_mean already"):
        gpurnn.cell(gates="z", parameters="running_mean")(lambda ax, ah, s, p: p.running_mean * ax.z)


def test_a_rate_of_one():
    with pytest.raises(ValueError, match="zoneout: a rate of 1 keeps the old state for ever"):
        gpurnn.GRU(2, 3, zoneout=1.0, backend="numpy")


# ---- modes


@pytest.mark.long
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_another_cell_in_evaluation_mode(backend):
    """It saves other blocks; calls of the same shape in turns."""

    x = X.astype("float32")

    def layer_of():
        layer = gpurnn.RNN(2, 30, recurrent_dropout=0.5, backend=backend, seed=1)
        assert layer.cell.saved_blocks != layer.cell.evaluating.saved_blocks
        return layer

    def trained(layer):
        layer.train()
        layer.calls = 0
        layer.zero_grad()
        y, _, backward = layer.forward(x)
        backward(np.ones_like(y))
        return layer.flat_grads.copy()

    def evaluated(layer):
        layer.eval()
        layer.zero_grad()
        y, _, backward = layer.forward(x)
        backward(np.ones_like(y))
        return layer.flat_grads.copy()

    fresh = [run(layer_of()) for run in (trained, evaluated)]
    layer = layer_of()
    for run, right in ((evaluated, fresh[1]), (trained, fresh[0]), (evaluated, fresh[1]), (trained, fresh[0])):
        np.testing.assert_array_equal(run(layer), right)


def test_running_statistics_of_forward_count_in_backward():
    layer = gpurnn.RNN(2, 3, batch_norm=True, backend="numpy", dtype="float64", seed=1)
    layer.forward(X)
    y, _, backward = layer.eval().forward(X)
    expected, _ = backward(np.ones_like(y))
    y, _, backward = layer.forward(X)
    layer.train().forward(3 * X)
    np.testing.assert_array_equal(backward(np.ones_like(y))[0], expected)


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "weight_hh_l0_reverse"])
def test_dropped_weights_of_a_frozen_direction(frozen):
    layers = [
        gpurnn.GRU(2, 3, bidirectional=True, weight_dropout=0.5, backend="numpy", dtype="float64", seed=1) for _ in "ab"
    ]
    layers[0].freeze(frozen)
    for layer in layers:
        y, _, backward = layer.forward(X)
        backward(np.ones_like(y))
    for name, gradient in layers[0].grads.items():
        np.testing.assert_array_equal(gradient, 0 if name == frozen else layers[1].grads[name])


def test_no_error_where_none_is_allowed():
    nothing = {"c": np.zeros(3)}
    assert worst_error(nothing, nothing, nothing, "float64", 0) == (0.0, "")


# ---- one hidden unit in float32: where NumPy's negative is wrong in place


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("B", [2, 3])
def test_one_unit_is_what_torch_has(kind, B):
    x = np.random.default_rng(B).standard_normal((4, B, 3)).astype("float32")
    layer, other = getattr(gpurnn, kind)(3, 1, backend="numpy", seed=1), getattr(torch.nn, kind)(3, 1)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in layer.state_dict().items()})
    expected = other(torch.from_numpy(x))[0].detach().numpy()
    assert_close(layer(x)[0], expected, count_terms(layer, 4), dtype="float32")
