"""An optimizer of one's own, which has no compiled rule, trains on every backend."""

import numpy as np
import pytest
from helpers import backend_of, host

from gpurnn import SGD, Adam, AdamW, Linear
from gpurnn.optim import Optimizer

EMULATED = pytest.param("cuda", marks=pytest.mark.emulated)


class SignSGD(Optimizer):
    """``p -= lr * sign(g)``, in array code alone."""

    def __init__(self, model, lr=0.25, **options):
        super().__init__(model, lr, **options)

    def _check_hyper(self):
        return {}

    def _array_names(self, hyper):
        return []

    def _update(self, by, p, g, a, b):
        self.model.xp.sign(g, out=b)
        b *= by.lr
        p -= b


class NamedSignSGD(SignSGD):
    _kernel = "sign"  # a rule that no backend has


class SignAdam(Adam):
    """Takes Adam's state and an update of its own: Adam's compiled rule must not take its place."""

    def _update(self, by, p, g, a, b, exp_avg, exp_avg_sq):
        exp_avg += 1
        SignSGD._update(self, by, p, g, a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["numpy", "cpu", EMULATED])
@pytest.mark.parametrize("kind", [SignSGD, NamedSignSGD, SignAdam])
def test_an_optimizer_in_array_code_trains(kind, backend, dtype):
    model = Linear(3, 2, backend=backend_of(backend), dtype=dtype, seed=0)
    optimizer = kind(model, lr=0.25, groups=[{"match": "bias", "lr": 0.5}])
    before = model.state_dict()
    grads = {
        name: np.where(np.arange(array.size) % 2, -3.0, 7.0).reshape(array.shape) for name, array in before.items()
    }
    for name, value in grads.items():
        model.grads[name][...] = model.xp.asarray(value, dtype=dtype)
    for _ in range(2):
        optimizer.step()
    for name, rate in (("weight", 0.25), ("bias", 0.5)):
        expected = before[name]
        for _ in range(2):
            expected = expected - np.asarray(rate, dtype) * np.sign(grads[name]).astype(dtype)
        np.testing.assert_array_equal(host(model.params[name]), expected)
    for name, state in optimizer.state_dict()["arrays"].items():
        assert (state == (2 if name.startswith("exp_avg.") else 0)).all()
    assert optimizer.steps == 2


@pytest.mark.parametrize("backend", ["cpu", EMULATED])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_ours_are_compiled(kind, backend, monkeypatch):
    class Child(kind):
        """No update of its own."""

    model = Linear(3, 2, backend=backend_of(backend), seed=0)
    monkeypatch.setattr(Optimizer, "_array_code", lambda *_: pytest.fail("array code where there is a compiled rule"))
    for one in (kind, Child):
        one(model, lr=0.1).step()
