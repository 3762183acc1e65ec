"""Two classic problems whose answer lies far back: adding, and copying from memory."""

from __future__ import annotations

import numpy as np

from .. import rng
from .._typing import Array
from ..errors import check_size


def adding_problem(count: int, T: int, seed: int = 0, call: int = 0) -> tuple[Array, Array]:
    """Add the two marked numbers of a sequence (Hochreiter & Schmidhuber 1997).

    Always predicting 1 gives a mean squared error of 1/6, the variance of the sum (0.1767 in the literature, where it
    was measured on a finite set).

    Parameters
    ----------
    count, T : int
        Sequences, and their timesteps (at least 2).
    seed, call : int
        Another seed or call draws other sequences.

    Returns
    -------
    x : Array
        (T, count, 2) float32: numbers uniform in [0, 1), and a marker that is 1 once in each half.
    y : Array
        (count, 1) float32, the sum of the two marked numbers.
    """
    T, half = check_size("T", T, 2), T // 2
    x = np.zeros((T, check_size("count", count), 2), np.float32)
    x[:, :, 0] = rng.uniform((T, count), 0, 1, seed, rng.name_key("adding"), call)
    drawn = rng.uniform((2, count), 0, 1, seed, rng.name_key("markers"), call, np.float64)
    places = np.stack([drawn[0] * half, half + drawn[1] * (T - half)]).astype(np.int64)
    everyone = np.arange(count)
    x[places, everyone, 1] = 1
    return x, x[places, everyone, 0].sum(axis=0)[:, None]


def copy_memory(
    count: int, T: int, symbols: int = 8, length: int = 10, seed: int = 0, call: int = 0
) -> tuple[Array, Array]:
    """Repeat the first ``length`` symbols after T blanks (Arjovsky, Shah, Bengio 2016).

    Class 0 is blank, classes 1 .. symbols are the symbols, and class symbols + 1 is the sign to begin. Targets are
    blank except in the last ``length`` timesteps. Guessing gives length ln(symbols) / (T + 2 length) nats.

    Parameters
    ----------
    count, T : int
        Sequences, and blanks between the symbols and their copy.
    symbols, length : int
        Different symbols, and how many of them are to be copied.
    seed, call : int
        Another seed or call draws other sequences.

    Returns
    -------
    ids, targets : Array
        (T + 2 * length, count) int64 each.
    """
    T, length = check_size("T", T), check_size("length", length)
    shape = (length, check_size("count", count))
    drawn = rng.uniform(shape, 1, check_size("symbols", symbols) + 1, seed, rng.name_key("copy"), call, np.float64)
    pattern = drawn.astype(np.int64)
    ids = np.zeros((T + 2 * length, count), np.int64)
    targets = np.zeros_like(ids)
    ids[:length] = pattern
    ids[T + length - 1] = symbols + 1
    targets[-length:] = pattern
    return ids, targets
