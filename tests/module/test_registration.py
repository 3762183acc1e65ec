"""Models of one's own: layers as attributes, lists and dicts of them, parameters, and what is refused."""

import copy
import gc
import pickle
from collections import UserDict, UserList, deque
from types import MappingProxyType

import numpy as np
import pytest
from helpers import cuda_ops

import gpurnn
from gpurnn import GRU, LSTM, Dropout, Linear, Module, Sequential, ShapeError
from gpurnn.backends.ops import Ops
from gpurnn.dtypes import compute_dtype
from gpurnn.module import ALIGNMENT, Layers
from gpurnn.module.base import _RESERVED
from gpurnn.testing import check_gradients
from gpurnn.train.loop import noisy_weights

F64 = {"backend": "numpy", "dtype": "float64"}


class Reader(Module):
    """Two inputs, two heads, a list and a dict of layers, a parameter of its own."""

    def __init__(self, **o):
        super().__init__()
        self.rnn = LSTM(3, 4, seed=1, **o)
        self.blocks = [Linear(4, 4, seed=2, **o), Linear(4, 4, seed=3, **o)]
        self.side = Linear(2, 4, seed=4, **o)
        self.parameter("gain", np.arange(1.0, 5.0))
        self.heads = {"kind": Linear(4, 5, seed=5, **o), "number": Linear(4, 1, seed=6, **o)}

    def __call__(self, inputs):
        return self.forward(inputs)[0]

    def forward(self, inputs, *, retain=False):
        sequence, side = inputs
        h, _, rnn_backward = self.rnn.forward(sequence, retain=retain)
        backwards = []
        for block in self.blocks:
            h, backward = block.forward(h)
            backwards.append(backward)
        s, side_backward = self.side.forward(side)
        gain = self.params["gain"]
        mixed = (h + gain * s).astype(self.dtype)
        kind, kind_backward = self.heads["kind"].forward(mixed)
        number, number_backward = self.heads["number"].forward(mixed)

        def backward(doutputs):
            dkind, dnumber = doutputs
            d = 0 if dkind is None else kind_backward(dkind)
            d = d if dnumber is None else d + number_backward(dnumber)
            self.grads["gain"] += (d * s).sum(axis=(0, 1))
            dside = side_backward((d * gain).sum(axis=0).astype(self.dtype))
            for block_backward in reversed(backwards):
                d = block_backward(d)
            return rnn_backward(d)[0], dside

        outputs = kind, number
        return outputs, self.guard_backward(backward, outputs, retain=retain)


NAMES = [
    "gain", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0",
    "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "side.weight", "side.bias",
    "heads.kind.weight", "heads.kind.bias", "heads.number.weight", "heads.number.bias",
]  # fmt: skip
INPUTS = np.random.default_rng(0).standard_normal((6, 2, 3)), np.random.default_rng(1).standard_normal((2, 2))


def check_tied(model):
    """Every parameter of every module is the same memory as the model's, aligned in its flat buffer, and in order."""
    for flat, views in ((model.flat_params, "params"), (model.flat_grads, "grads")):
        flat[...] = 0
        for number, view in enumerate(getattr(model, views).values(), 1):
            view[...] = number
        found = flat[flat != 0]
        assert np.all(np.diff(found) >= 0) and set(found) == set(range(1, len(model.params) + 1))
        for view in getattr(model, views).values():
            assert (view.ctypes.data - flat.ctypes.data) % (ALIGNMENT * flat.itemsize) == 0
        for prefix, module in model.modules():
            for name, view in getattr(module, views).items():
                whole = f"{prefix}.{name}" if prefix else name
                assert np.shares_memory(view, flat)
                np.testing.assert_array_equal(view, getattr(model, views)[whole], err_msg=whole)


