"""Hessian-vector products and derivatives along a direction: against torch, and finite differences of gradients."""

import numpy as np
import pytest
from helpers import BACKENDS, assert_close, backend_of, host
from optional import optional

import gpurnn
from gpurnn.backends.dual.array import Dual
from gpurnn.cells import library
from gpurnn.testing import check_gradients, count_terms, leaves, map_leaves

torch = optional("torch")
T, B, I, H = 5, 4, 3, 5
LENGTHS = [5, 0, 3, 2]
LAYERS = {"rnn": gpurnn.RNN, "lstm": gpurnn.LSTM, "gru": gpurnn.GRU}
OPTIONS = {
    "plain": {},
    "stack of two directions": {"num_layers": 2, "bidirectional": True, "learn_state": True, "dropout": 0.3},
    "reverse without biases": {"reverse": True, "bias": False, "batch_first": True},
    "dropped weights": {"num_layers": 2, "weight_dropout": 0.4},
    "wavefront": {"num_layers": 3, "wavefront": 2},
    "residual": {"num_layers": 3, "residual": True},
    "layer norm": {"layer_norm": True, "zoneout": 0.2},
    "batch norm": {"batch_norm": True},
    "heads": {"heads": 5, "num_layers": 2, "bidirectional": True, "learn_state": True, "weight_dropout": 0.3},
}
OF_ONE = {
    "relu": ("rnn", {"nonlinearity": "relu"}),
    "projection": ("lstm", {"proj_size": 2, "num_layers": 2}),
    "many": ("lstm", {"peephole": True, "coupled": True, "recurrent_dropout": 0.2, "cell_clip": 0.3}),
    "softplus": ("lstm", {"activation": "softplus", "recurrent_activation": "softsign"}),
    "silu": ("gru", {"activation": "silu", "recurrent_activation": "hard_sigmoid"}),
    "original": ("gru", {"reset_after": False}),
    "original with options": ("gru", {"reset_after": False, "activation": "elu"}),
}
CASES = [(kind, options) for options in OPTIONS.values() for kind in LAYERS] + list(OF_ONE.values())


def shake(model):
    """Values that differ, also where they all begin alike."""
    noise = 0.2 * np.random.default_rng(5).standard_normal(model.flat_params.shape)
    for name, array in model._views(noise).items():
        model.params[name] += model.xp.asarray(array.astype(model.compute_dtype))
    return model


def directions(model, seed=7):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(array.shape) for name, array in model.params.items()}


def gradient_of(model, x, **options):
    """Runs both passes of a loss that is no square of anything: dx, where there is one."""
    *outputs, backward = model.forward(x, **options)
    rng, dual = np.random.default_rng(3), any(isinstance(leaf, Dual) for leaf in leaves(tuple(outputs)))
    weights = [map_leaves(lambda y: rng.standard_normal(y.shape), part) for part in outputs]
    square = map_leaves(lambda y, w: y * y * w + w, tuple(outputs), tuple(weights))  # of the loss w (y^3 / 3 + y)
    assert dual == isinstance(model.flat_params, Dual)
    found = backward(*square)
    return found[0] if isinstance(found, tuple) else found


def check(model, x, **options):
    """H u for random u against differences of the gradients; H is symmetric, so H u is the gradient of u . gradient."""
    calls = [module.calls for _, module in model.modules()]

    def gradients(values, x):
        for name, value in zip(model.params, values, strict=True):
            model.params[name] = value
        for (_, module), count in zip(model.modules(), calls, strict=True):
            module.calls = count  # so that each call draws the same masks
        model.zero_grad()

        def backward(vectors, dx):
            def both(copied, x):
                dx = gradient_of(copied, x, **options)
                return tuple(copied.grads.values()), dx

            for (_, module), count in zip(model.modules(), calls, strict=True):
                module.calls = count
            return gpurnn.jvp(model, both, dict(zip(model.params, vectors, strict=True)), [x], [dx])[1]

        dx = gradient_of(model, x, **options)
        return tuple(array.copy() for array in model.grads.values()), dx, backward

    check_gradients(gradients, tuple(array.copy() for array in model.params.values()), x)


@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_recurrent(kind, options):
    layer = shake(LAYERS[kind](I, H, backend="numpy", dtype="float64", seed=1, **options))
    x = np.random.default_rng(0).standard_normal((B, T, I) if layer.batch_first else (T, B, I))
    check(layer, x, lengths=LENGTHS)


