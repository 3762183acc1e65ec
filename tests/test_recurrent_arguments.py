"""Arguments of the recurrent layers: initial values, signatures, what is refused and with which words."""

import inspect

import numpy as np
import pytest
from recurrent_cases import build

import gpurnn
from gpurnn import BackendError, DtypeError, ShapeError


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_signatures_are_explicit(name):
    """help() and an editor show every argument with its default and its type."""
    layer = getattr(gpurnn, name)
    for function in (layer.__init__, layer.__call__, layer.forward, layer.step):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in list(signature.parameters.values())[1:]:
            assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), parameter
            assert parameter.annotation is not parameter.empty, parameter
    if name.endswith("Cell"):  # an argument means the same in a cell as in its layer
        whole = inspect.signature(getattr(gpurnn, name.removesuffix("Cell"))).parameters
        own = inspect.signature(layer).parameters
        assert {n: p.default for n, p in own.items()} == {n: whole[n].default for n in own}


@pytest.mark.parametrize(
    "layer, text",
    [
        (gpurnn.LSTM(10, 20, num_layers=2, bidirectional=True), "LSTM(10, 20, num_layers=2, bidirectional=True)"),
        (gpurnn.GRU(3, [4, 5], 2, dropout=0.5), "GRU(3, [4, 5], num_layers=2, dropout=0.5)"),
        (gpurnn.GRU(3, 4, reset_after=False, dtype="float64"), "GRU(3, 4, reset_after=False, dtype='float64')"),
        (gpurnn.RNNCell(3, 4, False, "relu"), "RNNCell(3, 4, nonlinearity='relu', bias=False)"),
        (
            gpurnn.LSTM(3, 4, dtype="float64").freeze("bias_*"),
            "LSTM(3, 4, dtype='float64', 32 of 144 parameters frozen)",
        ),
    ],
    ids=str,
)
def test_repr_shows_sizes_as_torch_does(layer, text):
    assert repr(layer) == text


def test_initialisers():
    lstm = gpurnn.LSTM(30, 50, backend="cpu", seed=1)
    bound = 1 / np.sqrt(50)
    assert np.abs(lstm.flat_params).max() <= bound and np.abs(lstm.flat_params).max() > 0.99 * bound
    drawn = np.concatenate([values.ravel() for values in lstm.params.values()])
    assert abs(drawn.std() - bound / np.sqrt(3)) < 0.02 * bound
    assert np.array_equal(lstm.flat_params, gpurnn.LSTM(30, 50, backend="cpu", seed=1).flat_params)
    assert not np.array_equal(lstm.flat_params, gpurnn.LSTM(30, 50, backend="cpu", seed=2).flat_params)
    assert not np.array_equal(lstm.flat_params, gpurnn.LSTM(30, 50, backend="cpu").flat_params)
    gated = gpurnn.LSTM(30, 50, backend="cpu", seed=1, forget_bias=1.0)
    np.testing.assert_array_equal(gated.params["bias_ih_l0"][50:100], 1)
    np.testing.assert_array_equal(gated.params["bias_hh_l0"][50:100], 0)
    np.testing.assert_array_equal(gated.params["bias_ih_l0"][:50], lstm.params["bias_ih_l0"][:50])
    orthogonal = gpurnn.LSTM(30, 50, proj_size=20, backend="cpu", init="orthogonal", dtype="float64")
    for gate in orthogonal.params["weight_hh_l0"].reshape(4, 50, 20):
        np.testing.assert_allclose(gate.T @ gate, np.eye(20), atol=1e-12)
    assert not orthogonal.params["bias_ih_l0"].any()
    xavier = gpurnn.GRU(30, 50, backend="cpu", init="xavier", seed=0)
    assert np.abs(xavier.params["weight_ih_l0"]).max() <= np.sqrt(6 / 80)
    assert np.abs(xavier.params["weight_ih_l0"]).max() > 0.98 * np.sqrt(6 / 80)


def test_initialisers_for_long_range():
    irnn = gpurnn.RNN(300, 50, 2, "relu", backend="cpu", init="identity", seed=0)
    for layer in "01":
        np.testing.assert_array_equal(irnn.params[f"weight_hh_l{layer}"], np.eye(50))
        assert not irnn.params[f"bias_ih_l{layer}"].any() and not irnn.params[f"bias_hh_l{layer}"].any()
    assert abs(irnn.params["weight_ih_l0"].std() / 0.001 - 1) < 4 / np.sqrt(2 * 300 * 50)  # 4 standard errors
    projected = gpurnn.LSTM(30, 50, proj_size=20, backend="cpu", init="identity")
    np.testing.assert_array_equal(projected.params["weight_hh_l0"], np.tile(np.eye(50, 20), (4, 1)))
    np.testing.assert_array_equal(projected.params["weight_hr_l0"], np.eye(20, 50))

    H, longest = 400, 100
    for kind, held in (("lstm", "f"), ("gru", "z")):
        layer, plain = (build(kind, hidden=H, bidirectional=True, chrono=chrono) for chrono in (longest, None))
        for suffix in ("", "_reverse"):
            ih, hh, before = (
                values.reshape(-1, H)
                for values in (layer.params[f"bias_ih_l0{suffix}"], layer.params[f"bias_hh_l0{suffix}"],
                               plain.params[f"bias_ih_l0{suffix}"])
            )  # fmt: skip
            spans = np.exp(ih[1])  # U(1, 99): mean 50, deviation 98 / sqrt(12)
            assert spans.min() >= 1 and spans.max() <= longest - 1
            assert abs(spans.mean() - longest / 2) < 4 * (longest - 2) / np.sqrt(12 * H)
            assert not hh[1].any()
            others = [2, 3] if held == "f" else [0, 2]
            np.testing.assert_array_equal(ih[others], before[others])
            if held == "f":
                np.testing.assert_array_equal(ih[0], -ih[1])
                assert not hh[0].any()