# ---- layers as attributes


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_attributes_are_parts_of_the_model(backend, dtype):
    model = Reader(backend=backend, dtype=dtype)
    assert list(model.params) == list(model.grads) == list(model.state_dict()) == NAMES
    assert (model.ops.name, model.dtype) == (model.rnn.ops.name, np.dtype(dtype))  # the first layer's
    assert [name for name, _ in model.modules()][1:4] == ["rnn", "blocks", "blocks.0"]
    assert model.heads["kind"].name == "heads.kind" and model.blocks[-1] is model.children["blocks"]["1"]
    assert model.params["gain"].tolist() == [1, 2, 3, 4] and model.params["gain"].dtype == compute_dtype(model.dtype)
    assert not model.eval().rnn.training and not model.heads["kind"].training and model.train().side.training
    assert model.freeze("rnn", "gain").frozen == NAMES[:5] and model.rnn.frozen == list(model.rnn.params)
    assert "blocks" in dir(model) and len(model.blocks) == 2 and [*model.heads] == [h for _, h in model.heads.items()]
    text = model.summary()
    assert "heads: Layers" in text and "kind: Linear" in text and f"{model.parameter_count:,}" in text
    check_tied(model)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_the_gradients_are_right(backend):
    model = Reader(backend=backend, dtype="float64")
    check_gradients(model, INPUTS)
    model.freeze("blocks")
    check_gradients(model, INPUTS)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_cuda_backend_does_the_same(dtype):
    ops, results = cuda_ops(), []
    for backend in (ops, "numpy"):
        model = Reader(backend=backend, dtype=dtype)
        inputs = tuple(model.ops.xp.asarray(array.astype(dtype)) for array in INPUTS)
        outputs, backward = model.forward(inputs)
        backward(tuple(model.ops.xp.ones(output.shape, dtype) for output in outputs))
        gpurnn.Adam(model, lr=0.1).step()
        results.append([model.ops.to_numpy(array) for array in (*outputs, model.flat_grads, model.flat_params)])
    for got, expected in zip(*results, strict=True):
        # at most 6 steps of sums of 8 terms in two layers and heads; Adam's quotient g / |g| has no rounding to add
        terms = 6 * 8 * 3 * np.finfo(dtype).eps
        np.testing.assert_allclose(got, expected, rtol=terms, atol=terms * np.abs(expected).max())


def test_a_wrong_gradient_of_a_parameter_of_ones_own_is_named(monkeypatch):
    model = Reader(**F64)
    right = Reader.forward

    def wrong(self, inputs):
        outputs, backward = right(self, inputs)

        def twice(doutputs):
            found = backward(doutputs)
            self.grads["gain"] *= 1.01
            return found

        return outputs, twice

    monkeypatch.setattr(Reader, "forward", wrong)
    with pytest.raises(AssertionError, match="gain"):
        check_gradients(model, INPUTS)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(how):
    model = Reader(**F64)
    model.freeze("gain")
    model.flat_grads[...] = 3
    adam = gpurnn.Adam(model)
    copied = copy.deepcopy((model, adam)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, adam)))
    other, its_adam = copied
    np.testing.assert_array_equal(other.flat_params, model.flat_params)
    np.testing.assert_array_equal(other.flat_grads, model.flat_grads)
    assert list(other.params) == NAMES and other.frozen == ["gain"] and its_adam.model is other
    before = model.flat_params.copy()
    its_adam.step()
    np.testing.assert_array_equal(model.flat_params, before)
    assert (other.params["side.bias"] != model.params["side.bias"]).all()
    check_tied(other)
    later = Linear(4, 4, **F64)
    other.later = later  # a copy takes more layers
    check_tied(other)


def test_weights_go_to_a_file_and_back(tmp_path):
    model, other = Reader(**F64), Reader(**F64)
    model.flat_params[...] = np.arange(model.flat_params.size)
    gpurnn.save_weights(model, tmp_path / "model.json")
    gpurnn.load_weights(other, tmp_path / "model.json")
    assert all((other.params[name] == model.params[name]).all() for name in NAMES)


