"""What ``fit`` shows: a line for each epoch, and on a terminal a bar below the lines.

This is the one place outside ``cli/`` that prints, because ``fit(progress=True)`` asks for it.
"""

from __future__ import annotations

import builtins
import contextlib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from .callbacks import Callback, Record
from .state import TrainingState

_MEDIUM, _LARGE = 60, 100  # columns from which the bar's line has the learning rate, and the speed
_SHARES = re.compile("(.* )?(accuracy|error rate)|(word |utterance )?error|close|recall")  # metrics shown in per cent


class Progress(Callback):
    """Shows a training: one line for each epoch, why it ended, and a bar where standard error is a terminal.

    ``fit(progress=True)`` adds one. The bar is as wide as the terminal and disappears when the training ends; the lines
    stay.

    Parameters
    ----------
    write : callable, optional
        Called with each line. By default lines go to standard error, in a notebook to standard output.
    bar : bool
        Whether to show the bar.
    """

    def __init__(self, write: Callable[[str], Any] | None = None, bar: bool = True) -> None:
        self._write, self._wanted = write or _write_line, bar
        self._bar: Any = None

    def on_start(self, training: TrainingState) -> None:
        count = training.settings.batches.count
        total = None if count is None else -(-count // training.settings.accumulate)  # updates in an epoch
        done = training.epoch * (total or 0) + -(-training.index // training.settings.accumulate)
        self._bar = progress_bar(
            None, self._wanted, unit=" updates", leave=False, initial=done, total=total and total * training.epochs,
            desc=_epoch_of(training, training.epoch + 1),
        )  # fmt: skip

    def on_update(self, record: Record, training: TrainingState) -> None:
        if self._bar.disable:
            return
        loss, weight = training.sums
        shown = f"loss {show_loss(loss / (weight or 1))}"
        if self._bar.ncols >= _MEDIUM:
            shown += f", lr {record['lr']:.2g}"
        self._bar.set_description_str(_epoch_of(training, record["epoch"]), False)
        self._bar.set_postfix_str(shown, False)
        self._bar.update(1)

    def on_epoch(self, record: Record, training: TrainingState) -> None:
        self._say(epoch_line(record, training.epochs, training.waited == 0))

    def on_end(self, training: TrainingState) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        line = ended(training)
        if line:
            self._say(line)

    def _say(self, line: str) -> None:
        """Write a line above the bar. A full disk or a pipe that was closed must not end a training."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.clear()
            self._write(line)
            if self._bar is not None:
                self._bar.refresh()


def epoch_line(record: Record, epochs: int, best: bool) -> str:
    """The line about an epoch.

    >>> record = {"epoch": 3, "train_loss": 1.6234, "validation_loss": 1.7512, "validation_accuracy": 0.777}
    >>> epoch_line(record | {"seconds": 12.3}, epochs=10, best=True)
    'epoch 3/10  train 1.6234  valid 1.7512  accuracy 77.7%  best  12 s'
    """
    parts = [f"epoch {record['epoch']}/{epochs}", f"train {show_loss(record['train_loss'])}"]
    for name, value in record.items():
        if name.startswith("validation_") and value is not None:
            short = "valid" if name == "validation_loss" else name.removeprefix("validation_").replace("_", " ")
            parts.append(f"{short} {value:.1%}" if _SHARES.fullmatch(short) else f"{short} {show_loss(value)}")
    parts += ["best"] if best else []
    return "  ".join([*parts, duration(record["seconds"])])


def show_loss(value: float) -> str:
    """A loss with four decimals, or a large one by its power of ten.

    >>> show_loss(1.62), show_loss(7.3447e31)
    ('1.6200', '7.3e31')
    """
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def ended(training: TrainingState) -> str:
    """Why a training ended before its last epoch, as a line; empty where it did not, or where an error says why."""
    history = training.history
    if history.stopped == "patience":
        epochs = f"{training.waited} epoch{'' if training.waited == 1 else 's'}"
        return f"stopped after epoch {training.epoch}: no better for {epochs}, best epoch {training.best_epoch}"
    if history.stopped == "callback":
        return f"stopped by a callback after {training.step} updates: {history.reason}".rstrip(": ")
    return ""


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(9.4), duration(200), duration(7500)
    ('9 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; a program without a console has none."""
    return stream is not None and stream.isatty()


def fitted(line: str, stream: TextIO | None) -> str:
    """A line as a terminal shows it: broken between words where it is too long. In a file or a pipe it stays one."""
    if not is_terminal(stream):
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        line, max(width, 10), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False,
    )  # fmt: skip


def progress_bar(iterable: Iterable[Any] | None, progress: bool, **options: Any) -> Any:
    """A tqdm bar, as wide as the terminal; silent unless ``progress`` and where standard error is no terminal."""
    from tqdm import tqdm

    columns = shutil.get_terminal_size().columns
    shape = "{desc} |{bar}|{percentage:3.0f}%{postfix}, {remaining}"
    if columns >= _MEDIUM:
        shape += " left"
    if columns >= _LARGE:
        shape = shape.replace("{remaining}", "{rate_fmt}, {remaining}")
    if iterable is None and options.get("total") is None:
        shape = "{desc}, {n_fmt} updates{postfix}, {rate_fmt}"
    silent = not (progress and is_terminal(sys.stderr))
    options = {"bar_format": shape, **options} if iterable is None else options
    return tqdm(iterable, disable=silent, ncols=columns - 1, file=sys.stderr, **options)


def _epoch_of(training: TrainingState, epoch: int) -> str:
    return f"epoch {min(epoch, training.epochs)}/{training.epochs}"


def _write_line(line: str) -> None:
    """To standard error; in a notebook, which shows that as an alarm, to standard output."""
    stream = sys.stdout if hasattr(builtins, "__IPYTHON__") else sys.stderr
    print(fitted(line, stream), file=stream, flush=True)
