"""What may change between forward and backward: parameters not, attributes without effect, arrays given out freely."""

import numpy as np
import pytest
from helpers import LAYERS, assert_close, build_layer, numbers, ones

import gpurnn
from gpurnn import (
    GRU,
    LSTM,
    Attention,
    BatchNorm,
    Dropout,
    Embedding,
    Linear,
    LSTMCell,
    Pooling,
    Sequential,
    TiedLinear,
)
from gpurnn.testing import count_terms, leaves

BACKENDS = ["numpy", "cpu"]
DTYPES = ["float64", "float32", "float16"]


def run_backward(layer, outputs, backward):
    """All that backward gives: the derivatives by the inputs, and a copy of the gradients."""
    returned = backward(ones(outputs))
    return [np.array(a, "float64") for a in leaves(returned)] + [layer.flat_grads.astype("float64")]


def load(layer, name):
    layer.load_state_dict({name: layer.state_dict()[name] + 0.5}, strict=False)


def assign(layer, name):
    layer.params[name] = layer.params[name] + 0.5


def in_place(layer, name):
    layer.params[name] *= 2


def update(layer, name):
    layer.grads[name] += 1
    gpurnn.SGD(layer, lr=0.1).step()


def update_by_adam(layer, name):
    layer.grads[name] += 1
    gpurnn.Adam(layer).step()


def declare(layer, name):
    owner, _, inner = name.rpartition(".")
    owner = dict(layer.modules())[owner]
    owner._declare({n: a + 0.5 for n, a in owner.params.items()})


CHANGES = [load, assign, in_place, update, update_by_adam]


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_changed_parameters_are_refused_by_name(kind, backend, dtype):
    for change in CHANGES:
        layer, inputs = build_layer(kind, backend, dtype)
        for name in list(layer.params):
            outputs, *_, backward = layer.forward(*inputs)
            change(layer, name)
            before = layer.flat_grads.copy()
            only = "[\\w.]+" if change in (update, update_by_adam) else name.replace(".", r"\.")
            message = f"backward: parameter {only} was changed .version \\d+ at forward, \\d+ now"
            with pytest.raises(RuntimeError, match=message):
                backward(ones(outputs))
            np.testing.assert_array_equal(layer.flat_grads, before)  # nothing half done
            layer.zero_grad()
            outputs, *_, backward = layer.forward(*inputs)
            backward(ones(outputs))


def test_an_own_declaration_is_a_change():
    layer, inputs = build_layer("linear")
    _, backward = layer.forward(*inputs)
    declare(layer, "weight")
    with pytest.raises(RuntimeError, match=r"backward: parameter weight was changed .version 1 at forward, 2 now."):
        backward(np.ones((5, 2, 4)))


def test_the_error_says_what_to_do():
    model = Sequential({"rnn": LSTM(3, 4, backend="cpu", seed=1), "head": Linear(4, 2, backend="cpu", seed=1)})
    adam = gpurnn.Adam(model)
    adam.step()
    y, _, backward = model.forward(np.zeros((5, 2, 3), "float32"))
    model["head"].params["bias"] = 1
    with pytest.raises(RuntimeError) as caught:
        backward(y)
    assert str(caught.value) == (
        "backward: parameter head.bias was changed (version 2 at forward, 3 now), and the result would be that of "
        "neither. Call forward again, or change parameters after backward"
    )


def test_weight_noise_inside_a_step_is_no_change_and_across_it_is_one():
    from gpurnn.train.loop import noisy_weights

    layer, inputs = build_layer("lstm")
    with noisy_weights(layer, 0.1, step=0):
        y, _, backward = layer.forward(*inputs)
        backward(y)
        _, _, late = layer.forward(*inputs)
    with pytest.raises(RuntimeError, match="parameter weight_ih_l0 was changed"):
        late(y)
    y, _, early = layer.forward(*inputs)
    with noisy_weights(layer, 0.1, step=0), pytest.raises(RuntimeError, match="parameter weight_ih_l0 was changed"):
        early(y)


def test_a_table_used_twice_is_watched_by_both():
    table = Embedding(5, 3, backend="cpu", dtype="float64", seed=1)
    tied = TiedLinear(table)
    y, backward = tied.forward(numbers(2, 3))
    table.params["weight"] *= 2
    with pytest.raises(RuntimeError, match="parameter weight was changed"):
        backward(y)
    assert not tied.flat_grads.any() and not table.flat_grads.any()


