"""SequenceClassifier and SequenceRegressor."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d

from ..._typing import Array
from ...cells import Cell
from ...data import SequenceBatches
from ...data.batches import pad
from ...dtypes import check_dtype
from ...errors import check_choice, check_number, check_size
from ...layers import Dropout, Linear, Pooling, Sequential
from ...losses import cross_entropy, mse
from ...recurrent import LAYERS, Recurrent
from .inputs import check_count, is_sequences, mean_and_scale, read_sequences, read_steps, restored, standardized
from .training import train, validation_share


class _SequenceEstimator(BaseEstimator):
    """What both have in common: parameters, inputs, the model and its training."""

    def __init__(
        self,
        cell: str | Cell = "lstm",
        hidden_size: int = 32,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        pooling: str = "last",
        dropout: float = 0.0,
        optimizer: str = "adam",
        lr: float = 0.01,
        epochs: int = 30,
        batch_size: int = 32,
        clip_norm: float | None = 1.0,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        backend: str | None = None,
        dtype: str = "float32",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.pooling = pooling
        self.dropout = dropout
        self.optimizer = optimizer
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.clip_norm = clip_norm
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.backend = backend
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    # ---- fit

    def _fit(self, sequences, targets, outputs, loss):
        """Train a model of ``outputs`` outputs. targets: an array, or a list of arrays where each timestep has one."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.mean_, self.scale_ = mean_and_scale(np.concatenate(sequences))
        check_size("epochs", self.epochs)
        share = validation_share(self)
        model = self._build(outputs, seed)
        inputs, chosen, validation = self._scaled(sequences, model.dtype), np.arange(len(sequences)), None
        if share:
            chosen, held = self._split(len(sequences), targets, seed, share)
            validation = self._batches(inputs, targets, held, seed, shuffle=False)
        batches = self._batches(inputs, targets, chosen, seed, shuffle=True)
        train(self, model, loss(model), batches, validation)
        self.model_ = model.eval()

    def _build(self, outputs, seed):
        options = {"backend": self.backend, "dtype": self.dtype}
        stack = options | {"bidirectional": self.bidirectional, "seed": seed}
        if self.num_layers > 1:
            stack["dropout"] = self.dropout
        if isinstance(self.cell, Cell):
            recurrent = Recurrent(self.cell, self._input_size, self.hidden_size, self.num_layers, **stack)
        else:
            layer = LAYERS[check_choice("cell", self.cell, tuple(LAYERS))]
            recurrent = layer(self._input_size, self.hidden_size, self.num_layers, **stack)
        directions = 1 + bool(self.bidirectional)
        size = directions * recurrent.hidden_sizes[-1]
        layers = {"recurrent": recurrent}
        if not self._per_step:
            layers["pooling"] = Pooling(size, self.pooling, directions, seed=seed + 1, **options)
        if check_number("dropout", self.dropout, 0, 1, high_open=True):
            layers["dropout"] = Dropout(self.dropout, seed=seed + 2, **options)
        layers["linear"] = Linear(size, outputs, seed=seed + 3, **options)
        return Sequential(layers)

    def _split(self, count, targets, seed, share):
        """(numbers of the sequences to train on, of those to validate on)."""
        classes = targets if isinstance(self, ClassifierMixin) and not self._per_step else None
        return train_test_split(np.arange(count), test_size=share, random_state=seed, stratify=classes)

    def _scaled(self, sequences, dtype):
        return [standardized(f"X[{n}]", x, self.mean_, self.scale_, dtype) for n, x in enumerate(sequences)]

    def _batches(self, inputs, targets, chosen, seed, shuffle):
        per_step = self._per_step
        wanted = [targets[n] for n in chosen] if per_step else targets[chosen]
        inputs = [inputs[n] for n in chosen]
        return SequenceBatches(inputs, wanted, self.batch_size, per_step=per_step, shuffle=shuffle, seed=seed)

    # ---- predict

    def _outputs(self, X):
        """The model's outputs, float64: (N, V), or a list of (T_n, V) where each timestep has one."""
        check_is_fitted(self)
        model = self.model_
        inputs = self._scaled(read_sequences(self, X, reset=False), model.dtype)
        lengths, found = np.array([len(x) for x in inputs]), [None] * len(inputs)
        order = np.argsort(lengths, kind="stable")  # so that there is little padding
        for start in range(0, len(inputs), self.batch_size):
            chosen = order[start : start + self.batch_size]
            x = model.xp.asarray(pad([inputs[n] for n in chosen]))
            outputs, _ = model(x, lengths=lengths[chosen])
            outputs = model.ops.to_numpy(outputs).astype(np.float64)
            for place, n in enumerate(chosen):
                found[n] = outputs[: lengths[n], place] if self._per_step else outputs[place]
        return found if self._per_step else np.stack(found)


