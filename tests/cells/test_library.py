"""The cells of the literature against their papers' equations, written down once more, a sequence and a step at a time.

Also gradients, lengths, directions, learned states, pieces, dtypes, and copies. ``BACKENDS`` and ``EVERYWHERE`` say
where; a cell is compiled for the CPU at its first use, which takes seconds, and the emulator is slow.
"""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_close, backend_of

import gpurnn
from gpurnn import testing
from gpurnn.cells import CELLS as WRITTEN
from gpurnn.cells import library

BACKENDS = ["numpy", pytest.param("cpu", marks=pytest.mark.slow)]
EVERYWHERE = [*BACKENDS, pytest.param("cuda", marks=[pytest.mark.slow, pytest.mark.emulated])]
CELLS = {
    **{name: value for name, value in vars(library).items() if isinstance(value, gpurnn.cells.TracedCell)},
    "elman": library.elman("softsign"),
    "cornn": library.cornn(0.3, 1.2, 0.7),
}
T, B, I, H = 6, 4, 3, 5
LENGTHS = [6, 0, 3, 1]


def layer_of(name, backend="numpy", dtype="float64", I=I, H=H, **options):
    return gpurnn.Recurrent(CELLS[name], I, H, backend=backend, dtype=dtype, **{"seed": 1} | options)


def states_of(name, layer, seed=0):
    """A state for each of the cell's, n of the sLSTM positive."""
    rng = np.random.default_rng(seed)
    shape = layer.num_layers * (2 if layer.bidirectional else 1), B, H
    states = [rng.standard_normal(shape) for _ in CELLS[name].states]
    if "n" in CELLS[name].states:
        states[CELLS[name].states.index("n")] = 0.5 + rng.random(shape)
    return states[0] if len(states) == 1 else tuple(states)


# ---- the equations of the papers: W[g] @ x and U[g] @ h with matrices of each gate, b of its two biases


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def peephole(W, U, b, p, x, h, c):
    i = sigmoid(W["i"] @ x + U["i"] @ h + b["i"] + p["p_i"] * c)
    f = sigmoid(W["f"] @ x + U["f"] @ h + b["f"] + p["p_f"] * c)
    new_c = f * c + i * np.tanh(W["g"] @ x + U["g"] @ h + b["g"])
    o = sigmoid(W["o"] @ x + U["o"] @ h + b["o"] + p["p_o"] * new_c)
    return o * np.tanh(new_c), new_c


def cifg(W, U, b, p, x, h, c):
    i = sigmoid(-(W["f"] @ x + U["f"] @ h + b["f"]))  # the paper's gate, of the other sign
    f = 1 - i
    new_c = f * c + i * np.tanh(W["g"] @ x + U["g"] @ h + b["g"])
    return sigmoid(W["o"] @ x + U["o"] @ h + b["o"]) * np.tanh(new_c), new_c


def mgu(W, U, b, p, x, h):
    f = sigmoid(W["f"] @ x + U["f"] @ h + b["f"])
    candidate = np.tanh(W["n"] @ x + U["n"] @ (f * h) + b["n"])
    return ((1 - f) * h + f * candidate,)


def ligru(W, U, b, p, x, h):
    z = sigmoid(W["z"] @ x + U["z"] @ h + b["z"])
    candidate = W["n"] @ x + U["n"] @ h + b["n"]
    return (z * h + (1 - z) * np.where(candidate > 0, candidate, 0),)


def indrnn(W, U, b, p, x, h):
    z = W["z"] @ x + p["u"] * h + b["z"]
    return (np.where(z > 0, z, 0),)


def ugrnn(W, U, b, p, x, h):
    g = sigmoid(W["g"] @ x + U["g"] @ h + b["g"])
    return (g * h + (1 - g) * np.tanh(W["n"] @ x + U["n"] @ h + b["n"]),)


def slstm(W, U, b, p, x, h, c, n, m, forget=sigmoid):
    """Without the stabilizer: c and n are the true ones; m is 0."""
    a = {gate: W[gate] @ x + U[gate] @ h + b[gate] for gate in "ifzo"}
    i, f = np.exp(a["i"]), forget(a["f"])
    c, n = f * c + i * np.tanh(a["z"]), f * n + i
    return sigmoid(a["o"]) * c / n, c, n, m