def test_a_model_that_is_a_layer_of_another():
    class Outer(Module):
        def __init__(self):
            super().__init__()
            self.inner = Reader(**F64)

    outer = Outer()
    assert list(outer.params) == [f"inner.{name}" for name in NAMES]
    assert outer.inner.heads["kind"].name == "inner.heads.kind"
    outer.inner.late = Linear(2, 2, **F64)  # what is set inside later arrives outside
    assert list(outer.params)[-2:] == ["inner.late.weight", "inner.late.bias"]
    assert outer.inner.late.name == "inner.late" and outer.inner.late.key == gpurnn.rng.name_key("inner.late")
    outer.inner.parameter("scale", 3)
    assert outer.params["inner.scale"].shape == () and outer.params["inner.scale"] == 3
    check_tied(outer)


def test_adding_layers_saves_values_and_gradients():
    model = Module(**F64)
    model.first = Linear(3, 3, seed=1, **F64)
    model.flat_grads[...] = 2
    values = {name: array.copy() for name, array in model.params.items()}
    model.second = LSTM(3, 3, **F64)
    model.parameter("p", [5.0])
    for name, value in values.items():
        np.testing.assert_array_equal(model.params[name], value)
        assert (model.grads[name] == 2).all()
    assert list(model.params)[0] == "p" and model.grads["p"].tolist() == [0]


# ---- replacing and taking out


def test_a_layer_takes_the_place_of_another():
    model = Reader(**F64)
    old, values = model.side, model.side.flat_params.copy()
    model.side = new = Linear(7, 4, **F64)
    assert model.side is new and list(model.params) == NAMES and model.params["side.weight"].shape == (4, 7)
    model.flat_params[...] = 9
    np.testing.assert_array_equal(old.flat_params, values)  # on its own again
    assert old.name == "" and new.name == "side" and old.flat_params.base is None  # the buffer of before can go
    Sequential(old)
    check_tied(model)


@pytest.mark.parametrize("how", ["del", "None", "number"])
def test_a_layer_is_taken_out(how):
    model = Reader(**F64)
    old = model.side
    if how == "del":
        del model.side
    else:
        model.side = None if how == "None" else 3
    assert not any(name.startswith("side") for name in model.params) and "side" not in model.children
    assert getattr(model, "side", "none") == {"del": "none", "None": None, "number": 3}[how]
    assert old._parent is None
    model.side = old
    assert model.side is old and [*model.params][-1] == "side.bias"
    check_tied(model)


def test_a_layer_under_two_names_is_one():
    model = Module()
    model.first = model.second = Linear(3, 3, **F64)
    assert list(model.params) == ["first.weight", "first.bias"] and model.second is model.first
    del model.first
    assert list(model.params) == ["second.weight", "second.bias"] and model.second.name == "second"
    check_tied(model)


def test_replacing_inside_a_group():
    model = Reader(**F64)
    model.heads["kind"] = Linear(4, 9, **F64)
    model.blocks[1] = Linear(4, 2, **F64)
    assert model.params["heads.kind.weight"].shape == (9, 4) and model.params["blocks.1.weight"].shape == (2, 4)
    model.heads["more"] = Linear(4, 1, **F64)
    assert list(model.params)[-1] == "heads.more.bias"
    with pytest.raises(IndexError):
        model.blocks[2] = Linear(4, 4, **F64)
    check_tied(model)


def test_an_optimizer_refuses_a_model_that_has_changed():
    model = Reader(**F64)
    adam = gpurnn.Adam(model)
    model.flat_grads[...] = 1
    adam.step()
    model.side = Linear(2, 4, **F64)  # of the same size
    before = model.flat_params.copy()
    with pytest.raises(ValueError, match="a layer of the model was replaced .*: build a new optimizer"):
        adam.step()
    model.more = Linear(2, 4, **F64)
    with pytest.raises(ValueError, match="the model had .* parameters when the optimizer was built"):
        adam.step()
    np.testing.assert_array_equal(model.flat_params[: before.size], before)
    gpurnn.Adam(model).step()


