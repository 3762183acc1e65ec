"""Resets and masks: a batch is what its sequences are piece by piece, in every cell, direction and backend."""

import numpy as np
import pytest
from optional import given, optional
from piecewise import Piecewise, case, compare, flat, whole

import gpurnn
from gpurnn.backends import chunks
from gpurnn.testing import check_gradients, count_terms, draw_like, map_leaves, worst_error

st = optional("hypothesis.strategies")
torch = optional("torch")
MAKERS = {
    "rnn": lambda **more: gpurnn.RNN(3, 5, **more),
    "lstm": lambda **more: gpurnn.LSTM(3, 5, **more),
    "lstm projected": lambda **more: gpurnn.LSTM(3, 5, proj_size=2, **more),
    "gru": lambda **more: gpurnn.GRU(3, 5, **more),
    "gru original": lambda **more: gpurnn.GRU(3, 5, reset_after=False, **more),
    "layer norm": lambda **more: gpurnn.LSTM(3, 5, layer_norm=True, peephole=True, **more),
    "zoneout": lambda **more: gpurnn.GRU(3, 5, zoneout=0.3, activation="softsign", **more),
    "slstm": lambda **more: gpurnn.Recurrent(gpurnn.cells.slstm, 3, 5, **more),
}
STACKS = {
    "one": {},
    "reverse": {"reverse": True},
    "both": {"bidirectional": True},
    "two": {"num_layers": 2, "learn_state": True},
    "two, both": {"num_layers": 2, "bidirectional": True},
    "segments": {"num_layers": 2, "wavefront": 2},
}


def build(name, **more):
    layer = MAKERS[name](**{"dtype": "float64", "seed": 1} | more)
    layer.flat_params += (0.3 * np.random.default_rng(5).standard_normal(layer.flat_params.shape)).astype(layer.dtype)
    return layer.eval()


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", MAKERS)
def test_piece_by_piece(name, stack, backend):
    layer = build(name, backend=backend, **STACKS[stack])
    compare(layer, case(layer))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MAKERS)
def test_compiled_bits(name, dtype):
    """Compiled outputs and states have the bits that each piece has alone, but for a piece of one timestep: a loop of
    one reads its weights without packing them, and adds up in another order."""
    layer = build(name, backend="cpu", dtype=dtype, bidirectional=True)
    x, state, lengths, reset, mask, *rest = case(layer, T=12)
    reset[...], mask[...] = False, True
    reset[4, :2] = reset[8] = reset[5, 3] = True
    mask[[1, 10], ::2] = mask[2, 1::2] = mask[6] = mask[:, 4] = False
    got, expected = compare(layer, (x, state, [12, 8, 0, 12, 12], reset, mask, *rest))
    for one in got:
        if one.startswith(("output", "state")):
            np.testing.assert_array_equal(got[one], expected[one], one)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit(dtype):
    layer = build("lstm", backend="numpy", dtype=dtype, num_layers=2, bidirectional=True)
    x, state, lengths, reset, mask, *_ = case(layer)
    output, _ = layer(x, state, lengths, reset=reset, mask=mask)
    pieces = Piecewise(layer, x, state, lengths, reset, mask)
    for b, every in enumerate(pieces.pieces):
        for steps in every:
            alone, _ = layer(x[steps, b : b + 1], map_leaves(lambda part, b=b: part[:, b : b + 1], state))
            # products of other shapes add up in another order, and a state is rounded to 16 bits at every timestep
            allowed = 2 * len(x) * np.finfo("float16" if dtype == "float16" else "float32").eps
            allowed *= 2**16 if dtype == "bfloat16" else 1
            assert np.abs(output[steps, b].astype("f8") - alone[:, 0].astype("f8")).max(initial=0) <= allowed


@given(
    lambda: st.integers(0, 2**31), lambda: st.integers(1, 6), lambda: st.integers(1, 4),
    lambda: st.sampled_from(list(MAKERS)), lambda: st.sampled_from(list(STACKS)),
    lambda: st.sampled_from(["numpy", "cpu"]), lambda: st.tuples(st.floats(0, 1), st.floats(0, 1)),
    max_examples=500,
)  # fmt: skip
def test_patterns(seed, T, B, name, stack, backend, rates):
    layer, rng = build(name, backend=backend, **STACKS[stack]), np.random.default_rng(seed)
    x, state, _, _, _, doutput, dstate = case(layer, T=max(T, 3), B=5, seed=seed)
    reset, mask = (rng.random((T, B)) < rate for rate in rates)
    lengths = rng.integers(0, T + 1, B)
    short = [map_leaves(lambda part: part[:, :B], part) for part in (state, dstate)]
    compare(layer, (x[:T, :B], short[0], lengths, reset, mask, doutput[:T, :B], short[1]))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("more", [{}, {"masked_output": "repeat", "reset_to": "initial"}])
