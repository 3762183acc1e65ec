"""Forecaster: what comes after the end of a series."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted

from ..._typing import Array
from ...errors import check_size
from ...tasks.series.columns import Table
from ...tasks.series.forecasts import fit_margins, forecast, forecast_intervals
from ...tasks.series.parts import reach_back
from ...tasks.series.settings import SeriesSettings
from ...tasks.series.task import TASK, fit_facts
from ...tasks.series.windows import Windows
from ...tasks.trained import Trained
from .training import train, validation_share


class Forecaster(BaseEstimator):
    """A recurrent network that forecasts what comes after the end of a series, as ``gpurnn train series`` does.

    It learns the difference from a naive forecast, that of the last value or that of a season before, whichever is
    better in the series. Of a series of several columns each has a network of its own, which reads all of them.

    Parameters
    ----------
    horizon : int
        Values that are forecast.
    window : int
        Values that are read for a forecast.
    cell : {"lstm", "gru", "rnn"}
        The recurrent cell.
    hidden_size, num_layers : int
        Units of a layer, and layers.
    mode : {"direct", "every", "recursive"}
        "direct": all values of the horizon from the last state; "every": in training from every state; "recursive": one
        by one, by a decoder that reads what it said, for any horizon.
    residual : {"auto", "none", "last", "season"}
        What is learned: the value itself, or its difference from a naive forecast.
    season : int, optional
        Values in a season; None guesses by autocorrelation.
    log : bool
        Take the logarithm, for growth in per cent.
    loss : {"mse", "mae"}
        The loss.
    interval : str, optional
        Levels of prediction intervals, such as "80,95"; early stopping calibrates them on its validation part.
    dropout, optimizer, lr, epochs, batch_size, clip_norm, n_iter_no_change, backend, dtype, random_state, verbose :
        As of ``SequenceClassifier``; a batch is of windows.
    early_stopping, validation_fraction :
        As of ``SequenceClassifier``; the validation part is the end of the series.

    Attributes
    ----------
    n_features_in_ : int
        Columns that are read: those of y, then those of X.
    season_ : list of int
        Values in a season, of each column of y; 1 where there is none.
    models_ : list of Module
        The network of each column.
    n_iter_, loss_curve_, validation_loss_curve_ :
        As of ``SequenceClassifier``, of the last column.

    Examples
    --------
    >>> from gpurnn.interop.sklearn import Forecaster
    >>> y = np.sin(np.arange(120) * np.pi / 6) + np.arange(120) / 60
    >>> model = Forecaster(horizon=6, window=12, hidden_size=8, epochs=5, random_state=0).fit(y[:100])
    >>> model.predict().shape, model.score(y[100:]) > 0.8
    ((6,), True)
    """

    def __init__(
        self,
        horizon: int = 12,
        window: int = 48,
        *,
        cell: str = "lstm",
        hidden_size: int = 32,
        num_layers: int = 1,
        mode: str = "direct",
        residual: str = "auto",
        season: int | None = None,
        log: bool = False,
        loss: str = "mse",
        interval: str | None = None,
        dropout: float = 0.0,
        optimizer: str = "adam",
        lr: float = 0.003,
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
        self.horizon = horizon
        self.window = window
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.mode = mode
        self.residual = residual
        self.season = season
        self.log = log
        self.loss = loss
        self.interval = interval
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

    def fit(self, y: ArrayLike, X: ArrayLike | None = None) -> Forecaster:
        """Train on a series. Returns the estimator.

        Parameters
        ----------
        y : array
            (T,) or (T, F): the series, in order of time, without gaps.
        X : array, optional
            (T, K): what else is known of the same times, not of those to come.

        Raises
        ------
        ValueError, TypeError
            For a series that is too short or not finite, or a parameter that is not what it should be.
        """
        y, X = self._checked(y, X, reset=True)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        settings = self._settings(seed)
        self._y, self._X, self._trained = y, X, []
        for column in range(y.shape[1]):
            self._trained.append(self._fit_column(self._table(y, X, column), settings, column))
        self.season_ = [trained.facts["season"] for trained in self._trained]
        self.models_ = [trained.model for trained in self._trained]
        return self

    def _settings(self, seed):
        renamed = {"hidden": self.hidden_size, "layers": self.num_layers, "batch": self.batch_size, "seed": seed}
        same = ("horizon", "window", "cell", "mode", "residual", "season", "log", "loss", "interval", "dropout")
        same += ("optimizer", "lr", "epochs", "dtype")
        given = {name: _plain(getattr(self, name)) for name in same}
        return SeriesSettings(**renamed, **given, valid=validation_share(self), test=0.0, schedule="constant")

    def _fit_column(self, table, settings, column):
        """The ``Trained`` model of one column, which is the first of a table."""
        names = [f"column {n}" for n in range(table.values.shape[1])]
        facts = {"target": names[0], "inputs": names[1:], "date": None, "calendar": []}
        facts, _, ends = fit_facts(table, facts, settings, f"y, column {column}" if self._several else "y")
        model = TASK.build(settings, facts, self.backend)
        sources = {
            part: Windows(table, ends[part], settings, facts, training=part == "train")
            for part in ("train", "valid")
            if len(ends[part])
        }
        train(self, model, TASK.loss(settings, facts), sources["train"], sources.get("valid"))
        trained = Trained(None, TASK, settings, facts, model.eval())
        if settings.levels and "valid" in sources:
            trained.result["margins"] = fit_margins(trained, table, ends["valid"])
        return trained

    def predict(self, horizon: int | None = None, y: ArrayLike | None = None, X: ArrayLike | None = None) -> Array:
        """The values to come: (horizon,), or (horizon, F).

        Parameters
        ----------
        horizon : int, optional
            Their number, at most that of the estimator, unless its mode is "recursive".
        y, X : array, optional
            Another end of the series, or what came after that of ``fit``: as these, of at least ``window`` rows, and
            of ``window + season_`` rows where the difference from a season before is learned. None is the series of
            ``fit``.

        Raises
        ------
        ValueError
            For a horizon that is too long, or too few rows.
        DivergedError
            For a model that gives numbers that are not finite.
        """
        steps, y, X = self._request(horizon, y, X)
        made = [forecast(one, self._table(y, X, n), steps) for n, one in enumerate(self._trained)]
        return np.stack(made, axis=1) if self._several else made[0]

    def predict_interval(
        self, horizon: int | None = None, y: ArrayLike | None = None, X: ArrayLike | None = None
    ) -> Array:
        """The ends of the prediction intervals: (levels, 2, horizon), or with F columns (levels, 2, horizon, F).

        Takes and raises what ``predict`` does; ValueError without ``interval``.
        """
        steps, y, X = self._request(horizon, y, X)
        if not self._trained[0].settings.levels:
            raise ValueError("interval: this estimator has learned no prediction intervals: give interval='80,95'")
        made = [forecast_intervals(one, self._table(y, X, n), steps) for n, one in enumerate(self._trained)]
        return np.stack(made, axis=3) if self._several else made[0]

    def score(self, y: ArrayLike, X: ArrayLike | None = None) -> float:
        """R^2 of the forecasts of a held-out end: what comes right after the series of ``fit``.

        A forecast is made at each time from the end of ``fit`` on, of as many values as the horizon has, or as there
        are.

        Parameters
        ----------
        y, X : array
            The values that came, as of ``fit``; two at least.

        Raises
        ------
        ValueError
            For a single row, or columns that are not those of ``fit``.
        """
        check_is_fitted(self)
        before = len(self._y)
        y, X = self._checked(y, X, reset=False)
        if len(y) < 2:
            raise ValueError("y: expected at least two rows, as R^2 of one value is not defined, got 1")
        steps = min(self._trained[0].settings.horizon, len(y))
        y = np.concatenate([self._y, y])
        X = None if X is None else np.concatenate([self._X, X])
        ends = np.arange(before - 1, len(y) - steps)
        rows = ends[:, None] + np.arange(1, steps + 1)
        truth = [y[rows, n] for n in range(y.shape[1])]
        made = [forecast(one, self._table(y, X, n), steps, ends) for n, one in enumerate(self._trained)]
        truth, made = (np.stack(one, axis=-1).reshape(-1, len(made)) for one in (truth, made))
        return float(r2_score(truth, made))

    # ---- what comes in

    def _request(self, horizon, y, X):
        """(steps, y, X) of a forecast, checked."""
        check_is_fitted(self)
        settings = self._trained[0].settings  # those of fit, whatever set_params said since
        steps = settings.horizon if horizon is None else check_size("horizon", horizon)
        if steps > settings.horizon and settings.mode != "recursive":
            raise ValueError(
                f"horizon should be at most {settings.horizon}, that of the estimator, got {steps}: fit one with "
                f"horizon={steps}, or with mode='recursive'"
            )
        if y is None and X is not None:
            raise ValueError("X: give the y of the same times, too")
        y, X = (self._y, self._X) if y is None else self._checked(y, X, reset=False)
        for one in self._trained:
            reach = reach_back(one.settings, one.facts)
            if len(y) < reach:
                raise ValueError(f"y: expected at least {reach} rows, which a forecast reads, got {len(y)}")
        return steps, y, X

    def _checked(self, y, X, reset):
        """y (T, F) and X (T, K) or None."""
        y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        several = y.ndim == 2
        y = y if several else y[:, None]
        if X is not None:
            X = check_array(X, ensure_2d=False, dtype=np.float64, input_name="X")
            X = X if X.ndim == 2 else X[:, None]
            if len(X) != len(y):
                raise ValueError(f"X: expected {len(y)} rows, as y has, got {len(X)}")
        count = y.shape[1] + (0 if X is None else X.shape[1])
        if reset:
            self._several, self.n_features_in_ = several, count
        elif (several, y.shape[1], count) != (self._several, self._y.shape[1], self.n_features_in_):
            raise ValueError(
                f"y and X: expected {self._y.shape[1]} and {self.n_features_in_ - self._y.shape[1]} columns, as fit "
                f"had, got {y.shape[1]} and {count - y.shape[1]}"
            )
        return y, X

    def _table(self, y, X, column):
        """The columns that the network of one column of y reads, itself first."""
        others = [n for n in range(y.shape[1]) if n != column]
        columns = [y[:, [column, *others]], *([] if X is None else [X])]
        return Table(np.concatenate(columns, axis=1), None, None)


def _plain(value: Any) -> Any:
    """A number of NumPy, as a grid of parameters may have it, as one of Python."""
    return value.item() if isinstance(value, np.generic) else value
