"""Callbacks: what is called while ``fit`` trains, and may stop it.

A callback is an object with any of four methods, or a plain function, which is taken as ``on_epoch``.

| method | is called |
|---|---|
| ``on_start(training)`` | before the first update; in a resumed run, after its checkpoint was loaded |
| ``on_update(record, training)`` | after every update |
| ``on_epoch(record, training)`` | after every epoch and its validation, before its checkpoint is saved |
| ``on_end(training)`` | once, however the training ends |

``record`` is a record of the history (see ``History``), ``training`` the training that is under way, see ``Training``.
What a method returns is ignored. ``raise StopTraining("why")`` ends the training: the callbacks after this one are
called with the same, a checkpoint is saved, and ``fit`` returns. Any other exception ends it at once and reaches the
caller of ``fit``.

A run that was stopped and resumed shows each epoch once. Only after a kill that saved nothing (SIGKILL, power), and
where a callback raised another exception, is the epoch that was not saved trained and shown again. What a callback
changes in the model or the optimizer is saved with them; a callback that has a state of its own must save it itself.

>>> def show(record, training):
...     print(f"epoch {record['epoch']} of {training.epochs}")
>>> text = gpurnn.TextBatches(np.arange(201) % 5, batch_size=4, steps=10)
>>> model = gpurnn.Sequential(gpurnn.Embedding(5, 8), gpurnn.GRU(8, 16), gpurnn.Linear(16, 5))
>>> options = dict(optimizer="adam", lr=0.01, epochs=2, progress=False)
>>> history = gpurnn.fit(model, gpurnn.cross_entropy, text, callbacks=[show], **options)
epoch 1 of 2
epoch 2 of 2
"""

from __future__ import annotations

import csv
import inspect
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from ..errors import check_size
from ..files import make_folder, read_bytes, write_bytes_atomic
from ..module import Module
from ..optim import Optimizer
from .history import History, StopTraining

__all__ = ["Callback", "StopTraining", "StopWhen", "CSVLog", "TensorBoard", "Training"]

Record = dict[str, Any]
_ARGUMENTS = {"on_start": ("training",), "on_update": ("record", "training"), "on_epoch": ("record", "training"),
              "on_end": ("training",)}  # fmt: skip
_METHODS = tuple(_ARGUMENTS)


class Training(Protocol):
    """The training that is passed to a callback.

    Attributes
    ----------
    model : Module
        The model.
    optimizer : Optimizer
        Its optimizer; ``lr`` may be set.
    history : History
        The records so far.
    epochs, epoch, step : int
        Epochs in total; epochs done, the one just recorded included; updates done.
    best, best_epoch : float or None, int
        The best value of what ``fit`` watches, and its epoch; None and 0 before the first.
    waited : int
        Epochs since the best one.
    """

    model: Module
    optimizer: Optimizer
    history: History
    epochs: int
    epoch: int
    step: int
    best: float | None
    best_epoch: int
    waited: int


class Callback:
    """The methods of a callback, each empty. A callback need not derive from it."""

    def on_start(self, training: Training) -> None:
        """Training begins, or continues after a resume."""

    def on_update(self, record: Record, training: Training) -> None:
        """An update was made; record: step, epoch, loss, lr, grad_norm."""

    def on_epoch(self, record: Record, training: Training) -> None:
        """An epoch is over; record: epoch, step, train_loss, validation_loss, each metric, lr, grad_norm, seconds."""

    def on_end(self, training: Training) -> None:
        """Training is over; ``training.history.stopped`` says why."""


class _Function(Callback):
    """A plain function as a callback."""

    def __init__(self, function: Callable[[Record, Training], Any]) -> None:
        self.on_epoch = function


class Callbacks:
    """Several callbacks as one, called in order.

    Parameters
    ----------
    callbacks : iterable of objects and functions
        What ``fit`` was given.

    Raises
    ------
    TypeError
        For an object that has none of the methods and is no function.
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._each = [_checked(number, callback) for number, callback in enumerate(callbacks)]
        self._of = {name: [c for c in self._each if _overrides(c, name)] for name in _METHODS}
        self.updated = tuple(self._of["on_update"])  # those that are called after every update
        self.watch_updates = bool(self.updated)

    def start(self, training: Training) -> None:
        _call_each([callback.on_start for callback in self._of["on_start"]], training)

    def update(self, record: Record, training: Training) -> None:
        _call_each([callback.on_update for callback in self._of["on_update"]], training, record)

    def epoch(self, record: Record, training: Training) -> None:
        _call_each([callback.on_epoch for callback in self._of["on_epoch"]], training, record)

    def end(self, training: Training) -> None:
        """Call every ``on_end``, even where one of them raises."""
        _end_each(self._of["on_end"], training)


def _call_each(methods: list[Callable[..., Any]], training: Training, record: Record | None = None) -> None:
    """Call all, each with a record of its own to change; then raise the first StopTraining that one of them raised."""
    stop = None
    for method in methods:
        try:
            method(*(() if record is None else (dict(record),)), training)
        except StopTraining as error:
            stop = stop or error
    if stop is not None:
        raise stop


def _end_each(callbacks: list[Any], training: Training) -> None:
    if callbacks:
        try:
            callbacks[0].on_end(training)
        finally:
            _end_each(callbacks[1:], training)


def _checked(number: int, callback: Any) -> Any:
    """A callback, or one made of a function."""
    if not isinstance(callback, type) and any(callable(getattr(callback, name, None)) for name in _METHODS):
        for name in _METHODS:
            if _overrides(callback, name):
                _check_takes(f"callbacks[{number}].{name}", getattr(callback, name), _ARGUMENTS[name])
        return callback
    if isinstance(callback, type) or not callable(callback):
        what = f"the class {callback.__name__}: build one" if isinstance(callback, type) else type(callback).__name__
        raise TypeError(
            f"callbacks[{number}]: expected a function of (record, training), or an object with one of "
            f"{', '.join(_METHODS)}, got {what}"
        )
    _check_takes(f"callbacks[{number}]", callback, _ARGUMENTS["on_epoch"])
    return _Function(callback)


def _check_takes(name: str, function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """Raise TypeError where a function cannot be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a compiled function
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(f"{name}: expected a function of ({', '.join(arguments)}), got one of {signature}") from None


