"""Estimators for scikit-learn: its own checks, its tools, ragged sequences, classes of timesteps, forecasts."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from optional import needs, optional

import gpurnn

ours = optional("gpurnn.interop.sklearn")
inputs = optional("gpurnn.interop.sklearn.inputs")
base, checks, pipeline, selection, preprocessing = (
    optional(f"sklearn.{name}")
    for name in ("base", "utils.estimator_checks", "pipeline", "model_selection", "preprocessing")
)
pytestmark = needs("sklearn")
SMALL = {"cell": "gru", "hidden_size": 8, "epochs": 15, "lr": 0.03, "random_state": 0}
# float64: predictions of a sequence alone and in a batch are then equal up to scikit-learn's tolerance
CHECKED = SMALL | {"epochs": 20, "lr": 0.05, "dtype": "float64"}
SERIES = dict.fromkeys(
    (
        "check_dict_unchanged", "check_dtype_object", "check_estimators_dtypes", "check_estimators_pickle",
        "check_f_contiguous_array_estimator", "check_fit2d_predict1d", "check_fit_idempotent",
        "check_methods_sample_order_invariance", "check_methods_subset_invariance", "check_readonly_memmap_input",
    ),
    "predict takes how many values to forecast, not samples",
) | {
    "check_estimators_nan_inf": "fit refuses them; predict takes how many values to forecast, not samples",
    "check_fit1d": "a series is one axis of time",
    "check_fit2d_1sample": "the message for a series of one row says that it is too short for a window",
    "check_fit_score_takes_y": "fit takes the series as y, first, and X is what else is known",
    "check_n_features_in": "n_features_in_ counts the columns of y and X; the check gives X in the place of y",
    "check_n_features_in_after_fitting": "likewise",
}  # fmt: skip


def sequences(count, seed=0, features=2, longest=9):
    """Ragged sequences whose class is whether the mean of the first feature is above 0."""
    rng = np.random.default_rng(seed)
    X = [rng.standard_normal((T, features)) + sign for T, sign in drawn(rng, count, longest)]
    return X, np.array(["high" if x[:, 0].mean() > 0 else "low" for x in X])


def drawn(rng, count, longest):
    return zip(rng.integers(1, longest, count), rng.choice([-0.7, 0.7], count), strict=True)


# ---- scikit-learn's checks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SequenceClassifier", "SequenceRegressor", "Forecaster"])
def test_scikit_learns_own_checks(name):
    series = name == "Forecaster"
    options = {"horizon": 1, "window": 2, "hidden_size": 4, "epochs": 1, "random_state": 0} if series else CHECKED
    expected = SERIES if series else {}
    found = checks.check_estimator(
        getattr(ours, name)(**options), expected_failed_checks=expected, on_fail=None, on_skip=None
    )
    failed = {one["check_name"]: one["exception"] for one in found if one["status"] == "failed"}
    assert not failed, failed
    assert sum(one["status"] == "passed" for one in found) >= (20 if series else 45)
    assert {one["check_name"] for one in found if one["status"] == "xfail"} <= set(expected)


FEW = (
    "check_do_not_raise_errors_in_init_or_set_param", "check_no_attributes_set_in_init", "check_dict_unchanged",
    "check_dont_overwrite_attributes", "check_estimators_unfitted", "check_parameters_default_constructible",
)  # fmt: skip


@pytest.mark.parametrize("name", ["SequenceClassifier", "SequenceRegressor"])
def test_the_quick_ones_of_these_checks(name):
    done = 0
    for estimator, check in checks.estimator_checks_generator(getattr(ours, name)(**CHECKED | {"epochs": 1})):
        if getattr(check, "func", check).__name__ in FEW:
            check(estimator)
            done += 1
    assert done >= 4


# ---- sequences


@pytest.mark.long
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mgu"])
def test_ragged_sequences_into_classes(cell):
    X, y = sequences(80)
    cell = gpurnn.cells.mgu if cell == "mgu" else cell
    options = SMALL | {"cell": cell, "bidirectional": cell == "gru", "pooling": "mean", "backend": "numpy"}
    model = ours.SequenceClassifier(**options).fit(X, y)
    assert model.classes_.tolist() == ["high", "low"] and model.n_features_in_ == 2 and model.n_iter_ == 15
    assert model.loss_curve_[-1] < model.loss_curve_[0] and model.validation_loss_curve_ is None
    held, labels = sequences(40, seed=1)
    assert model.score(held, labels) > 0.85
    found = model.predict_proba(held)
    assert found.shape == (40, 2) and found.dtype == np.float64
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=4 * np.finfo(float).eps)
    assert (model.classes_[found.argmax(axis=1)] == model.predict(held)).all()


def test_the_model_is_the_one_that_fit_trains():
    """predict is the network on standardized sequences, whatever else is in the batch."""
    X, y = sequences(30)
    model = ours.SequenceClassifier(**SMALL | {"dtype": "float64", "backend": "numpy", "batch_size": 7}).fit(X, y)
    steps = np.concatenate(X)
    x = ((X[3] - steps.mean(axis=0)) / steps.std(axis=0))[:, None]
    logits = model.model_(x)[0][0]
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(model.predict_proba(X)[3], p, rtol=1e-12)
    assert not model.model_.training and isinstance(model.model_, gpurnn.Sequential)


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-160, 1e150, 1e160, 1e200, 1e307])
def test_extreme_scales_change_nothing(scale):
    """Neither the squares of features nor those of targets overflow or underflow."""
    X, _ = sequences(20)
    y = np.array([[x.sum(), x[0, 0]] for x in X]) / 64
    options = SMALL | {"epochs": 4, "dtype": "float64", "backend": "numpy"}
    plain, power = ours.SequenceRegressor(**options).fit(X, y), float(2.0 ** np.floor(np.log2(scale)))
    few = 1e-3 if scale < 1e-300 else 1e-9  # subnormal numbers have few digits
    for X2, y2, grown in (([x * power / 8 for x in X], y, 1), (X, y * power, power)):
        model = ours.SequenceRegressor(**options).fit(X2, y2)
        np.testing.assert_allclose(model.predict(X2) / grown, plain.predict(X), rtol=few, atol=few)
        np.testing.assert_allclose(model.score(X2, y2), plain.score(X, y), rtol=few)


def test_numbers_at_the_ends_of_float64():
    """Differences of the largest numbers overflow, and a deviation below the smallest one is 0."""
    largest, smallest = np.finfo(float).max, np.finfo(float).smallest_subnormal
    X = np.tile([[largest, 0, largest]] * 3 + [[-largest, smallest, largest]], (5, 1))[:, None]
    model = ours.SequenceClassifier(**SMALL | {"dtype": "float64"}).fit(X, [0, 0, 0, 1] * 5)
    assert np.isfinite(model.mean_).all() and (model.scale_ > 0).all() and model.scale_[2] == 1
    assert model.score(X, [0, 0, 0, 1] * 5) == 1
    mean, scale = inputs.mean_and_scale(X[:, 0, :1])
    found = inputs.restored(inputs.standardized("X", X[:, 0, :1], mean, scale, np.float64), mean, scale)
    np.testing.assert_allclose(found, X[:, 0, :1], rtol=1e-14)
    with pytest.raises(ValueError, match=r"X\[0\]: 1 \(row 0, column 1\) is too far from the data of fit"):
        model.predict(np.ones((1, 1, 3)))


def test_mean_and_scale_make_what_the_network_takes():
    X, _ = sequences(20)
    y = np.array([x.sum() for x in X])
    model = ours.SequenceRegressor(**SMALL | {"epochs": 2, "dtype": "float64", "backend": "numpy"}).fit(X, y)
    np.testing.assert_array_equal(model.scale_, np.concatenate(X).std(axis=0))
    x = ((X[3] - model.mean_) / model.scale_)[:, None]
    found = model.model_(x)[0][0] * model.y_scale_ + model.y_mean_
    np.testing.assert_allclose(model.predict(X[3:4]), found, rtol=1e-12)


def test_a_fitted_estimator_keeps_its_dtype():
    X, y = sequences(20)
    model = ours.SequenceClassifier(**SMALL | {"epochs": 1, "dtype": "float64"}).fit(X, y)
    expected = model.predict_proba(X)
    np.testing.assert_array_equal(model.set_params(dtype="float32").predict_proba(X), expected)


def test_one_sequence_alone():
    X, y = sequences(20)
    model = ours.SequenceClassifier(**SMALL | {"dtype": "float64", "backend": "numpy"}).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X[7:8]), model.predict_proba(X)[7:8], rtol=1e-12)
    assert ours.SequenceRegressor(**SMALL).fit(X[:1], [3.0]).predict(X[:1]).shape == (1,)


def test_large_logits_overflow_nothing():
    X, y = sequences(20)
    model = ours.SequenceClassifier(**SMALL | {"epochs": 1, "backend": "numpy"}).fit(X, y)
    model.model_.params["linear.bias"] = [5000, -5000]
    assert model.predict_proba(X).tolist() == [[1.0, 0.0]] * 20


def test_both_have_the_same_defaults():
    one, two = (getattr(ours, name)().get_params() for name in ("SequenceClassifier", "SequenceRegressor"))
    assert one.pop("class_weight") is None and one == two
    assert not any(one[name] for name in ("bidirectional", "early_stopping", "verbose", "dropout"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_dtype(dtype):
    optional("ml_dtypes").bfloat16  # noqa: B018 - skips where it is not here
    X, y = sequences(40)
    model = ours.SequenceClassifier(**SMALL | {"dtype": dtype, "pooling": "mean"}).fit(X, y)
    assert model.model_.dtype.name == dtype and model.score(X, y) > 0.8


def test_the_same_seed_gives_the_same_bits():
    X, y = sequences(30)
    options = SMALL | {"dropout": 0.2, "num_layers": 2, "early_stopping": True, "epochs": 3}
    one, two = (ours.SequenceClassifier(**options).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(one.model_.flat_params, two.model_.flat_params)
    options["random_state"] = np.random.RandomState(5)
    other = ours.SequenceClassifier(**options).fit(X, y)
    assert (other.model_.flat_params != one.model_.flat_params).any()


def test_forms_of_sequences():
    """An array of three axes, lists of arrays, of lists, of one feature, and arrays of objects are the same."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 5, 1)), np.arange(20) % 2
    ragged = np.empty(20, object)
    ragged[:] = list(X)
    forms = [X, list(X), X.tolist(), list(X[:, :, 0]), ragged, [x.astype("float32").astype(float) for x in X]]
    options = SMALL | {"epochs": 2, "dtype": "float64", "backend": "numpy"}
    first = ours.SequenceClassifier(**options).fit(X, y)
    for form in forms[:5]:
        model = ours.SequenceClassifier(**options).fit(form, y)
        assert model.n_features_in_ == 1
        np.testing.assert_array_equal(model.model_.flat_params, first.model_.flat_params)
        np.testing.assert_array_equal(first.predict_proba(form), first.predict_proba(X))
    table = ours.SequenceClassifier(**options).fit(X[:, :, 0], y)
    assert table.n_features_in_ == 5
    np.testing.assert_array_equal(table.model_.flat_params, first.model_.flat_params)
    np.testing.assert_array_equal(table.predict_proba(X[:, :, 0]), table.predict_proba(list(X[:, :3]) + list(X))[20:])
    np.testing.assert_array_equal(first.predict_proba(X[:, :4, 0]), first.predict_proba(X[:, :4]))
    assert table.fit(X, y).n_features_in_ == 1


