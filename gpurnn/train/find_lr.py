"""The learning-rate finder: one short training with a rising rate, and the rate at which its loss falls fastest."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import BatchSource
from ..errors import check_number, check_size
from ..module import Module
from ..optim import Optimizer
from .callbacks import Callback, Record, Training
from .fit import fit
from .history import StopTraining, TrainingError
from .settings import optimizer_for

_BETA = 0.9  # of the moving average of the losses
_DIVERGED = 4.0  # stop at this many times the smallest mean: fastai's rule


@dataclass
class LrCurve:
    """What ``find_lr`` found.

    Attributes
    ----------
    lr : float
        The suggested rate: where the loss falls most steeply over the logarithm of the rate.
    rates, losses : list of float
        The rate of each update, and the loss of its batches.
    """

    lr: float
    rates: list[float]
    losses: list[float]


def find_lr(
    model: Module,
    loss: Callable[..., Any],
    batches: BatchSource | Iterable[Any],
    *,
    optimizer: Optimizer | str = "adam",
    low: float = 1e-6,
    high: float = 10.0,
    updates: int = 100,
    clip_norm: float | None = None,
) -> LrCurve:
    """Suggest a learning rate: train a copy of the model while the rate rises from ``low`` to ``high``.

    The sweep stops where a moving average of the loss has become four times its smallest value. Model, optimizer and
    their random draws stay as they are, because only copies are trained. The same call gives the same rate, unless the
    batches come in another order, as from a loader that shuffles.

    Parameters
    ----------
    model, loss, batches, clip_norm
        As for ``fit``.
    optimizer : Optimizer or str
        As for ``fit``; its own rate plays no part.
    low, high : float
        The first and the last rate, above 0.
    updates : int
        Updates of the sweep, at least 10.

    Returns
    -------
    LrCurve
        The suggestion ``lr``, and the curve.

    Raises
    ------
    TrainingError
        Where the loss falls at no rate, or is not finite from the start.
    TypeError, ValueError
        For an argument of the wrong type or out of its range, as ``fit`` does.

    Notes
    -----
    Source: Smith, "Cyclical learning rates for training neural networks", WACV 2017. The steepest point instead of the
    smallest loss is fastai's choice: at the smallest loss the rate is too high already.

    Examples
    --------
    >>> text = gpurnn.TextBatches(np.arange(2001) % 7, batch_size=4, steps=10)
    >>> model = gpurnn.Sequential(gpurnn.Embedding(7, 8), gpurnn.GRU(8, 16), gpurnn.Linear(16, 7))
    >>> curve = gpurnn.train.find_lr(model, gpurnn.cross_entropy, text)
    >>> history = gpurnn.fit(model, gpurnn.cross_entropy, text, optimizer="adam", lr=curve.lr, epochs=2, progress=False)
    """
    low, high = check_number("low", low, 0, low_open=True), check_number("high", high, low, low_open=True)
    updates = check_size("updates", updates, 10)
    optimizer = optimizer_for(optimizer, low if isinstance(optimizer, str) else None, model)
    twin, optimizer = copy.deepcopy((model, optimizer))
    sweep = _Sweep(low, high, updates)
    try:
        fit(
            twin, loss, batches, optimizer=optimizer, epochs=updates, callbacks=[sweep], clip_norm=clip_norm,
            progress=False,
        )  # fmt: skip
    except TrainingError:
        if len(sweep.losses) < 2:
            raise
    return LrCurve(_steepest(sweep.rates, sweep.losses), sweep.rates, sweep.losses)


class _Sweep(Callback):
    """Raises the rate after every update, and records rates and smoothed losses."""

    def __init__(self, low: float, high: float, updates: int) -> None:
        self._planned = np.geomspace(low, high, updates).tolist()
        self._mean, self._lowest = 0.0, math.inf  # of the losses; the smallest mean so far
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_start(self, training: Training) -> None:
        training.optimizer.lr = self._planned[0]

    def on_update(self, record: Record, training: Training) -> None:
        count = len(self.losses) + 1
        self._mean = _BETA * self._mean + (1 - _BETA) * record["loss"]
        smooth = self._mean / (1 - _BETA**count)
        if not math.isfinite(smooth):
            raise StopTraining
        self.rates.append(training.optimizer.lr)
        self.losses.append(record["loss"])
        self._lowest = min(self._lowest, smooth)
        if count == len(self._planned) or smooth > _DIVERGED * self._lowest > 0:
            raise StopTraining
        training.optimizer.lr = self._planned[count]


def _steepest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the loss falls most steeply, before its smallest value.

    Slopes are those of straight lines through a decade of rates, by least squares, so that the noise of single batches
    is averaged out. A slope counts where it is larger than three times its standard error.
    """
    x, y = np.log(rates), np.array(losses)
    spacing = x[1] - x[0] if len(x) > 1 else 1.0
    half = max(2, round(math.log(10) / 2 / spacing))
    best, steepest, lowest = None, 0.0, math.inf
    for middle in range(half, len(y) - half):
        part = slice(middle - half, middle + half + 1)
        distance, value = x[part] - x[middle], y[part]
        slope = float(distance @ value / (distance @ distance))
        rest = value - value.mean() - slope * distance
        error = math.sqrt(float(rest @ rest) / (len(value) - 2) / float(distance @ distance))
        if slope < min(steepest, -3 * error) and value.mean() < lowest:
            best, steepest = middle, slope
        lowest = min(lowest, float(value.mean()))
    if best is None:
        raise TrainingError(
            f"the loss falls at no learning rate from {rates[0]:.3g} to {rates[-1]:.3g}. A model that is trained "
            "already has little left to learn: give it a rate; for a new one look at the data and the loss"
        )
    return float(f"{rates[best]:.3g}")