def slstm_exp(*arguments):
    return slstm(*arguments, forget=np.exp)


def mingru(W, U, b, p, x, h):
    z = sigmoid(W["z"] @ x + b["z"])
    return ((1 - z) * h + z * (W["n"] @ x + b["n"]),)


def minlstm(W, U, b, p, x, h):
    f, i = sigmoid(W["f"] @ x + b["f"]), sigmoid(W["i"] @ x + b["i"])
    return (f / (f + i) * h + i / (f + i) * (W["n"] @ x + b["n"]),)


def mut1(W, U, b, p, x, h):
    z = sigmoid(W["z"] @ x + b["z"])
    r = sigmoid(W["r"] @ x + U["r"] @ h + b["r"])
    new = np.tanh(U["n"] @ (r * h) + np.tanh(W["n"] @ x + p["bias_ih"]["n"]) + p["bias_hh"]["n"])
    return (new * z + h * (1 - z),)


def elman(W, U, b, p, x, h):
    a = W["z"] @ x + U["z"] @ h + b["z"]
    return (a / (1 + abs(a)),)


def cornn(W, U, b, p, x, y, z):
    force = np.tanh(W["y"] @ x + U["y"] @ y + U["z"] @ z + b["y"] + p["bias_hh"]["z"])
    new_z = z + 0.3 * (force - 1.2 * y - 0.7 * z)
    return y + 0.3 * new_z, new_z


def rows(array, gates):
    return dict(zip(gates, array.reshape(len(gates), -1, *array.shape[1:]), strict=True)) if len(gates) else {}


def by_hand(name, params, suffix, x, states):
    """The output (T, H) and the final states of one sequence in one direction."""
    cell, p = CELLS[name], {key.removesuffix(suffix): value for key, value in params.items() if key.endswith(suffix)}
    W, U = rows(p["weight_ih"], cell.gates), rows(p.get("weight_hh", np.zeros((0, H))), cell.hidden)
    if "bias_ih" in p:
        p["bias_ih"], p["bias_hh"] = rows(p["bias_ih"], cell.gates), rows(p["bias_hh"], cell.gates)
    else:
        p["bias_ih"] = p["bias_hh"] = dict.fromkeys(cell.gates, 0.0)
    b = {gate: p["bias_ih"][gate] + p["bias_hh"][gate] for gate in cell.gates}
    output = np.zeros((len(x), H))
    for t in range(len(x)):
        states = globals()[name](W, U, b, p, x[t], *states)
        output[t] = states[0]
    return output, states


def unscaled(name, states):
    """The sLSTM's c and n without the factor exp(-m), and no m."""
    if "m" not in CELLS[name].states:
        return states
    h, c, n, m = states
    return h, c * np.exp(m), n * np.exp(m), 0 * m


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CELLS)
def test_each_cell_computes_what_its_paper_says(name, bias, backend):
    """Both directions, lengths, a given state, one sequence and one timestep at a time."""
    layer = layer_of(name, backend, bidirectional=True, bias=bias)
    assert "weight_hh_l0" in layer.params or name in ("indrnn", "mingru", "minlstm")
    params = {key: layer.ops.to_numpy(value) for key, value in layer.params.items()}
    x = np.random.default_rng(2).standard_normal((T, B, I))
    given = states_of(name, layer)
    whole, final = layer(x, given, lengths=LENGTHS)
    given, final = (testing.leaves(part) for part in (given, final))
    output = np.zeros((T, B, 2 * H))
    states = [np.zeros((2, B, H)) for _ in given]
    for b, length in enumerate(LENGTHS):
        for d, suffix in enumerate(("_l0", "_l0_reverse")):
            order = slice(None, None, -1 if d else 1)
            start = unscaled(name, [part[d, b] for part in given])
            steps, end = by_hand(name, params, suffix, x[:length, b][order], start)
            output[:length, b, d * H : (d + 1) * H] = steps[order]
            for part, value in zip(states, end, strict=True):
                part[d, b] = value
    terms = testing.count_terms(layer, T)
    assert_close(whole, output, terms, name)
    for got, expected, state in zip(unscaled(name, final), states, CELLS[name].states, strict=True):
        assert_close(got, expected, terms, f"{name}: {state}")