def test_a_model_put_into_another_still_trains():
    model = Reader(**F64)
    adam = gpurnn.Adam(model)
    outer = Module()
    outer.inner = model
    model.flat_grads[...] = 1
    before = outer.flat_params.copy()
    adam.step()
    assert (outer.flat_params != before).any()


@pytest.mark.parametrize("what", ["layer", "parameter"])
def test_what_is_set_between_forward_and_backward(what):
    model = Reader(**F64)
    outputs, backward = model.forward(INPUTS)
    if what == "layer":
        model.side = Linear(2, 4, **F64)
    else:
        model.parameter("more", [1.0])
    with pytest.raises(RuntimeError, match="backward: a layer or parameter of the Reader was set since. Call forward"):
        backward(outputs)


@pytest.mark.long
def test_layers_whose_model_is_gone_are_free():
    model = Reader(**F64)
    rnn = model.rnn
    del model
    gc.collect()
    other = Module()
    other.rnn = rnn
    check_tied(other)


# ---- what is refused


def refused(error, message):
    return pytest.raises(error, match=message)


def test_before_the_constructor_of_module():
    class Wrong(Module):
        def __init__(self, value):
            self.thing = value
            super().__init__()

    for value in (Linear(2, 2), [Linear(2, 2)]):
        with refused(AttributeError, r"thing: call super\(\).__init__\(\) first, in Wrong.__init__"):
            Wrong(value)
    assert Wrong(3).thing == 3

    class Parameter(Module):
        def __init__(self):
            self.parameter("p", [1.0])

    with refused(AttributeError, r"p: call super\(\).__init__\(\) first"):
        Parameter()


def test_backends_and_dtypes_must_agree():
    model = Reader(**F64)
    flat, children = model.flat_params, dict(model.children)
    for other in (Linear(2, 2, backend="numpy"), Linear(2, 2, backend="cpu", dtype="float64")):
        with refused(ValueError, "more is .*, the module around it numpy/float64: build all layers with one backend"):
            model.more = other
    stranger = Linear(2, 2, **F64)
    stranger.ops = Ops(np, "cuda")
    with refused(ValueError, "more is cuda/float64"):
        model.more = [stranger]
    strict = Module(backend="numpy", dtype="float32")
    with refused(ValueError, "a is numpy/float64, the module around it numpy/float32"):
        strict.a = Linear(2, 2, **F64)
    assert model.flat_params is flat and model.children == children and not strict.children


@pytest.mark.parametrize("first", ["bare", "layer", "alone"])
def test_a_module_without_layers_follows(first):
    """It has no backend and dtype of its own: those of the model that it comes into, or of what comes into that."""

    class Square(Module):
        def __init__(self):
            super().__init__()

        def forward(self, x):
            return x * x, lambda dy: 2 * x * dy

        def __call__(self, x):
            return x * x

    if first == "alone":
        inner = Module()
        inner.square = Square()
        model = Module()
        model.inner = inner
        model.parts = {"linear": Linear(3, 3, **F64)}
        assert {(module.ops.name, module.dtype.name) for _, module in model.modules()} == {("numpy", "float64")}
        assert inner.square.flat_params.dtype == np.float64
        check_tied(model)
        return
    linear = Linear(3, 3, seed=1, **F64)
    model = Sequential(Square(), linear) if first == "bare" else Sequential(linear, Square())
    assert (model.ops.name, model.dtype) == ("numpy", np.float64)
    assert {module.dtype.name for _, module in model.modules()} == {"float64"}
    check_gradients(model, np.random.default_rng(0).standard_normal((4, 3)))
    with refused(ValueError, "build all layers with one backend and one dtype"):
        model[0 if first == "bare" else 1].extra = Linear(3, 3, dtype="float32")


