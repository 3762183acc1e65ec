"""Packing: many sequences, one behind another, in few rows, instead of one padded row for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._typing import Array
from ..arrays import host_array, refuse_masked
from ..errors import DtypeError, ShapeError, check_flag, check_size, described


@dataclass(frozen=True)
class Places:
    """Where ``pack`` has put each sequence: sequence n has ``lengths[n]`` timesteps from ``firsts[n]`` on in row
    ``rows[n]``.

    Attributes
    ----------
    rows, firsts, lengths : Array
        (N,) int64 each, in the order in which the sequences were given.
    shape : tuple of int
        (T, B): timesteps and rows.
    batch_first : bool
        Whether rows are the first axis of packed arrays.
    """

    rows: Array
    firsts: Array
    lengths: Array
    shape: tuple[int, int]
    batch_first: bool = False

    @property
    def filled(self) -> float:
        """The share of all places that hold a timestep, from 0 to 1."""
        return float(self.lengths.sum() / (self.shape[0] * self.shape[1]))

    @property
    def order(self) -> Array:
        """The numbers of the sequences row by row, in a row by time: the order in which ``Pooling`` gives its vectors.

        For targets (N,), ``targets[where.order]`` belong to these vectors.
        """
        return np.lexsort((self.firsts, self.rows))


class Packed(NamedTuple):
    """What ``pack`` returns."""

    rows: Array
    reset: Array
    mask: Array
    where: Places


def pack(sequences: Sequence[Array], T: int | None = None, *, batch_first: bool = False) -> Packed:
    """Put many sequences into few rows of T timesteps, one behind another.

    A recurrent layer that gets ``reset`` and ``mask`` begins each sequence anew, so it computes what it would for each
    alone. There is less to compute than with padding: most places of the rows hold a timestep. Rows are filled by
    first-fit decreasing: the longest sequence comes first, each into the first row with room for it. So the places
    depend on the lengths alone, and targets for each timestep are packed by a second call.

    Parameters
    ----------
    sequences : sequence of Array
        One array (T_n, ...) for each sequence, of one dtype, with at least one timestep. Integers (T_n,) are tokens.
    T : int, optional
        Timesteps of a row. None means those of the longest sequence.
    batch_first : bool
        Whether the results are (B, T, ...) instead of (T, B, ...).

    Returns
    -------
    rows : Array
        (T, B, ...), zero where nothing stands.
    reset : Array
        (T, B) booleans, True where a sequence begins.
    mask : Array
        (T, B) booleans, False where nothing stands.
    where : Places
        The row and the first timestep of each sequence; ``where.filled`` tells how full the rows are.

    Raises
    ------
    ShapeError
        For a sequence with more than T timesteps, an empty one, or one that does not fit the others.
    DtypeError
        For sequences of different dtypes.
    ValueError
        For no sequences.

    Examples
    --------
    >>> rows, reset, mask, where = gpurnn.data.pack([np.array([1, 2]), np.array([3, 4, 5]), np.array([6])])
    >>> rows.T.tolist(), reset.T.tolist()
    ([[3, 4, 5], [1, 2, 6]], [[True, False, False], [True, False, True]])
    >>> where.rows.tolist(), where.firsts.tolist(), where.filled
    ([1, 0, 1], [0, 0, 2], 1.0)
    """
    check_flag("batch_first", batch_first)
    if not isinstance(sequences, Iterable) or getattr(sequences, "shape", None) == ():
        raise TypeError(f"sequences: expected a list of arrays, got {described(sequences)}")
    refuse_masked("sequences", sequences)
    arrays = [host_array(one, f"sequences[{n}]") for n, one in enumerate(sequences)]
    if not arrays:
        raise ValueError("sequences: expected at least one sequence")
    T = None if T is None else check_size("T", T)
    lengths = _checked_lengths(arrays, T)
    T = int(lengths.max()) if T is None else T
    rows, firsts, B = _first_fit(lengths, T)
    axes = (B, T) if batch_first else (T, B)
    packed = np.zeros((*axes, *arrays[0].shape[1:]), arrays[0].dtype)
    reset, mask = np.zeros(axes, bool), np.zeros(axes, bool)
    places = Places(rows, firsts, lengths, (T, B), batch_first)
    for part, there, begins, array in zip(
        unpack(packed, places), unpack(mask, places), unpack(reset, places), arrays, strict=True
    ):
        part[...], there[...], begins[:1] = array, True, True
    return Packed(packed, reset, mask, places)


def unpack(output: Array, where: Places) -> list[Array]:
    """The part of each sequence in an output for packed rows, in the order in which ``pack`` was given them.

    Parameters
    ----------
    output : Array
        (T, B, ...), or (B, T, ...) where the rows were packed with ``batch_first``, on the host or a device.
    where : Places
        As ``pack`` has returned it.

    Returns
    -------
    list of Array
        (T_n, ...) each, views of the output.

    Raises
    ------
    ShapeError
        For an output of other rows.

    Examples
    --------
    >>> rows, reset, mask, where = gpurnn.data.pack([np.ones((2, 3)), np.ones((5, 3)), np.ones((3, 3))])
    >>> [part.shape for part in gpurnn.data.unpack(rows, where)]
    [(2, 3), (5, 3), (3, 3)]
    """
    if not isinstance(where, Places):
        raise TypeError(f"where: expected the Places that pack has returned, its fourth result, got {described(where)}")
    if not hasattr(output, "shape"):
        raise TypeError(f"output: expected an array, got {described(output)}")
    expected = where.shape[::-1] if where.batch_first else where.shape
    if tuple(np.shape(output)[:2]) != expected:
        axes = "(B, T, ...)" if where.batch_first else "(T, B, ...)"
        raise ShapeError(f"output: expected {axes} with the axes {expected} of the packed rows, got {np.shape(output)}")
    by_row = output if where.batch_first else output.swapaxes(0, 1)
    places = zip(where.rows.tolist(), where.firsts.tolist(), where.lengths.tolist(), strict=True)
    return [by_row[row, first : first + length] for row, first, length in places]


def _checked_lengths(arrays, T):
    """How many timesteps each sequence has, (N,); raises where one cannot be packed. T: the most, or None."""
    usual = arrays[0]
    for n, array in enumerate(arrays):
        if array.ndim == 0:
            raise ShapeError(f"sequences[{n}]: expected an array (T_n, ...), got one value")
        if array.shape[1:] != usual.shape[1:]:
            raise ShapeError(
                f"sequences[{n}]: expected shape {('T_n', *usual.shape[1:])}, as sequences[0], got {array.shape}"
            )
        if array.dtype != usual.dtype:
            raise DtypeError(f"sequences[{n}]: expected {usual.dtype}, as sequences[0], got {array.dtype}")
        if not len(array):
            raise ShapeError(f"sequences[{n}]: expected at least one timestep, got none: leave it out")
    lengths = np.array([len(array) for array in arrays], np.int64)
    if T is not None and lengths.max() > T:
        n = int(lengths.argmax())
        others = int((lengths > T).sum()) - 1
        more = f", and {others} more are longer than that" if others else ""
        raise ShapeError(f"sequences[{n}]: expected at most T = {T} timesteps, got {lengths[n]}{more}. Cut them first")
    return lengths


def _first_fit(lengths, T):
    """(row of each sequence, its first timestep, number of rows): the longest first, each into the first row with room.

    A tree holds the room of every row in its leaves, and in each node the most below it, so that a sequence is placed
    in O(log N). Rows that are not begun have all their room: the first of them is taken where no other has enough.
    """
    N = len(lengths)
    leaves = 1 << (N - 1).bit_length()
    room = [T] * (2 * leaves)
    rows, firsts = np.zeros(N, np.int64), np.zeros(N, np.int64)
    for n in np.argsort(-lengths, kind="stable").tolist():
        length, node = int(lengths[n]), 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        rows[n], firsts[n] = node - leaves, T - room[node]
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows, firsts, int(rows.max()) + 1