def test_every_cell_of_the_library_is_checked_here_and_public():
    for name in CELLS:
        assert name in globals() and name in gpurnn.cells.__all__
        assert len(CELLS[name].__doc__ or library.__dict__[name].__doc__) > 50
        assert name not in WRITTEN
    assert len(CELLS) == 13


# ---- gradients, lengths, directions, states


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"reverse": True, "bias": False}, {"learn_state": True}],
    ids=["plain", "two layers, both directions", "reverse, no bias", "learned state"],
)
@pytest.mark.parametrize("name", CELLS)
def test_gradients(name, options, backend):
    layer = layer_of(name, backend_of(backend), **options)
    x, state = np.random.default_rng(3).standard_normal((T, B, I)), states_of(name, layer)
    if "learn_state" in options:
        state = None
        for key in layer.params:
            if key.startswith("initial"):  # not at 0, where n of the sLSTM has no derivative
                layer.params[key][...] = layer.xp.asarray(0.5 + np.random.default_rng(4).random(H))
    assert testing.check_gradients(layer, x, state, lengths=LENGTHS) <= 1
    assert testing.check_gradients(layer, x, state) <= 1


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", CELLS)
def test_ragged_batches_and_repetition(name, backend):
    layer = layer_of(name, backend_of(backend), bidirectional=True)
    x, state = np.random.default_rng(5).standard_normal((T, B, I)), states_of(name, layer)
    testing.check_ragged(layer, x, LENGTHS, state)
    testing.check_repeat(layer, x, state, lengths=LENGTHS)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CELLS)
def test_other_dtypes(name, dtype, backend):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    sample = layer_of(name)
    x, state = np.random.default_rng(6).standard_normal((T, B, I)), states_of(name, sample)
    testing.check_parity(
        lambda backend, dtype: layer_of(name, backend, dtype),
        x,
        state,
        backend=backend_of(backend),
        dtype=dtype,
        lengths=LENGTHS,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CELLS)
def test_steps_are_the_whole_call(name, dtype, backend):
    """One timestep at a time, and in two pieces: one rounding for each term of a sum in each step."""
    layer = layer_of(name, backend, dtype, num_layers=2)
    x = layer.xp.asarray(np.random.default_rng(7).standard_normal((T, B, I)).astype(dtype))
    output, final = layer(x)
    state, terms = None, testing.count_terms(layer, T)
    for t in range(T):
        y, state = layer.step(x[t], state)
        assert_close(y, output[t], terms, name, dtype)
    first, middle = layer(x[:2])
    second, end = layer(x[2:], middle)
    assert_close(np.concatenate([first, second]), output, terms, name, dtype)
    for reached in (state, end):
        for got, expected in zip(testing.leaves(reached), testing.leaves(final), strict=True):
            assert_close(got, expected, terms, name, dtype)