def test_other_refusals():
    model, other = Reader(**F64), Reader(**F64)
    flat, children = model.flat_params, dict(model.children)
    with refused(ValueError, "x: this Linear already belongs to another Reader"):
        model.x = other.side
    with refused(ValueError, "x: this Linear already belongs to another Layers"):
        model.x = model.heads["kind"]
    for name in ("params", "forward", "training", "name", "freeze", "_own"):
        with refused(AttributeError, f"{name}: every Reader has an attribute of that name, so no layer can take it"):
            setattr(model, name, Linear(2, 2, **F64))
    with refused(ValueError, "gain: this Reader has a parameter of that name"):
        model.gain = Linear(2, 2, **F64)
    with refused(TypeError, "x: expected layers alone in a list, got int"):
        model.x = [Linear(2, 2, **F64), 3]
    with refused(TypeError, "x: expected a gpurnn layer, got int"):
        model.add_layers({"x": 3})
    with refused(ValueError, "names of layers should be non-empty and without a dot, got 'a.b'"):
        model.add_layers({"a.b": Linear(2, 2, **F64)})
    with refused(TypeError, "names of layers should be strings, got int"):
        model.x = {1: Linear(2, 2, **F64)}
    with refused(ValueError, "x: this Reader holds the module itself"):
        Module.add_layers(other, {"x": other})
    with refused(AttributeError, "'Reader' object has no attribute 'y'"):
        model.y  # noqa: B018
    with refused(AttributeError, "y"):
        del model.y
    assert model.flat_params is flat and model.children == children


def test_wrong_parameters_are_refused():
    model = Reader(**F64)
    flat = model.flat_params
    for name, kind in (("gain", "parameter"), ("rnn", "layer")):
        with refused(ValueError, f"{name}: this Reader has a {kind} of that name. Take another one"):
            model.parameter(name, [1.0])
    for name in ("", "a.b"):
        with refused(ValueError, "names of parameters should be non-empty and without a dot"):
            model.parameter(name, [1.0])
    with refused(TypeError, "names of parameters should be strings, got int"):
        model.parameter(1, [1.0])
    with refused(gpurnn.DtypeError, "p: expected numbers, got bool"):
        model.parameter("p", [True])
    assert model.flat_params is flat and list(model.params) == NAMES


def test_a_list_that_was_filled_too_late_is_found():
    """The habit of ``self.layers = []`` and ``append``: silent in torch, where the optimizer trains nothing of it."""

    class Late(Module):
        def __init__(self):
            super().__init__()
            self.head = Linear(2, 2, **F64)
            self.stack = []
            self.stack.append(Linear(2, 2, **F64))

    model = Late()
    message = "stack: this list was filled after it had been set, so its layers are not part of the Late. Fill it first"
    for use in (gpurnn.Adam, lambda m: m.state_dict(), lambda m: m.load_state_dict({})):
        with refused(ValueError, message):
            use(model)
    model.stack = list(model.stack)
    gpurnn.Adam(model)
    assert "stack.0.weight" in model.params


def test_references_are_no_parts():
    class Tied(Module):
        references = ("table",)

        def __init__(self, table):
            super().__init__()
            self.table = table

    table = Linear(2, 2, **F64)
    model = Module()
    model.table = table
    model.tied = Tied(table)
    assert list(model.params) == ["table.weight", "table.bias"] and model.tied.table is table
    model.table.around = model  # the module around it is no part either
    assert model.table.around is model and list(model.params) == ["table.weight", "table.bias"]
    other = copy.deepcopy(model)
    assert other.tied.table is other.table and other.table.around is other


