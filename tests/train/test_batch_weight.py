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


# ---- resets and masks


def sequences():
    """(inputs, targets of every timestep, a class of each) of nine sequences."""
    rng = np.random.default_rng(7)
    inputs = [rng.standard_normal((n, 3)) for n in (5, 1, 3, 9, 2, 2, 4, 1, 6)]
    return inputs, [rng.integers(0, 4, len(x)) for x in inputs], rng.integers(0, 4, len(inputs))


def sequence_model(per_step):
    layers = [gpurnn.GRU(3, 3, bidirectional=True, **SHARED), gpurnn.Pooling(6, "last", 2, **SHARED)]
    return gpurnn.Sequential(*layers[: 1 if per_step else 2], gpurnn.Linear(6, 4, **SHARED))


@pytest.mark.parametrize("per_step", [True, False])
def test_packed_batches_train_what_padded_ones_train(per_step):
    """The same weights, training loss, validation loss and metric."""
    inputs, steps, classes = sequences()

    def trained(packed):
        data = SequenceBatches(
            inputs, steps if per_step else classes, 4, per_step=per_step, bucket=False, packed=packed, seed=1
        )
        assert all((batch.mask is not None) == packed for batch in (data.batch(0, n) for n in range(3)))
        model, metrics = sequence_model(per_step), {"accuracy": gpurnn.accuracy}
        history = gpurnn.fit(
            model, gpurnn.cross_entropy, data, optimizer="sgd", lr=0.1, epochs=2, validation=data, metrics=metrics,
            progress=False, accumulate=2,
        )  # fmt: skip
        return model.flat_params, history.epochs[-1]

    (weights, record), (expected, other) = trained(True), trained(False)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1000 * EPS)
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        assert record[name] == pytest.approx(other[name], rel=1000 * EPS)


def test_weight_of_a_batch_with_a_mask():
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1]], bool)
    x = np.zeros((3, 3, 2))
    assert Batch(x, x, mask=mask).weight == 5 and Batch(x, x, mask=mask, lengths=[2, 3, 1]).weight == 4
    assert Batch(x, x, mask=mask).loss_options.keys() == {"mask"}
    assert Batch(x, x, reset=mask).weight == 9 and Batch(x, x, reset=mask).loss_options == {}


def test_a_mask_of_holes_trains_on_what_is_there():
    """NaN in data that are masked is no reason to stop, and counts in nothing."""
    rng = np.random.default_rng(3)
    mask = rng.random((6, 4)) < 0.6
    x, y = rng.standard_normal((6, 4, 3)), rng.standard_normal((6, 4, 2))
    x[~mask], y[~mask] = np.nan, np.nan
    model = gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED), gpurnn.Linear(6, 2, **SHARED))
    batch = Batch(x, y, mask=mask)
    output, _ = model(x, mask=mask)
    wanted = np.square(output - y)[mask].mean()
    assert evaluate(model, gpurnn.mse, [batch]) == pytest.approx(wanted, rel=100 * EPS)
    history = gpurnn.fit(model, gpurnn.mse, [batch], optimizer="sgd", lr=0.1, epochs=2, progress=False)
    assert history.epochs[0]["train_loss"] == pytest.approx(wanted, rel=100 * EPS)
    assert history.epochs[1]["train_loss"] < wanted
    x[mask.nonzero()[0][0], mask.nonzero()[1][0]] = np.nan
    with pytest.raises(gpurnn.TrainingError, match="data hold values that are not finite"):
        gpurnn.fit(model, gpurnn.mse, [batch], optimizer="sgd", lr=0.1, epochs=2, progress=False)
    x[mask] = 1.0
    model.flat_params[...] = np.nan
    with pytest.raises(gpurnn.TrainingError, match="It is the first step"):
        gpurnn.fit(model, gpurnn.mse, [batch], optimizer="sgd", lr=0.1, epochs=2, progress=False)
    plain = gpurnn.Sequential(gpurnn.Linear(3, 2, **SHARED))
    gpurnn.fit(plain, gpurnn.mse, [batch], optimizer="sgd", lr=0.1, epochs=1, progress=False)
    assert np.isfinite(plain.flat_params).all()


class Forgetful(gpurnn.Sequential):
    def forward(self, x, state=None, lengths=None):
        return super().forward(x, state, lengths)


@pytest.mark.parametrize("name", ["reset", "mask"])
def test_a_model_that_ignores_them_is_refused(name):
    model = Forgetful(gpurnn.GRU(3, 4, **SHARED))
    batch = Batch(np.zeros((5, 2, 3)), np.zeros((5, 2, 4)), **{name: np.ones((5, 2), bool)})
    for run in (
        lambda: evaluate(model, gpurnn.mse, [batch]),
        lambda: gpurnn.fit(model, gpurnn.mse, [batch], optimizer="sgd", lr=0.1, epochs=1, progress=False),
    ):
        with pytest.raises(TypeError, match=f"^{name}: model: Forgetful.forward does not take it"):
            run()
    if name == "reset":
        plain = gpurnn.Sequential(gpurnn.Linear(3, 4, **SHARED))
        with pytest.raises(TypeError, match="^reset: no layer here takes it"):
            evaluate(plain, gpurnn.mse, [batch])


def test_an_empty_sequence_is_not_packed():
    inputs = [np.ones((2, 3)), np.ones((0, 3))]
    with pytest.raises(gpurnn.ShapeError, match=r"^inputs\[1\]: a sequence without timesteps"):
        SequenceBatches(inputs, [0, 1], 2, per_step=False, packed=True)


@pytest.mark.parametrize("begins", [0, 3])
def test_documents_in_a_stream(begins):
    """Nothing that a document holds is known in the next one, and what is known within one crosses batches."""
    rng = np.random.default_rng(begins)
    ids = np.concatenate([np.r_[begins, rng.choice([1, 2, 4, 5], n)] for n in rng.integers(1, 12, 30)])
    text = gpurnn.TextBatches(ids, 1, 4, begins=begins)
    o = {"backend": "cpu", "dtype": "float64", "seed": 1}
    gru = gpurnn.GRU(3, 4, reset_to="initial", **o)
    model = gpurnn.Sequential(gpurnn.Embedding(6, 3, **o), gru, gpurnn.Linear(4, 6, **o))
    starts = np.flatnonzero(ids == begins)
    total = 0.0
    for start, end in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        logits, _ = model(ids[start:end])
        total += float(gpurnn.cross_entropy(logits, ids[start + 1 : end + 1], reduction="sum")[0])
    terms = gpurnn.testing.count_terms(model, len(ids))
    assert evaluate(model, gpurnn.cross_entropy, text) == pytest.approx(total / (len(ids) - 1), rel=terms * EPS)
    assert gpurnn.TextBatches(ids, 1, 4).batch(0, 0).reset is None
    with pytest.raises(ValueError, match="^begins "):
        gpurnn.TextBatches(ids, 1, 4, begins=-1)
    other = gpurnn.Sequential(gpurnn.Embedding(6, 3, **o), gpurnn.GRU(3, 4, **o), gpurnn.Linear(4, 6, **o))
    with pytest.raises(ValueError, match='^reset: 1 would be reset to the state that is carried.*reset_to="initial"'):
        evaluate(other, gpurnn.cross_entropy, text)
