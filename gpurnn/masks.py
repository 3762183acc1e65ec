"""What counts in a padded batch of sequences: from ``lengths`` and ``mask`` to booleans, True where a step is valid."""

import numpy as np

from .arrays import host_array
from .errors import DivergedError, DtypeError, ShapeError, check_flag


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
    """Raise DivergedError unless ``highest``, the highest logits of each place, is finite: else nothing can be drawn.

    highest: an array on the host. It is NaN where one of the logits is.
    """
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


def valid_places(shape, mask, lengths, batch_first, ops):
    """Booleans over some leading axes of ``shape``, True where ``mask`` and ``lengths`` say that a place counts.

    None where all of them count.
    """
    check_flag("batch_first", batch_first)
    valid = None
    if mask is not None:
        valid = ops.asarray(mask, "mask")
        if valid.dtype.kind != "b":
            raise DtypeError(f"mask: expected booleans, got {valid.dtype}. Convert it: mask = mask.astype(bool)")
        if valid.shape != shape[: valid.ndim]:
            raise ShapeError(f"mask: expected the leading axes of {shape}, such as {shape[:2]}, got {valid.shape}")
    if lengths is not None:
        if len(shape) < 2:
            raise ShapeError(
                f"lengths: expected steps and sequences as the leading axes, got an array of shape {shape}"
            )
        B, T = shape[:2] if batch_first else shape[1::-1]
        steps = valid_steps(lengths, T, B, ops.xp)
        steps = steps.T if batch_first else steps
        if valid is None:
            valid = steps
        else:
            rank = max(valid.ndim, 2)
            valid = lift(valid, rank) & lift(steps, rank)
    return valid


def lift(array, rank):
    """``array`` with axes of size 1 added at the end, up to ``rank`` axes."""
    return array.reshape(array.shape + (1,) * (rank - array.ndim))