def test_plain_attributes_stay_plain():
    model = Module()
    model.sizes, model.nothing, model.empty, model.words = [1, 2], None, [], {"a": "b"}
    assert model.sizes == [1, 2] and model.nothing is None and model.empty == [] and model.words == {"a": "b"}
    model.nothing = Linear(2, 2)
    assert model.nothing.name == "nothing" and "nothing" not in vars(model)
    model.nested = [[Linear(2, 2)], {"x": Linear(2, 2)}]
    assert list(model.params)[2:] == [f"nested.{n}.{p}" for n in ("0.0", "1.x") for p in ("weight", "bias")]


def test_the_reserved_names_are_those_that_module_sets():
    assert set(vars(Module())) == _RESERVED


# ---- backward functions with checks


def test_guarded_backwards_check_first():
    model = Reader(**F64)
    (kind, number), backward = model.forward(INPUTS)
    for wrong, error, message in (
        (kind, TypeError, "doutputs: expected 2 gradients in a tuple, got ndarray"),
        ((kind,), TypeError, "doutputs: expected 2 gradients in a tuple, got a tuple of ndarray"),
        ((kind, kind), ShapeError, r"doutputs\[1\]: expected shape \(6, 2, 1\), got \(6, 2, 5\)"),
        ((kind, number.astype("float32")), gpurnn.DtypeError, r"doutputs\[1\]: dtype \(float32\) does not match"),
        (lambda: 0, TypeError, r"doutputs: expected an array, got a function. Call it: backward\(dloss\(\)\)"),
    ):
        with refused(error, message):
            backward(wrong)
    assert not model.flat_grads.any()
    backward((kind, None))
    assert not model.grads["heads.number.weight"].any() and model.grads["heads.kind.weight"].any()
    with refused(RuntimeError, "backward ran already"):
        backward((kind, number))
    _, backward = model.forward(INPUTS, retain=True)
    backward([kind, number])
    backward([kind, number])
    model.params["gain"] = 2
    with refused(RuntimeError, r"backward: parameter gain was changed \(version 1 at forward, 2 now\)"):
        backward((kind, number))


# ---- Sequential


def test_layers_of_a_sequential_are_attributes_too():
    model = Sequential({"rnn": GRU(3, 4, **F64), "drop": Dropout(0.5, **F64), "head": Linear(4, 2, **F64)})
    assert model.head is model["head"] and model.stateful
    model.head = Linear(4, 7, **F64)
    assert model(np.zeros((5, 2, 3)))[0].shape == (5, 2, 7)
    with refused(ShapeError, "head: Linear reads 5 features, but drop: Dropout before it gives 4"):
        model.head = Linear(5, 7, **F64)
    model.rnn = Linear(3, 4, **F64)
    assert not model.stateful and model(np.zeros((5, 2, 3))).shape == (5, 2, 7)
    with refused(TypeError, "head: a list of layers does not say how it runs. Give a gpurnn.Sequential"):
        model.head = [Linear(4, 7, **F64)]
    only = Sequential(Linear(2, 2))
    with refused(ValueError, "a Sequential needs at least one layer"):
        delattr(only, "0")
    assert len(only) == 1


def test_layers_say_what_they_hold():
    group = Layers({"a": Linear(2, 2), "b": [Linear(2, 2)]})
    assert len(group) == 2 and dict(group.items())["a"] is group["a"] is group[0]
    assert list(group.params) == ["a.weight", "a.bias", "b.0.weight", "b.0.bias"]
    assert Layers([Linear(2, 2, seed=7), Linear(2, 2, seed=8)]).seed == 7  # so that equal models have equal states


