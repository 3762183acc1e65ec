"""Cells of one's own: what a function may be and say, errors in the user's words, what is saved.

The cells of RNN, LSTM and GRU are written once more as functions, and compared with the layers.
"""

import copy
import cProfile
import functools
import math
import os
import pickle
import sys

import numpy as np
import pytest
from optional import optional

import gpurnn
from gpurnn import testing
from gpurnn.backends.cpu import cells as cpu_cells
from gpurnn.cells import (
    clip,
    clip_gradient,
    dropout,
    exp,
    log,
    maximum,
    mean,
    minimum,
    normalized,
    normalized_together,
    relu,
    sigmoid,
    stop_gradient,
    tanh,
    where,
    zoneout,
)

BACKENDS = ["numpy", pytest.param("cpu", marks=pytest.mark.slow)]  # a C++ compiler takes seconds for each cell
T, B, I, H = 5, 4, 3, 6
LENGTHS = [5, 0, 3, 1]


def build(cell, backend="numpy", dtype="float64", **options):
    return gpurnn.Recurrent(cell, I, H, backend=backend, dtype=dtype, **{"seed": 1} | options)


def check(cell, **options):
    """The gradients of a layer of the cell."""
    layer = build(cell, **options)
    return testing.check_gradients(layer, np.random.default_rng(0).standard_normal((T, B, I)), lengths=LENGTHS)


# ---- RNN, LSTM and GRU as functions


@gpurnn.cell(gates="z")
def rnn_tanh(ax, ah, s):
    return tanh(ax.z + ah.z)


@gpurnn.cell(gates="z")
def rnn_relu(ax, ah, s):
    return relu(ah.z + ax.z)


@gpurnn.cell(gates="i f g o", states="h c", remembers="f", writes="i")
def lstm(ax, ah, s):
    i = sigmoid(ax.i + ah.i)
    f = sigmoid(ax.f + ah.f)
    g = tanh(ax.g + ah.g)
    o = sigmoid(ax.o + ah.o)
    c = f * s.c + i * g
    return o * tanh(c), c


@gpurnn.cell(gates="r z n", remembers="z")
def gru(ax, ah, s):
    r = sigmoid(ax.r + ah.r)
    z = sigmoid(ax.z + ah.z)
    n = tanh(ax.n + r * ah.n)
    return n + z * (s.h - n)


@gpurnn.cell(gates="r z n", remembers="z")
def gru_original(ax, ah, s):
    r = sigmoid(ax.r + ah.r)
    z = sigmoid(ax.z + ah.z)
    n = tanh(ax.n + ah.n(r * s.h))
    return n + z * (s.h - n)


WRITTEN = {
    "rnn_tanh": (rnn_tanh, functools.partial(gpurnn.RNN, nonlinearity="tanh")),
    "rnn_relu": (rnn_relu, functools.partial(gpurnn.RNN, nonlinearity="relu")),
    "lstm": (lstm, gpurnn.LSTM),
    "gru": (gru, gpurnn.GRU),
    "gru_original": (gru_original, functools.partial(gpurnn.GRU, reset_after=False)),
}


# On the CPU by turns in one dtype or the other: to compile a cell as users do takes ten seconds
AS_LAYERS = [
    *((name, dtype, "numpy") for name in WRITTEN for dtype in ("float64", "float32")),
    *(
        pytest.param(name, ("float32", "float64")[number % 2], "cpu", marks=pytest.mark.slow)
        for number, name in enumerate(WRITTEN)
    ),
]


@pytest.mark.parametrize("name, dtype, backend", AS_LAYERS)
def test_the_cells_of_the_layers_written_as_functions(name, dtype, backend, monkeypatch):
    """Equal outputs, to the bit, of equal parameters; gradients up to 4 roundings in each step of each layer, because
    d s (1 - s) is rounded in another order; on the CPU RNN's and LSTM's are equal, too. That holds where both were
    compiled alike, so not by the quick compiler of conftest.py."""
    if "quick_compiler" in os.environ.get("CXX", ""):
        monkeypatch.delenv("CXX")
    monkeypatch.setattr(cpu_cells, "_known", {})  # what other tests have compiled
    cell, layer = WRITTEN[name]
    options = {"num_layers": 2, "bidirectional": True, "backend": backend, "dtype": dtype, "seed": 1}
    written, traced = layer(I, H, **options), gpurnn.Recurrent(cell, I, H, **options)
    np.testing.assert_array_equal(written.flat_params, traced.flat_params)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, B, I))
    doutputs = testing.draw_like(testing.map_leaves(np.asarray, written(x.astype(dtype))), rng)
    first, second = (testing.results(one, (x, None), doutputs, lengths=LENGTHS) for one in (written, traced))
    for key in first:
        if not key.startswith("d"):
            np.testing.assert_array_equal(second[key], first[key], err_msg=key)
    exact = backend == "cpu" and "gru" not in name
    share, detail = testing.worst_error(second, None, first, dtype, 0.001 if exact else 4 * T * 2)
    assert share <= 1, detail


