"""What the processes of a group do together in one training: sums, signals, callbacks, the same start.

Of a process on its own nothing of it does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._typing import Array
from ..data import Batch
from .history import Terminated
from .parallel.group import add_in_order
from .parallel.start import batch_digest, check_same, code_digest, data_digest
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
            "the model": lambda: [type(model).__name__, model.ops.name, str(model.dtype),
                                  [[name, list(array.shape)] for name, array in model.params.items()]],
            "the arguments of fit": lambda: settings_of(training) | {
                "epochs": settings.epochs, "accumulate": settings.accumulate, "patience": settings.patience,
                "checkpoint_every": settings.checkpoint_every, "flow": settings.flow,
                "optimizer": type(training.optimizer).__name__, "schedule": type(settings.schedule).__name__,
                "loss": getattr(settings.loss, "__qualname__", type(settings.loss).__qualname__),
                "metrics": list(settings.metrics)},
            "the training data": lambda: data_digest(settings.batches),
            "the validation data": lambda: data_digest(settings.validation),
        })  # fmt: skip
        others = any(not isinstance(one, Progress) for one in training.settings.callbacks)
        self.saves, self.watched = group.send([self.saves, self.watched and others])
        arrays, document = snapshot_of(training)
        arrays = group.send_arrays(arrays if group.is_first else None)
        document = group.send(document() if group.is_first else None)
        if not group.is_first:
            load_snapshot(training, arrays, document)

    # ---- in every update

    def reduce(self, loss: float, some: list[Batch]) -> float:
        """Add the gradients over all processes; returns the sum of the losses. Signals are agreed on with it.

        Raises ValueError, on all, where a loader gave the processes different batches.
        """
        if self.group.size == 1:
            return loss
        total = self.group.start_sum(self.training.model.flat_grads)
        batches = 0 if self.training.settings.batches.numbered else sum(map(batch_digest, some))
        each = self.group.gather_numbers(loss, _SIGNALS.index(self._mine()), batches)
        self._signal = self._signal or int(each[:, 1].max())
        total.finish()
        if (each[:, 2] != each[0, 2]).any():
            raise ValueError(
                "batches: this loader gives the processes different batches. Give it the same seed on all, and no part "
                "of the data: fit takes the parts itself"
            )
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
            self.call(lambda: training.callbacks.update(record, training))
        elif training.callbacks.watch_updates:
            training.callbacks.update(record, training)

    def call(self, function: Callable[[], Any]) -> None:
        """Call callbacks, on process 0: what they raise, and the learning rate that they set, holds for all."""
        optimizer = self.training.optimizer
        self.group.first(function)
        if self.group.size > 1:
            optimizer.lr = self.group.send(optimizer.lr)

    def mean(self, norms: Array) -> Array:
        """The mean (T,) over the sequences of the whole batch, of (T, B)."""
        if self.group.size == 1:
            return norms.mean(axis=1)
        each = self.group.gather_numbers(*norms.sum(axis=1).tolist(), norms.shape[1])
        return each[:, :-1].sum(axis=0) / each[:, -1].sum()