@pytest.mark.parametrize("more", [{}, {"reset_to": "initial", "masked_output": "repeat"}, {"heads": 5}], ids=str)
@pytest.mark.parametrize("kind, options", [(kind, {}) for kind in LAYERS] + [("gru", {"reset_after": False})], ids=str)
def test_resets_and_masks(kind, options, more):
    options = {"bidirectional": True, "learn_state": True, "backend": "numpy", "dtype": "float64", **options, **more}
    layer, rng = shake(LAYERS[kind](I, H, seed=1, **options)), np.random.default_rng(0)
    x = rng.standard_normal((T, B, I))
    state = map_leaves(lambda part: rng.standard_normal(part.shape), layer(x)[1])
    check(layer, x, state=state, lengths=LENGTHS, reset=rng.random((T, B)) < 0.4, mask=rng.random((T, B)) < 0.7)


@pytest.mark.parametrize("name", [n for n, one in vars(library).items() if isinstance(one, gpurnn.cells.TracedCell)])
def test_cells(name):
    layer = shake(gpurnn.Recurrent(vars(library)[name], I, H, 2, backend="numpy", dtype="float64", seed=1))
    check(layer, np.random.default_rng(0).standard_normal((T, B, I)), lengths=LENGTHS)


@pytest.mark.parametrize("mode", ["last", "mean", "max", "attention"])
def test_models(mode):
    how = {"backend": "numpy", "dtype": "float64"}
    layers = (
        gpurnn.Linear(I, 4, **how), gpurnn.LayerNorm(4, **how), gpurnn.Dropout(0.2, **how), gpurnn.GRU(4, 4, **how),
        gpurnn.BatchNorm(4, **how), gpurnn.Pooling(4, mode, **how), gpurnn.Linear(4, 2, **how),
    )  # fmt: skip
    check(shake(gpurnn.Sequential(*layers)), np.random.default_rng(0).standard_normal((T, B, I)), lengths=LENGTHS)


def test_an_encoder_decoder():
    """Attention, a state in a bridge, and two strings of words."""
    model = shake(gpurnn.EncoderDecoder(9, 8, 6, seed=0, backend="numpy", dtype="float64"))
    rng = np.random.default_rng(0)
    source, target, lengths = rng.integers(4, 9, (5, 2)), rng.integers(4, 8, (4, 2)), ([5, 3], [4, 2])

    def gradient(model):
        y, backward = model.forward((source, target), lengths)
        loss, dloss = gpurnn.cross_entropy(y, target, lengths=lengths[1])
        backward(dloss())

    check_symmetric(model, gradient)


def check_symmetric(model, gradient):
    """The same as ``check`` for a function of the model alone."""

    def gradients(*values):
        for name, value in zip(model.params, values, strict=True):
            model.params[name] = value
        model.zero_grad()
        gradient(model)

        def backward(*vectors):
            return tuple(gpurnn.hvp(model, gradient, dict(zip(model.params, vectors, strict=True))).values())

        return *(array.copy() for array in model.grads.values()), backward

    values = [array.copy() for array in model.params.values()]
    check_gradients(gradients, *values)
    for name, value in zip(model.params, values, strict=True):  # the differences have moved them
        model.params[name] = value


# ---- losses

CLASSES = np.random.default_rng(1).integers(0, 4, (T, B))
SHARES = np.random.default_rng(2).dirichlet(np.ones(4), (T, B))
REALS = np.random.default_rng(3).standard_normal((T, B, 4))
LOSSES = {
    "cross_entropy": lambda y: gpurnn.cross_entropy(y, CLASSES, lengths=LENGTHS),
    "smoothed": lambda y: gpurnn.cross_entropy(y, CLASSES, label_smoothing=0.2, weight=[1.0, 2.0, 0.0, 0.5]),
    "shares": lambda y: gpurnn.cross_entropy(y, SHARES, lengths=LENGTHS),
    "binary": lambda y: gpurnn.binary_cross_entropy_with_logits(y, SHARES),
    "mse": lambda y: gpurnn.mse(y, REALS, lengths=LENGTHS),
    "huber": lambda y: gpurnn.huber(y, REALS, delta=0.7),
    "ctc": lambda y: gpurnn.ctc_loss(y, [[1, 2], [3], [2, 2], []], lengths=[5, 4, 5, 2]),
}


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, zero):
    """Also where all logits are 0, as those of an output layer that begins at zero: no loss has a kink there."""
    model = gpurnn.Linear(I, 4, backend="numpy", dtype="float64", seed=0)
    if zero:
        model.flat_params[...] = 0
    x = np.random.default_rng(0).standard_normal((T, B, I))

    def gradient(model):
        y, backward = model.forward(x)
        _, dloss = LOSSES[name](y)
        backward(dloss())

    check_symmetric(model, gradient)
    vector = directions(model)
    loss, dloss = gpurnn.jvp(model, lambda model: LOSSES[name](model(x))[0], vector)
    assert loss == LOSSES[name](model(x))[0]
    model.zero_grad()
    gradient(model)
    expected = sum((model.grads[n] * v).sum() for n, v in vector.items())
    assert_close(dloss, expected, count_terms(model, T * B))