def test_what_is_saved_and_what_is_recomputed():
    assert lstm.saved == lstm.shown == ("i", "f", "g", "o")
    assert len(gru.saved) == 4 and gru.shown == ("r", "z", "n")
    assert gpurnn.cells.peephole.saved == ("i", "f", "g", "o")
    assert rnn_tanh.saved == rnn_relu.saved == ()
    assert gpurnn.cells.cifg.saved == ("f", "g", "o")
    assert gpurnn.cells.indrnn.saved == ()
    # what follows from the states and the parameters is computed again
    doubled = gpurnn.cell("z", parameters="u")(lambda ax, ah, s, p: tanh(ax.z + ah.z + exp(p.u) * s.h * s.h))
    assert doubled.saved == ()
    # a mean is saved, because it would need the other units again; and so is what it multiplies
    averaged = gpurnn.cell("z")(lambda ax, ah, s: tanh(mean(ax.z + ah.z) * ax.z))
    assert len(averaged.saved) == 2


def test_gates_are_shown_by_the_names_of_the_function():
    for cell, names in ((lstm, {"i", "f", "g", "o"}), (gru_original, {"r", "z", "n"}), (rnn_tanh, set())):
        layer = build(cell)
        _, _, (steps,) = layer(np.ones((T, B, I)), return_all=True)
        assert set(steps.gates) == names and all(gate.shape == (T, B, H) for gate in steps.gates.values())
    x = np.random.default_rng(1).standard_normal((T, B, I))
    written, traced = gpurnn.LSTM(I, H, backend="numpy", dtype="float64", seed=1), build(lstm)
    first, second = (layer(x, return_all=True)[2][0] for layer in (written, traced))
    for name in "ifgo":
        np.testing.assert_array_equal(second.gates[name], first.gates[name])


def test_the_second_product_named_by_the_user_is_no_gate():
    @gpurnn.cell("r n")
    def named(ax, ah, s):
        reset = sigmoid(ax.r + ah.r) * s.h
        return tanh(ax.n + ah.n(reset))

    _, _, (steps,) = build(named)(np.ones((T, B, I)), return_all=True)
    assert "reset" not in steps.gates
    assert check(named) <= 1


# ---- sources


def test_sources_have_the_names_of_the_function():
    for language in ("cuda", "cpp", "numpy"):
        text = lstm.source(language)
        assert "c = f * " in text and "d_o = " in text and "lstm" in text or language == "numpy"
    assert lstm.source() == lstm.source("cuda") == lstm.source("cpp") == lstm.struct
    with pytest.raises(ValueError, match="language should be one of 'cuda', 'cpp', 'numpy', got 'C'"):
        lstm.source("C")


def test_sources_are_those_of_the_same_function():
    again = gpurnn.cell("i f g o", "h c", name="lstm")(lstm.function)
    assert again.struct == lstm.struct and again == lstm and hash(again) == hash(lstm)
    assert again != gru and gpurnn.cell("z")(lambda ax, ah, s: tanh(ax.z)) != gpurnn.cell("z")(lambda ax, ah, s: ax.z)


def test_equal_terms_are_computed_once():
    cell = gpurnn.cell("z")(lambda ax, ah, s: tanh(ax.z + ah.z) * tanh(ax.z + ah.z) + 0 * s.h)
    assert cell.source("numpy").count("xp.tanh(ax") == 1


def test_means_within_a_second_product_are_array_code_only():
    @gpurnn.cell("r n")
    def averaged(ax, ah, s):
        return tanh(ax.n + ah.n(normalized(sigmoid(ax.r + ah.r) * s.h)))

    assert averaged.source("cuda") == "" and averaged.source("numpy")
    assert check(averaged) <= 1
    other = gpurnn.cell("r n", name="averaged")(
        lambda ax, ah, s: tanh(ax.n + ah.n(normalized(tanh(ax.r + ah.r) * s.h)))
    )
    assert averaged != other  # though their structs and saved blocks are alike


# ---- functions of every kind


class Equations:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, ax, ah, s):
        z = tanh(ax.z + ah.z)
        return self.scale * z

    def method(self, ax, ah, s):
        z = tanh(ax.z + ah.z)
        return self.scale * z


def scaled(scale, ax, ah, s):
    z = tanh(ax.z + ah.z)
    return scale * z


def closure(scale):
    def equations(ax, ah, s):
        z = tanh(ax.z + ah.z)
        return scale * z

    return equations