@pytest.mark.parametrize("name", ["slstm", "slstm_exp", "minlstm"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shift", [-300.0, -80.0, 80.0, 300.0])
def test_exponential_gates_neither_overflow_nor_vanish(name, dtype, shift):
    """Input and forget gate far out: h is a mean of what was written, so finite and at most the largest of it."""
    layer = layer_of(name, dtype=dtype)
    for gate in CELLS[name].gates:
        k = CELLS[name].gates.index(gate)
        if gate in "if":
            layer.params["bias_ih_l0"][k * H : (k + 1) * H] += np.asarray(shift * (1 if gate == "i" else -1), dtype)
    x = np.random.default_rng(8).standard_normal((T, B, I)).astype(dtype)
    output, final, backward = layer.forward(x)
    for array in (output, *testing.leaves(final), *testing.leaves(backward(np.ones_like(output)))):
        assert np.isfinite(array).all()
    if name != "minlstm":  # o tanh(z) in the middle of the range
        assert (np.abs(output) < 1).all() and np.abs(output).max() > 0.1


# ---- as any other layer


@pytest.mark.parametrize("name", CELLS)
def test_copies_and_files_of_a_layer(name):
    layer = layer_of(name, num_layers=2)
    x = np.random.default_rng(9).standard_normal((T, B, I))
    expected, _ = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell == layer.cell and other.cell.source() == layer.cell.source()
        np.testing.assert_array_equal(other(x)[0], expected)
        other.flat_params[...] += 1
    np.testing.assert_array_equal(layer(x)[0], expected)
    fresh = layer_of(name, num_layers=2, seed=2)
    assert (fresh(x)[0] != expected).any()
    fresh.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(fresh(x)[0], expected)


@pytest.mark.parametrize("name", CELLS)
def test_in_a_model_with_other_layers(name):
    options = {"backend": "numpy", "dtype": "float64", "seed": 1}
    model = gpurnn.Sequential(
        layer_of(name), gpurnn.LayerNorm(H, **options), layer_of(name, I=H), gpurnn.Linear(H, 2, **options)
    )
    x = np.random.default_rng(10).standard_normal((T, B, I))
    assert testing.check_gradients(model, x, lengths=LENGTHS) <= 1


def test_parameters_begin_as_the_docstrings_say():
    assert (layer_of("indrnn").params["u_l0"] == 1).all()
    drawn = layer_of("peephole").params["p_i_l0"]
    assert len(set(drawn)) == H and (np.abs(drawn) <= H**-0.5).all()
    for name in ("peephole", "cifg", "ugrnn", "slstm", "minlstm", "ligru"):
        cell, layer = CELLS[name], layer_of(name, forget_bias=3.0)
        k = cell.gates.index(cell.remembers)
        assert (layer.params["bias_ih_l0"][k * H : (k + 1) * H] == 3).all()
    with pytest.raises(ValueError, match="the cell mgu does not say which of its gates remembers"):
        layer_of("mgu", forget_bias=1.0)


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.remembers])
def test_the_gate_that_remembers_does(name):
    """Wide open, and with the input gate closed where there is one, it leaves the state as it was."""
    cell, layer = CELLS[name], layer_of(name)
    layer.flat_params[...] = 0
    for gate, bias in ((cell.remembers, 0 if name == "slstm_exp" else 40), ("i", -40)):  # exp(0) is wide open
        if gate in cell.gates:
            k = cell.gates.index(gate)
            layer.params["bias_ih_l0"][k * H : (k + 1) * H] = bias
    given = [np.full((1, 1, H), 0.5 + k / 10) for k in range(len(cell.states))]
    _, final = layer(np.ones((1, 1, I)), tuple(given) if len(given) > 1 else given[0])
    place = min(1, len(given) - 1)  # c, or h where it is alone
    before, after = unscaled(name, given)[place], unscaled(name, testing.leaves(final))[place]
    np.testing.assert_allclose(after, before, rtol=1e-14)  # exp(-40) is 4e-18; exp(m) and exp(-m) round a few times


def test_arguments_of_the_makers():
    assert library.elman("relu") is library.elman("relu")
    assert library.elman("relu") != library.elman("tanh")
    assert library.cornn(0.1) != library.cornn(0.2)
    own = library.elman(my_activation)
    assert own.name == "elman_my_activation" and pickle.loads(pickle.dumps(own)) == own
    with pytest.raises(ValueError, match=r"activation should be one of 'tanh', .*, got 'tan'"):
        library.elman("tan")
    with pytest.raises(ValueError, match="dt should be"):
        library.cornn(-1)
    with pytest.raises(TypeError, match="gamma should be a number"):
        library.cornn(gamma="1")


def my_activation(x):
    return gpurnn.cells.tanh(x) + 0.1 * x


@pytest.mark.parametrize("name", gpurnn.cells.ACTIVATIONS)
def test_every_activation_of_an_elman_network(name):
    layer = gpurnn.Recurrent(library.elman(name), I, H, backend="numpy", dtype="float64", seed=3)
    assert testing.check_gradients(layer, np.random.default_rng(11).standard_normal((T, B, I)), lengths=LENGTHS) <= 1
