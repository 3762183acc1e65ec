"""The recurrent layers by themselves: finite differences, ragged batches, streaming, options, errors, memory."""

import inspect
import tracemalloc

import numpy as np
import pytest
from helpers import BACKENDS, assert_close, backend_of, host
from optional import optional

import gpurnn
from gpurnn import BackendError, DtypeError, ShapeError
from gpurnn.testing import check_gradients, check_ragged, count_terms, draw_like, leaves, map_leaves

torch = optional("torch")

KINDS = {
    "rnn-tanh": (gpurnn.RNN, {}),
    "rnn-relu": (gpurnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (gpurnn.LSTM, {}),
    "lstm-projected": (gpurnn.LSTM, {"proj_size": 3}),
    "gru": (gpurnn.GRU, {}),
    "gru-original": (gpurnn.GRU, {"reset_after": False}),
}
BATCHES = (1, 3, 8, 11)  # below and above the batch size at which NumPy changes the memory order


def build(kind, inside=4, hidden=5, dtype="float64", seed=3, backend="cpu", **options):
    layer_class, own = KINDS[kind]
    return layer_class(inside, hidden, backend=backend, dtype=dtype, seed=seed, **own, **options)


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("direction", [{}, {"bidirectional": True}, {"reverse": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind, direction, ragged, B):
    rng = np.random.default_rng(B)
    # the two time loops on a CPU: array code and compiled code
    layer = build(kind, num_layers=2, init="xavier", backend="cpu" if B in (1, 11) else "numpy", **direction)
    layer.flat_params += 0.1 * rng.standard_normal(layer.flat_params.shape)
    T = 6
    x = rng.standard_normal((T, B, 4))
    state = draw_like(layer(x)[1], rng)
    lengths = rng.integers(0, T + 1, B) if ragged else None
    check_gradients(layer, x, state, lengths=lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"hidden": [5, 7, 4]}, {"hidden": [6, 6], "bidirectional": True}])
def test_finite_differences_of_learned_states_and_unequal_layers(kind, sizes):
    rng = np.random.default_rng(5)
    sizes = dict(sizes)
    hidden = sizes.pop("hidden")
    layer = build(kind, hidden=hidden, num_layers=len(hidden), learn_state=True, **sizes)
    layer.flat_params += 0.2 * rng.standard_normal(layer.flat_params.shape)
    x = rng.standard_normal((5, 3, 4))
    check_gradients(layer, x, lengths=[5, 0, 3])
    check_gradients(layer, x, draw_like(layer(x)[1], rng))


def test_a_broken_derivative_is_seen(monkeypatch):
    """The check itself can fail: a wrong sign in one gate's derivative must not pass."""
    right = gpurnn.cells.LSTMStep.backward

    def wrong(self, xp, w, old, new, dstate, scratch, hook):
        right(self, xp, w, old, new, dstate, scratch, hook)
        scratch.d[: len(old[1])] *= -1

    monkeypatch.setattr(gpurnn.cells.LSTMStep, "backward", wrong)
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="^weight_.h_l0: the derivative .* off by"):
        check_gradients(build("lstm", backend="numpy"), rng.standard_normal((3, 2, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_reads_the_parameters_of_now(kind, backend):
    """Written in place, or in another buffer since the layer moved into a model: what calls remember is no copy."""
    layer = build(kind, backend=backend_of(backend), dtype="float32")
    x = layer.xp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4)).astype("float32"))
    first = host(layer(x)[0])
    layer.flat_params *= 0.5
    second = host(layer(x)[0])
    gpurnn.Sequential(layer)
    np.testing.assert_array_equal(host(layer(x)[0]), second)
    layer.flat_params.fill(0)
    assert not np.array_equal(first, second) and not host(layer(x)[0]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cell_declares_fits_together(kind):
    """The weight gradients are made from these declarations: rows in blocks, and what the rows multiply."""
    cell = build(kind).cell
    blocks = cell.preactivations + cell.saved[len(cell.preactivations) :]  # what the backward pass leaves
    assert len(cell.hidden) == len(cell.inputs) == len(cell.gates) and len(blocks) == cell.saved_blocks
    assert cell.preactivations[: len(cell.gates)] == cell.hidden  # so that b_hh takes one sum over neighbors
    for product in cell.products:
        columns = cell.columns(product.rows, 10)
        assert tuple(blocks[columns.start // 10 : columns.stop // 10]) == product.rows
        assert product.reads == "h" or product.reads in blocks[len(cell.preactivations) :]
    assert cell.projects is None or cell.projects in blocks[len(cell.preactivations) :]
    assert all(blocks[cell.columns((name,), 1).start] == name for name in cell.inputs)
    assert set(cell.shown) <= set(cell.saved) and {cell.remembers, cell.writes} - {None} <= set(cell.gates)


@pytest.mark.parametrize(
    "kind, attribute, wrong",
    [("gru", "inputs", ("r", "z", "q")), ("gru-original", "products", (gpurnn.cells.Product(("r", "z", "n")),))],
)
def test_a_wrong_declaration_is_seen(kind, attribute, wrong):
    """Each form of the GRU with a declaration that is right for the other cells."""
    layer, x = build(kind, backend="cpu"), np.random.default_rng(0).standard_normal((3, 2, 4))
    setattr(layer.cell, attribute, wrong)
    with pytest.raises(AssertionError, match="the derivative .* off by"):
        check_gradients(layer, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"reverse": True}, {"batch_first": True}])
def test_ragged_batch_equals_each_sequence_alone(kind, options):
    """Any order, zero lengths, NaN in the padding: every sequence as if it were alone, gradients included."""
    rng = np.random.default_rng(1)
    layer = build(kind, num_layers=2, **options)
    T, lengths = 9, [4, 9, 0, 1, 7, 9, 2, 3, 5, 0]
    x = rng.standard_normal((len(lengths), T, 4) if layer.batch_first else (T, len(lengths), 4))
    check_ragged(layer, x, lengths, draw_like(layer(x)[1], rng))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_a_batch_axis_is_a_batch_of_one(kind):
    rng = np.random.default_rng(1)
    layer = build(kind, num_layers=2, bidirectional=True)
    x = rng.standard_normal((7, 1, 4))
    state = draw_like(layer(x)[1], rng)
    found = []
    for given in ((x, state), (x[:, 0], map_leaves(lambda part: part[:, 0], state))):
        layer.zero_grad()
        output, final, backward = layer.forward(*given)
        found.append([*leaves((output, final, backward(output, final))), layer.flat_grads.copy()])
    for one, other in zip(*found, strict=True):
        assert_close(other.reshape(one.shape), one, count_terms(layer, 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_stepping_equals_the_sequence(kind, batch_first):
    rng = np.random.default_rng(2)
    layer = build(kind, num_layers=2, batch_first=batch_first, learn_state=True)
    layer.flat_params += 0.1 * rng.standard_normal(layer.flat_params.shape)
    x = rng.standard_normal((7, 3, 4))
    output, final = layer(x.transpose(1, 0, 2) if batch_first else x)
    output = output.transpose(1, 0, 2) if batch_first else output
    state = None
    for t in range(7):
        y, state = layer.step(x[t], state)
        assert_close(y, output[t], count_terms(layer, 7))
    for a, b in zip(leaves(state), leaves(final), strict=True):
        assert_close(a, b, count_terms(layer, 7))
    single, _ = layer.step(x[0, 0])
    assert_close(single, output[0, 0], count_terms(layer, 1))


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"reverse": True}])
def test_stepping_into_the_future_is_refused(options):
    with pytest.raises(ValueError, match="backwards in time"):
        build("gru", **options).step(np.zeros((1, 4)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_single_step_cells_equal_torch(name, bias):
    rng = np.random.default_rng(3)
    ours = getattr(gpurnn, name)(4, 6, bias=bias, backend="cpu", dtype="float64", seed=1)
    theirs = getattr(torch.nn, name)(4, 6, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    pair = name == "LSTMCell"
    for B in (1, 5, 9):
        x = rng.standard_normal((B, 4))
        state = tuple(rng.standard_normal((B, 6)) for _ in range(1 + pair))
        tx, tstate = torch.from_numpy(x).requires_grad_(), [torch.from_numpy(s).requires_grad_() for s in state]
        new, backward = ours.forward(x, state if pair else state[0])
        tnew = theirs(tx, tuple(tstate) if pair else tstate[0])
        dnew = draw_like(new, rng)
        ours.zero_grad()
        theirs.zero_grad()
        dx, dold = backward(dnew)
        sum((a * torch.from_numpy(b)).sum() for a, b in zip(leaves(tnew), leaves(dnew), strict=True)).backward()
        for mine, t in zip(leaves(new), leaves(tnew), strict=True):
            assert_close(mine, t.detach().numpy(), count_terms(ours, 1))
        assert_close(dx, tx.grad.numpy(), count_terms(ours, 1))
        for mine, t in zip(leaves(dold), tstate, strict=True):
            assert_close(mine, t.grad.numpy(), count_terms(ours, 1))
        for key, parameter in theirs.named_parameters():
            assert_close(ours.grads[key], parameter.grad.numpy(), count_terms(ours, B))
        one = ours(x[0], tuple(s[0] for s in state) if pair else state[0][0])
        assert_close(leaves(one)[0], leaves(new)[0][0], count_terms(ours, 1))
    y, state = ours.step(x)
    np.testing.assert_array_equal(y, leaves(state)[0])


def test_original_gru_follows_its_equations():
    rng = np.random.default_rng(4)
    gru = build("gru-original")
    p = gru.params
    x, h = rng.standard_normal((6, 3, 4)), rng.standard_normal((3, 5))

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    output, _ = gru(x, h[None])
    for t in range(6):
        ax = x[t] @ p["weight_ih_l0"].T + p["bias_ih_l0"] + p["bias_hh_l0"]
        w = p["weight_hh_l0"]
        r, z = sigmoid(ax[:, :5] + h @ w[:5].T), sigmoid(ax[:, 5:10] + h @ w[5:10].T)
        n = np.tanh(ax[:, 10:] + (r * h) @ w[10:].T)
        h = (1 - z) * n + z * h
        assert_close(output[t], h, count_terms(gru, t + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_used_twice_accumulates(kind):
    rng = np.random.default_rng(6)
    layer = build(kind)
    xs = rng.standard_normal((2, 5, 3, 4))
    grads, calls = [], [layer.forward(x) for x in xs]
    douts = [rng.standard_normal(call[0].shape) for call in calls]
    for call, dout in reversed(list(zip(calls, douts, strict=True))):  # both forwards first, then both backwards
        call[2](dout)
    total = layer.flat_grads.copy()
    for x, dout in zip(xs, douts, strict=True):
        layer.zero_grad()
        layer.forward(x)[2](dout)
        grads.append(layer.flat_grads.copy())
    assert_close(total, grads[0] + grads[1], count_terms(layer, 5))


def test_backward_twice_is_refused_and_bad_gradients_leave_it_usable():
    layer = build("lstm")
    x = np.random.default_rng(0).standard_normal((5, 3, 4))
    output, _, backward = layer.forward(x)
    with pytest.raises(ShapeError, match="doutput"):
        backward(output[:2])
    with pytest.raises(DtypeError, match="doutput"):
        backward(output.astype("float32"))
    with pytest.raises(ShapeError, match="dstate"):
        backward(output, np.zeros((1, 3, 5)))
    assert not layer.flat_grads.any()
    backward(output)
    with pytest.raises(RuntimeError, match="ran already"):
        backward(output)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_output_or_only_the_state(kind):
    rng = np.random.default_rng(7)
    layer = build(kind, num_layers=2)
    x = rng.standard_normal((5, 3, 4))
    output, final, backward = layer.forward(x)
    dout, dfin = rng.standard_normal(output.shape), draw_like(final, rng)
    both, _ = backward(dout, dfin)
    only_output, _ = layer.forward(x)[2](dout)
    only_state, _ = layer.forward(x)[2](dstate=dfin)
    nothing, _ = layer.forward(x)[2]()
    assert_close(both, only_output + only_state, count_terms(layer, 5))
    assert not nothing.any()


@pytest.mark.parametrize("kind", KINDS)
def test_return_all(kind):
    rng = np.random.default_rng(8)
    layer = build(kind, num_layers=2, bidirectional=True)
    x, lengths = rng.standard_normal((6, 9, 4)), [6, 0, 3, 6, 1, 2, 5, 4, 6]
    output, final, backward, steps = layer.forward(x, None, lengths, return_all=True)
    dx, _ = backward(output)
    again = layer(x, None, lengths, return_all=True)[2]
    assert len(steps) == 4
    top = np.concatenate([steps[2].h, steps[3].h], axis=2)
    np.testing.assert_array_equal(top, output)
    names = {"lstm": "ifgo", "lstm-projected": "ifgom", "gru": "rzqn", "gru-original": "rznp"}.get(kind, "")
    for one, two in zip(steps, again, strict=True):
        assert "".join(one.gates) == names.replace("m", "")
        np.testing.assert_array_equal(one.h, two.h)  # backward must not have written into them
        for name in one.gates:
            np.testing.assert_array_equal(one.gates[name], two.gates[name])
            assert one.gates[name].shape == (6, 9, 5) and not one.gates[name][0, 1].any()
    if "lstm" in kind:
        g = steps[0].gates
        previous = np.concatenate([np.zeros((1, 9, 5)), steps[0].c[:-1]])
        inside = np.arange(6)[:, None] < np.array(lengths)
        expected = np.where(inside[:, :, None], g["f"] * previous + g["i"] * g["g"], 0)
        assert_close(steps[0].c, expected, count_terms(layer, 1))
    else:
        assert steps[0].c is None


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wavefront_changes_no_number(kind, reverse, ragged):
    """In stretches that divide T and that do not, one step long and longer than T; dropout, states in and out."""
    rng = np.random.default_rng(0)
    T, B = 11, 5
    x, lengths = rng.standard_normal((T, B, 4)), [0, 7, 3, 11, 9] if ragged else None
    found, state = {}, None
    for wavefront in (0, 1, 3, 10, 20):
        options = {"num_layers": 3, "dropout": 0.3, "reverse": reverse, "backend": "numpy"}
        layer = build(kind, **options, wavefront=wavefront)
        rng = np.random.default_rng(1)
        state = build(kind, **options)(x)[1] if state is None else state
        output, final, backward = layer.forward(x, state, lengths)
        dx, dinitial = backward(rng.standard_normal(output.shape), draw_like(final, rng))
        found[wavefront] = [output, *leaves(final), dx, *leaves(dinitial), layer.flat_grads.copy()]
    for wavefront, results in found.items():
        for one, other in zip(found[0], results, strict=True):
            assert_close(other, one, count_terms(layer, T), f"wavefront={wavefront}")


def test_a_wavefront_where_it_cannot_be():
    with pytest.raises(ValueError, match="wavefront: with two directions"):
        build("lstm", num_layers=2, bidirectional=True, wavefront=4)
    with pytest.raises(ValueError, match="wavefront should be at least 0"):
        build("lstm", num_layers=2, wavefront=-1)
    layer, x = build("lstm", num_layers=2, wavefront=2), np.ones((5, 3, 4))
    assert len(layer(x, return_all=True)[2]) == 2  # who wants to see all steps gets them: all of time at once
    with gpurnn.record_gradient_flow() as flow:
        output, _, backward = layer.forward(x)
        backward(output)
    assert flow["l1"].dh.shape == (5, 3)
    output, _, backward = layer.forward(x)
    with gpurnn.record_gradient_flow(), pytest.raises(RuntimeError, match="forward ran as a wavefront"):
        backward(output)
    assert "2 layers side by side, each 2 timesteps after" in layer.plan(5, 3).reason
    assert "side by side" not in layer.plan(2, 3).reason


def test_dropout_between_layers():
    rng = np.random.default_rng(9)
    layer = build("lstm", num_layers=2, dropout=0.5)
    x = rng.standard_normal((5, 9, 4))
    still = build("lstm", num_layers=2)
    assert np.array_equal(layer.flat_params, still.flat_params)
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert not np.array_equal(first, second)
    assert layer.calls == 2
    layer.calls = 0
    np.testing.assert_array_equal(layer.forward(x)[0], first)
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0], still(x)[0])
    np.testing.assert_array_equal(layer.forward(x)[0], still(x)[0])
    assert layer.calls == 1
    # training mode's derivative, with the same mask for every evaluation
    layer.train()
    layer.calls = 0
    check_gradients(layer, x)
    everything = build("gru", num_layers=2, dropout=1.0)
    output, _, backward = everything.forward(x)
    dx, _ = backward(output)
    assert np.isfinite(output).all() and not dx.any()


@pytest.mark.parametrize("B", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm-projected"])
def test_one_unit(kind, backend, B):
    """The gates of a unit lie 16 bytes apart then, where np.negative in place is wrong (NumPy 2.4)."""
    layer, exact = (build(kind, hidden=1, dtype=dtype, backend=backend) for dtype in ("float32", "float64"))
    exact.load_state_dict(layer.state_dict())
    x = np.random.default_rng(0).standard_normal((3, B, 4)).astype("float32")
    assert_close(layer(x)[0], exact(x.astype("float64"))[0], count_terms(layer, 3), dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, B, hidden", [(1, 1, 4), (1, 8, 4), (3, 0, 4), (0, 2, 4), (4, 2, 33)])
def test_edges_of_shape(kind, T, B, hidden):
    layer = build(kind, inside=1, hidden=hidden, bidirectional=True)
    x = np.random.default_rng(0).standard_normal((T, B, 1))
    output, state, backward = layer.forward(x)
    P = 3 if kind == "lstm-projected" else hidden
    assert output.shape == (T, B, 2 * P) and leaves(state)[0].shape == (2, B, P)
    dx, dstate = backward(output, state)
    assert dx.shape == x.shape and [s.shape for s in leaves(dstate)] == [s.shape for s in leaves(state)]
    if T == 0:
        assert not leaves(state)[0].any()


def test_one_hidden_unit_and_all_lengths_zero():
    for kind in ("rnn-tanh", "lstm", "gru", "gru-original"):
        layer = build(kind, hidden=1, learn_state=True)
        layer.flat_params += 0.5
        x = np.full((3, 2, 4), np.nan)
        output, state, backward = layer.forward(x, None, [0, 0])
        assert not output.any()
        np.testing.assert_array_equal(leaves(state)[0], np.full((1, 2, 1), 0.5))
        dx, _ = backward(np.ones_like(output), draw_like(state, np.random.default_rng(0)))
        assert not dx.any() and np.isfinite(layer.flat_grads).all()
        assert layer.grads["initial_h_l0"].any()


def test_very_long_sequence():
    """More than 65,535 steps (cuDNN refuses them)."""
    gru = build("gru", hidden=2, dtype="float32")
    x = np.random.default_rng(0).standard_normal((70_000, 1, 4)).astype("float32")
    output, state, backward = gru.forward(x)
    np.testing.assert_array_equal(output[-1], state[0])
    tail, _ = gru(x[69_000:], None)
    assert_close(tail[-1], output[-1], count_terms(gru, 1), dtype="float32")  # what came before the tail is forgotten
    dx, _ = backward(output)
    assert np.isfinite(dx).all()


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch on its own implementation
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_error_is_that_of_float32(kind, B):
    """Against float64: at most twice the error that torch's float32 makes on the same numbers, and one rounding."""
    rng = np.random.default_rng(B)
    exact = build(kind, inside=20, hidden=24, num_layers=2, bidirectional=True)
    single = build(kind, inside=20, hidden=24, num_layers=2, bidirectional=True, dtype="float32")
    single.load_state_dict(exact.state_dict())
    exact.load_state_dict(single.state_dict())  # both now hold the same float32 numbers
    x = rng.standard_normal((25, B, 20)).astype("float32")
    results = []
    for layer in (exact, single):
        output, state, backward = layer.forward(x.astype(layer.dtype))
        dout = np.random.default_rng(1).standard_normal(output.shape).astype("float32").astype(layer.dtype)
        dx, _ = backward(dout)
        results.append((output, dx, np.concatenate([grad.ravel() for grad in layer.grads.values()])))
    if kind == "gru-original":
        yardstick = [2e-6, 2e-6, 2e-6]  # torch has none: a few roundings of float32 (6e-8) over 25 steps of 24 terms
    else:
        options = {"lstm-projected": {"proj_size": 3}, "rnn-relu": {"nonlinearity": "relu"}}.get(kind, {})
        class_ = {"r": torch.nn.RNN, "l": torch.nn.LSTM, "g": torch.nn.GRU}[kind[0]]
        reference = class_(20, 24, 2, bidirectional=True, **options)
        reference.load_state_dict({k: torch.from_numpy(v) for k, v in single.state_dict().items()})
        tx = torch.from_numpy(x).requires_grad_()
        toutput, _ = reference(tx)
        toutput.backward(torch.from_numpy(dout))
        tgrads = np.concatenate([p.grad.numpy().ravel() for p in reference.parameters()])
        yardstick = [
            np.linalg.norm(t - e) / np.linalg.norm(e)
            for t, e in zip((toutput.detach().numpy(), tx.grad.numpy(), tgrads), results[0], strict=True)
        ]
    for exact_part, single_part, unit in zip(*results, yardstick, strict=True):
        error = np.linalg.norm(single_part - exact_part) / np.linalg.norm(exact_part)
        assert single_part.dtype == np.float32
        assert error <= 2 * unit + 2**-24


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_equal_bits(kind):
    x = np.random.default_rng(0).standard_normal((20, 9, 4)).astype("float32")
    results = []
    for _ in range(2):
        layer = build(kind, hidden=33, dtype="float32", num_layers=2, bidirectional=True, dropout=0.3)
        output, _, backward = layer.forward(x)
        dx, _ = backward(output)
        results.append((output, dx, layer.flat_grads))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


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
        assert_close(gate.T @ gate, np.eye(20), 50 + 20)  # terms of the product, and of the factorization
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
            kept = [2, 3] if held == "f" else [0, 2]
            np.testing.assert_array_equal(ih[kept], before[kept])
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_gradient_flow(kind, options):
    rng = np.random.default_rng(10)
    layer = build(kind, **options)
    x, lengths = rng.standard_normal((7, 3, 4)), [7, 2, 5]
    output, _, backward = layer.forward(x, None, lengths)
    with gpurnn.record_gradient_flow() as flow:
        backward(np.ones_like(output))
    names = ["l0"] if not options else ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert sorted(flow) == names
    for norms in flow.values():
        assert norms.dh.shape == (7, 3) and (norms.dh[:2] > 0).all() and not norms.dh[2:, 1].any()
        assert (norms.dc is not None) == ("lstm" in kind)


def test_gradient_flow_is_the_derivative_by_h():
    """||dL/dh_t|| against finite differences: h_t enters the rest of the sequence as its initial state."""
    rng = np.random.default_rng(11)
    layer = build("gru")
    x, weights = rng.standard_normal((6, 1, 4)), rng.standard_normal((6, 1, 5))
    output, _, backward = layer.forward(x)
    with gpurnn.record_gradient_flow() as flow:
        backward(weights)
    for t in range(6):
        gradient = weights[t, 0].copy()
        for unit in range(5):
            if t == 5:
                continue
            step = np.zeros((1, 1, 5))
            step[0, 0, unit] = 1e-6
            up = (layer(x[t + 1 :], output[None, t] + step)[0] * weights[t + 1 :]).sum()
            down = (layer(x[t + 1 :], output[None, t] - step)[0] * weights[t + 1 :]).sum()
            gradient[unit] += (up - down) / 2e-6
        assert abs(flow["l0"].dh[t, 0] - np.linalg.norm(gradient)) < 1e-7


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}])
def test_memory_of_a_training_step(options):
    """A training step allocates at most 1.3 times what its cache needs, and no more than its plan says."""
    T, B, H = 2000, 16, 256
    layer = gpurnn.LSTM(H, H, backend="cpu", seed=0, **options)
    plan = layer.plan(T, B)
    L = layer.num_layers
    assert plan.cache_bytes == 4 * L * (T * B * 4 * H + (T + 1) * B * 2 * H)  # gates i f g o; h and c with their start
    x, dout = np.zeros((T, B, H), "float32"), np.zeros((T, B, H), "float32")
    layer.forward(x[:2])[2](dout[:2])  # first-call effects outside the measurement
    tracemalloc.start()
    output, _, backward = layer.forward(x)
    backward(dout)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.3 * plan.cache_bytes
    assert peak <= plan.total_bytes


def test_copying_between_memory_orders():
    ops = build("lstm").ops
    rng = np.random.default_rng(0)
    for T, B, F in ((3, 17, 33), (1, 8, 1), (4, 40, 5), (2, 9, 300), (0, 8, 3), (3, 0, 4)):
        source = rng.standard_normal((T, B, F))
        steps = ops.empty_steps(T, B, F, source.dtype)
        ops.copy_steps(steps, source)
        np.testing.assert_array_equal(steps, source)
        back = np.empty_like(source)
        ops.copy_steps(back, steps)
        np.testing.assert_array_equal(back, source)


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
        (gpurnn.GRU(3, 4, reset_after=False, dtype="float64"), "GRU(3, 4, reset_after=False)"),
        (gpurnn.RNNCell(3, 4, False, "relu"), "RNNCell(3, 4, nonlinearity='relu', bias=False)"),
    ],
    ids=str,
)
def test_repr_shows_sizes_as_torch_does(layer, text):
    assert repr(layer).startswith(text[:-1] + "; ")  # then parameters, backend and dtype