def decorated(ax, ah, s):
    return closure(0.5)(ax, ah, s)


def any_arguments(*arguments):
    ax, ah, *_ = arguments
    z = tanh(ax.z + ah.z)
    return 0.5 * z


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda ax, ah, s: 0.5 * tanh(ax.z + ah.z), "cell"),
        (Equations(0.5), "cell"),
        (Equations(0.5).method, "method"),
        (functools.partial(scaled, 0.5), "cell"),
        (closure(0.5), "equations"),
        (decorated, "decorated"),
        (any_arguments, "any_arguments"),
        (lambda ax, ah, s, p: 0.5 * tanh(ax.z + ah.z), "cell"),
        (lambda ax, ah, s, scale=0.5: 0.5 * tanh(ax.z + ah.z), "cell"),
        (lambda ax, ah, s, *, scale=0.5: scale * tanh(ax.z + ah.z), "cell"),
        (lambda ax, ah, s: [0.5 * tanh(ax["z"] + ah["z"])], "cell"),
        (lambda ax, ah, s: np.float32(0.5) * np.tanh(sum([ax.z, ah.z])), "cell"),
        (lambda ax, ah, s: np.array(0.5) * np.tanh(ax.z - -ah.z), "cell"),
    ],
)
def test_functions_of_every_kind(function, name):
    cell = gpurnn.cell(gates="z")(function)
    assert cell.name == name
    x = np.random.default_rng(2).standard_normal((T, B, I))
    expected, _ = build(gpurnn.cell("z")(lambda ax, ah, s: 0.5 * tanh(ax.z + ah.z)))(x)
    np.testing.assert_array_equal(build(cell)(x)[0], expected)
    assert check(cell) <= 1


def test_variables_of_the_function_name_the_code_whatever_calls_it():
    for function in (Equations(0.5), Equations(0.5).method, functools.partial(scaled, 0.5), closure(0.5)):
        assert "const real z = tanh(" in gpurnn.cell(gates="z")(function).source()


def test_cprofile_goes_on():
    profile = cProfile.Profile()
    profile.enable()
    try:
        gpurnn.cell("z")(lambda ax, ah, s: tanh(ax.z))
        math.hypot(3, 4)
    finally:
        profile.disable()
    assert any("hypot" in str(entry.code) for entry in profile.getstats())


def test_the_profiler_that_was_set_is_set_again():
    def profiler(*arguments):
        pass

    sys.setprofile(profiler)
    try:
        gpurnn.cell("z")(lambda ax, ah, s: tanh(ax.z))
        assert sys.getprofile() is profiler
        with pytest.raises(ZeroDivisionError):
            gpurnn.cell("z")(lambda ax, ah, s: 1 / 0)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


# ---- what an equation may be


SMALL = {
    "a state as it was": ("h c", lambda ax, ah, s: (tanh(ax.z + ah.z + s.c), s.c)),
    "a state that is a number": ("h c", lambda ax, ah, s: (tanh(ax.z + ah.z + s.c), 0.5)),
    "a state that becomes the output": ("h c", lambda ax, ah, s: (s.c, tanh(ax.z + ah.z))),
    "swapped states": ("h c", lambda ax, ah, s: (tanh(ax.z + ah.z + s.c), s.h)),
    "equal states": ("h c", lambda ax, ah, s: (tanh(ax.z + ah.z + s.c),) * 2),
    "nothing but products": ("h", lambda ax, ah, s: ax.z + ah.z),
    "no W_hh": ("h", lambda ax, ah, s: tanh(ax.z) + 0.5 * s.h),
    "powers": ("h", lambda ax, ah, s: tanh(abs(ax.z) ** 2 + ah.z**3 + (s.h**2 + 1) ** 0.5 + s.h**1)),
    "negative": ("h", lambda ax, ah, s: -tanh(-ax.z - (-ah.z)) * -1 - s.h * 0 + (+s.h) / 3 - 2 * -s.h),
    "comparisons": ("h", lambda ax, ah, s: where(ax.z >= 0.1, tanh(ah.z), where(s.h <= ah.z, 1, ax.z))),
    "reversed": ("h", lambda ax, ah, s: 1 - tanh(1 / (2 + exp(1 - ax.z - ah.z))) + where(ah.z > 0, 0.5, 1 / 4)),
    "folded": ("h", lambda ax, ah, s: tanh(ax.z + ah.z) * sigmoid(0 * s.h) + log(1 + 0 * s.h)),
    "clipped": ("h", lambda ax, ah, s: clip(ax.z + ah.z, -0.5, 0.75)),
    "limits": ("h", lambda ax, ah, s: maximum(tanh(ax.z), minimum(ah.z, s.h))),
    "means": ("h", lambda ax, ah, s: tanh(ax.z + ah.z - mean(mean(ax.z)) * mean(s.h))),
    "layer norm": ("h", lambda ax, ah, s: tanh(normalized(ax.z) + normalized(ah.z))),
    "layer norm of both": ("h", lambda ax, ah, s: tanh(sum(normalized_together(ax.z, ah.z)))),
}