def test_a_memory_is_of_the_weights_it_was_made_with():
    attention = Attention(3, 4, "general", backend="cpu", dtype="float64", seed=1)
    memory = attention.remember(numbers(5, 2, 4))
    attention.attend(numbers(2, 2, 3), memory)
    attention.params["weight"] *= 2
    with pytest.raises(RuntimeError, match="attend: parameter weight was changed .version 1 at remember, 2 now"):
        attention.attend(numbers(2, 2, 3), memory)


def test_what_is_no_change():
    """Gradients, other layers, a home in a model, and reading."""
    layer, inputs = build_layer("lstm")
    outputs, *_, backward = layer.forward(*inputs)
    expected = run_backward(layer, outputs, backward)
    other = Linear(8, 2, backend="numpy", dtype="float64", seed=2)
    layer.zero_grad()
    outputs, *_, backward = layer.forward(*inputs)
    layer.grads["weight_ih_l0"] += 1
    layer.grads["weight_ih_l0"] = 0
    layer.zero_grad()
    layer.state_dict(), layer.params["weight_ih_l0"], layer.flat_params.sum()
    other.params["weight"] = 0
    gpurnn.Adam(other).step()
    model = Sequential(layer, other)  # the parameters move into another buffer, with the bits they have
    returned = backward(ones(outputs))
    for got, want in zip([*leaves(returned), layer.flat_grads], expected, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(model.flat_grads[: layer.flat_grads.size], layer.flat_grads)


def test_an_optimiser_of_one_part_leaves_the_others():
    model = Sequential({"rnn": GRU(3, 4, backend="cpu", seed=1), "head": Linear(4, 2, backend="cpu", seed=1)})
    rnn, head = model["rnn"], model["head"]
    y, _, rnn_backward = rnn.forward(np.ones((5, 2, 3), "float32"))
    _, head_backward = head.forward(y)
    gpurnn.SGD(head, lr=0.1).step()
    rnn_backward(y)
    with pytest.raises(RuntimeError, match=r"parameter head\.weight was changed"):
        head_backward(np.ones((5, 2, 2), "float32"))


def test_views_follow_a_layer_into_a_model():
    layer = Linear(3, 4, backend="cpu", dtype="float64", seed=1)
    params, grads = layer.params, layer.grads
    model = Sequential(layer)
    params["weight"] = 7
    grads["bias"] += 1
    assert (model.params["0.weight"] == 7).all() and (model.grads["0.bias"] == 1).all()


def test_writes_through_arrays_are_told_by_hand():
    layer = Linear(3, 4, backend="cpu", dtype="float64", seed=1)
    y, backward = layer.forward(numbers(2, 3))
    layer.params["weight"][0] = 0  # nobody sees it
    backward(y)
    layer.changed("weight")
    with pytest.raises(RuntimeError, match="parameter weight was changed"):
        backward(y)
    with pytest.raises(KeyError, match="Weight"):
        layer.changed("Weight")


def test_accumulation_and_truncated_bptt_go_on():
    model = Sequential(LSTM(3, 4, backend="cpu", seed=1), Linear(4, 2, backend="cpu", seed=2))
    adam, state = gpurnn.Adam(model), None
    x = numbers(4, 5, 2, 3).astype("float32")
    for _ in range(2):
        model.zero_grad()
        done = [model.forward(part) for part in x]
        for y, _, backward in reversed(done):
            backward(y)
        adam.step()
        for part in x:
            model.zero_grad()
            y, state, backward = model.forward(part, state)
            backward(y)
            adam.step()


# ---- attributes


ATTRIBUTES = {  # kind of layer -> attributes that may be set on it, and to what
    "linear": {"bias": False, "in_features": 1, "out_features": 2},
    "embedding": {"padding_idx": 1},
    "layer norm": {"bias": False, "eps": 10.0, "features": 1},
    "batch norm": {"affine": False, "eps": 10.0, "momentum": 0.9, "training": False, "batch_first": True},
    "pooling, attention": {"mode": "mean", "batch_first": True, "attention_size": 1, "features": 1},
    "attention, general": {"score": "dot", "scale": 3.0, "memory_size": 1, "query_size": 1},
    "attention, additive": {"score": "general", "scale": 3.0, "attention_size": 1},
    "lstm": {
        "dropout": 0.1, "training": False, "batch_first": True, "_directions": (False,), "schedule": "step",
        "memory": "sqrt", "reset_to": "initial", "masked_output": "repeat",
    },
    "lstm, wavefront": {"wavefront": 0},
    "gru": {"reset_after": False, "_directions": (True,)},
    "encoder-decoder": {"hidden": 2, "tied": False, "sampling": None, "_kinds": ("h",), "layers": 3},
    "sequential": {"stateful": False},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, name, value", [(k, n, v) for k, some in ATTRIBUTES.items() for n, v in some.items()])
def test_attributes_are_those_of_forward(kind, name, value, backend):
    found = []
    for change in (False, True):
        layer, inputs = build_layer(kind, backend)
        if kind == "lstm":
            layer.dropout = 0.4
        outputs, *_, backward = layer.forward(*inputs)
        if change:
            setattr(layer, name, value)
        found.append(run_backward(layer, outputs, backward))
    for got, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_another_rate_between_the_masks_and_backward():
    """The fault as it was found: the mask of forward, the factor of another rate."""
    layer = LSTM(3, 4, 2, dropout=0.5, backend="cpu", dtype="float64", seed=1)
    x, found = numbers(5, 2, 3), []
    for rate in (0.5, 0.1):
        layer.dropout, layer.calls = 0.5, 0
        y, _, backward = layer.forward(x)
        layer.dropout = rate
        found.append(backward(y)[0])
    np.testing.assert_array_equal(*found)


def test_dropout_and_pooling_have_the_mask_and_the_kind_of_forward():
    x = numbers(5, 2, 4)
    for layer, name, value in (
        (Dropout(0.5, backend="cpu", dtype="float64", seed=1), "rate", 0.1),
        (Dropout(0.5, backend="cpu", dtype="float64", seed=1), "training", False),
        (Pooling(4, "last", 2, backend="cpu", dtype="float64"), "directions", 1),
        (Pooling(4, "max", batch_first=True, backend="cpu", dtype="float64"), "batch_first", False),
        (Pooling(4, "mean", batch_first=True, backend="cpu", dtype="float64"), "mode", "max"),
    ):
        y, backward = layer.forward(x)
        expected = backward(y)
        setattr(layer, name, value)
        np.testing.assert_array_equal(backward(y), expected)


def test_another_table_between_forward_and_backward():
    first, second = (Embedding(5, 3, backend="cpu", dtype="float64", seed=seed) for seed in (1, 2))
    tied = TiedLinear(first)
    y, backward = tied.forward(numbers(2, 3))
    tied.embedding = second
    dx = backward(np.ones_like(y))
    np.testing.assert_allclose(dx, np.ones((2, 5)) @ first.params["weight"], rtol=1e-12)
    assert first.flat_grads.any() and not second.flat_grads.any()


# ---- arrays given out are the caller's: what is done to them does not reach backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind",
    [*LAYERS, "batch norm without weights", "dot attention", "dot attention, one query", "dropout of nothing", "max"],
)
def test_outputs_may_be_overwritten(kind, backend):
    o = {"backend": backend, "dtype": "float64"}
    more = {
        "batch norm without weights": (lambda: BatchNorm(3, affine=False, **o), [numbers(5, 3)]),
        "dot attention": (lambda: Attention(3, 3, "dot", **o), [numbers(2, 2, 3), numbers(5, 2, 3)]),
        "dot attention, one query": (lambda: Attention(3, 3, "dot", **o), [numbers(1, 2, 3), numbers(5, 2, 3)]),
        "dropout of nothing": (lambda: Dropout(0.0, **o), [numbers(5, 3)]),
        "max": (lambda: Pooling(3, "max", **o), [numbers(5, 2, 3)]),
    }
    found = []
    for change in (False, True):
        layer, inputs = (more[kind][0](), more[kind][1]) if kind in more else build_layer(kind, backend)
        *outputs, backward = layer.forward(*inputs)
        given = ones(outputs[0])
        for array in leaves(outputs) if change else ():
            array[...] = 1e3
        found.append([np.array(a) for a in leaves(backward(given))] + [layer.flat_grads])
    for got, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(got, expected)


# ---- backward twice

ONCE = [name for name in LAYERS if name.startswith(("rnn", "lstm", "gru", "sequential", "encoder"))]


@pytest.mark.parametrize("backend, dtype", [("numpy", "float64"), *(("cpu", dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("kind", LAYERS)
def test_backward_twice(kind, backend, dtype):
    """Where forward was told to retain, or where nothing is spent in any case: the same bits, added once more."""
    layer, inputs = build_layer(kind, backend, dtype)
    *outputs, backward = layer.forward(*inputs)
    given = ones(outputs[0])
    once = [np.array(a) for a in leaves(backward(given))]
    gradients = layer.flat_grads.copy()
    if kind in ONCE:
        with pytest.raises(RuntimeError, match=r"backward ran already.*forward\(\.\.\., retain=True\)"):
            backward(given)
        np.testing.assert_array_equal(layer.flat_grads, gradients)  # no layer has added to its gradients
    layer.zero_grad()
    *_, backward = layer.forward(*inputs, retain=True)
    for _ in range(3):
        for got, expected in zip(leaves(backward(given)), once, strict=True):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(layer.flat_grads, gradients)
        layer.zero_grad()


def test_two_losses_of_one_forward():
    """What retain is for: the derivatives of each on its own, ragged and watched, too."""
    layer, (x,) = build_layer("lstm", "cpu")
    given, found = [numbers(5, 2, 8) for _ in range(2)], []
    _, _, both = layer.forward(x, lengths=[5, 3], retain=True)
    for dy in given:
        with gpurnn.record_gradient_flow() as flow:
            dx, dstate = both(dy)
        found.append([dx, *dstate, flow["l0"].dh])
    for dy, results in zip(given, found, strict=True):
        _, _, alone = layer.forward(x, lengths=[5, 3])
        with gpurnn.record_gradient_flow() as flow:
            dx, dstate = alone(dy)
        for got, expected in zip(results, [dx, *dstate, flow["l0"].dh], strict=True):
            assert_close(got, expected, count_terms(layer, 5))


def test_retained_after_an_error_is_whole():
    layer, (x,) = build_layer("gru", "cpu")
    y, _, backward = layer.forward(x, retain=True)
    expected = backward(y)[0]

    def fail(*args):
        raise MemoryError

    sums, layer.ops = layer.ops.sum_steps, layer.ops
    try:
        layer.ops.sum_steps = fail
        with pytest.raises(MemoryError):
            backward(y)
    finally:
        del layer.ops.sum_steps
    assert layer.ops.sum_steps == sums
    np.testing.assert_array_equal(backward(y)[0], expected)


# ---- a loss's backward in the place of what it gives


@pytest.mark.parametrize("kind", [*LAYERS, "dropout", "mean"])
def test_a_function_in_the_place_of_a_derivative(kind):
    o = {"backend": "cpu", "dtype": "float64"}
    more = {"dropout": (Dropout(0.5, **o), [numbers(5, 3)]), "mean": (Pooling(3, "mean", **o), [numbers(5, 2, 3)])}
    layer, inputs = more[kind] if kind in more else build_layer(kind)
    *outputs, backward = layer.forward(*inputs)
    _, dloss = gpurnn.mse(np.zeros(3), np.zeros(3))
    wrong = (dloss, dloss) if kind == "lstm cell" else dloss
    with pytest.raises(TypeError, match=r"expected an array, got a function. Call it: backward\(dloss\(\)\)"):
        backward(wrong)
    layer.zero_grad()
    backward(ones(outputs[0]))  # nothing was spent


def test_a_function_in_the_place_of_other_arrays():
    _, dloss = gpurnn.mse(np.zeros(3), np.zeros(3))
    with pytest.raises(TypeError, match="dloss: expected an array, got a function. Call it"):
        dloss(dloss)
    with pytest.raises(TypeError, match="x: expected an array, got a function"):
        Linear(3, 4, backend="cpu")(dloss)
    lstm, (x,) = build_layer("lstm")
    _, _, backward = lstm.forward(x)
    with pytest.raises(TypeError, match="dstate h: expected an array, got a function. Call it"):
        backward(None, (dloss, dloss))
    sizes, cell = LSTM(3, [4, 2], 2, backend="cpu"), LSTMCell(3, 4, backend="cpu")
    single = numbers(5, 2, 3).astype("float32")
    model = Sequential(LSTM(3, 4, backend="cpu"), Linear(4, 3, backend="cpu"), GRU(3, 2, backend="cpu"))
    y, _, last = model.forward(single)
    for call, name in (
        (lambda: backward(None, dloss), "dstate"),
        (lambda: sizes.forward(single)[2](None, dloss), "dstate"),
        (lambda: sizes.forward(single)[2](None, (dloss, None)), "dstate h"),
        (lambda: cell.forward(single[0])[1](dloss), "dstate"),
        (lambda: cell.forward(single[0])[1]((None, dloss)), "dstate c"),
        (lambda: gpurnn.GRUCell(3, 4, backend="cpu").forward(single[0])[1](dloss), "dstate"),
        (lambda: last(y, dloss), "dstate"),
        (lambda: last(y, (dloss, None)), r"dstate\[0\]"),
        (lambda: last(y, (None, dloss)), r"dstate\[1\]"),
        (lambda: last(dloss), "doutput"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected an array, got a function. Call it: backward"):
            call()
    with pytest.raises(TypeError, match="^state: expected an array, got a function$"):
        lstm(x, dloss)
    for layer, first in ((lstm, x), (cell, single[0])):
        with pytest.raises(gpurnn.ShapeError, match=r"^state: expected a pair \(h, c\), got a tuple of 3"):
            layer(first, (x, x, x))
        with pytest.raises(gpurnn.ShapeError, match=r"^state: expected a pair \(h, c\), got ndarray"):
            layer(first, x)
    attention, inputs = build_layer("attention, general")
    context, weights, backward = attention.forward(*inputs)
    with pytest.raises(TypeError, match="dweights: expected an array, got a function. Call it"):
        backward(context, dloss)


# ---- one of several derivatives left out


def test_none_in_a_pair_is_zero():
    for make in (lambda: LSTMCell(3, 4, backend="cpu", dtype="float64", seed=1),
                 lambda: LSTMCell(3, 4, proj_size=2, backend="numpy", dtype="float64", seed=1),
                 lambda: LSTM(3, 4, 2, bidirectional=True, backend="cpu", dtype="float64", seed=1),
                 lambda: LSTM(3, [4, 3], 2, backend="cpu", dtype="float64", seed=1)):  # fmt: skip
        layer = make()
        cell = isinstance(layer, LSTMCell)
        x = numbers(2, 3) if cell else numbers(5, 2, 3)

        def derivatives(dstate, layer=layer, cell=cell, x=x):
            layer.zero_grad()
            *outputs, backward = layer.forward(x)
            dx, dold = backward(dstate) if cell else backward(None, dstate)
            return [dx, *leaves(dold), layer.flat_grads.copy()]

        state = layer(x) if cell else layer(x)[1]

        def zeros(part):
            return tuple(map(zeros, part)) if isinstance(part, tuple) else np.zeros_like(part)

        h, c = state
        for short, whole in (((h, None), (h, zeros(c))), ((None, c), (zeros(h), c)), ((None, None), zeros(state))):
            for got, expected in zip(derivatives(short), derivatives(whole), strict=True):
                np.testing.assert_array_equal(got, expected)
        if isinstance(h, tuple):
            short, whole = ((h[0], None), c), ((h[0], zeros(h[1])), c)
            for got, expected in zip(derivatives(short), derivatives(whole), strict=True):
                np.testing.assert_array_equal(got, expected)
    gru, (x,) = build_layer("gru cell")
    _, backward = gru.forward(x)
    assert not backward(None)[0].any()
    with pytest.raises(gpurnn.DtypeError, match="state h"):
        LSTM(3, 4, backend="cpu")(np.zeros((5, 2, 3), "float32"), (None, np.zeros((1, 2, 4), "float32")))


def test_attention_without_a_derivative_of_its_context():
    attention, inputs = build_layer("attention, additive")
    context, weights, backward = attention.forward(*inputs)
    expected = backward(np.zeros_like(context), weights)
    for got, want in zip(backward(None, weights), expected, strict=True):
        np.testing.assert_array_equal(got, want)


# ---- inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["layer norm", "batch norm", "pooling, attention", "dropout", "last", "mean", "max"])
def test_what_keeps_nothing_of_its_input(kind, backend):
    """Those of which the documents do not say that they keep it by reference."""
    o, found = {"backend": backend, "dtype": "float64", "seed": 1}, []
    for change in (False, True):
        if kind == "dropout":
            layer = Dropout(0.5, **o)
        else:
            layer = Pooling(3, kind, **o) if kind in ("last", "mean", "max") else build_layer(kind, backend)[0]
        x = LAYERS["layer norm"][1][0].copy()
        y, backward = layer.forward(x)
        if change:
            x[...] = np.nan
        found.append([backward(y), layer.flat_grads])
    for got, expected in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_and_derivatives_may_be_overwritten(backend):
    for kind in ("lstm", "gru"):
        layer, (x,) = build_layer(kind, backend)
        found = []
        for change in (False, True):
            state = [np.full_like(array, 0.5) for array in leaves(layer(x)[1])]
            y, _, backward = layer.forward(x, state if kind == "lstm" else state[0], lengths=[5, 2], retain=True)
            dy = np.ones_like(y)
            returned = backward(dy)
            for array in [*state, dy, *leaves(returned)] if change else ():
                array[...] = np.nan
            layer.zero_grad()
            found.append([*leaves(backward(np.ones_like(y))), layer.flat_grads.copy()])
        for got, expected in zip(*found, strict=True):
            np.testing.assert_array_equal(got, expected)