# ---- torch


@pytest.mark.parametrize("kind", LAYERS)
def test_against_torch(kind):
    """Double backward through torch.nn, with lengths, from output and final state, for parameters, x and the state."""
    options = {"num_layers": 2, "bidirectional": True}
    layer = shake(LAYERS[kind](I, H, backend="numpy", dtype="float64", seed=1, **options))
    theirs = getattr(torch.nn, kind.upper())(I, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(layer.params[name]))
    lengths, rng = [5, 1, 3, 2], np.random.default_rng(0)
    x, weights = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, 2 * H))
    state = layer(x)[1]
    vector, dx, dstate = directions(layer), rng.standard_normal(x.shape), map_leaves(np.cos, state)

    def gradient(model, x, *state):
        y, final, backward = model.forward(x, state if len(state) > 1 else state[0], lengths)
        dx, dinitial = backward(y * y * weights, final)
        return dict(model.grads), dx, dinitial

    _, found = gpurnn.jvp(layer, gradient, vector, [x, *leaves(state)], [dx, *leaves(dstate)])
    p = dict(theirs.named_parameters())
    given = [torch.from_numpy(one).requires_grad_() for one in (x, *leaves(state))]
    packed = torch.nn.utils.rnn.pack_padded_sequence(given[0], lengths, enforce_sorted=False)
    output, final = theirs(packed, tuple(given[1:]) if kind == "lstm" else given[1])
    output = torch.nn.utils.rnn.pad_packed_sequence(output)[0]
    loss = (output**3 * torch.from_numpy(weights)).sum() / 3 + sum((one**2).sum() for one in leaves(final)) / 2
    everything, along = [*p.values(), *given], [*(vector[name] for name in p), dx, *leaves(dstate)]
    first = torch.autograd.grad(loss, everything, create_graph=True)
    product = sum((one * torch.from_numpy(v)).sum() for one, v in zip(first, along, strict=True))
    expected = torch.autograd.grad(product, everything)
    ours = [*(found[0][name] for name in p), found[1], *leaves(found[2])]
    for name, one, other in zip([*p, "x", "h", "c"], ours, expected, strict=False):
        assert_close(one, other, 4 * count_terms(layer, T), name)  # two passes of the gradient, each with a tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own call
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_against_torch(kind):
    layer = shake(LAYERS[kind](I, H, backend="numpy", dtype="float64", seed=1))
    theirs = getattr(torch.nn, kind.upper())(I, H, dtype=torch.float64)
    x, vector = np.random.default_rng(0).standard_normal((T, B, I)), directions(layer)
    (output, state), (doutput, dstate) = gpurnn.jvp(layer, lambda model: model(x), vector)
    p = {name: torch.from_numpy(array) for name, array in layer.params.items()}

    def run(p):
        return torch.func.functional_call(theirs, p, (torch.from_numpy(x),))

    values, tangents = torch.func.jvp(run, (p,), ({name: torch.from_numpy(v) for name, v in vector.items()},))
    pairs = zip((output, *leaves(state), doutput, *leaves(dstate)), (*leaves(values), *leaves(tangents)), strict=True)
    for one, other in pairs:
        assert_close(one, other, 2 * count_terms(layer, T))


# ---- numbers