def test_ragged_lists_of_numbers():
    X, y = [[1, 2, 3], [4, 5]] * 4, [0, 1] * 4
    options = SMALL | {"dtype": "float64", "backend": "numpy"}
    model = ours.SequenceClassifier(**options).fit(X, y)
    assert model.n_features_in_ == 1 and model.score(X, y) == 1
    np.testing.assert_array_equal(model.predict_proba(X[:1] * 2), model.predict_proba(X)[:3:2])
    arrays = [np.array(x, float) for x in X]
    np.testing.assert_array_equal(model.predict_proba(arrays), model.predict_proba(X))
    steps = ours.SequenceRegressor(**options).fit(X, X).predict(X)
    assert [len(one) for one in steps] == [3, 2] * 4


def test_scores_of_timesteps_name_the_sequence_that_does_not_fit():
    X, _ = sequences(20)
    y = [np.arange(len(x)) % 2 for x in X]
    y[:2] = np.append(y[0], 0), y[1]
    for name in ("SequenceClassifier", "SequenceRegressor"):
        model = getattr(ours, name)(**SMALL | {"epochs": 1}).fit(X[1:], y[1:])
        with pytest.raises(ValueError, match=r"y\[0\]: expected a value for each of the \d timesteps of X\[0\], got"):
            model.score(X, y)