def test_a_module_without_a_seed_takes_that_of_its_first_seeded_layer():
    class Net(Module):
        def __init__(self, seed=None):
            super().__init__(seed=seed)
            self.norm = gpurnn.LayerNorm(2)  # draws nothing, so it says nothing
            self.inner = Module()
            self.inner.first = Linear(2, 2, seed=7)  # later than ``inner`` itself
            self.second = Linear(2, 2, seed=8)

    model = Net()
    assert model.seed == model.inner.seed == 7
    assert Net(seed=5).seed == 5
    assert Sequential(gpurnn.LayerNorm(2), Linear(2, 2, seed=3)).seed == 3
    by_hand = Module()
    by_hand.seed = 9
    by_hand.layer = Linear(2, 2, seed=1)
    assert by_hand.seed == 9
    drawn = Module()
    drawn.layer = Linear(2, 2)
    assert drawn.seed != Module().seed
    copied = copy.deepcopy(drawn)
    copied.other = Linear(2, 2, seed=4)
    assert copied.seed == 4


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: {layer},
        lambda layer: frozenset([layer]),
        lambda layer: deque([layer]),
        lambda layer: {"a": layer}.values(),
        lambda layer: {"a": layer}.items(),
        lambda layer: {layer: 1}.keys(),
        lambda layer: UserList([layer]),
        lambda layer: UserDict(a=layer),
        lambda layer: MappingProxyType({"a": layer}),
        lambda layer: np.array([None, layer], dtype=object),
        lambda layer: (layer for _ in range(1)),
        lambda layer: map(lambda _: layer, range(1)),
        lambda layer: [{layer}],
    ],
)
def test_what_cannot_be_registered_is_refused(hold):
    model, layer = Module(), Linear(1, 1)
    model.s = "before"
    held = hold(layer)
    with pytest.raises(TypeError, match=r"^s: .*list, tuple or dict"):
        model.s = held
    assert model.s == "before" and not model.children and layer._parent is None

    class Refers(Module):
        references = ("s",)

    model = Refers()
    model.s = held
    assert model.s is held and not model.children
    model.own = Linear(1, 1)
    gpurnn.SGD(model, lr=0.1)  # does not take the layers that are only referred to for forgotten ones


def test_a_set_that_is_filled_later_is_refused():
    model = Module()
    model.own, model.s = Linear(1, 1), set()
    model.s.add(Linear(1, 1))
    with pytest.raises(ValueError, match="s: this set was filled after it had been set"):
        gpurnn.SGD(model, lr=0.1)


def test_other_values_are_plain_attributes():
    model = Module()
    for value in ({1, 2}, deque([1]), np.array([None, 1], dtype=object), np.ones(3), {"a": 1}.values(), "text"):
        model.value = value
        assert model.value is value


def test_layers_of_a_list_or_dict_are_deleted():
    model = Module()
    first, second, third = (Linear(2, 2, seed=seed, **F64) for seed in range(3))
    model.bs = [first, second, third]
    model.bs[1].params["bias"] = 5.0
    model.grads["bs.1.bias"] = 6.0
    del model.bs[0]
    assert list(model.bs) == [second, third] and list(model.params)[0] == "bs.0.weight" and second.name == "bs.0"
    assert (model.params["bs.0.bias"] == 5).all() and (model.grads["bs.0.bias"] == 6).all()
    assert first.name == "" and first._parent is None
    del model.bs[-1]
    assert list(model.bs) == [second] and list(model.params) == ["bs.0.weight", "bs.0.bias"]
    with pytest.raises(IndexError):
        del model.bs[1]
    with pytest.raises(TypeError):
        del model.bs[0:1]
    model.heads = {"a": Linear(2, 2, **F64), "b": Linear(2, 2, **F64), "c": Linear(2, 2, **F64)}
    del model.heads["b"]
    del model.heads[0]
    assert [name for name, _ in model.heads.items()] == ["c"]
    with pytest.raises(KeyError, match="b"):
        del model.heads["b"]
    assert len(model.bs) == len(model.heads) == 1


def test_noise_on_the_weights_follows_the_layers_seed():
    def noisy():
        model = Module()
        model.layer = Linear(3, 3, seed=7, **F64)
        with noisy_weights(model, 0.1, step=0):
            return model.flat_params.copy()

    np.testing.assert_array_equal(noisy(), noisy())