@pytest.mark.parametrize(
    "function, at, slope",
    [
        (lambda y: np.maximum(y, 0), 0, 0), (lambda y: np.maximum(0, y), 0, 1), (lambda y: np.minimum(y, 0), 0, 0),
        (lambda y: np.minimum(0, y), 0, 1), (abs, 0, 0), (abs, -2, -1), (lambda y: y**3, 2, 12),
        (lambda y: y.max(axis=0), 5, 1), (lambda y: y.max(axis=1, keepdims=True), 5, 1), (lambda y: y / y, 3, 0),
        (lambda y: np.clip(y, 1, 3), 2, 1), (lambda y: np.clip(y, 1, 3), 3, 0), (lambda y: np.cumsum(y), 2, 1),
        (lambda y: 3 - y, 1, -1), (lambda y: 1 / y, 2, -0.25), (np.log1p, 1, 0.5), (np.expm1, 0, 1),
        (lambda y: 2**y, 1, 2 * np.log(2)),
    ],
)  # fmt: skip
def test_rules(function, at, slope):
    """The derivative of a function at a number, and on which side of a kink it is taken."""
    layer = gpurnn.Linear(1, 1, bias=False, dtype="float64")
    layer.params["weight"] = at
    x = np.ones((1, 1))
    value, tangent = gpurnn.jvp(layer, lambda model: function(model(x)), {"weight": [[2.0]]})
    assert value.item() == np.asarray(function(np.full((1, 1), float(at)))).item()
    assert tangent.item() == 2 * slope


@pytest.mark.parametrize("activation", ["softplus", "silu", "sigmoid", "softsign", "elu"])
def test_activations_have_no_kink_at_zero(activation):
    """The first timestep of a layer whose parameters are 0: its output moves as its gradient says."""
    layer = gpurnn.RNN(2, 3, nonlinearity=activation, backend="numpy", dtype="float64")
    layer.flat_params[...] = 0
    x, vector = np.ones((1, 1, 2)), directions(layer)
    output, _, backward = layer.forward(x)
    _, moves = gpurnn.jvp(layer, lambda model: model(x)[0].sum(), vector)
    backward(np.ones(output.shape))
    expected = sum((layer.grads[name] * v).sum() for name, v in vector.items())
    assert expected != 0
    assert_close(moves, expected, count_terms(layer, 1))