def test_a_class_for_each_timestep():
    X, _ = sequences(60)
    y = [np.where(x[:, 1] > 0, "up", "down") for x in X]
    model = ours.SequenceClassifier(**SMALL).fit(X, y)
    found, shares = model.predict(X), model.predict_proba(X)
    assert [len(one) for one in found] == [len(x) for x in X] and shares[0].shape == (len(X[0]), 2)
    right = np.concatenate([one == two for one, two in zip(found, y, strict=True)])
    assert model.score(X, y) == right.mean() > 0.85


@pytest.mark.long
def test_numbers_for_sequences_and_timesteps():
    X, _ = sequences(80, longest=6)
    totals = np.array([[x.sum(), 100 + 50 * x[-1, 0]] for x in X])
    options = SMALL | {"epochs": 25, "cell": "rnn"}
    model = ours.SequenceRegressor(**options).fit(X, totals)
    assert model.predict(X).shape == (80, 2) and model.score(X, totals) > 0.8
    assert ours.SequenceRegressor(**options).fit(X, totals[:, 0]).predict(X).shape == (80,)
    for y in ([np.cumsum(x[:, 0]) for x in X], [np.cumsum(x, axis=0) for x in X]):
        model = ours.SequenceRegressor(**options).fit(X, y)
        found = model.predict(X)
        assert [one.shape for one in found] == [one.shape for one in y] and model.score(X, y) > 0.8
    constant = ours.SequenceRegressor(**SMALL).fit(X, np.full(80, 7.0))
    assert constant.y_mean_.tolist() == [7] and constant.y_scale_.tolist() == [1]  # of a deviation of 0
    x = ((X[3] - constant.mean_) / constant.scale_).astype("float32")
    network = constant.model_(x[:, None])[0].item()
    np.testing.assert_allclose(constant.predict([X[3]]), 7 + network, rtol=1e-6)  # some roundings of float32


