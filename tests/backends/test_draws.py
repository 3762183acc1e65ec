"""Random masks in training mode: every call draws its own, reproducibly, and a resumed run draws what it would have."""

import json

import numpy as np
import pytest
from helpers import BACKENDS, backend_of, host, values

import gpurnn

x = values((6, 5, 8))


def dropout(**options):
    return gpurnn.Dropout(0.5, seed=1, **options)


def variational(**options):
    return gpurnn.Dropout(0.5, variational=True, seed=1, **options)


def stack(cell=gpurnn.LSTM, **options):
    return cell(8, 8, num_layers=2, dropout=0.5, seed=1, **options)


def model(**options):
    return gpurnn.Sequential(dropout(**options), stack(**options), gpurnn.Linear(8, 8, seed=1, **options))


def nested(**options):
    return gpurnn.Sequential(gpurnn.Sequential(dropout(**options), gpurnn.Linear(8, 8, seed=1, **options)))


KINDS = {
    "Dropout": dropout, "variational": variational, "RNN": lambda **o: stack(gpurnn.RNN, **o), "LSTM": stack,
    "GRU": lambda **o: stack(gpurnn.GRU, **o), "wavefront": lambda **o: stack(wavefront=2, **o), "Sequential": model,
    "Sequential in another": nested,
}  # fmt: skip


def output(result):
    return host(result[0] if isinstance(result, tuple) else result)


def draws(layer, how):
    given = layer.xp.asarray(x)
    if how == "step":
        return output(layer.step(given[0]))
    return output(layer(given) if how == "call" else layer.forward(given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_call_draws_anew_and_reproducibly(backend, kind):
    options = {"backend": backend_of(backend)}
    hows = ["call", "forward", "call", "call", "forward"]
    if kind in ("RNN", "LSTM", "GRU", "Sequential"):
        hows += ["step", "step", "step"]
    layer = KINDS[kind](**options)
    found = [draws(layer, how) for how in hows]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert one.shape != other.shape or (one != other).any()
    again = KINDS[kind](**options)
    for n, how in enumerate(hows):
        if n == 3:  # a state that went through a file
            state = json.loads(json.dumps(again.random_state()))
            again = KINDS[kind](**options)
            again.load_random_state(state)
        np.testing.assert_array_equal(draws(again, how), found[n])


def test_masks_of_a_call_do_not_depend_on_how_it_was_called():
    for make in KINDS.values():
        np.testing.assert_array_equal(draws(make(), "call"), draws(make(), "forward"))


def test_monte_carlo_dropout_has_variance():
    layer = gpurnn.Sequential(dropout(), gpurnn.Linear(8, 1, seed=2))
    found = np.array([layer(x)[0, 0, 0] for _ in range(200)])
    weight, one = layer.params["1.weight"][0], x[0, 0]
    expected = np.sqrt(((weight * one) ** 2).sum())  # of a sum of independent terms, each there twice or not at all
    assert found.std() == pytest.approx(expected, rel=0.15)
    layer.eval()
    assert len({float(layer(x)[0, 0, 0]) for _ in range(5)}) == 1


def test_nothing_is_counted_where_nothing_is_drawn():
    for make in KINDS.values():
        layer = make().eval()
        layer(x), layer.forward(x)
        assert all(calls == 0 for _, _, calls in layer.random_state().values())
    layer = stack()
    for wrong in (x.astype("float64"), x[..., :3], x[0, 0]):
        with pytest.raises((gpurnn.ShapeError, gpurnn.DtypeError)):
            layer(wrong)
    assert layer.calls == 0


def test_a_call_that_fails_draws_nothing(monkeypatch):
    layer = stack()
    monkeypatch.setattr(layer.ops, "layer_forward", lambda *args, **options: 1 / 0)
    for call in (layer, layer.forward):
        with pytest.raises(ZeroDivisionError):
            call(x)
    assert layer.calls == 0


def test_step_of_a_cell_and_of_a_decoder():
    net = gpurnn.EncoderDecoder(9, 9, 8, layers=2, dropout=0.5, seed=1)
    source = np.full((4, 2), 5)
    memory, state = net.start(source)
    first, second = (net.next(np.full((1, 2), 6), memory, state)[0] for _ in range(2))
    assert (first != second).any()
    logits = [net((source, source)) for _ in range(2)] + [net.forward((source, source))[0]]
    assert (logits[0] != logits[1]).any() and (logits[1] != logits[2]).any()
    other = gpurnn.EncoderDecoder(9, 9, 8, layers=2, dropout=0.5, seed=1)
    memory, state = other.start(source)
    np.testing.assert_array_equal(other.next(np.full((1, 2), 6), memory, state)[0], first)