VECTORS = {
    "a parameter": lambda ax, ah, s, p: tanh(ax.n + ah.n(p.u) + ax.r + ah.r),
    "one number for all units": lambda ax, ah, s, p: tanh(ax.n + ah.n(mean(s.h)) + ax.r + ah.r + p.u),
    "of x alone": lambda ax, ah, s, p: tanh(ah.n(ax.r * p.u) + ah.r),
    "with a mask": lambda ax, ah, s, p: tanh(ah.n(dropout(s.h, 0.5)) + ax.n + ax.r + ah.r + p.u),
    "of a gate": lambda ax, ah, s, p: tanh(ah.n(sigmoid(ax.r + ah.r)) + ax.n * p.u),
}


@pytest.mark.parametrize("what", VECTORS)
def test_what_a_second_product_may_multiply(what):
    cell = gpurnn.cell("r n", parameters="u")(VECTORS[what])
    assert len(cell.products) == 2
    assert check(cell, num_layers=2) <= 1


@pytest.mark.parametrize("what", SMALL)
def test_equations(what):
    states, function = SMALL[what]
    cell = gpurnn.cell("z", states)(function)
    assert check(cell, num_layers=2) <= 1
    assert check(cell, reverse=True, bias=False) <= 1


def test_names_that_generated_code_needs_itself_are_no_trouble():
    """Gates, states, parameters and variables called as words of C++, of the struct, and of array code."""

    @gpurnn.cell(gates="inner double xp", states="out new", parameters="struct hook d")
    def lstm(ax, ah, s, p):
        z = sigmoid(ax.double + ah.double)
        real = tanh(ax.inner + ah.inner + p.struct)
        inner = z * s.new
        H = real + inner
        stage = tanh(H + ax.xp + ah.xp(inner)) * p.hook + p.d
        return stage, H

    assert check(lstm, num_layers=2) <= 1
    for word in ("const real real ", "const real inner ", "const real stage ", "const real double"):
        assert word not in lstm.source()


def test_parameters_called_as_gates_and_states():
    @gpurnn.cell(gates="h i", states="h c", parameters="h i c x own")
    def same(ax, ah, s, p):
        return tanh(ax.h + ah.h + p.h * s.h + p.x * s.c), tanh(ax.i * p.i + p.c + p.own * s.h)

    assert check(same) <= 1
    layer = build(same)
    assert {f"{name}_l0" for name in ("h", "i", "c", "x", "own")} <= set(layer.params)


def test_a_parameter_with_a_vector_for_each_gate():
    cell = gpurnn.cell("a b", parameters=[gpurnn.cells.Parameter("gain", ("a", "b"), 1.5), "u"])(
        lambda ax, ah, s, p: tanh(p.gain.a * ax.a + ah.a) * sigmoid(p.gain.b * ax.b) + p.u * s.h
    )
    layer = build(cell)
    assert (layer.params["gain_l0"] == 1.5).all() and layer.params["gain_l0"].shape == (2 * H,)
    assert check(cell) <= 1


# ---- random masks


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_and_zoneout(backend):
    @gpurnn.cell("i f g o", "h c")
    def noisy(ax, ah, s):
        h, c = lstm.function(ax, ah, s)
        return zoneout(h, s.h, 0.3), dropout(zoneout(c, s.c, 0.1), 0.2, "sequence")

    assert [(draw.rate, draw.each) for draw in noisy.draws] == [(0.3, "timestep"), (0.1, "timestep"), (0.2, "sequence")]
    layer = build(noisy, backend=backend)
    x = np.random.default_rng(3).standard_normal((T, B, I))
    assert testing.check_gradients(layer, x, lengths=LENGTHS) <= 1
    assert (layer(x)[0] != layer(x)[0]).any()  # other masks in each call
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0], layer(x)[0])
    assert testing.check_gradients(layer, x, lengths=LENGTHS) <= 1
    assert noisy.evaluating.draws == () and noisy.evaluating.evaluating is noisy.evaluating


def test_rates_of_nothing_and_of_all():
    assert gpurnn.cell("z")(lambda ax, ah, s: dropout(tanh(ax.z), 0)).draws == ()
    assert gpurnn.cell("z")(lambda ax, ah, s: zoneout(tanh(ax.z), s.h, 0.0)).draws == ()
    with pytest.raises(ValueError, match="zoneout: a rate of 1 keeps the old state for ever"):
        gpurnn.cell("z")(lambda ax, ah, s: zoneout(tanh(ax.z), s.h, 1))
    gone = build(gpurnn.cell("z")(lambda ax, ah, s: dropout(tanh(ax.z), 1)))
    assert not gone(np.ones((T, B, I)))[0].any()