def test_arrays_from_outside_may_be_of_any_dtype():
    layer = gpurnn.Linear(2, 3, dtype="float64", seed=0)
    x, y = np.ones((4, 2)), np.zeros((4, 3))

    def gradient(dtype):
        def run(model):
            output, backward = model.forward(x.astype(dtype))
            _, dloss = gpurnn.mse(output, y.astype(dtype))
            backward(dloss())

        return run

    found = [gpurnn.hvp(layer, gradient(dtype), directions(layer)) for dtype in ("float64", "float32", "float16")]
    for other in found[1:]:
        for name, array in found[0].items():
            np.testing.assert_array_equal(other[name], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_and_dtypes(backend, dtype):
    """The same float64 numbers everywhere, rounded once at the end."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    model = shake(gpurnn.LSTM(I, H, 2, backend=backend_of(backend), dtype=dtype, seed=1, dropout=0.3))
    plain = gpurnn.LSTM(I, H, 2, backend="numpy", dtype="float64", seed=1, dropout=0.3)
    for name, array in model.params.items():
        plain.params[name] = host(array)
    x, vector = np.random.default_rng(0).standard_normal((T, B, I)).astype("float32"), directions(model)
    x = model.xp.asarray(x)
    found = gpurnn.hvp(model, lambda model: gradient_of(model, x, lengths=LENGTHS), vector)
    expected = gpurnn.hvp(plain, lambda model: gradient_of(model, host(x), lengths=LENGTHS), vector)
    for name, array in expected.items():
        assert found[name].dtype == np.float32 and type(found[name]) is type(model.params[name])
        np.testing.assert_array_equal(host(found[name]), array.astype("float32"), err_msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_saturated_gates_do_not_move(kind):
    """An exp that overflows has an infinite derivative; that of its gate is 0."""
    layer = LAYERS[kind](1, 3, backend="numpy", dtype="float64", seed=0)
    x = np.array([1.0, -1e4, 1e4])[:, None, None]
    found = gpurnn.hvp(layer, lambda model: gradient_of(model, x), directions(layer))
    assert all(np.isfinite(array).all() for array in found.values())
    assert any(array.any() for array in found.values())


def test_the_model_stays_as_it_is():
    model = shake(gpurnn.LSTM(I, H, batch_norm=True, recurrent_dropout=0.3, seed=0, backend="numpy", dtype="float64"))
    model.flat_grads[...] = 3
    x = np.random.default_rng(0).standard_normal((T, B, I))
    before = {"flat": model.flat_params.copy(), **{name: array.copy() for name, array in model.buffers.items()}}
    output, _ = gpurnn.jvp(model, lambda model: model(x)[0], directions(model))
    gpurnn.hvp(model, lambda model: gradient_of(model, x), directions(model))
    assert (model.flat_grads == 3).all() and model.calls == 0 and model.training
    for name, array in before.items():
        np.testing.assert_array_equal(model.flat_params if name == "flat" else model.buffers[name], array)
    np.testing.assert_array_equal(model(x)[0], output)  # the masks of the next call


def test_frozen_parameters_may_move_but_have_no_gradient():
    model = gpurnn.Linear(2, 3, dtype="float64").freeze("weight")
    x = np.ones((1, 2))

    def gradient(model):
        y, backward = model.forward(x)
        backward(y)

    found = gpurnn.hvp(model, gradient, {"weight": np.ones((3, 2))})
    assert {name: array.tolist() for name, array in found.items()} == {"bias": [2.0, 2.0, 2.0]}


def test_structures_and_what_does_not_move():
    layer = gpurnn.Linear(2, 3)
    x = np.ones((1, 2), "float32")

    def function(model, given):
        y, backward = model.forward(given)
        return {"y": [y, given], "still": np.ones(2), "number": 3, "none": None}, backward

    (found, backward), (tangent, nothing) = gpurnn.jvp(layer, function, {}, [x], [2 * x])
    assert callable(backward) and nothing is None
    assert_close(found["y"][0], layer(x), 3, dtype="float32")
    assert_close(tangent["y"][0], (2 * x) @ layer.params["weight"].T, 3, dtype="float32")
    assert tangent["y"][1].tolist() == [[2.0, 2.0]] and found["y"][1].dtype == np.float32
    assert found["number"] == 3 and tangent["number"] is tangent["none"] is None
    assert tangent["still"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda y: np.linalg.norm(y),
        lambda y: np.einsum("tbf->", y),
        lambda y: np.arctan(y),
        lambda y: np.maximum.reduce(y),
    ],
)
def test_functions_without_a_rule(function):
    with pytest.raises(TypeError):
        gpurnn.jvp(gpurnn.Linear(2, 3), lambda model: function(model(np.ones((2, 1, 2)))), {})


@pytest.mark.parametrize("convert", [float, np.asarray, bool, int, lambda y: y.tolist(), lambda y: np.ones(1) + [y]])
def test_a_tangent_is_never_lost(convert):
    with pytest.raises(TypeError, match="tangent would be lost"):
        gpurnn.jvp(gpurnn.Linear(2, 3), lambda model: convert(model(np.ones((1, 2))).sum()), {})


@pytest.mark.parametrize(
    "write", [lambda plain, y: plain.__iadd__(y), lambda plain, y: plain.__setitem__(0, y[0]), np.copyto]
)
def test_a_tangent_is_not_written_into_a_plain_array(write):
    def function(model):
        write(np.zeros((1, 3)), model(np.ones((1, 2))))

    with pytest.raises(TypeError, match="tangent would be lost"):
        gpurnn.jvp(gpurnn.Linear(2, 3), function, {})


def test_errors():
    layer, function = gpurnn.Linear(2, 3), lambda model, *inputs: model
    with pytest.raises(KeyError, match="no parameter is called 'wieght'; did you mean weight"):
        gpurnn.hvp(layer, function, {"wieght": np.ones((3, 2))})
    with pytest.raises(gpurnn.ShapeError, match=r"vector\['weight'\]"):
        gpurnn.hvp(layer, function, {"weight": np.ones((2, 3))})
    with pytest.raises(TypeError, match="vector: expected a dict"):
        gpurnn.hvp(layer, function, np.ones(9))
    with pytest.raises(TypeError, match="model: expected a gpurnn layer"):
        gpurnn.hvp(np.ones(2), function, {})
    with pytest.raises(TypeError, match="input_vectors: expected one for each of 1 inputs, got 2"):
        gpurnn.jvp(layer, function, {}, [np.ones(2)], [None, None])
    with pytest.raises(gpurnn.ShapeError, match=r"input_vectors\[0\]"):
        gpurnn.jvp(layer, function, {}, [np.ones(2)], [np.ones(3)])


def test_functions_that_leave_the_model_alone():
    """A function that runs another model than its argument."""
    model = shake(gpurnn.GRU(I, H, backend="numpy", seed=1))
    x = np.ones((T, B, I), "float32")

    def outer(_):
        output, _, backward = model.forward(x)
        backward(output)

    with pytest.raises(RuntimeError, match="function: the model that it got has no gradients"):
        gpurnn.hvp(model, outer, directions(model))
    with pytest.raises(TypeError, match="inputs: expected a list or tuple of arrays"):
        gpurnn.jvp(model, lambda model, x: model(x), {}, x, [x])