def _overrides(callback: Any, name: str) -> bool:
    """Whether a callback has a method of this name that does something."""
    method = getattr(callback, name, None)
    return callable(method) and getattr(method, "__func__", method) is not getattr(Callback, name)


# ---- callbacks to use


class StopWhen(Callback):
    """Stops the training after an epoch for which a function returns true, for example to prune a trial of a search.

    Parameters
    ----------
    function : callable
        Called with the record of each epoch; a true result stops the training.
    reason : str
        The history's ``reason`` then.

    Examples
    --------
    With Optuna, where ``trial`` is the trial::

        def should_prune(record):
            trial.report(record["validation_loss"], record["epoch"])
            return trial.should_prune()

        history = gpurnn.fit(..., callbacks=[StopWhen(should_prune)])
        if history.stopped == "callback":
            raise optuna.TrialPruned
    """

    def __init__(self, function: Callable[[Record], Any], reason: str = "a condition of StopWhen was met") -> None:
        if not callable(function):
            raise TypeError(f"function: expected a function of the epoch's record, got {type(function).__name__}")
        self._function, self._reason = function, reason

    def on_epoch(self, record: Record, training: Training) -> None:
        if self._function(record):
            raise StopTraining(self._reason)


class CSVLog(Callback):
    """Writes a table with a line for each epoch. A resumed training continues it.

    Parameters
    ----------
    path : path
        The .csv file. It is rewritten, atomically, after each epoch.

    Raises
    ------
    FileExistsError
        From ``fit``, for a file that is no such table.
    """

    _FIRST = ("epoch", "step", "train_loss")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._rows: list[Record] = []

    def on_start(self, training: Training) -> None:
        self._rows = [row for row in self._read() if int(row["epoch"]) <= training.epoch] if training.epoch else []
        if not training.epoch:
            self._read()  # which refuses somebody else's file
            make_folder(self.path.parent)

    def on_epoch(self, record: Record, training: Training) -> None:
        self._rows.append({name: value for name, value in record.items() if name != "kind"})
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in self._rows for name in row)))
        table.writeheader()
        table.writerows(self._rows)
        write_bytes_atomic(self.path, text.getvalue().encode())

    def _read(self) -> list[Record]:
        """The rows that the file has; none where there is no file."""
        if not self.path.exists():
            return []
        rows = csv.DictReader(io.StringIO(read_bytes(self.path).decode(errors="replace"), newline=""))
        if tuple(rows.fieldnames or ())[:3] != self._FIRST:
            raise FileExistsError(f"{self.path} is no table of CSVLog: it is not replaced. Choose another name")
        return list(rows)


class TensorBoard(Callback):
    """Writes every number of the history for TensorBoard: ``tensorboard --logdir FOLDER`` shows them live.

    Needs tensorboardX (``pip install "gpurnn[tensorboard]"``), or torch with tensorboard. After a resume the curves go
    on where the checkpoint was made.

    Parameters
    ----------
    folder : path
        Where the event files go; ``runs/mine/tensorboard``, for example.
    every : int
        Updates between two points of the training loss, the learning rate and the gradient norm.

    Raises
    ------
    ImportError
        Where neither library is installed.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 10) -> None:
        self.folder, self.every = Path(folder), check_size("every", every)
        self._make = _summary_writer()
        self._writer: Any = None

    def on_start(self, training: Training) -> None:
        purge = (
            {"purge_step": training.step + 1} if training.step else {}
        )  # points that would otherwise be there twice after a kill
        self._writer = self._make(str(self.folder), **purge)

    def on_update(self, record: Record, training: Training) -> None:
        if record["step"] % self.every == 0:
            self._write(record, {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm"})

    def on_epoch(self, record: Record, training: Training) -> None:
        names = {"train_loss": "epoch/train_loss", "lr": "epoch/lr"}
        names |= {name: f"epoch/{name}" for name in record if name.startswith("validation_")}
        self._write(record, names)
        self._writer.flush()

    def on_end(self, training: Training) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, record: Record, names: dict[str, str]) -> None:
        for name, tag in names.items():
            if record.get(name) is not None:
                self._writer.add_scalar(tag, record[name], record["step"])


def _summary_writer() -> Callable[..., Any]:
    """The class SummaryWriter of tensorboardX, or else of torch."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs tensorboardX: pip install "gpurnn[tensorboard]"') from error
    return SummaryWriter