@pytest.mark.parametrize("stack", ["one", "two, both", "reverse"])
def test_finite_differences(stack, more, backend):
    layer = build("lstm", backend=backend, **{**STACKS[stack], "learn_state": True, **more})
    x, state, lengths, reset, mask, *_ = case(layer)
    check_gradients(layer, x, state, lengths=lengths, reset=reset, mask=mask)
    check_gradients(layer, x, None, reset=reset, mask=mask)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("name", MAKERS)
def test_nothing_unread_arrives(name, backend):
    """NaN where a timestep is left out, and in an initial state that a reset replaces, reaches nothing."""
    layer = build(name, backend=backend, bidirectional=True, reset_to="initial", learn_state=True)
    x, state, lengths, reset, mask, doutput, dstate = case(layer)
    there = mask & (np.arange(len(x))[:, None] < lengths)
    reset[0] = True  # the forward direction reads no initial state now
    D = len(layer._directions)
    expected = flat(whole(layer, x, state, lengths, reset, mask, doutput, dstate))
    x, doutput, state = x.copy(), doutput.copy(), map_leaves(np.copy, state)
    x[~there] = doutput[~there] = np.nan
    state = map_leaves(lambda part: np.where((np.arange(len(part)) % D == 0)[:, None, None], np.nan, part), state)
    got = flat(whole(layer, x, state, lengths, reset, mask, doutput, dstate))
    for one, value in expected.items():
        if one.startswith("state"):  # of sequences of length 0 it is the initial state as it came
            value, got[one] = value[:, np.array(lengths) > 0], got[one][:, np.array(lengths) > 0]
        np.testing.assert_array_equal(got[one], value, one)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize(
    "more", [{}, {"masked_output": "repeat"}, {"bidirectional": True}, {"memory": "sqrt"}, {"heads": 5}], ids=str
)
def test_nothing_unread_arrives_in_a_stack(more, backend, monkeypatch):
    """NaN at masked timesteps, and as the state of a sequence that is masked whole, changes no gradient."""
    monkeypatch.setattr(chunks, "ROWS", 6)
    layer = build("gru", backend=backend, num_layers=2, **more)
    x, state, _, _, mask, doutput, dstate = case(layer, T=12)
    assert not mask[:, 0].any()
    expected = flat(whole(layer, x, state, None, None, mask, doutput, dstate))
    x, state = x.copy(), state.copy()
    x[~mask], state[:, 0] = np.nan, np.nan
    if layer.masked_output == "zero":
        doutput = np.where(mask[..., None], doutput, np.nan)
    got = flat(whole(layer, x, state, None, None, mask, doutput, dstate))
    for one, value in expected.items():
        if one.startswith(("state", "output")):  # of the sequence without a timestep both are the state as it came
            value, got[one] = value[:, 1:], got[one][:, 1:]
        np.testing.assert_array_equal(got[one], value, one)