def test_gradients_that_are_clipped_or_stopped():
    x = np.random.default_rng(5).standard_normal((1, B, I))
    for function, expected in (
        (
            lambda ax, ah, s: clip_gradient(s.h + ax.z, 0.25),
            lambda d: np.clip(d, -0.25, 0.25),
        ),
        (lambda ax, ah, s: stop_gradient(s.h) + ax.z, lambda d: 0 * d),
    ):
        layer = build(gpurnn.cell("z")(function))
        output, _, backward = layer.forward(x, np.zeros((1, B, H)))
        doutput = np.random.default_rng(6).standard_normal(output.shape)
        _, dstate = backward(doutput)
        np.testing.assert_array_equal(dstate, expected(doutput))


# ---- pickle


def test_a_cell_that_pickle_cannot_find_says_so():
    layer = build(gpurnn.cell("z")(lambda ax, ah, s: tanh(ax.z)))
    with pytest.raises(
        pickle.PicklingError, match="cell cell: pickle finds a cell by name, .* put the decorator before"
    ):
        pickle.dumps(layer)
    other = gpurnn.cell("z", name="other")(lstm_of_nothing)  # its name leads to the plain function
    with pytest.raises(pickle.PicklingError, match=r"lstm_of_nothing is not this one"):
        pickle.dumps(other)
    assert pickle.loads(pickle.dumps(lstm)) is lstm


def lstm_of_nothing(ax, ah, s):
    return tanh(ax.z)


@gpurnn.cell("z")
def with_dropout(ax, ah, s):
    return dropout(tanh(ax.z + ah.z), 0.5)


def test_the_cell_of_evaluation_can_be_pickled():
    assert pickle.loads(pickle.dumps(with_dropout.evaluating)) is with_dropout.evaluating
    layer = build(with_dropout).eval()
    again = pickle.loads(pickle.dumps(layer))
    x = np.ones((T, B, I))
    np.testing.assert_array_equal(again(x)[0], layer(x)[0])


# ---- errors


def one(gates="z", states="h", parameters=(), **options):
    """A decorator, for functions that must not become a cell."""
    return lambda function: lambda: gpurnn.cell(gates, states, parameters, **options)(function)


