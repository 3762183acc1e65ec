"""The arguments of ``fit``, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import BatchSource
from ..errors import check_choice, check_flag, check_number, check_size
from ..loss_scale import LossScaler
from ..module import Module
from ..optim import Optimizer, Schedule


@dataclass(eq=False)
class FitSettings:
    """What ``fit`` was called with; see there. Building one checks everything before anything is changed."""

    model: Module
    loss: Callable[..., Any]
    batches: BatchSource
    optimizer: Optimizer
    epochs: int
    validation: BatchSource | None
    schedule: Schedule | None
    schedule_every: str
    clip_norm: float | None
    clip_value: float | None
    weight_noise: float
    accumulate: int
    out: Path | None
    checkpoint_every: int | None
    patience: int | None
    metrics: Mapping[str, Callable[..., Any]] | None
    watch: tuple[str, str]
    progress: bool
    flow: bool
    extra: Any
    loss_scaler: LossScaler | str | None

    def __post_init__(self) -> None:
        check_flag("progress", self.progress)
        check_flag("flow", self.flow)
        self.epochs = check_size("epochs", self.epochs)
        check_choice("schedule_every", self.schedule_every, ("epoch", "step"))
        if self.clip_norm is None:
            self.clip_norm = math.inf
        else:
            self.clip_norm = check_number("clip_norm", self.clip_norm, 0, low_open=True)
        if self.clip_value is not None:
            self.clip_value = check_number("clip_value", self.clip_value, 0, low_open=True)
        self.weight_noise = check_number("weight_noise", self.weight_noise, 0)
        self.accumulate = check_size("accumulate", self.accumulate)
        self.out = None if self.out is None else Path(self.out)
        for name in ("checkpoint_every", "patience"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else check_size(name, value))
        self.metrics = self.metrics or {}
        self.loss_scaler = _scaler_for(self.loss_scaler, self.model)
        check_choice("watch", self.watch[0], ("loss", *self.metrics))
        check_choice("watch", self.watch[1], ("min", "max"))
        if self.patience is not None and self.validation is None:
            raise ValueError("patience watches the validation loss: give validation batches")
        if self.optimizer.model is not self.model:
            raise ValueError("optimizer: was built for another model")


def _scaler_for(scaler: Any, model: Module) -> LossScaler | None:
    """The loss scaler that an argument ``loss_scaler`` means."""
    if scaler is None or isinstance(scaler, LossScaler):
        return scaler
    if not isinstance(scaler, str) or scaler != "auto":
        raise TypeError(f"loss_scaler should be a LossScaler, None or 'auto', got {scaler!r}")
    return LossScaler() if model.dtype == np.float16 else None
