"""How the estimators train: by ``gpurnn.fit``, and the weights of the best epoch stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...data import BatchSource
from ...errors import check_flag, check_number, check_size
from ...module import Module
from ...optim import CosineSchedule
from ...train import fit
from ...train.callbacks import Callback
from ...train.settings import OPTIMIZERS


def validation_share(estimator: Any) -> float:
    """The share of the data to validate on: 0 without early stopping. Raises for a parameter of it that is wrong."""
    share = check_number("validation_fraction", estimator.validation_fraction, 0, 1, low_open=True, high_open=True)
    check_size("n_iter_no_change", estimator.n_iter_no_change)
    return share if check_flag("early_stopping", estimator.early_stopping) else 0.0


class BestWeights(Callback):
    """Has the weights of the epoch with the least validation loss."""

    def __init__(self, model: Module) -> None:
        self._model, self._least, self.state = model, np.inf, model.state_dict()

    def on_epoch(self, record: dict[str, Any], training: Any) -> None:
        if record["validation_loss"] < self._least:
            self._least, self.state = record["validation_loss"], self._model.state_dict()


def train(
    estimator: Any, model: Module, loss: Callable[..., Any], batches: BatchSource, validation: BatchSource | None
) -> None:
    """Train the model of an estimator by its parameters; sets ``n_iter_`` and the curves of the losses.

    The learning rate falls by a cosine to a twentieth. With validation batches training stops early, and the model has
    the weights of its best epoch.
    """
    optimizer = OPTIMIZERS.get(estimator.optimizer)
    if optimizer is None:
        raise ValueError(f"optimizer should be one of {', '.join(map(repr, OPTIMIZERS))}, got {estimator.optimizer!r}")
    optimizer = optimizer(model, lr=estimator.lr)
    best = None if validation is None else BestWeights(model)
    total = estimator.epochs * len(batches)
    with np.errstate(over="ignore", invalid="ignore"):  # fit says what is not finite
        history = fit(
            model,
            loss,
            batches,
            optimizer=optimizer,
            epochs=estimator.epochs,
            validation=validation,
            schedule=CosineSchedule(optimizer, total=max(1, total), min_lr=optimizer.lr / 20),
            schedule_every="step",
            clip_norm=estimator.clip_norm,
            patience=None if validation is None else estimator.n_iter_no_change,
            callbacks=() if best is None else (best,),
            progress=bool(estimator.verbose),
        )
    if best is not None:
        model.load_state_dict(best.state)
    estimator.n_iter_ = len(history.epochs)
    estimator.loss_curve_ = [record["train_loss"] for record in history.epochs]
    estimator.validation_loss_curve_ = None if best is None else [one["validation_loss"] for one in history.epochs]
