"""What the processes of a group do together in one training: sums, signals, callbacks, the same start.

Of a process on its own nothing of it does anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .._typing import Array
from ..data import Batch
from .history import StopTraining, Terminated
from .parallel.group import add_in_order
from .parallel.start import (
    batch_digest,
    check_batches,
    check_same,
    code_digest,
    data_facts,
    function_facts,
    model_digest,
    model_facts,
)
from .progress import Progress
from .snapshot import load_snapshot, settings_of, snapshot_of

Interrupted = Callable[[], type[BaseException] | None]
_SIGNALS: tuple[type[BaseException] | None, ...] = (None, KeyboardInterrupt, Terminated)


class Members:
    """The processes of one training.

    saves: whether process 0 writes checkpoints. watched: whether callbacks see every update, besides the bar.
    """

    def __init__(self, training: Any) -> None:
        self.training, self.group = training, training.group
        self.saves, self.watched = training.files.out is not None, training.callbacks.watch_updates
        self._signal, self._mine = 0, lambda: None

    def meet(self) -> None:
        """Compare code, data and settings, and take the weights and the random draws of process 0.

        Raises ValueError, on all, where they differ.
        """
        group, training = self.group, self.training
        if group.size == 1:
            return
        settings = training.settings
        model = training.model
        check_same(group, {
            "the code of gpurnn, Python and NumPy": code_digest,
            "the model": lambda: model_facts(model),
            "the arguments of fit": lambda: settings_of(training) | {
                "epochs": settings.epochs, "accumulate": settings.accumulate, "patience": settings.patience,
                "checkpoint_every": settings.checkpoint_every, "flow": settings.flow,
                "optimizer": type(training.optimizer).__name__, "schedule": type(settings.schedule).__name__,
                "loss": function_facts(settings.loss),
                "metrics": {name: function_facts(one) for name, one in settings.metrics.items()}},
            "the training data": lambda: data_facts(settings.batches),
            "the validation data": lambda: data_facts(settings.validation),
        })  # fmt: skip
        others = any(not isinstance(one, Progress) for one in training.settings.callbacks)
        what = "the initial weights"
        self.saves, self.watched = group.send([self.saves, self.watched and others], what)
        arrays, document = snapshot_of(training)
        arrays = group.send_arrays(arrays if group.is_first else None, what)
        document = group.send(document() if group.is_first else None, what)
        if not group.is_first:
            load_snapshot(training, arrays, document)

    # ---- in every update

    def reduce(self, loss: float, some: list[Batch]) -> float:
        """Add the gradients over all processes; returns the sum of the losses. Signals are agreed on before.

        Raises ValueError, on all, where the processes had different batches.
        """
        if self.group.size == 1:
            return loss
        digest, training = functools.reduce(lambda value, batch: batch_digest(batch, value), some, 0), self.training
        what = f"update {training.step + 1}"
        each = self.group.gather_numbers(loss, _SIGNALS.index(self._mine()), digest, what=what)
        self._signal = self._signal or int(each[:, 1].max())
        last = f" to {training.index + len(some)}" if len(some) > 1 else ""
        check_batches(each[:, 2], f"batch {training.index + 1}{last} of epoch {training.epoch + 1}, in {what},")
        self.group.add(training.model.flat_grads)  # now that all are here, with the same batches
        return add_in_order(each[:, 0])

    def agreed(self, interrupted: Interrupted) -> Interrupted:
        """``interrupted`` of all processes: the same answer on all, which changes in ``reduce`` alone."""
        if self.group.size == 1:
            return interrupted
        self._mine = interrupted
        return lambda: _SIGNALS[self._signal]

    def after_update(self, record: dict[str, Any]) -> None:
        """Call the callbacks that watch updates."""
        training = self.training
        if self.watched and self.group.size > 1:
            self.call(lambda: training.callbacks.update(record, training), f"the callbacks of update {training.step}")
        elif training.callbacks.watch_updates:
            training.callbacks.update(record, training)

    def call(self, function: Callable[[], Any], what: str, compare: bool = False) -> None:
        """Call callbacks, on process 0: what they raise, and the learning rate that they set, holds for all.

        compare: also raise ValueError, on all, unless the model is then the same on all; what: for messages.
        """
        stop = None
        try:
            self.group.first(function, what)
        except StopTraining as stopped:
            stop = stopped
        if self.group.size > 1:
            self._agree(what, compare)
        if stop is not None:
            raise stop

    def _agree(self, what, compare):
        """Take the learning rate of process 0, and compare the model."""
        training = self.training
        digest = model_digest(training.model) if compare else 0
        each = self.group.gather_numbers(training.optimizer.lr, digest, what=what)
        training.optimizer.lr = float(each[0, 0])
        odd = np.flatnonzero(each[:, 1] != each[0, 1])
        if odd.size:
            raise ValueError(
                f"group: after {what} the model of process {', '.join(map(str, odd))} (of {len(each)}) is another one "
                "than that of process 0. Callbacks run on process 0 alone, and only the learning rate that they set "
                "reaches the others: change weights on all processes, between two calls of fit"
            )

    def mean(self, norms: Array) -> Array:
        """The mean (T,) over the sequences of the whole batch, of (T, B)."""
        if self.group.size == 1:
            return norms.mean(axis=1)
        each = self.group.gather_numbers(*norms.sum(axis=1).tolist(), norms.shape[1], what="the gradient flow")
        return each[:, :-1].sum(axis=0) / each[:, -1].sum()