def test_weights_of_classes():
    X, y = sequences(60)
    y = np.random.default_rng(1).permutation(y)  # nothing to learn but how often, or how heavy, each class is
    y[:12], options = "low", SMALL | {"epochs": 5}
    high = {
        str(weight): (ours.SequenceClassifier(**options, class_weight=weight).fit(X, y).predict(X) == "high").mean()
        for weight in (None, "balanced", {"high": 100.0, "low": 0.01}, {"low": 3.0})
    }
    assert high["{'high': 100.0, 'low': 0.01}"] == 1 and high["{'low': 3.0}"] < 0.05
    assert high["None"] < high["balanced"] < 1, high


def test_early_stopping_has_the_best_weights():
    X, _ = sequences(60)
    y = np.random.default_rng(0).standard_normal(60)  # nothing to learn: it gets worse
    options = SMALL | {"epochs": 60, "early_stopping": True, "validation_fraction": 0.3, "n_iter_no_change": 4}
    model = ours.SequenceRegressor(**options | {"dtype": "float64", "backend": "numpy"}).fit(X, y)
    curve = model.validation_loss_curve_
    assert model.n_iter_ == len(curve) == len(model.loss_curve_) < 60 and np.argmin(curve) == len(curve) - 5
    chosen, held = model._split(60, y, int(np.random.RandomState(0).randint(2**31 - 1)), 0.3)
    assert len(held) == 18 and not set(chosen) & set(held)
    scaled = (model.predict([X[n] for n in held]) - model.y_mean_) / model.y_scale_
    expected = np.mean(((y[held] - model.y_mean_) / model.y_scale_ - scaled[:, None][:, 0]) ** 2)
    np.testing.assert_allclose(expected, min(curve), rtol=1e-9)


# ---- scikit-learn's tools


@pytest.mark.long
def test_pipelines_grids_and_two_processes():
    rng = np.random.default_rng(0)
    X, small = rng.standard_normal((60, 6)), SMALL | {"epochs": 8}
    y = (X[:, -1] > 0).astype(int)
    steps = pipeline.make_pipeline(preprocessing.StandardScaler(), ours.SequenceClassifier(**small))
    assert steps.fit(X * [1, 10, 100, 1, 1, 1], y).score(X * [1, 10, 100, 1, 1, 1], y) > 0.8
    found = selection.cross_validate(ours.SequenceClassifier(**small), X[:, :, None], y, cv=3, n_jobs=2)
    assert found["test_score"].shape == (3,) and found["test_score"].mean() > 0.7
    ragged, labels = sequences(40)
    grid = {"cell": ["gru", "rnn"], "hidden_size": np.array([4, 6])}
    search = selection.GridSearchCV(ours.SequenceClassifier(**small), grid, cv=2, n_jobs=2).fit(ragged, labels)
    assert len(search.cv_results_["params"]) == 4 and search.predict(ragged).shape == (40,)
    assert search.best_estimator_.hidden_size in (4, 6)


