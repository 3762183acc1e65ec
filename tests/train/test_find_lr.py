"""The learning-rate finder: it suggests a rate that trains, and leaves no trace."""

import numpy as np
import pytest
from helpers import TEXT_IDS, backend_of, host

import gpurnn
from gpurnn import TextBatches, TrainingError, fit
from gpurnn.train import find_lr

TEXT = TextBatches(TEXT_IDS, 8, 10)


def model_of(cell="GRU", dtype="float32", backend="cpu", seed=1):
    shared = {"backend": backend, "dtype": dtype, "seed": seed}
    rnn = getattr(gpurnn, cell)(8, 16, 2, dropout=0.2, **shared)
    return gpurnn.Sequential(gpurnn.Embedding(11, 8, **shared), rnn, gpurnn.BatchNorm(16, **shared),
                             gpurnn.Linear(16, 11, **shared))  # fmt: skip


def loss_at(rate, name, cell):
    try:
        options = {"optimizer": name, "lr": rate, "epochs": 2, "clip_norm": 1.0, "progress": False}
        return fit(model_of(cell), gpurnn.cross_entropy, TEXT, **options).epochs[-1]["train_loss"]
    except TrainingError:
        return np.inf


@pytest.mark.long
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_rate_is_better_than_far_from_it(name, cell):
    """Than a hundredth of it and a hundred times it."""
    curve = find_lr(model_of(cell), gpurnn.cross_entropy, TEXT, optimizer=name, clip_norm=1.0)
    here = loss_at(curve.lr, name, cell)
    assert here < loss_at(curve.lr / 100, name, cell) and here < loss_at(100 * curve.lr, name, cell)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_no_trace_is_left(dtype, backend):
    """A training after it has the bits of one without it: weights, moments, statistics, draws, modes, gradients."""
    weights = []
    for search in (False, True):
        model = model_of(dtype=dtype, backend=backend)
        adam = gpurnn.Adam(model, lr=1e-4)
        fit(model, gpurnn.cross_entropy, TEXT, optimizer=adam, epochs=1, progress=False)
        model[2].eval()
        if search:
            grads = model.flat_grads.copy()
            curve = find_lr(model, gpurnn.cross_entropy, TEXT, optimizer=adam, updates=20)
            again = find_lr(model, gpurnn.cross_entropy, TEXT, optimizer=adam, updates=20)
            assert curve == again and np.array_equal(model.flat_grads, grads)
            assert adam.lr == 1e-4 and adam.model is model and not model[2].training and model.training
        fit(model, gpurnn.cross_entropy, TEXT, optimizer=adam, epochs=1, progress=False)
        weights.append((model.flat_params.copy(), model.state_dict()))
    assert np.array_equal(weights[0][0], weights[1][0])
    assert all(np.array_equal(a, weights[1][1][name]) for name, a in weights[0][1].items())


def test_the_curve():
    curve = find_lr(model_of(), gpurnn.cross_entropy, TEXT, low=1e-4, high=1.0, updates=13)
    assert len(curve.rates) == len(curve.losses) <= 13
    np.testing.assert_allclose(curve.rates, np.geomspace(1e-4, 1, 13)[: len(curve.rates)], rtol=1e-12)
    assert 1e-4 <= curve.lr <= 1 and min(curve.losses) < curve.losses[0]
    one = [TEXT.batch(0, 0)]
    model = model_of()
    first = fit(model, gpurnn.cross_entropy, one, optimizer="sgd", lr=0.0, epochs=1, progress=False).epochs[0]
    found = find_lr(model_of(), gpurnn.cross_entropy, one, optimizer="sgd", high=1e3)
    assert found.losses[0] == pytest.approx(first["train_loss"], rel=1e-6)


def test_a_sweep_that_explodes_ends_before_its_last_rate():
    batch = np.ones((4, 2, 1), "float32"), np.ones((4, 2, 1), "float32")
    model = gpurnn.Linear(1, 1, backend="cpu", seed=1)
    with np.errstate(over="ignore"):
        curve = find_lr(model, gpurnn.mse, [batch], optimizer="sgd", low=1e-3, high=1e9, updates=60)
    assert len(curve.rates) < 60 and curve.lr < 1.0  # (2 x)^2 / lr: beyond 1/2 the square loss diverges


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"low": 0}, ValueError, "low should be"),
        ({"low": 1.0, "high": 0.5}, ValueError, "high should be"),
        ({"updates": 3}, ValueError, "updates should be at least 10"),
        ({"optimizer": "adamax"}, ValueError, "optimizer should be one of"),
        ({"batches": 3}, TypeError, "batches: expected a batch source"),
        ({"low": 1e3, "high": 1e6}, TrainingError, "the loss falls at no learning rate"),
    ],
)
def test_what_is_refused(options, error, words):
    arguments = {"batches": TEXT, **options}
    with pytest.raises(error, match=words), np.errstate(all="ignore"):
        find_lr(model_of(), gpurnn.cross_entropy, **arguments)


@pytest.mark.emulated
def test_on_a_gpu():
    """The copy lives on the same device; the model there stays as it is."""
    ops = backend_of("cuda")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 2)).astype("float32")
    batch = x, x.sum(axis=2, keepdims=True)
    rates = []
    for backend in (ops, "numpy"):
        shared = {"backend": backend, "seed": 1}
        model = gpurnn.Sequential(gpurnn.GRU(2, 4, **shared), gpurnn.Linear(4, 1, **shared))

        def square(outputs, targets, model=model):
            rest = outputs - model.xp.asarray(targets)
            return host((rest * rest).mean()), lambda factor=1.0: rest * np.float32(2 * factor / rest.size)

        before = host(model.flat_params).copy()
        rates.append(find_lr(model, square, [batch], optimizer="sgd", low=1e-3, updates=20).lr)
        assert np.array_equal(host(model.flat_params), before)
    assert rates[0] == rates[1] and 1e-3 < rates[0] < 10