@pytest.mark.parametrize("more", [{}, {"memory": "sqrt"}])
def test_a_state_may_be_written_to_before_backward(more, monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 6)
    layer = build("lstm", backend="cpu", **more)
    x, state, _, reset, mask, doutput, dstate = case(layer)
    marks = {} if more else {"reset": reset}
    expected = flat(whole(layer, x, state, None, marks.get("reset"), None, doutput, dstate))
    _, final, backward = layer.forward(x, state, **marks)
    for part, one in zip(state, final, strict=True):
        part[...] = one
    layer.zero_grad()
    dx, _ = backward(doutput, dstate)
    np.testing.assert_array_equal(dx, expected["dx 0"])
    for name, gradient in layer.grads.items():
        np.testing.assert_array_equal(gradient, expected[f"d {name} 0"], name)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_repeat(backend):
    """The output of a timestep that is left out is h, and gradients pass through it."""
    layer = build("lstm", backend=backend, masked_output="repeat")
    x, state, _, reset, mask, *_ = case(layer)
    output, (h, _) = layer(x, state, reset=reset, mask=mask)
    before = state[0][0]
    for t in range(len(x)):
        before = np.where(reset[t][:, None], state[0][0], before)
        np.testing.assert_array_equal(output[t][~mask[t]], before[~mask[t]])
        before = output[t]
    np.testing.assert_array_equal(before, h[0])
    lengths = [5, 8, 0, 3, 8]
    past = np.arange(len(x))[:, None] >= lengths
    for more in ({}, {"mask": mask}, {"reset": reset}):  # past the end of a sequence there is no output to repeat
        assert not layer(x, state, lengths, **more)[0][past].any()


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("name", MAKERS)
def test_streaming(name, backend):
    """Calls one after another, and single timesteps, are what one call is, where resets give the layer's own state."""
    layer = build(name, backend=backend, num_layers=2, learn_state=True, reset_to="initial")
    x, state, _, reset, mask, *_ = case(layer)
    output, final = layer(x, state, reset=reset, mask=mask)
    parts, here = [], state
    for part in (slice(0, 3), slice(3, 4), slice(4, None)):
        y, here = layer(x[part], here, reset=reset[part], mask=mask[part])
        parts.append(y)
    steps, now = [], state
    for t in range(len(x)):
        y, now = layer.step(x[t], now, reset=reset[t], mask=mask[t])
        steps.append(y)
    expected = flat({"output": output, "state": final})
    terms = count_terms(layer, len(x))
    for got in ({"output": np.concatenate(parts), "state": here}, {"output": np.stack(steps), "state": now}):
        share, detail = worst_error(flat(got), None, expected, "float64", terms)
        assert share <= 1, detail


@pytest.mark.parametrize("make", [gpurnn.RNNCell, gpurnn.LSTMCell, gpurnn.GRUCell])
def test_single_steps(make):
    cell = make(3, 5, dtype="float64", backend="numpy", learn_state=True, seed=2)
    cell.flat_params += np.random.default_rng(0).standard_normal(cell.flat_params.shape)
    rng = np.random.default_rng(1)
    x, state = rng.standard_normal((4, 3)), draw_like(cell(np.zeros((4, 3))), rng)
    reset, mask = np.array([True, False, True, False]), np.array([True, True, False, False])
    new, fresh, plain = cell(x, state, reset=reset, mask=mask), cell(x), cell(x, state)
    own = cell(x, mask=np.zeros(4, bool))
    rows = zip(*(map(np.asarray, map_leaves(np.asarray, part) if isinstance(part, tuple) else (part,))
                 for part in (new, fresh, plain, own, state)), strict=True)  # fmt: skip
    for got, a, b, c, d in rows:
        np.testing.assert_array_equal(got, np.stack([a[0], b[1], c[2], d[3]]))
    check_gradients(cell, x, state, reset=reset, mask=mask)


