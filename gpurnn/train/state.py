"""The state of a training."""

from __future__ import annotations

import time

from .._typing import State
from .history import History
from .run_files import RunFiles
from .settings import FitSettings


class TrainingState:
    """How far a training has come: everything that a checkpoint holds, and the objects that hold the rest of it.

    Attributes
    ----------
    epoch, index, step : int
        Whole epochs done, number of the next batch, updates done.
    state : State
        The recurrent state that the next batch may carry on.
    sums : list
        [loss times weight, weight], summed over this epoch so far.
    norm : float or None
        Gradient norm of the last update.
    best, waited : float or None, int
        Best watched value, and epochs since then.
    group : Group
        The processes that train together.
    log_sizes : dict
        Log -> its bytes at the checkpoint that was restored.
    """

    def __init__(self, settings: FitSettings) -> None:
        self.settings = settings
        self.model, self.optimizer, self.scaler = settings.model, settings.optimizer, settings.loss_scaler
        self.history = History()
        self.group = settings.group
        self.files = RunFiles(settings.out if self.group.is_first else None, settings.flow)
        self.epoch, self.index, self.step = 0, 0, 0
        self.state: State = None
        self.sums = [0.0, 0]
        self.norm: float | None = None
        self.best: float | None = None
        self.waited = 0
        self.seconds = 0.0  # of the runs that this one continues
        self.log_sizes: dict[str, int] = {}
        self._started = time.monotonic()

    @property
    def epochs(self) -> int:
        """Epochs in total."""
        return self.settings.epochs

    @property
    def best_epoch(self) -> int:
        """The epoch of the best watched value; 0 before the first."""
        return 0 if self.best is None else self.epoch - self.waited

    def elapsed(self) -> float:
        """Seconds of training so far, with those before the run was resumed."""
        return self.seconds + time.monotonic() - self._started