class SequenceClassifier(ClassifierMixin, _SequenceEstimator):
    """A recurrent network that names the class of each sequence, or of each timestep.

    X is an array (N, T, I), or a list of arrays (T_n, I) or (T_n,), of any lengths; or a table (N, T), with one number
    for each timestep. Features are standardized by the mean and the deviation of all timesteps of the training data.
    y is (N,) labels of any type; or a list of arrays (T_n,), for a class of each timestep.

    Parameters
    ----------
    cell : {"lstm", "gru", "rnn"} or Cell
        Or one of ``gpurnn.cells``, or a cell of your own.
    hidden_size, num_layers, bidirectional :
        As ``gpurnn.LSTM``.
    pooling : {"last", "mean", "max", "attention"}
        What makes one vector of a sequence: ``gpurnn.Pooling``.
    dropout : float
        Of the vector, and between layers.
    optimizer : {"adam", "adamw", "rmsprop", "sgd"}
        See ``gpurnn.fit``.
    lr : float
        The highest learning rate; it falls by a cosine to a twentieth.
    epochs, batch_size : int
        Passes over the data, and sequences in a batch.
    clip_norm : float, optional
        Largest norm of the gradient.
    early_stopping : bool
        Validate on ``validation_fraction`` of the sequences, stop after ``n_iter_no_change`` epochs without a better
        loss, and take the best epoch's weights.
    validation_fraction : float
        See ``early_stopping``.
    n_iter_no_change : int
        See ``early_stopping``.
    class_weight : dict or "balanced", optional
        Label -> weight in the loss, as in scikit-learn.
    backend : str, optional
        "numpy", "cpu", "cuda"; None is the current one.
    dtype : str
        "float64" makes results equal to rounding whatever else is in a batch.
    random_state : int, RandomState or None
        Of initial values, the order of sequences, dropout, and the split.
    verbose : bool
        Show a line for each epoch.

    Attributes
    ----------
    classes_ : ndarray
        The labels, in order.
    n_features_in_ : int
        I of sequences; T of a table.
    model_ : Sequential
        The network; ``gpurnn.save`` saves it. It takes standardized features: ``(x - mean_) / scale_``.
    mean_, scale_ : ndarray
        (I,): mean and deviation of each feature; the deviation is 1 for a feature that is always the same.
    n_iter_ : int
        Epochs that were trained.
    loss_curve_, validation_loss_curve_ : list
        The losses of each epoch; the second is None without early stopping.

    Examples
    --------
    >>> from gpurnn.interop.sklearn import SequenceClassifier
    >>> rng = np.random.default_rng(0)
    >>> X = [rng.standard_normal((T, 2)) + T % 2 for T in rng.integers(3, 9, 40)]
    >>> y = ["even" if len(x) % 2 == 0 else "odd" for x in X]
    >>> model = SequenceClassifier(hidden_size=8, epochs=10, random_state=0).fit(X, y)
    >>> model.predict(X[:2]).shape, model.predict_proba(X).shape, model.score(X, y) > 0.8
    ((2,), (40, 2), True)
    """

    def __init__(
        self,
        cell: str | Cell = "lstm",
        hidden_size: int = 32,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        pooling: str = "last",
        dropout: float = 0.0,
        optimizer: str = "adam",
        lr: float = 0.01,
        epochs: int = 30,
        batch_size: int = 32,
        clip_norm: float | None = 1.0,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        class_weight: dict[Any, float] | str | None = None,
        backend: str | None = None,
        dtype: str = "float32",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            cell, hidden_size, num_layers, bidirectional=bidirectional, pooling=pooling, dropout=dropout,
            optimizer=optimizer, lr=lr, epochs=epochs, batch_size=batch_size, clip_norm=clip_norm,
            early_stopping=early_stopping, validation_fraction=validation_fraction, n_iter_no_change=n_iter_no_change,
            backend=backend, dtype=dtype, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any) -> SequenceClassifier:
        """Train on sequences X and labels y; the class says what they may be. Returns the estimator.

        Raises ValueError or TypeError for data or a parameter that is not what it should be.
        """
        _refuse_no_targets(self, y)
        sequences = read_sequences(self, X, reset=True)
        self._per_step = is_sequences(y)
        labels = np.concatenate(read_steps(y, sequences)) if self._per_step else _one_column(y)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        if not self._per_step:
            check_count(labels, sequences)
        self.classes_, targets = np.unique(labels, return_inverse=True)
        if self._per_step:
            targets = np.split(targets, np.cumsum([len(x) for x in sequences])[:-1])
        self._fit(sequences, targets, len(self.classes_), partial(self._loss, labels))
        return self

    def _loss(self, labels, model):
        if self.class_weight is None:
            return cross_entropy
        weight = compute_class_weight(self.class_weight, classes=self.classes_, y=labels)
        return partial(cross_entropy, weight=model.xp.asarray(weight, model.compute_dtype))

    def predict(self, X: Any) -> Any:
        """The labels: (N,); or a list of (T_n,), where each timestep has one. Raises as ``fit``."""
        found = self._outputs(X)
        if self._per_step:
            return [self.classes_[one.argmax(axis=1)] for one in found]
        return self.classes_[found.argmax(axis=1)]

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class: (N, V) in the order of ``classes_``; or a list of (T_n, V)."""
        found = self._outputs(X)
        return [_softmax(one) for one in found] if self._per_step else _softmax(found)

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """The share of right labels, of sequences or of timesteps; sample_weight: one for each of these."""
        found = self.predict(X)
        if self._per_step:
            y, found = np.concatenate(read_steps(y, found)), np.concatenate(found)
        return float(accuracy_score(y, found, sample_weight=sample_weight))


class SequenceRegressor(RegressorMixin, _SequenceEstimator):
    """A recurrent network that gives a number, or several, for each sequence or each timestep.

    X is as of ``SequenceClassifier``. y is (N,) or (N, K) numbers; or a list of arrays (T_n,) or (T_n, K), for numbers
    of each timestep. The network learns standardized targets by squared error.

    Parameters
    ----------
    cell, hidden_size, num_layers, bidirectional, pooling, dropout, optimizer, lr, epochs, batch_size, clip_norm :
        As ``SequenceClassifier``.
    early_stopping, validation_fraction, n_iter_no_change, backend, dtype, random_state, verbose :
        As ``SequenceClassifier``.

    Attributes
    ----------
    n_features_in_, model_, mean_, scale_, n_iter_, loss_curve_, validation_loss_curve_ :
        As of ``SequenceClassifier``.
    y_mean_, y_scale_ : ndarray
        (K,): likewise, of each target. A prediction is the network's output times ``y_scale_`` plus ``y_mean_``.

    Examples
    --------
    >>> from gpurnn.interop.sklearn import SequenceRegressor
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 5, 2))
    >>> y = X.sum(axis=(1, 2))
    >>> model = SequenceRegressor("gru", hidden_size=8, epochs=40, random_state=0).fit(X, y)
    >>> model.predict(X[:3]).shape, model.score(X, y) > 0.9
    ((3,), True)
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> SequenceRegressor:
        """Train on sequences X and numbers y; the class says what they may be. Returns the estimator.

        Raises ValueError or TypeError for data or a parameter that is not what it should be.
        """
        _refuse_no_targets(self, y)
        sequences = read_sequences(self, X, reset=True)
        self._per_step = is_sequences(y)
        numbers = np.concatenate(read_steps(y, sequences)) if self._per_step else y
        numbers = check_array(numbers, ensure_2d=False, dtype=np.float64, input_name="y")
        if not self._per_step:
            check_count(numbers, sequences)
        self._one = numbers.ndim == 1
        numbers = numbers.reshape(len(numbers), -1)
        self.y_mean_, self.y_scale_ = mean_and_scale(numbers)
        targets = standardized("y", numbers, self.y_mean_, self.y_scale_, check_dtype(self.dtype))
        if self._per_step:
            targets = np.split(targets, np.cumsum([len(x) for x in sequences])[:-1])
        self._fit(sequences, targets, numbers.shape[1], lambda model: mse)
        return self

    def predict(self, X: Any) -> Any:
        """The numbers, as y was: (N,) or (N, K), or a list of (T_n,) or (T_n, K). Raises as ``fit``."""
        found = self._outputs(X)
        return [self._restored(one) for one in found] if self._per_step else self._restored(found)

    def _restored(self, outputs: Array) -> Array:
        numbers = restored(outputs, self.y_mean_, self.y_scale_)
        return numbers[:, 0] if self._one else numbers

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """R^2 of the predictions, over sequences or timesteps; sample_weight: one for each of these."""
        found = self.predict(X)
        if self._per_step:
            y, found = np.concatenate(read_steps(y, found)), np.concatenate(found)
        y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if y.shape == found.shape:  # a power of two rounds nothing, and no square over- or underflows
            power = np.frexp(np.maximum(np.abs(y), np.abs(found)).max(axis=0))[1]
            y, found = np.ldexp(y, -power), np.ldexp(found, -power)
        return float(r2_score(y, found, sample_weight=sample_weight))


def _refuse_no_targets(estimator: Any, y: Any) -> None:
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")


def _one_column(y):
    """Labels (N,). Raises ValueError for those of timesteps in one array."""
    shape = np.asarray(y).shape
    if len(shape) == 2 and shape[1] > 1:
        what = "list(y)" if isinstance(y, np.ndarray) else "list(np.asarray(y))"
        raise ValueError(
            f"y should be a 1d array of labels, got shape {shape}: for a class of each timestep give {what}"
        )
    return column_or_1d(y, warn=True)


def _softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
