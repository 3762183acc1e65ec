"""The four errors a user can cause, and the checks that raise them.

Every check runs before anything is computed or changed, and its message names the argument, what was expected and what
came. The classes derive from the built-in ones that a careful caller would catch anyway.
"""

import re
from numbers import Integral, Real

import numpy as np

# C0 but for tab and line feed, delete, C1, what turns the direction of writing; a carriage return unless a line ends
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)")


class ShapeError(ValueError):
    """An array has the wrong rank or size, or lengths do not fit the array they describe."""


class DtypeError(TypeError):
    """An array has a data type that the receiving layer or loss does not take."""


class FileError(ValueError):
    """A file is damaged, too large, or not of the kind that is read; the message names it, and the place in it.

    That of a run's folder is a ``CheckpointError``, which derives from this.
    """


class BackendError(RuntimeError):
    """The backend asked for cannot work on this machine, or an array lives on another backend."""


def check_shape(name, array, expected):
    """Raise ShapeError unless ``array.shape`` fits ``expected``.

    ``expected`` is a tuple whose entries are sizes, or strings naming a free axis:
    ``check_shape("x", x, ("T", "B", 5))`` takes any T and B.
    """
    shape = tuple(array.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ShapeError(f"{name}: expected shape ({wanted}), got {shape}")


def check_size(name, value, minimum=1):
    """Return ``value`` as int; raise unless it is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} should be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} should be at least {minimum}, got {value}")
    return int(value)


def check_number(name, value, low=None, high=None, *, low_open=False, high_open=False):
    """Return ``value`` as float; raise unless it is a finite number between ``low`` and ``high``.

    ``low_open`` / ``high_open`` leave the bound itself out. NaN is always refused.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} should be a number, got {type(value).__name__}")
    below = low is not None and (value < low or (low_open and value == low))
    above = high is not None and (value > high or (high_open and value == high))
    if not np.isfinite(value) or below or above:
        left, right = ("(" if low_open else "["), (")" if high_open else "]")
        bounds = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
        raise ValueError(f"{name} should be a finite number in {bounds}, got {value}")
    return float(value)


def check_choice(name, value, choices):
    """Return ``value``; raise ValueError unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


# ---- what messages say


def printable(text):
    """``text`` with its control characters as escapes, such as ``\\x1b``, so that a terminal only shows it.

    Tabs, line feeds and the carriage returns before these stay as they are.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(error, longest=200):
    """What an exception says, in one line of at most ``longest`` characters."""
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding} text: byte {error.start} is {error.object[error.start]:#04x}"
    if isinstance(error, KeyError) and error.args:
        text = f"{error.args[0]!r} is missing" if re.fullmatch(r"[\w/.]+", str(error.args[0])) else str(error.args[0])
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply"
    else:
        text = str(error) or type(error).__name__
    text = printable(" ".join(text.split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def show_size(count):
    """A number of bytes for people: "3.2 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1e15 else "more than 1,000 TB"
    return f"{count} bytes"
