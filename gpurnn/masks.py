"""Sequences of different lengths in one padded batch: from ``lengths`` to a mask of valid steps."""

import numpy as np

from .arrays import host_array
from .errors import DivergedError, DtypeError, ShapeError


def check_lengths(lengths, T, B, name="lengths"):
    """``lengths`` as an int64 NumPy array (B,), each 0..T, in any order.

    Takes a list, a NumPy array or a device array. Raises DtypeError unless the entries are integers and for a masked
    array, ShapeError for a wrong count, a negative length or one past T.
    """
    lengths = host_array(lengths, name)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)
    if lengths.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ShapeError(f"{name}: expected one length for each of the {B} sequences, got shape {lengths.shape}")
    if B and (lengths.min() < 0 or lengths.max() > T):
        wrong = lengths[(lengths < 0) | (lengths > T)][0]
        raise ShapeError(f"{name}: expected lengths from 0 to {T} (the number of steps), got {wrong}")
    return lengths.astype(np.int64)


def refuse_no_distribution(highest, name="logits"):
    """Raise DivergedError unless the highest logits of what is to be drawn from or decoded, an array on the host, are
    finite numbers: the highest is NaN where one of them is."""
    wrong = highest[~np.isfinite(highest)]
    if wrong.size:
        raise DivergedError(
            f"{name}: expected the highest of all classes to be a finite number, got {wrong[0]}: nothing can be drawn "
            "from that. The model has diverged, or its input is not finite"
        )


def valid_steps(lengths, T, B, xp=np, name="lengths"):
    """Boolean (T, B): True where step t belongs to sequence b. Raises as ``check_lengths`` does."""
    lengths = check_lengths(lengths, T, B, name)
    return xp.asarray(np.arange(T)[:, None] < lengths[None, :])
