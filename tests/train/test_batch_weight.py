"""Means over batches of which not every target counts: as over one batch of all of them."""

import functools

import numpy as np
import pytest

import gpurnn
from gpurnn import Batch, SequenceBatches
from gpurnn.losses.mean import mean_weight
from gpurnn.train import evaluate, measure

WEIGHT = [1.0, 2.0, 0.0, 9.0]
SHARED = {"backend": "cpu", "seed": 1, "dtype": "float64"}
EPS = np.finfo(np.float64).eps
OPTIONS = {
    "ignore_index": {"ignore_index": -100},
    "weight": {"weight": WEIGHT},
    "both": {"weight": WEIGHT, "ignore_index": -100},
    "smoothing": {"weight": WEIGHT, "ignore_index": -100, "label_smoothing": 0.1},
}


def uneven(ignored):
    """Two batches (x, y) of 20 targets, of which 1 and 20 count."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 5, 4, 3)), rng.integers(0, 4, (2, 5, 4))
    if ignored:
        y[0] = -100
        y[0, 2, 1] = 3
    return list(zip(x, y, strict=True))


def joined(batches):
    """One batch of several, next to each other."""
    return [tuple(np.concatenate(parts, axis=1) for parts in zip(*batches, strict=True))]


@pytest.fixture
def model():
    return gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED), gpurnn.Linear(6, 4, **SHARED))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("as_batches", [False, True])
def test_means_are_over_what_counts(model, name, as_batches):
    options = OPTIONS[name]
    loss, batches = functools.partial(gpurnn.cross_entropy, **options), uneven("ignore_index" in options)
    whole = measure(model, loss, joined(batches), {"acc": gpurnn.accuracy})
    parts = [Batch(*pair) for pair in batches] if as_batches else batches
    found = measure(model, loss, parts, {"acc": gpurnn.accuracy})
    assert found == pytest.approx(whole, rel=100 * EPS)
    assert found["loss"] == evaluate(model, loss, parts)


@pytest.mark.parametrize("kind", [gpurnn.cross_entropy, gpurnn.mse, gpurnn.quantile_loss])
def test_masks_of_the_batches(model, kind):
    """Over targets that are classes or numbers, and next to batches without a mask."""
    loss = functools.partial(kind, quantiles=[0.1, 0.5, 0.6, 0.9]) if kind is gpurnn.quantile_loss else kind
    rng, batches = np.random.default_rng(3), uneven(False)
    if kind is not gpurnn.cross_entropy:
        shape = (5, 4, 4) if kind is gpurnn.mse else (5, 4)
        batches = [(x, rng.standard_normal(shape)) for x, _ in batches]
    mask = np.zeros((5, 4), bool)
    mask[2, 1] = True
    parts = [Batch(*batches[0], loss_options={"mask": mask}), Batch(*batches[1])]
    (one,) = joined(batches)
    whole = Batch(*one, loss_options={"mask": np.concatenate([mask, np.ones_like(mask)], axis=1)})
    assert evaluate(model, loss, parts) == pytest.approx(evaluate(model, loss, [whole]), rel=100 * EPS)


@pytest.mark.parametrize("name", OPTIONS)
def test_accumulated_batches_equal_one_large_batch(name):
    options = OPTIONS[name]
    loss, batches = functools.partial(gpurnn.cross_entropy, **options), uneven("ignore_index" in options)

    def trained(data, **more):
        model = gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED), gpurnn.Linear(6, 4, **SHARED))
        history = gpurnn.fit(model, loss, data, optimizer="sgd", lr=0.1, epochs=1, progress=False, **more)
        return model.flat_params, history

    (weights, history), (expected, other) = trained(batches, accumulate=2), trained(joined(batches))
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1000 * EPS)
    assert history.epochs[0]["train_loss"] == pytest.approx(other.epochs[0]["train_loss"], rel=100 * EPS)


def test_sequences_with_lengths_or_one_target_each(model):
    rng = np.random.default_rng(5)
    x = [rng.standard_normal((n, 3)) for n in (5, 2, 4, 1, 3)]
    loss = functools.partial(gpurnn.cross_entropy, ignore_index=0)
    y = [rng.integers(0, 4, len(a)) for a in x]
    few, all_ = (SequenceBatches(x, y, size, shuffle=False) for size in (2, 5))
    assert evaluate(model, loss, few) == pytest.approx(evaluate(model, loss, all_), rel=100 * EPS)
    pooling = gpurnn.Pooling(6, "last", backend="cpu", dtype="float64")
    pooled = gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED), pooling, gpurnn.Linear(6, 4, **SHARED))
    few, all_ = (SequenceBatches(x, [0, 0, 1, 2, 3], size, per_step=False, shuffle=False) for size in (2, 5))
    assert evaluate(pooled, loss, few) == pytest.approx(evaluate(pooled, loss, all_), rel=100 * EPS)


def test_options_of_a_loss_of_the_callers_own(model):
    """They may mean anything: the weights of the batches are those of the batches."""

    def loss(outputs, targets, mask):
        return gpurnn.cross_entropy(outputs, targets)

    x, y = uneven(False)[0]
    batches = [Batch(x, y, loss_options={"mask": 0.5}), Batch(x[:, :1], y[:, :1], loss_options={"mask": "half"})]
    values = iter([1.0, 4.0])
    found = measure(model, loss, batches, {"m": lambda outputs, targets, mask: next(values)})
    assert found["m"] == pytest.approx((1.0 * 20 + 4.0 * 5) / 25)


def test_a_weight_that_is_given_is_taken(model):
    loss, batches = functools.partial(gpurnn.cross_entropy, ignore_index=-100), uneven(True)
    means = [evaluate(model, loss, [batch]) for batch in batches]
    found = evaluate(model, loss, [Batch(*batch, weight=w) for batch, w in zip(batches, (3, 1), strict=True)])
    assert found == pytest.approx((3 * means[0] + means[1]) / 4, rel=100 * EPS)


def test_weights_of_targets():
    y = np.array([[0, 1, 3], [3, -1, 1]])
    weighted = functools.partial(gpurnn.nll_loss, weight=WEIGHT, ignore_index=-1)
    assert mean_weight(weighted, y, {}) == 1 + 2 + 9 + 9 + 2
    assert mean_weight(weighted, y, {"lengths": [1, 2, 0]}) == 1 + 2
    assert mean_weight(functools.partial(weighted, batch_first=True), y, {"lengths": [1, 2]}) == 1 + 9
    assert mean_weight(gpurnn.cross_entropy, y, {"mask": y == 3}) == 2
    assert mean_weight(gpurnn.cross_entropy, np.ones((2, 3, 4)), {"mask": y == 3}) == 2  # probabilities
    assert mean_weight(gpurnn.mse, np.ones((2, 3, 4)), {"mask": y == 3}) == 2
    for loss in (gpurnn.cross_entropy, lambda outputs, targets: None, functools.partial(weighted, reduction="sum")):
        assert mean_weight(loss, y, {}) is None