@pytest.mark.parametrize("name", ["SequenceClassifier", "SequenceRegressor", "Forecaster"])
def test_copies(name):
    series = name == "Forecaster"
    options = {"horizon": 2, "window": 4, "hidden_size": 4, "epochs": 1, "random_state": 3} if series else SMALL
    model = getattr(ours, name)(**options)
    assert {one: model.get_params()[one] for one in options} == options
    X, _ = sequences(20)
    data = (np.sin(np.arange(30)),) if series else (X, np.arange(20) % 2)
    asked = () if series else (X,)
    for unfitted in (base.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unfitted.get_params() == model.get_params()
        assert [one for one in vars(unfitted) if one.endswith("_")] == []
    model.fit(*data)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(copied.predict(*asked), model.predict(*asked))
    again = base.clone(model).set_params(random_state=4).fit(*data)
    assert not np.array_equal(again.predict(*asked), model.predict(*asked)) or name == "SequenceClassifier"


# ---- what is refused


def nan_at(x, t, k):
    x = x.copy()
    x[t, k] = np.nan
    return x


REFUSED = {
    "NaN": (lambda X, y: ([nan_at(X[0], 0, 1), *X[1:]], y), r"X\[0\]: feature 1 of timestep 0 is NaN: fill it"),
    "infinity": (lambda X, y: ([*X[:3], X[3] * np.inf, *X[4:]], y), r"X\[3\]: feature 0 of timestep 0 is infinity"),
    "features": (lambda X, y: ([X[0], X[1][:, :1], *X[2:]], y), r"X\[1\]: expected 2 features, as X\[0\] has, got 1"),
    "no timesteps": (lambda X, y: ([X[0][:0], *X[1:]], y), r"X\[0\]: expected at least one timestep"),
    "axes": (lambda X, y: ([X[0], X[1][None], *X[2:]], y), r"X\[1\]: expected an array \(T, I\) or \(T,\), got shape"),
    "text": (lambda X, y: ([X[0].astype(str), *X[1:]], y), r"X\[0\]: expected numbers, got <U"),
    "masked": (lambda X, y: ([np.ma.masked_less(X[0], 0), *X[1:]], y), r"X\[0\]"),
    "no list": (lambda X, y: ([], []), "X: expected at least one sequence, got an empty list"),
    "ragged features": (lambda X, y: ([[[1, 2], [3]]] * 20, y), r"X\[0\]: expected an array \(T, I\) or \(T,\), got"),
    "a number": (lambda X, y: ([[1, 2], 3] * 10, y), r"X\[1\]: expected an array \(T, I\) or \(T,\), got shape \(\)"),
    "an empty list": (lambda X, y: ([[], [1, 2]] * 10, y), r"X\[0\]: expected at least one timestep"),
    "classes in one array": (
        lambda X, y: (np.zeros((20, 5, 1)), np.zeros((20, 5), int)),
        r"y should be a 1d array of labels, got shape \(20, 5\): for a class of each timestep give list\(y\)",
    ),
    "none": (lambda X, y: (np.zeros((0, 3, 2)), y[:0]), "0 sample"),
    "NaN as a label": (lambda X, y: (X, np.where(y == "low", np.nan, 1.0)), "Input y contains NaN"),
    "numbers as labels": (lambda X, y: (X, np.linspace(0, 1, 20)), "Unknown label type: continuous"),
    "fewer labels": (lambda X, y: (X, y[:5]), "inconsistent numbers of samples: X has 20, y has 5"),
    "no labels": (lambda X, y: (X, None), "SequenceClassifier requires y to be passed, but the target y is None"),
    "fewer of steps": (lambda X, y: (X, [np.zeros(len(x), int) for x in X[:5]]), "X has 20, y has 5"),
    "one value": (
        lambda X, y: (X, [np.zeros(len(X[0]), int), np.array(1), *y[2:]]),
        r"y\[1\]: .* timesteps of X\[1\], got one",
    ),
    "steps": (lambda X, y: (X, [np.zeros(30, int)] * 20), r"y\[0\]: expected a value for each of the \d timesteps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_data_is_refused_by_name(name):
    change, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=words):
        ours.SequenceClassifier(**SMALL).fit(*change(*sequences(20)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cell": "elman"}, "cell should be one of"),
        ({"hidden_size": 0}, "hidden_size should be at least 1"),
        ({"epochs": 2.5}, "epochs should be an int"),
        ({"epochs": 0}, "epochs should be at least 1"),
        ({"batch_size": 0}, "batch_size should be at least 1"),
        ({"optimizer": "lbfgs"}, "optimizer should be one of 'adam'"),
        ({"pooling": "sum"}, "mode should be one of"),
        ({"dropout": 1.0}, "dropout should be a finite number in"),
        ({"early_stopping": True, "validation_fraction": 0}, "validation_fraction should be a finite number in"),
        ({"validation_fraction": 1.5}, "validation_fraction should be a finite number in"),
        ({"n_iter_no_change": 0}, "n_iter_no_change should be at least 1, got 0"),
        ({"early_stopping": "yes"}, "early_stopping should be True or False, got 'yes'"),
        ({"dtype": "int8"}, "dtype should be one of"),
        ({"lr": -1}, "lr should be"),
    ],
)
def test_wrong_parameters_are_refused_by_fit(options, words):
    model = ours.SequenceClassifier(**SMALL | options)
    with pytest.raises((ValueError, TypeError), match=words):
        model.fit(*sequences(20))


def test_predictions_of_other_data():
    X, y = sequences(20)
    model = ours.SequenceClassifier(**SMALL | {"epochs": 1})
    with pytest.raises(ValueError, match="not fitted yet"):
        model.predict(X)
    model.fit(X, y)
    for wrong in ([x[:, :1] for x in X], np.zeros((4, 7))):
        with pytest.raises(ValueError, match="X has 1 features at each timestep, but .*expecting 2"):
            model.predict(wrong)
    with pytest.raises(ValueError, match="is NaN"):
        model.predict([nan_at(X[0], 0, 0)])
    model.fit(np.zeros((20, 6)), y)
    with pytest.raises(ValueError, match="X has 5 features, but SequenceClassifier is expecting 6 features"):
        model.predict(np.zeros((20, 5)))


@pytest.mark.long
def test_without_scikit_learn():
    code = """
import sys, gpurnn, gpurnn.interop
assert "sklearn" not in sys.modules
sys.modules["sklearn"] = None
try:
    import gpurnn.interop.sklearn
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == 'gpurnn.interop.sklearn needs scikit-learn. Run pip install "gpurnn[sklearn]"\n'


# ---- forecasts


def season(count, seed=0):
    """A season of 12, growing; some noise."""
    n = np.arange(count)
    return np.sin(n * np.pi / 6) + n / 60 + 0.05 * np.random.default_rng(seed).standard_normal(count)


FORECASTS = {"horizon": 6, "window": 12, "hidden_size": 8, "epochs": 6, "random_state": 0, "lr": 0.01}


@pytest.mark.parametrize("mode", ["direct", "every", "recursive"])
def test_forecasts(mode):
    y = season(150)
    model = ours.Forecaster(**FORECASTS, mode=mode).fit(y[:126])
    assert model.season_ == [12] and model.n_features_in_ == 1 and model.n_iter_ == 6
    found = model.predict()
    assert found.shape == (6,) and np.abs(found - y[126:132]).mean() < 0.3
    np.testing.assert_array_equal(model.predict(3), found[:3])
    np.testing.assert_array_equal(model.predict(y=y[:126]), found)
    assert model.score(y[126:]) > 0.8
    later = model.predict(y=y[:140])
    assert np.abs(later - y[140:146]).mean() < 0.3 and (later != found).any()
    if mode == "recursive":
        assert model.predict(20).shape == (20,)
    else:
        with pytest.raises(ValueError, match="horizon should be at most 6.*got 7.*horizon=7, or with mode='recursive'"):
            model.predict(7)


def test_the_score_is_that_of_the_forecasts_from_each_time():
    y = season(140)
    model = ours.Forecaster(**FORECASTS | {"epochs": 2}).fit(y[:120])
    truth, made = [], []
    for end in range(120, 140 - 6 + 1):
        made.append(model.predict(y=y[:end]))
        truth.append(y[end : end + 6])
    truth, made = np.ravel(truth), np.ravel(made)
    expected = 1 - np.square(truth - made).sum() / np.square(truth - truth.mean()).sum()
    np.testing.assert_allclose(model.score(y[120:]), expected, rtol=1e-4)  # float32, in batches of other sizes
    assert model.score(y[120:123]) < 1  # fewer than the horizon
    with pytest.raises(ValueError, match="y: expected at least two rows.*got 1"):
        model.score(y[120:121])
    model.set_params(horizon=9, mode="recursive")  # it stays what fit made
    np.testing.assert_array_equal(model.predict(y=y[:120]), made[:6])
    with pytest.raises(ValueError, match="horizon should be at most 6"):
        model.predict(9)


def test_several_columns_and_what_else_is_known():
    y, X = np.stack([season(130), 5 - season(130, 1)], axis=1), np.random.default_rng(2).standard_normal((130, 3))
    model = ours.Forecaster(**FORECASTS).fit(y[:120], X[:120])
    assert model.n_features_in_ == 5 and len(model.models_) == 2 and model.season_ == [12, 12]
    assert model.predict().shape == (6, 2) and model.score(y[120:], X[120:]) > 0.5
    np.testing.assert_array_equal(model.predict(4, y[:125], X[:125]).shape, (4, 2))
    for arguments, words in (
        ((4, y[:125]), "expected 2 and 3 columns, as fit had, got 2 and 0"),
        ((4, y[:125, 0], X[:125]), "y and X: expected 2 and 3 columns"),
        ((4, None, X), "X: give the y of the same times, too"),
        ((4, y[:20], X[:20]), "y: expected at least 24 rows, which a forecast reads, got 20"),
        ((4, y[:125], X[:124]), "X: expected 125 rows, as y has, got 124"),
    ):
        with pytest.raises(ValueError, match=words):
            model.predict(*arguments)


def test_intervals():
    y = season(200)
    model = ours.Forecaster(**FORECASTS, interval="50,90", early_stopping=True, validation_fraction=0.2).fit(y[:180])
    found = model.predict_interval(4)
    assert found.shape == (2, 2, 4) and (found[1, 0] <= found[0, 0]).all() and (found[0, 1] <= found[1, 1]).all()
    assert model.predict().shape == (6,) and len(model.validation_loss_curve_) == model.n_iter_
    with pytest.raises(ValueError, match="this estimator has learned no prediction intervals"):
        ours.Forecaster(**FORECASTS | {"epochs": 1}).fit(y).predict_interval()


@pytest.mark.long
def test_a_grid_over_time():
    search = selection.GridSearchCV(
        ours.Forecaster(**FORECASTS | {"epochs": 2}), {"window": np.array([8, 12]), "cell": ["gru", "rnn"]},
        cv=selection.TimeSeriesSplit(2, test_size=20), n_jobs=2,
    ).fit(season(120))  # fmt: skip
    assert len(search.cv_results_["params"]) == 4 and np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.predict().shape == (6,)


@pytest.mark.parametrize(
    "y, options, words",
    [
        (season(14), {}, "y: too short: 14 rows to train on, a window of 12 rows and a horizon of 6 need 18"),
        (np.append(season(50), np.nan), {}, "Input y contains NaN"),
        (np.stack([season(14)] * 2, axis=1), {}, "y, column 0: too short"),
        (season(50), {"mode": "twice"}, "mode should be one of"),
        (season(50), {"interval": "120"}, "interval"),
        (season(50), {"window": 0}, "window should be at least 1"),
        (season(50), {"n_iter_no_change": 0}, "n_iter_no_change should be at least 1"),
        (season(50), {"early_stopping": True, "validation_fraction": 1.0}, "validation_fraction should be"),
        (season(50) - 9, {"log": True}, "y: row 1: log needs a target above 0"),
    ],
)
def test_wrong_series_are_refused(y, options, words):
    with pytest.raises(ValueError, match=words):
        ours.Forecaster(**FORECASTS | options).fit(y)
    with pytest.raises(ValueError, match="not fitted yet"):
        ours.Forecaster().predict()
