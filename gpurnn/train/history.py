"""The records of a training, and the errors that end one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class TrainingError(RuntimeError):
    """Training cannot continue: the loss or the gradient is not finite.

    The weights are those before the bad step. The attribute ``history`` holds the records so far.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM ended a training, after a checkpoint. The attribute ``history`` holds the records so far."""


class StopTraining(Exception):
    """What a callback raises to end the training: a checkpoint is saved, and ``fit`` returns its history.

    The text of the exception, if it has one, is the history's ``reason``.
    """


class History(list[dict[str, Any]]):
    """The records of a training, in order, each a dict; the lines of ``history.jsonl``.

    A record of the kind "step" has step, epoch, loss, lr and grad_norm (of the last update; None before the first). A
    record of the kind "epoch" has epoch (counted from 1), step, train_loss, validation_loss (or None),
    validation_NAME for each metric, lr, grad_norm, and seconds since the start. With a loss scale both have
    loss_scale, and skipped: the number of steps so far that made no update because their gradients overflowed.

    Attributes
    ----------
    stopped : str or None
        Why training ended: "epochs", "patience", "callback", or "interrupt" (Ctrl-C, SIGTERM) and "error", where the
        history is an attribute of the exception. None while it runs.
    reason : str
        What a callback that stopped the training said, or "".
    """

    stopped: str | None = None
    reason: str = ""

    if not TYPE_CHECKING:  # which would take any name for an attribute

        def __getattr__(self, name):
            raise AttributeError(
                f"'History' object has no attribute {name!r}; history.epochs lists the records of epochs: "
                "[record['train_loss'] for record in history.epochs]"
            )

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The records of whole epochs."""
        return [record for record in self if record["kind"] == "epoch"]

    def __repr__(self) -> str:
        """In a line, as for the end of a notebook's cell; ``list(history)`` shows the records."""
        return f"History({len(self.epochs)} epochs, {len(self)} records, stopped={self.stopped!r})"