def test_parameters_are_views_of_one_buffer():
    layer = build("lstm", num_layers=2, bidirectional=True)
    for views, buffer in ((layer.params, layer.flat_params), (layer.grads, layer.flat_grads)):
        assert sum(view.size for view in views.values()) == layer.parameter_count <= buffer.size
        assert all(np.shares_memory(view, buffer) for view in views.values())
    layer.forward(np.ones((2, 1, 4)))[2](np.ones((2, 1, 10)))
    assert layer.flat_grads.any()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda layer, x: layer(x[0, 0]), ShapeError, "x: expected 2-D .* or 3-D"),
        (lambda layer, x: layer(x[:, :, :3]), ShapeError, "Expected 4, got 3"),
        (lambda layer, x: layer(x.astype("float32")), DtypeError, r"astype\('float64'\)"),
        (lambda layer, x: layer(x.astype(int)), DtypeError, "int64"),
        (lambda layer, x: layer(x, np.zeros((2, 3, 5))), ShapeError, "pair"),
        (lambda layer, x: layer(x, (np.zeros((2, 3, 5)), np.zeros((2, 4, 5)))), ShapeError, r"state c.*\(2, 3, 5\)"),
        (lambda layer, x: layer(x, (np.zeros((1, 3, 5)),) * 2), ShapeError, r"state h.*\(2, 3, 5\), got \(1, 3, 5\)"),
        (lambda layer, x: layer(x, (np.zeros((2, 3, 5), "f"),) * 2), DtypeError, "state h"),
        (lambda layer, x: layer(x, lengths=[6, -1, 2]), ShapeError, "from 0 to 6"),
        (lambda layer, x: layer(x, lengths=[6, 7, 2]), ShapeError, "got 7"),
        (lambda layer, x: layer(x, lengths=[6, 2]), ShapeError, "each of the 3"),
        (lambda layer, x: layer(x, lengths=[6.0, 2.0, 1.0]), DtypeError, "integers"),
        (lambda layer, x: layer.step(x), ShapeError, "one step"),
        (lambda layer, x: layer.plan(-1, 3), ValueError, "T should be"),
    ],
)
def test_bad_calls(call, error, words):
    layer = build("lstm", num_layers=2, dropout=0.5)
    with pytest.raises(error, match=words):
        call(layer, np.zeros((6, 3, 4)))
    assert layer.calls == 0


@pytest.mark.parametrize(
    "options, error",
    [
        ({"hidden_size": 0}, ValueError),
        ({"hidden_size": 2.5}, TypeError),
        ({"hidden_size": [3, 4]}, ValueError),
        ({"num_layers": 0}, ValueError),
        ({"dropout": 0.5}, ValueError),
        ({"dropout": float("nan"), "num_layers": 2}, ValueError),
        ({"dropout": 1.5, "num_layers": 2}, ValueError),
        ({"proj_size": 5}, ValueError),
        ({"bidirectional": True, "reverse": True}, ValueError),
        ({"init": "zeros"}, ValueError),
        ({"forget_bias": float("inf")}, ValueError),
        ({"forget_bias": 1.0, "bias": False}, ValueError),
        ({"chrono": 100, "bias": False}, ValueError),
        ({"chrono": 1}, ValueError),
        ({"chrono": 9.5}, TypeError),
        ({"chrono": 100, "forget_bias": 1.0}, ValueError),
        ({"dtype": "int32"}, DtypeError),
        ({"seed": -1}, ValueError),
        ({"backend": "tpu"}, ValueError),
    ],
)
def test_bad_constructor_arguments(options, error):
    with pytest.raises(error):
        gpurnn.LSTM(**{"input_size": 4, "hidden_size": 5, "backend": "cpu"} | options)


def test_options_of_other_cells_are_refused():
    with pytest.raises(TypeError, match="proj_size"):
        gpurnn.GRU(3, 4, proj_size=2, backend="cpu")
    with pytest.raises(TypeError, match="forget_bias"):
        gpurnn.RNN(3, 4, forget_bias=1.0, backend="cpu")
    with pytest.raises(TypeError, match="chrono"):
        gpurnn.RNN(3, 4, chrono=100, backend="cpu")
    with pytest.raises(TypeError, match="bidirectional"):
        gpurnn.LSTMCell(3, 4, bidirectional=True, backend="cpu")
    with pytest.raises(ValueError, match="nonlinearity"):
        gpurnn.RNN(3, 4, nonlinearity="sine", backend="cpu")


def test_array_of_another_device_is_refused():
    class OnGpu:
        __cuda_array_interface__ = {"shape": (1, 1, 4)}

    with pytest.raises(BackendError, match="x: is on a GPU"):
        build("lstm")(OnGpu())
