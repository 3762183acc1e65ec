"""Steppers: sequences that are read one timestep at a time, with states of their own."""

import copy
import os
import pickle
import re
import threading

import numpy as np
import pytest
from helpers import cuda_ops, host

import gpurnn
from gpurnn import cells
from gpurnn.testing.nested import leaves

RNG = np.random.default_rng


def recurrent(kind, **options):
    return lambda **where: getattr(gpurnn, kind)(6, 10, seed=1, **options, **where)


def whole(**where):
    """A model of each kind of part, states in a nested Sequential, and dropout that an evaluation leaves out."""
    inner = gpurnn.Sequential(
        gpurnn.LSTM(6, 10, 2, dropout=0.4, learn_state=True, seed=2, **where), gpurnn.Dropout(0.5, **where)
    )
    return gpurnn.Sequential(
        gpurnn.Embedding(9, 6, seed=1, **where), inner, gpurnn.GRU(10, 7, seed=3, **where),
        gpurnn.Linear(7, 5, seed=4, **where), gpurnn.Linear(5, 3, bias=False, seed=5, **where),
    )  # fmt: skip


MODELS = {  # -> (makes one, whether it is one call of compiled code)
    "rnn": (recurrent("RNN"), True),
    "lstm": (recurrent("LSTM", num_layers=2), True),
    "gru": (recurrent("GRU", learn_state=True), True),
    "original": (recurrent("GRU", reset_after=False), True),
    "projection": (recurrent("LSTM", proj_size=4), True),
    "sizes": (lambda **where: gpurnn.LSTM(6, [10, 4], 2, learn_state=True, seed=1, **where), True),
    "heads": (recurrent("LSTM", heads=2), True),
    "heads apart": (recurrent("GRU", heads=2, mix_heads=False), False),
    "means": (recurrent("LSTM", layer_norm=True), True),
    "zoneout": (recurrent("LSTM", zoneout=0.3), True),
    "dropped": (recurrent("GRU", recurrent_dropout=0.3, weight_dropout=0.2), True),
    "residual": (recurrent("LSTM", num_layers=2, residual=True), False),
    "own cell": (lambda **where: gpurnn.Recurrent(cells.slstm, 6, 10, seed=1, **where), True),
    "whole": (whole, True),
}


def inputs(model, T, B, rng):
    if isinstance(model, gpurnn.Sequential) and isinstance(model[0], gpurnn.Embedding):
        return rng.integers(0, 9, (T, B))
    return rng.standard_normal((T, B, 6)).astype(model.dtype)