def test_axes():
    layer = build("gru", backend="cpu", batch_first=True)
    plain = build("gru", backend="cpu")
    x, state, lengths, reset, mask, *_ = case(plain)
    expected, _ = plain(x, state, lengths, reset=reset, mask=mask)
    got, _ = layer(x.transpose(1, 0, 2).copy(), state, lengths, reset=reset.T, mask=mask.T)
    np.testing.assert_array_equal(got.transpose(1, 0, 2), expected)
    one, _ = plain(x[:, 1], state[:, 1], reset=reset[:, 1], mask=mask[:, 1])
    np.testing.assert_array_equal(one, expected[:, 1])
    one, _ = layer.step(x[0], state, reset=reset[0], mask=mask[0])
    np.testing.assert_array_equal(one, plain.step(x[0], state, reset=reset[0], mask=mask[0])[0])


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_all_steps_and_retained(backend):
    layer = build("lstm", backend=backend, bidirectional=True)
    x, state, lengths, reset, mask, doutput, dstate = case(layer)
    *_, backward, steps = layer.forward(x, state, lengths, reset=reset, mask=mask, return_all=True, retain=True)
    there = mask & (np.arange(len(x))[:, None] < lengths)
    output, _ = layer(x, state, lengths, reset=reset, mask=mask)
    for d, one in enumerate(steps):
        np.testing.assert_array_equal(one.h, output[:, :, d * 5 : (d + 1) * 5])
        assert not one.c[~there].any() and not one.gates["i"][~there].any() and one.c[there].all()
    first = [part.copy() for part in (backward(doutput, dstate)[0], layer.flat_grads)]
    layer.zero_grad()
    for a, b in zip(first, (backward(doutput, dstate)[0], layer.flat_grads), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_marked_changes_nothing():
    for backend in ("numpy", "cpu"):
        layer = build("lstm", backend=backend, bidirectional=True)
        x, state, lengths, reset, mask, *rest = case(layer)
        plain = flat(whole(layer, x, state, lengths, None, None, *rest))
        marked = flat(whole(layer, x, state, lengths, np.zeros_like(reset), np.ones_like(mask), *rest))
        for one, value in plain.items():
            np.testing.assert_array_equal(marked[one], value, one)


def test_torch_one_by_one():
    """A row with resets is torch's LSTM on each piece."""
    layer = build("lstm", backend="cpu", bidirectional=True)
    x, state, _, reset, mask, *_ = case(layer)
    mask[:, 0] = True
    reference = torch.nn.LSTM(3, 5, bidirectional=True, dtype=torch.float64)
    reference.load_state_dict({name: torch.tensor(value) for name, value in layer.params.items()})
    output, _ = layer(x, reset=reset, mask=mask)
    for b, pieces in enumerate(Piecewise(layer, x, state, None, reset, mask).pieces):
        for steps in pieces:
            if len(steps):
                with torch.no_grad():
                    expected = reference(torch.tensor(x[steps, b]))[0].numpy()
                allowed = count_terms(layer, len(x)) * np.finfo("f8").eps
                assert np.abs(output[steps, b] - expected).max() <= allowed


@pytest.mark.parametrize(
    "message, more, call",
    [
        ("reset: batch_norm has statistics", {"batch_norm": True}, {"reset": np.zeros((8, 5), bool)}),
        (r"mask: expected booleans, got int64: mask = mask.astype\(bool\)", {}, {"mask": np.ones((8, 5), int)}),
        (r"reset: expected one boolean for each timestep, \(T, B\) = \(8, 5\), got \(5, 8\)", {},
         {"reset": np.zeros((5, 8), bool)}),
    ],
)  # fmt: skip
def test_refusals(message, more, call):
    layer = gpurnn.LSTM(3, 5, backend="numpy", **more)
    with pytest.raises((ValueError, gpurnn.DtypeError, gpurnn.ShapeError), match=message):
        layer.forward(np.zeros((8, 5, 3), "f4"), **call)
    with pytest.raises(ValueError, match="masked_output: with residual"):
        gpurnn.LSTM(3, 3, num_layers=2, residual=True, masked_output="repeat", backend="numpy")


def test_shapes_of_a_single_step():
    message = r"reset: expected one boolean for each sequence, \(B,\) = \(5,\)"
    for layer in (gpurnn.GRU(3, 5, backend="cpu"), gpurnn.GRU(3, 5, batch_first=True, backend="cpu")):
        for wrong in (True, np.ones((5, 3), bool), np.ones((1, 5), bool)):
            with pytest.raises(gpurnn.ShapeError, match=message):
                layer.step(np.zeros((5, 3), "f4"), reset=wrong)
    with pytest.raises(gpurnn.ShapeError, match="mask: expected one boolean for the sequence, got shape"):
        gpurnn.GRUCell(3, 5, backend="cpu")(np.zeros(3, "f4"), mask=np.ones(1, bool))


def test_masked_batch_norm():
    """Timesteps that are left out have no part in the statistics of the batch."""
    layer = gpurnn.GRU(3, 5, batch_norm=True, backend="numpy", dtype="float64", seed=1)
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((6, 7, 3)), rng.random((6, 7)) < 0.7
    mask[:, :3], mask[:, 3] = True, False  # at least three are there; one never is
    here = [b for b in range(7) if b != 3]
    output, _, backward = layer.forward(x, mask=mask)
    kept, layer.calls = {name: value.copy() for name, value in layer.buffers.items()}, 0
    check_gradients(layer, x, mask=mask)
    alone = gpurnn.GRU(3, 5, batch_norm=True, backend="numpy", dtype="float64", seed=1)
    expected, _, _ = alone.forward(x[:, here], mask=mask[:, here])
    allowed = count_terms(layer, 6) * np.finfo("f8").eps
    assert np.abs(output[:, here] - expected).max() <= allowed
    for name, value in kept.items():
        assert np.abs(value - alone.buffers[name]).max() <= allowed
    backward(np.ones_like(output))
