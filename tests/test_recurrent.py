"""The recurrent layers by themselves: ragged batches, streaming, wavefronts, dropout, memory."""

import tracemalloc

import numpy as np
import pytest
from optional import optional
from recurrent_cases import BATCHES, KINDS, build, like, parts

import gpurnn

torch = optional("torch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"reverse": True}, {"batch_first": True}])
def test_ragged_batch_equals_each_sequence_alone(kind, options):
    """Any order, zero lengths, NaN in the padding: every sequence as if it were alone, gradients included."""
    rng = np.random.default_rng(1)
    layer = build(kind, num_layers=2, **options)
    T, lengths = 9, [4, 9, 0, 1, 7, 9, 2, 3, 5, 0]
    B = len(lengths)
    x = rng.standard_normal((T, B, 4))
    state = like(layer(x.transpose(1, 0, 2) if layer.batch_first else x)[1], rng)
    alone = []
    for b, length in enumerate(lengths):
        one = tuple(s[:, b] for s in state) if isinstance(state, tuple) else state[:, b]
        alone.append(layer.forward(x[:length, b], one))
    wild = x.copy()
    for b, length in enumerate(lengths):
        wild[length:, b] = np.nan
    output, final, backward = layer.forward(wild.transpose(1, 0, 2) if layer.batch_first else wild, state, lengths)
    doutput, dfinal = rng.standard_normal(output.shape), like(final, rng)
    layer.zero_grad()
    dx, dstate = backward(doutput, dfinal)
    together = layer.flat_grads.copy()
    if layer.batch_first:
        output, doutput, dx = (a.transpose(1, 0, 2) for a in (output, doutput, dx))
    layer.zero_grad()
    for b, length in enumerate(lengths):
        out, fin, back = alone[b]
        np.testing.assert_allclose(output[:length, b], out, atol=1e-13)
        assert not output[length:, b].any()
        dfin = tuple(d[:, b] for d in dfinal) if isinstance(dfinal, tuple) else dfinal[:, b]
        dx_alone, dstate_alone = back(doutput[:length, b], dfin)
        np.testing.assert_allclose(dx[:length, b], dx_alone, atol=1e-12)
        assert not dx[length:, b].any()
        for whole, one in zip(parts(final) + parts(dstate), parts(fin) + parts(dstate_alone), strict=True):
            np.testing.assert_allclose(whole[:, b], one, atol=1e-12)
    np.testing.assert_allclose(together, layer.flat_grads, atol=1e-11)


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
        np.testing.assert_allclose(y, output[t], atol=1e-14)
    for a, b in zip(parts(state), parts(final), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
    single, _ = layer.step(x[0, 0])
    np.testing.assert_allclose(single, output[0, 0], atol=1e-14)


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
        dnew = like(new, rng)
        ours.zero_grad()
        theirs.zero_grad()
        dx, dold = backward(dnew)
        sum((a * torch.from_numpy(b)).sum() for a, b in zip(parts_t(tnew), parts(dnew), strict=True)).backward()
        for mine, t in zip(parts(new), parts_t(tnew), strict=True):
            np.testing.assert_allclose(mine, t.detach().numpy(), atol=1e-13)
        np.testing.assert_allclose(dx, tx.grad.numpy(), atol=1e-12)
        for mine, t in zip(parts(dold), tstate, strict=True):
            np.testing.assert_allclose(mine, t.grad.numpy(), atol=1e-12)
        for key, parameter in theirs.named_parameters():
            np.testing.assert_allclose(ours.grads[key], parameter.grad.numpy(), atol=1e-12)
        one = ours(x[0], tuple(s[0] for s in state) if pair else state[0][0])
        np.testing.assert_allclose(parts(one)[0], parts(new)[0][0], atol=1e-13)
    y, state = ours.step(x)
    np.testing.assert_array_equal(y, parts(state)[0])


def parts_t(state):
    return list(state) if isinstance(state, tuple) else [state]


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
        np.testing.assert_allclose(output[t], h, atol=1e-14)


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
        np.testing.assert_allclose(steps[0].c, expected, atol=1e-14)
    else:
        assert steps[0].c is None


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wavefront_changes_no_number(kind, reverse, ragged):
    """Segments that divide T or do not, that are one timestep long or longer than T; dropout, states in and out."""
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
        dx, dinitial = backward(rng.standard_normal(output.shape), like(final, rng))
        found[wavefront] = [output, *parts(final), dx, *parts(dinitial), layer.flat_grads.copy()]
    for wavefront, results in found.items():
        for one, other in zip(found[0], results, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-13, err_msg=f"wavefront={wavefront}")


def test_a_wavefront_where_it_cannot_be():
    with pytest.raises(ValueError, match="wavefront: with two directions"):
        build("lstm", num_layers=2, bidirectional=True, wavefront=4)
    with pytest.raises(ValueError, match="wavefront should be at least 0"):
        build("lstm", num_layers=2, wavefront=-1)
    layer, x = build("lstm", num_layers=2, wavefront=2), np.ones((5, 3, 4))
    assert len(layer(x, return_all=True)[2]) == 2  # all steps are wanted, so that all of time is one segment
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
    # the gradient in training mode, with the same mask for every evaluation
    layer.train()
    layer.calls = 0
    output, _, backward = layer.forward(x)
    dout, v = rng.standard_normal(output.shape), rng.standard_normal(x.shape)
    dx, _ = backward(dout)

    def loss(step):
        layer.calls = 0
        return (layer.forward(x + step * v)[0] * dout).sum()

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs((dx * v).sum() - numeric) < 1e-6 * abs(numeric)
    everything = build("gru", num_layers=2, dropout=1.0)
    output, _, backward = everything.forward(x)
    dx, _ = backward(output)
    assert np.isfinite(output).all() and not dx.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, B, hidden", [(1, 1, 4), (1, 8, 4), (3, 0, 4), (0, 2, 4), (4, 2, 33)])
def test_edges_of_shape(kind, T, B, hidden):
    layer = build(kind, inside=1, hidden=hidden, bidirectional=True)
    x = np.random.default_rng(0).standard_normal((T, B, 1))
    output, state, backward = layer.forward(x)
    P = 3 if kind == "lstm-projected" else hidden
    assert output.shape == (T, B, 2 * P) and parts(state)[0].shape == (2, B, P)
    dx, dstate = backward(output, state)
    assert dx.shape == x.shape and [s.shape for s in parts(dstate)] == [s.shape for s in parts(state)]
    if T == 0:
        assert not parts(state)[0].any()


def test_one_hidden_unit_and_all_lengths_zero():
    for kind in ("rnn-tanh", "lstm", "gru", "gru-original"):
        layer = build(kind, hidden=1, learn_state=True)
        layer.flat_params += 0.5
        x = np.full((3, 2, 4), np.nan)
        output, state, backward = layer.forward(x, None, [0, 0])
        assert not output.any()
        np.testing.assert_array_equal(parts(state)[0], np.full((1, 2, 1), 0.5))
        dx, _ = backward(np.ones_like(output), like(state, np.random.default_rng(0)))
        assert not dx.any() and np.isfinite(layer.flat_grads).all()
        assert layer.grads["initial_h_l0"].any()


def test_very_long_sequence():
    """More than 65,535 steps (cuDNN refuses them)."""
    gru = build("gru", hidden=2, dtype="float32")
    x = np.random.default_rng(0).standard_normal((70_000, 1, 4)).astype("float32")
    output, state, backward = gru.forward(x)
    np.testing.assert_array_equal(output[-1], state[0])
    tail, _ = gru(x[69_000:], None)
    np.testing.assert_allclose(tail[-1], output[-1], atol=1e-5)
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