# Sums in another order; of 16 bits, which are then rounded to a neighbor and go through some layers more
CLOSE = {"float64": 1e-14, "float32": 1e-6, "float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7}


def assert_equal(stepper, model, x, state):
    """A step of a stepper and of the model; returns the model's state."""
    with model.evaluation():
        y, state = model.step(model.xp.asarray(x), state)
    close = CLOSE[model.dtype.name]
    assert_close(stepper.step(model.xp.asarray(x)), y, close)
    for one, other in zip(leaves(stepper.state), leaves(state), strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, close)
    return state


def assert_close(one, other, close):
    one, other = (host(array).astype(np.float64) for array in (one, other))
    np.testing.assert_allclose(one, other, atol=close, rtol=close)


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_stepper_is_the_models_step(kind, backend, dtype, B):
    """From the model's initial state, after a reset of a row, and from a state that was set."""
    make, compiled = MODELS[kind]
    model, rng = make(backend=backend, dtype=dtype), RNG(0)
    for name in model.params:
        if "initial" in name:
            model.params[name] = rng.standard_normal(model.params[name].shape)
    stepper = model.stepper(B)
    if backend == "cpu":
        assert stepper.compiled == compiled
    x, state = inputs(model, 6, B, rng), None
    for t in range(3):
        state = assert_equal(stepper, model, x[t], state)
    held = leaves(stepper.state)
    stepper.reset([B - 1])
    reset = np.arange(B) == B - 1
    with model.evaluation():
        y, state = model.step(x[3], state, reset=reset)
    assert_close(stepper.step(x[3]), y, max(CLOSE[dtype], 1e-6))
    state = assert_equal(stepper, model, x[4], state)
    stepper.state = state
    assert_equal(stepper, model, x[5], state)
    assert all(part is not other for part, other in zip(held, leaves(stepper.state), strict=True))


@pytest.mark.emulated
def test_on_an_emulated_gpu():
    model, rng = MODELS["lstm"][0](backend=cuda_ops()), RNG(0)
    stepper, state = model.stepper(3), None
    for x in inputs(model, 3, 3, rng):
        state = assert_equal(stepper, model, x, state)
    stepper.reset()
    assert not any(host(part).any() for part in leaves(stepper.state))


def test_rows_join_and_leave():
    model = MODELS["gru"][0](backend="cpu")
    model.params["initial_h_l0"] = np.arange(10.0)
    stepper, x = model.stepper(3), RNG(0).standard_normal((4, 3, 6)).astype("float32")
    first = stepper.step(x[0])
    with pytest.raises(ValueError, match="join: none of the 3 rows is free"):
        stepper.join()
    stepper.leave(2)
    stepper.leave(0)
    assert stepper.free == [0, 2]
    with pytest.raises(ValueError, match="leave: row 0 is free already"):
        stepper.leave(0)
    kept = stepper.state[0, 1]
    assert stepper.join() == 0 and stepper.free == [2]
    np.testing.assert_array_equal(stepper.state[0, 1], kept)
    np.testing.assert_array_equal(stepper.state[0, 0], np.arange(10.0, dtype="float32"))
    np.testing.assert_array_equal(stepper.step(x[0])[0], first[0])


def test_changes_of_the_parameters_are_seen():
    """By an assignment, an optimizer, a new home; and by ``changed`` those through an array, of a copied parameter."""
    for kind in ("whole", "own cell", "means"):
        model, rng = MODELS[kind][0](backend="cpu"), RNG(0)
        stepper, other = model.stepper(2), MODELS[kind][0](backend="cpu")
        x = inputs(model, 5, 2, rng)
        state = assert_equal(stepper, model, x[0], None)
        model.load_state_dict({name: rng.standard_normal(p.shape) for name, p in other.params.items()})
        state = assert_equal(stepper, model, x[1], state)
        model.flat_grads[...] = 1
        gpurnn.Adam(model, lr=0.5).step()
        state = assert_equal(stepper, model, x[2], state)
        for name in model.params:
            model.params[name][...] *= 0.5
        model.changed()
        state = assert_equal(stepper, model, x[3], state)
        home = gpurnn.Sequential(model, gpurnn.Linear(3 if kind == "whole" else 10, 2, backend="cpu"))
        home.load_state_dict({name: rng.standard_normal(p.shape) for name, p in home.params.items()})
        assert_equal(stepper, model, x[4], state)


def test_what_is_wrong_is_refused_and_changes_no_state():
    model = MODELS["whole"][0](backend="cpu")
    stepper = model.stepper(2)
    stepper.step([3, 4])
    before = [part.copy() for part in leaves(stepper.state)]
    for x, error, match in (
        ([1, 9], ValueError, "ids: expected numbers from 0 to 8, got 9"),
        ([-1, 0], ValueError, "ids: expected numbers from 0 to 8, got -1"),
        ([1, 2, 3], gpurnn.ShapeError, r"x: expected one timestep of every sequence, \(2,\), got \(3,\)"),
        ([0.5, 1.0], gpurnn.DtypeError, "integers"),
        (np.array([2**64 - 1, 2], np.uint64), ValueError, "got 18446744073709551615"),
    ):
        with pytest.raises(error, match=match):
            stepper.step(np.array(x))
    floats = MODELS["lstm"][0](backend="cpu").stepper(2)
    with pytest.raises(gpurnn.DtypeError, match="x"):
        floats.step(np.zeros((2, 6)))
    with pytest.raises(gpurnn.ShapeError, match="x"):
        floats.step(np.zeros((2, 5), "float32"))
    with pytest.raises(gpurnn.ShapeError, match="state"):
        stepper.state = stepper.state[:1]
    for rows in ([2], [-1]):
        with pytest.raises(ValueError, match="rows"):
            stepper.reset(rows)
    with pytest.raises(TypeError, match=r"rows: expected several, such as \[1\], got"):
        stepper.reset(1)
    for one, other in zip(before, leaves(stepper.state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_models_that_have_no_stepper():
    class Own(gpurnn.Module):
        stateful = True

        def forward(self, x, state=None):
            return x, state, lambda d, ds=None: (d, ds)

    for model, error, match in (
        (gpurnn.LSTM(2, 3, bidirectional=True), ValueError, "stepper: a layer that runs backwards"),
        (gpurnn.Sequential(gpurnn.GRU(2, 3, reverse=True)), ValueError, "stepper: a layer that runs backwards"),
        (gpurnn.LSTM(2, 3, batch_norm=True), ValueError, "stepper: batch_norm"),
        (gpurnn.GRUCell(2, 3), TypeError, "stepper: a GRUCell is one timestep alone: give the layer, GRU"),
        (gpurnn.Sequential(gpurnn.GRU(2, 3), gpurnn.Pooling(3)), ValueError, "Pooling needs the whole sequence"),
        (gpurnn.Linear(2, 3), TypeError, "a Linear without a recurrent layer has no state"),
        (gpurnn.Sequential(Own()), TypeError, re.escape("Sequential.0: a Own has a state of its own kind")),
    ):
        with pytest.raises(error, match=match):
            model.stepper(2)
    with pytest.raises(ValueError, match="batch"):
        gpurnn.GRU(2, 3).stepper(0)


def test_threads_share_a_stepper():
    """Each step is whole: a counter of equal inputs comes to the same state in whatever order."""
    model = gpurnn.RNN(1, 1, backend="cpu", nonlinearity="relu", bias=False)
    model.load_state_dict({"weight_ih_l0": [[1]], "weight_hh_l0": [[1]]})
    stepper, one = model.stepper(1), np.ones((1, 1), "float32")
    threads = [threading.Thread(target=lambda: [stepper.step(one) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stepper.state.item() == 800


def test_a_class_that_computes_something_else_is_not_compiled():
    class Twice(gpurnn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Plus(gpurnn.Sequential):
        def __call__(self, x):
            return x + super().__call__(x)

    class Shifted(gpurnn.GRU):
        def __call__(self, x, state=None, **given):
            return super().__call__(x + 1, state, **given)

    where = {"backend": "cpu", "seed": 1}
    for part in (Twice(6, 6, **where), Plus(gpurnn.Linear(6, 6, **where)), Shifted(6, 6, **where)):
        model = gpurnn.Sequential(gpurnn.GRU(6, 6, **where), part)
        stepper, x = model.stepper(2), RNG(0).standard_normal((2, 6)).astype("float32")
        assert not stepper.compiled
        assert_equal(stepper, model, x, None)


def test_a_recurrent_layer_that_was_replaced_is_noticed():
    for other in (gpurnn.GRU(6, 4, bidirectional=True), gpurnn.GRU(6, 4, 2), gpurnn.GRU(6, 4), gpurnn.LSTM(6, 4)):
        model = gpurnn.Sequential({"rnn": gpurnn.GRU(6, 4), "head": gpurnn.Dropout(0.5)})
        stepper, x = model.stepper(3), np.ones((3, 6), "float32")
        stepper.step(x)
        model.add_layers({"head": gpurnn.Dropout(0.1)})
        stepper.step(x)
        model.add_layers({"rnn": other})
        for _ in range(2):
            with pytest.raises(RuntimeError, match="were replaced since: make another stepper"):
                stepper.step(x)


def test_copies_and_forks(monkeypatch):
    """A copy goes on alone. A child of a fork does not wait for what a thread of its parent was doing."""
    stepper, x = MODELS["lstm"][0](backend="cpu").stepper(2), RNG(0).standard_normal((2, 6)).astype("float32")
    stepper.step(x)
    stepper.leave(1)
    for other in (copy.deepcopy(stepper), pickle.loads(pickle.dumps(stepper))):
        assert other.free == [1] and repr(other) == repr(stepper) == "Stepper(LSTM, batch=2, compiled)"
        np.testing.assert_array_equal(other.state[0], stepper.state[0])
        expected = other.step(x)
    np.testing.assert_array_equal(stepper.step(x), expected)
    with stepper._lock:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        stepper.step(x)


def test_its_size_stays():
    stepper = gpurnn.GRU(2, 3, backend="cpu").stepper(2)
    with pytest.raises(AttributeError):
        stepper.batch = 5
    assert stepper.batch == 2 and stepper.step(np.ones((2, 2), "float32")).shape == (2, 3)


def test_a_step_in_the_middle_of_an_update(monkeypatch):
    """What a stepper reads of weights that are being written is not taken for what they are afterwards."""
    model, x = gpurnn.LSTM(4, 6, backend="cpu", seed=0), RNG(0).standard_normal((2, 4)).astype("float32")
    stepper, optimizer = model.stepper(2), gpurnn.SGD(model, lr=0.5)
    model.flat_grads[:] = 1.0
    update = optimizer._step

    def with_a_step_before(*arguments):  # as another thread may make one
        stepper.step(x)
        update(*arguments)

    monkeypatch.setattr(optimizer, "_step", with_a_step_before)
    optimizer.step()
    stepper.reset()
    np.testing.assert_array_equal(stepper.step(x), model.stepper(2).step(x))
