"""Frozen parameters: no gradient is made for them, nothing moves them, all else is as without."""

import copy
import pickle

import numpy as np
import pytest
from helpers import LAYERS, build_layer, cuda_ops, numbers, ones

import gpurnn
from gpurnn import LSTM, Embedding, LayerNorm, Linear, Sequential, TiedLinear
from gpurnn.testing import leaves

OPTIMIZERS = {
    "sgd": lambda model: gpurnn.SGD(model, 0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda model: gpurnn.RMSprop(model, centered=True, momentum=0.5, weight_decay=0.1),
    "adam": lambda model: gpurnn.Adam(model, amsgrad=True, weight_decay=0.1),
    "adamw": lambda model: gpurnn.AdamW(model, weight_decay=0.1),
}


def language_model(backend="cpu"):
    o = {"backend": backend, "dtype": "float64"}
    table = Embedding(7, 6, seed=1, **o)
    return Sequential(
        {"table": table, "encoder": LSTM(6, 6, 2, seed=2, **o), "norm": LayerNorm(6, **o), "head": TiedLinear(table)}
    )


@pytest.mark.parametrize("backend, dtype", [("numpy", "float64"), ("cpu", "float64"), ("cpu", "float16")])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_gradient_is_made_for_each_in_turn(kind, backend, dtype):
    layer, inputs = build_layer(kind, backend, dtype)
    *outputs, backward = layer.forward(*inputs)
    expected = [np.array(a) for a in leaves(backward(ones(outputs[0])))]
    gradients = {name: grad.copy() for name, grad in layer.grads.items()}
    for frozen in [[name] for name in layer.params] + [list(layer.params)]:
        layer.freeze(*frozen)
        assert layer.frozen == frozen
        layer.zero_grad()
        *outputs, backward = layer.forward(*inputs)
        for got, want in zip(leaves(backward(ones(outputs[0]))), expected, strict=True):
            np.testing.assert_array_equal(got, want)
        for name, grad in layer.grads.items():
            np.testing.assert_array_equal(grad, 0 if name in frozen else gradients[name], err_msg=name)
        layer.unfreeze()
        assert layer.frozen == []


def test_no_product_is_made(monkeypatch):
    """Of the weights' gradients only those by the inputs are left."""
    from gpurnn.backends.ops import Ops

    ops = Ops(np, "numpy")
    calls = []
    for name in ("accumulate_product", "sum_steps", "accumulate_rows"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    model = Sequential(
        Embedding(7, 4, backend=ops, seed=1), gpurnn.GRU(4, 4, 2, bidirectional=True, backend=ops, seed=2),
        gpurnn.Pooling(8, "attention", backend=ops, seed=3), Linear(8, 2, backend=ops, seed=4),
    )  # fmt: skip
    ids = np.array([[1, 2], [3, 4]])
    for frozen in (False, True):
        if frozen:
            model.freeze()
        calls.clear()
        y, _, backward = model.forward(ids)
        backward(y)
        assert bool(calls) != frozen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_no_optimiser_moves_them_and_the_rest_goes_as_without(optimizer, backend):
    """Weight decay, momentum and what the gradients' buffer holds: nothing reaches a frozen parameter."""
    frozen, free = language_model(backend), language_model(backend)
    frozen.freeze("encoder.*_l1", "norm.bias")
    names = frozen.frozen
    assert names == [f"encoder.{n}_l1" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] + ["norm.bias"]
    before = frozen.state_dict()
    rules = [OPTIMIZERS[optimizer](model) for model in (frozen, free)]
    for step in range(3):
        for model, rule in zip((frozen, free), rules, strict=True):
            for grad in model.grads.values():
                grad[...] = np.cos(np.arange(grad.size) + step).reshape(grad.shape)
            rule.step()
    for name, value in frozen.params.items():
        np.testing.assert_array_equal(value, before[name] if name in names else free.params[name], err_msg=name)
    for name, array in rules[0].state_dict()["arrays"].items():
        if name.partition(".")[2] in names:
            assert not array.any()
    frozen.unfreeze("norm")
    rules[0].step()
    assert (frozen.params["norm.bias"] != before["norm.bias"]).any()
    frozen.freeze()
    before = frozen.state_dict()
    rules[0].step()
    for name, value in frozen.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_clipping_ignores_them(backend):
    model = language_model(backend)
    model.freeze("encoder")
    for name, grad in model.grads.items():
        grad[...] = np.nan if name.startswith("encoder") else 2  # also where nobody should have written
    count = sum(grad.size for name, grad in model.grads.items() if not name.startswith("encoder"))
    norm = float(gpurnn.clip_grad_norm(model, 1.0))
    assert norm == pytest.approx(2 * np.sqrt(count), rel=1e-12)
    assert not model.grads["encoder.weight_ih_l0"].any()
    assert model.grads["table.weight"][0, 0] == pytest.approx(2 / norm, rel=1e-5)
    model.grads["encoder.bias_ih_l0"] = np.nan
    gpurnn.clip_grad_value(model, 0.01)
    assert not model.grads["encoder.bias_ih_l0"].any()


def test_names_and_patterns():
    model = language_model()
    assert model.freeze("encoder.*") is model
    assert (
        [name for name in model.params if name.startswith("encoder.")] == model.frozen == model.freeze("encoder").frozen
    )
    assert model["encoder"].frozen == list(model["encoder"].params) and model["norm"].frozen == []
    model["norm"].freeze("weight")
    assert model.frozen[-1] == "norm.weight"
    assert model.unfreeze("encoder.*_l1").unfreeze("encoder.weight_?h_l0").frozen == [
        "encoder.bias_ih_l0", "encoder.bias_hh_l0", "norm.weight",
    ]  # fmt: skip
    for wrong in ("encoder.weight", "decoder.*", "enc", ""):
        before = model.frozen
        for call in (model.freeze, model.unfreeze):
            with pytest.raises(
                KeyError, match=rf"{call.__name__}: no parameter or layer is called '.*', there are table"
            ):
                call("table", wrong)
        assert model.frozen == before  # nothing half done
    with pytest.raises(TypeError, match="freeze: names should be strings, got LSTM"):
        model.freeze(model["encoder"])
    assert gpurnn.Dropout(0.5, backend="cpu").freeze().frozen == []


def test_they_are_shown():
    model = language_model()
    before = repr(model)
    model.freeze("norm", "encoder.bias_ih_l0")
    assert f"{model.parameter_count} parameters, 36 of them frozen, " in repr(model).split("\n")[0]
    assert "norm: LayerNorm(6; 12 parameters, 12 of them frozen, " in repr(model)
    assert repr(model.unfreeze()) == before


def test_a_tied_table_is_frozen_in_both_uses():
    model = language_model()
    model.freeze("table")
    y, _, backward = model.forward(np.array([[1, 2], [3, 4]]))
    backward(np.ones_like(y))
    assert not model.grads["table.weight"].any() and model.grads["head.bias"].any()


def test_gradients_made_before_are_dropped_and_copies_keep_what_is_frozen():
    model = language_model()
    y, _, backward = model.forward(np.array([[1, 2], [3, 4]]))
    backward(np.ones_like(y))
    model.freeze("encoder")
    assert not model["encoder"].flat_grads.any() and model.grads["norm.weight"].any()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.frozen == model.frozen
        other.unfreeze()
        assert model.frozen and not other.frozen
    layer = Linear(3, 4, backend="cpu").freeze()
    assert Sequential(layer).frozen == ["0.weight", "0.bias"]  # and into a model


def test_a_frozen_layer_is_not_changed_by_an_optimiser():
    """So its backward may come after the step."""
    model = language_model().freeze("encoder")
    x = numbers(4, 2, 6)
    y, _, backward = model["encoder"].forward(x)
    gpurnn.Adam(model).step()
    backward(y)
    model.unfreeze("encoder.bias_ih_l0")
    y, _, backward = model["encoder"].forward(x)
    gpurnn.Adam(model).step()
    with pytest.raises(RuntimeError, match="parameter encoder.bias_ih_l0 was changed"):
        backward(y)


@pytest.mark.long
def test_fit_leaves_them_alone_and_says_where_a_resumed_run_has_others(tmp_path, caplog):
    """Weight noise, too; values are saved as ever, what is frozen is the model's."""
    rng = np.random.default_rng(0)
    x, y = [rng.standard_normal((4, 4)) for _ in range(4)], [rng.integers(0, 3, 4) for _ in range(4)]
    source = gpurnn.SequenceBatches(x, y, 2)
    o = {"backend": "cpu", "dtype": "float64"}
    seen = []

    class Watched(Linear):
        def forward(self, x, **options):
            seen.append(self.params["weight"].copy())
            return super().forward(x, **options)

    def train(epochs, freeze):
        first = Watched(4, 5, seed=1, **o)
        model = Sequential(first, gpurnn.GRU(5, 5, seed=2, **o), Linear(5, 3, seed=3, **o))
        if freeze:
            model.freeze("0")
        before = first.state_dict()
        gpurnn.fit(
            model, gpurnn.cross_entropy, source, optimizer=gpurnn.AdamW(model), epochs=epochs, weight_noise=0.1,
            clip_norm=1.0, out=tmp_path, resume=epochs > 1, progress=False,
        )  # fmt: skip
        return before, first.state_dict()

    before, after = train(1, True)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    assert all((weight == before["weight"]).all() for weight in seen)
    train(2, True)
    assert not caplog.records
    train(3, False)
    assert "was made with frozen parameters: 0.weight, 0.bias; this run has: none" in caplog.text


@pytest.mark.emulated
@pytest.mark.parametrize("schedule", ["step", "block", "grid"])
def test_frozen_on_the_cuda_backend(schedule):
    found = []
    for frozen in ([], ["0.weight_hh_l0", "0.bias_ih_l0", "1.weight"]):
        o = {"backend": cuda_ops(), "dtype": "float32"}
        model = Sequential(gpurnn.GRU(3, 32, schedule=schedule, seed=1, **o), Linear(32, 3, seed=2, **o))
        before = model.state_dict()
        if frozen:
            model.freeze(*frozen)
        x = model.xp.asarray(np.ones((4, 2, 3), "float32"))
        y, _, backward = model.forward(x)
        dx, _ = backward(y)
        gradients = {name: grad.get() for name, grad in model.grads.items()}
        gpurnn.clip_grad_norm(model, 1e9)
        gpurnn.AdamW(model).step()
        found.append([dx.get(), before, gradients, model.state_dict()])
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for name, value in found[1][3].items():
        np.testing.assert_array_equal(value, found[1][1][name] if name in frozen else found[0][3][name], err_msg=name)
        np.testing.assert_array_equal(found[1][2][name], 0 if name in frozen else found[0][2][name], err_msg=name)