IF = "traced once, before there are numbers"
MISTAKES = {
    "a gate that is not there": (
        one("i f")(lambda ax, ah, s: ax.g),
        AttributeError,
        "^cell cell: ax has no 'g'; it has i, f$",
    ),
    "its hidden part": (one()(lambda ax, ah, s: ax.z + ah.q), AttributeError, "^cell cell: ah has no 'q'; it has z$"),
    "a state that is not there": (
        one()(lambda ax, ah, s: ax.z + s.c),
        AttributeError,
        "^cell cell: s has no 'c'; it has h$",
    ),
    "no parameters": (one()(lambda ax, ah, s, p: ax.z + p.u), AttributeError, "^cell cell: p has no 'u'; it has none$"),
    "a gate by number": (one()(lambda ax, ah, s: ax[0]), AttributeError, "^cell cell: ax has no '0'; it has z$"),
    "nothing returned": (
        one()(lambda ax, ah, s: None),
        ValueError,
        "return the new states h, .* got None for h: did you forget return[?]$",
    ),
    "too few states": (
        one(states="h c")(lambda ax, ah, s: ax.z),
        ValueError,
        "states h, c, in this order; got 1 value$",
    ),
    "too many": (one()(lambda ax, ah, s: (ax.z, s.h)), ValueError, "states h, in this order; got 2 values"),
    "a state of None": (one(states="h c")(lambda ax, ah, s: (ax.z, None)), ValueError, "got None for c$"),
    "a state that is set": (
        one(states="h c")(lambda ax, ah, s: setattr(s, "c", ax.z)),
        AttributeError,
        r"s\.c cannot be set: return the new",
    ),
    "if": (one()(lambda ax, ah, s: ax.z if ax.z else s.h), TypeError, IF + ".*the value of a symbol: write gpurnn"),
    "if of a comparison": (
        one()(lambda ax, ah, s: ax.z if ax.z > 0 else s.h),
        TypeError,
        IF + ".* at a condition: write",
    ),
    "if equal": (one()(lambda ax, ah, s: ax.z if ax.z == 0 else s.h), TypeError, IF + ".*whether a symbol equals"),
    "if not equal": (one()(lambda ax, ah, s: ax.z if s.h != ax.z else s.h), TypeError, IF),
    "in": (one()(lambda ax, ah, s: ax.z if ax.z in (s.h, 1) else s.h), TypeError, IF),
    "and": (one()(lambda ax, ah, s: where(ax.z > 0 and s.h > 0, 1, ax.z)), TypeError, IF),
    "&": (one()(lambda ax, ah, s: where((ax.z > 0) & (s.h > 0), 1, ax.z)), TypeError, "one gpurnn.cells.where inside"),
    "a chain": (one()(lambda ax, ah, s: where(0 < ax.z < 1, 1, ax.z)), TypeError, IF),
    "max of Python": (one()(lambda ax, ah, s: max(ax.z, s.h)), TypeError, IF),
    "max with a number": (
        one()(lambda ax, ah, s: max(ax.z, 0)),
        TypeError,
        r"and gpurnn\.cells\.maximum and minimum for",
    ),
    "a method of a class": (
        one()(lambda self, ax, ah, s: ax.z),
        TypeError,
        "^cell cell: .*begins with self: a cell is no method",
    ),
    "2**x": (
        one()(lambda ax, ah, s: 2**ax.z),
        TypeError,
        r"power of a symbol, got 2: write gpurnn\.cells\.exp\(x \* math",
    ),
    "x**-1": (one()(lambda ax, ah, s: ax.z**-1), TypeError, "to 0.5, got -1: write 1 / x$"),
    "an array of one": (one()(lambda ax, ah, s: ax.z * np.ones(1)), TypeError, "got ndarray: declare an array"),
    "a cell called inner": (
        one(name="inner")(lambda ax, ah, s: ax.z),
        ValueError,
        "'inner', which is a word of C[+]+ or",
    ),
    "where of a number": (
        one()(lambda ax, ah, s: where(ax.z, 1, s.h)),
        TypeError,
        "expected a comparison .* got Symbol",
    ),
    "a condition as number": (one()(lambda ax, ah, s: ax.z * (s.h > 0)), TypeError, "a condition is no number"),
    "np.sin": (one()(lambda ax, ah, s: np.sin(ax.z)), TypeError, r"^np.sin cannot take a symbol: .* gpurnn\.cells$"),
    "np.where": (one()(lambda ax, ah, s: np.where(ax.z > 0, 1, s.h)), TypeError, IF),
    "math.tanh": (one()(lambda ax, ah, s: math.tanh(ax.z)), TypeError, "no value yet: .* not with math's"),
    "int": (one()(lambda ax, ah, s: int(ax.z)), TypeError, "no value yet"),
    "@": (one()(lambda ax, ah, s: ax.z @ ah.z), TypeError, "products with matrices are ax, ah and"),
    "a method": (one()(lambda ax, ah, s: ax.z.sum()), AttributeError, "a symbol has no 'sum': it is a number"),
    "an index": (one()(lambda ax, ah, s: ax.z[0]), TypeError, "no parts to index or to loop over"),
    "a loop": (one()(lambda ax, ah, s: [v for v in ax.z]), TypeError, "no parts to index or to loop over"),
    "an array": (one()(lambda ax, ah, s: ax.z * np.ones(5)), TypeError, "got ndarray: declare an array as a parameter"),
    "an array before": (one()(lambda ax, ah, s: np.ones(5) * ax.z), TypeError, "got ndarray: declare an array"),
    "a list": (one()(lambda ax, ah, s: ax.z + [1]), TypeError, "got list: declare an array"),
    "a string": (one()(lambda ax, ah, s: ax.z + "1"), TypeError, "expected a symbol or a number .* got str$"),
    "True": (one()(lambda ax, ah, s: ax.z + True), TypeError, "expected a symbol or a number .* got bool$"),
    "a complex number": (one()(lambda ax, ah, s: ax.z * 1j), TypeError, "got complex$"),
    "NaN": (one()(lambda ax, ah, s: ax.z * math.nan), ValueError, "expected a finite number .* got nan"),
    "infinity": (one()(lambda ax, ah, s: minimum(ax.z, math.inf)), ValueError, "expected a finite number .* got inf"),
    "an integer beyond float": (one()(lambda ax, ah, s: ax.z * 10**400), ValueError, "expected a finite number"),
    "a result beyond float": (
        one()(lambda ax, ah, s: ax.z * exp(0 * s.h + 1000)),
        ValueError,
        "expected a finite number",
    ),
    "division by 0": (one()(lambda ax, ah, s: ax.z / 0), ZeroDivisionError, "equation divides by 0"),
    "a root of 3": (
        one()(lambda ax, ah, s: ax.z ** (1 / 3)),
        TypeError,
        "whole power from 1 to 8, or to 0.5, got 0.33.*: write gpurnn.cells.exp",
    ),
    "a power of a symbol": (one()(lambda ax, ah, s: ax.z**s.h), TypeError, "whole power from 1 to 8"),
    "a function of numbers": (
        one()(lambda ax, ah, s: ax.z * log(2)),
        TypeError,
        "log: expected a symbol .* take math's",
    ),
    "two second products": (
        one("a b")(lambda ax, ah, s: ah.a(2 * s.h) + ah.b(3 * s.h) + ax.a + ax.b),
        ValueError,
        "one second product: all gates",
    ),
    "a product of a product": (
        one("a b")(lambda ax, ah, s: ah.b(ah.a(2 * s.h)) + ax.a + ax.b),
        ValueError,
        "second product",
    ),
    "both products of a gate": (
        one()(lambda ax, ah, s: ah.z(2 * s.h) + ah.z + ax.z),
        ValueError,
        r"ah\.z multiplies h at one",
    ),
    "a product of a number": (one()(lambda ax, ah, s: ah.z(1.0) + ax.z), ValueError, "ah of a number"),
    "ax of a vector": (one()(lambda ax, ah, s: ax.z(s.h)), TypeError, r"only ah\.gate can be called"),
    "an unused gate": (
        one("a b")(lambda ax, ah, s: ax.a),
        ValueError,
        "do not use the gate 'b': leave it out of `gates`",
    ),
    "an unused parameter": (
        one(parameters="u v")(lambda ax, ah, s, p: ax.z + p.u),
        ValueError,
        "the parameter 'v': leave it",
    ),
    "the order of gates": (
        one("n r")(lambda ax, ah, s: ax.n + ah.n(sigmoid(ax.r + ah.r) * s.h)),
        ValueError,
        "write gates='r n'",
    ),
    "a gate without ah before others": (one("n z")(lambda ax, ah, s: ax.n + ah.z), ValueError, "write gates='z n'"),
    "a rate": (
        one()(lambda ax, ah, s: dropout(ax.z, 1.5)),
        ValueError,
        r"dropout: rate should be .* \[0, 1\], got 1.5",
    ),
    "no rate": (one()(lambda ax, ah, s: zoneout(ax.z, s.h, None)), TypeError, "zoneout: rate should be a number"),
    "each": (one()(lambda ax, ah, s: dropout(ax.z, 0.5, "step")), ValueError, "each should be one of 'timestep', 'seq"),
    "limits in the wrong order": (one()(lambda ax, ah, s: clip(ax.z, 1, -1)), ValueError, "clip: expected low <= high"),
    "no limit": (one()(lambda ax, ah, s: clip_gradient(ax.z, 0)), ValueError, "clip_gradient: limit should be"),
    "no parts": (one()(lambda ax, ah, s: normalized_together()), TypeError, "expected symbols, got none"),
    "epsilon": (one()(lambda ax, ah, s: normalized(ax.z, -1)), ValueError, "epsilon should be"),
    "a cell called sigmoid": (
        one(name="sigmoid")(lambda ax, ah, s: ax.z),
        ValueError,
        "cannot be called 'sigmoid'.*name=",
    ),
    "a word of C++": (one(name="double")(lambda ax, ah, s: ax.z), ValueError, "cannot be called 'double'"),
    "a word of Python": (lambda: gpurnn.cell("lambda"), ValueError, "no words of Python, got 'lambda'"),
    "a name with a dot": (
        one("a.b")(lambda ax, ah, s: ax.z),
        ValueError,
        r"gates: expected names of letters .* got 'a\.b'",
    ),
    "a name with an underscore first": (
        one(states="_h")(lambda ax, ah, s: ax.z),
        ValueError,
        "states: .* begin with a letter",
    ),
    "a Greek gate": (one("\N{GREEK SMALL LETTER SIGMA}")(lambda ax, ah, s: ax.z), ValueError, r"letters \(a-z, A-Z\)"),
    "a gate twice": (one("a a")(lambda ax, ah, s: ax.a), ValueError, "gates: expected different names, got a a"),
    "no gates": (one("")(lambda ax, ah, s: s.h), ValueError, "gates: expected at least one name"),
    "no states": (one("z", "")(lambda ax, ah, s: s.h), ValueError, "states: expected at least one name"),
    "a number of gates": (
        one(4)(lambda ax, ah, s: s.h),
        TypeError,
        "gates: expected names in a string or a seq.* got int",
    ),
    "no parentheses": (
        lambda: gpurnn.cell(lstm_of_nothing),
        TypeError,
        r"put @gpurnn\.cell\(gates=\.\.\.\) before the",
    ),
    "no function": (lambda: gpurnn.cell("z")(3), TypeError, "expected a function of the equations, got int"),
    "two arguments": (
        one()(lambda ax, ah: ax.z),
        TypeError,
        r"expected a function of \(ax, ah, s, p\), .* got one of \(ax, ah\)",
    ),
    "five": (one()(lambda ax, ah, s, p, q: ax.z), TypeError, r"got one of \(ax, ah, s, p, q\)"),
    "a class": (lambda: gpurnn.cell("z")(Equations), TypeError, "got a class, a generator or a coroutine"),
    "a generator": (one()(lambda ax, ah, s: (yield ax.z)), TypeError, "got a class, a generator or a coroutine"),
    "a parameter of the layer": (
        one(parameters="bias_ih")(lambda ax, ah, s, p: ax.z),
        ValueError,
        "the layer has a bias_ih already",
    ),
    "a learned state": (
        one(parameters="initial_h")(lambda ax, ah, s, p: ax.z),
        ValueError,
        "a initial_h already|an initial_h",
    ),
    "a weight": (
        one(parameters="weight_hh", biases=False)(lambda ax, ah, s, p: ax.z),
        ValueError,
        "the layer has a weight_hh",
    ),
    "an initial value": (
        one(parameters={"u": "one"})(lambda ax, ah, s, p: ax.z),
        ValueError,
        "initial value of u should be one of 'zeros'",
    ),
    "an initial array": (
        one(parameters={"u": np.ones(5)})(lambda ax, ah, s, p: ax.z),
        TypeError,
        "initial value of u should be a number",
    ),
    "parameters of a number": (
        one(parameters=3)(lambda ax, ah, s, p: ax.z),
        TypeError,
        "parameters: expected names, or a dict",
    ),
    "a gate that remembers": (
        one(remembers="q")(lambda ax, ah, s: ax.z),
        ValueError,
        "remembers should be one of 'z', got 'q'",
    ),
    "biases": (one(biases="no")(lambda ax, ah, s: ax.z), TypeError, "biases should be True or False"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_the_words_of_the_user(mistake):
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        make()


def test_functions_of_torch():
    torch = optional("torch")
    for function in (lambda ax, ah, s: torch.tanh(ax.z), lambda ax, ah, s: torch.tanh(input=ax.z)):
        with pytest.raises(TypeError, match=r"^torch.tanh cannot take a symbol: .* the functions of gpurnn\.cells$"):
            gpurnn.cell("z")(function)


def test_an_array_of_no_axes_is_a_number():
    given, number = (
        gpurnn.cell("z")(lambda ax, ah, s, *, half=half: half * ax.z + s.h / half + half)
        for half in (np.array(0.5), 0.5)
    )
    assert given.source("numpy") == number.source("numpy")


def test_symbols_and_cells_show_what_they_are():
    shown = []

    def equations(ax, ah, s, p):
        z = tanh(ax.z + ah.z * 0.5)
        shown.extend([z, 1 - s.h * (p.u - 2), -p.gain.z, where(s.h > 0, exp(exp(exp(exp(exp(s.h))))), p.u)])
        shown[:] = map(repr, shown)
        return z * p.u * p.gain.z

    made = gpurnn.cell("z", parameters=["u", gpurnn.cells.Parameter("gain", ("z",), "ones")])(equations)
    assert shown == [
        "tanh(ax.z + (ah.z * 0.5))", "1 - (s.h * (p.u - 2))", "neg(p.gain.z)",
        "where_greater(s.h, 0, exp(exp(exp(exp(...)))), p.u)",
    ]  # fmt: skip
    assert repr(made) == "<cell equations: gates z, states h, parameters u gain>"
    assert repr(gpurnn.cells.cifg) == "<cell cifg: gates f g o, states h c>"


def test_a_symbol_from_another_trace_is_refused():
    memory = []

    def forgetful(ax, ah, s):
        memory.append(ax.z)
        return tanh(memory[0] + ah.z)

    gpurnn.cell("z")(forgetful)
    with pytest.raises(TypeError, match="a symbol of another trace: a symbol is of use only inside"):
        gpurnn.cell("z")(forgetful)


def test_layers_refuse_what_is_no_cell():
    with pytest.raises(TypeError, match=r"put @gpurnn\.cell\(gates=\.\.\.\) before it"):
        build(lstm_of_nothing)
    with pytest.raises(TypeError, match="cell: expected a cell made by gpurnn.cell"):
        build("lstm")
    with pytest.raises(ValueError, match="does not say which of its gates remembers"):
        build(rnn_tanh, chrono=10)
    with pytest.raises(ValueError, match="proj_size: the cell lstm has no form with a projection"):
        build(lstm, proj_size=2)


def test_cells_never_change():
    assert copy.deepcopy(lstm) is lstm and copy.deepcopy(build(lstm)).cell is lstm
    assert repr(lstm) == "<cell lstm: gates i f g o, states h c>"
    assert "Gers" in gpurnn.cells.peephole.__doc__
