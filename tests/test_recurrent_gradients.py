"""Gradients of the recurrent layers: finite differences, accumulation, several backward passes, the gradient flow."""

import numpy as np
import pytest
from recurrent_cases import BATCHES, KINDS, build, like, parts

import gpurnn
from gpurnn import DtypeError, ShapeError


def check_directional(layer, x, state, lengths, seed=0):
    """Analytic against central differences along one random direction through x, the state and every parameter."""
    rng = np.random.default_rng(seed)
    output, final, backward = layer.forward(x, state, lengths)
    doutput, dfinal = rng.standard_normal(output.shape), like(final, rng)
    layer.zero_grad()
    dx, dinitial = backward(doutput, dfinal)
    directions = [rng.standard_normal(x.shape), rng.standard_normal(layer.flat_params.shape)]
    state_directions = [rng.standard_normal(part.shape) for part in parts(state)]
    slope = (dx * directions[0]).sum() + (layer.flat_grads * directions[1]).sum()
    if state is not None:
        slope += sum((d * v).sum() for d, v in zip(parts(dinitial), state_directions, strict=True))

    def loss(step):
        layer.flat_params[...] = params + step * directions[1]
        moved = iter(p + step * v for p, v in zip(parts(state), state_directions, strict=True))
        output, final = layer(x + step * directions[0], rebuild(state, moved), lengths)
        return (output * doutput).sum() + sum((a * b).sum() for a, b in zip(parts(final), parts(dfinal), strict=True))

    def rebuild(state, arrays):
        if isinstance(state, tuple):
            return tuple(rebuild(part, arrays) for part in state)
        return None if state is None else next(arrays)

    params = layer.flat_params.copy()
    step = 1e-5
    # fourth-order central difference: truncation ~ step^4, round-off ~ 1e-16 / step
    numeric = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)
    layer.flat_params[...] = params
    scale = np.linalg.norm(dx) + np.linalg.norm(layer.flat_grads)
    assert abs(slope - numeric) < 1e-6 * max(abs(numeric), 1e-2 * scale), (slope, numeric)


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
    state = like(layer(x)[1], rng)
    lengths = rng.integers(0, T + 1, B) if ragged else None
    check_directional(layer, x, state, lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"hidden": [5, 7, 4]}, {"hidden": [6, 6], "bidirectional": True}])
def test_finite_differences_of_learned_states_and_unequal_layers(kind, sizes):
    rng = np.random.default_rng(5)
    sizes = dict(sizes)
    hidden = sizes.pop("hidden")
    layer = build(kind, hidden=hidden, num_layers=len(hidden), learn_state=True, **sizes)
    layer.flat_params += 0.2 * rng.standard_normal(layer.flat_params.shape)
    x = rng.standard_normal((5, 3, 4))
    check_directional(layer, x, None, [5, 0, 3])
    check_directional(layer, x, like(layer(x)[1], rng), None)


def test_a_broken_gradient_is_found(monkeypatch):
    """The check itself can fail: a wrong sign in one gate's gradient must not pass."""
    right = gpurnn.cells.LSTMStep.backward

    def wrong(self, xp, w, z, h, c, h_new, c_new, dh, dc, d, tmp, hook):
        right(self, xp, w, z, h, c, h_new, c_new, dh, dc, d, tmp, hook)
        d[: len(c)] *= -1

    monkeypatch.setattr(gpurnn.cells.LSTMStep, "backward", wrong)
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        check_directional(build("lstm", backend="numpy"), rng.standard_normal((3, 2, 4)), None, None)


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
    np.testing.assert_allclose(total, grads[0] + grads[1], atol=1e-13)


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
    dout, dfin = rng.standard_normal(output.shape), like(final, rng)
    both, _ = backward(dout, dfin)
    only_output, _ = layer.forward(x)[2](dout)
    only_state, _ = layer.forward(x)[2](dstate=dfin)
    nothing, _ = layer.forward(x)[2]()
    np.testing.assert_allclose(both, only_output + only_state, atol=1e-13)
    assert not nothing.any()


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


def test_gradient_flow_is_the_gradient_with_respect_to_h():
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
