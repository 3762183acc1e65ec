"""Sequences of different lengths in one padded batch: from ``lengths`` to a mask of valid timesteps."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ._typing import Array, Lengths
from .arrays import host_array
from .errors import DivergedError, DtypeError, ShapeError, check_flag, described


def check_lengths(lengths: Lengths, T: int, B: int, name: str = "lengths", *, batch_first: bool = False) -> np.ndarray:
    """``lengths`` as an int64 NumPy array (B,), each 0..T, in any order.

    Parameters
    ----------
    lengths : sequence of int
        A list, a NumPy array or a device array.
    T, B : int
        Timesteps and sequences of the batch.
    name : str
        What messages call the lengths.
    batch_first : bool
        Whether the caller's arrays are (B, T, ...), for messages.

    Raises
    ------
    DtypeError
        Unless the entries are integers; for a masked array, too.
    ShapeError
        For a wrong number of lengths, a negative length, or one past T.
    """
    given, lengths = lengths, host_array(lengths, name)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)
    if lengths.dtype.kind not in "iu":
        got, hint = lengths.dtype if lengths.dtype.kind in "bf" else described(given), ""
        if lengths.dtype.kind == "b" and lengths.ndim == 2:
            hint = f". Of a mask give how many steps count: mask.sum(axis={int(batch_first)})"
        elif lengths.dtype.kind == "f" and (lengths == lengths.round()).all():
            hint = f". Convert them: {name} = np.asarray({name}, int)"
        raise DtypeError(f"{name}: expected integers, got {got}{hint}")
    if lengths.shape != (B,):
        hint = ""
        if lengths.shape == (T,):
            hint = (
                f"; with batch_first=True arrays are (B, T, ...), here ({B}, {T}, ...): for (T, B, ...) leave it out"
                if batch_first
                else f"; arrays are time-major, (T, B, ...): for (B, T, ...), with T = {B}, give batch_first=True"
            )
        raise ShapeError(f"{name}: expected one length for each of the {B} sequences, got shape {lengths.shape}{hint}")
    if B and (lengths.min() < 0 or lengths.max() > T):
        wrong = lengths[(lengths < 0) | (lengths > T)][0]
        raise ShapeError(f"{name}: expected lengths from 0 to {T} (the number of steps), got {wrong}")
    return lengths.astype(np.int64)


def refuse_no_distribution(highest: np.ndarray, name: str = "logits") -> None:
    """Raise DivergedError unless ``highest`` is finite: the highest logits, on the host, of each distribution that is
    to
    be sampled or decoded. Where one logit is NaN, so is the highest."""
    wrong = highest[~np.isfinite(highest)]
    if wrong.size:
        raise DivergedError(
            f"{name}: expected the highest of all classes to be a finite number, got {wrong[0]}: nothing can be drawn "
            "from that. The model has diverged, or its input is not finite"
        )


def valid_steps(
    lengths: Lengths, T: int, B: int, xp: ModuleType = np, name: str = "lengths", *, batch_first: bool = False
) -> Array:
    """Boolean array (T, B) of ``xp``, True where timestep t belongs to sequence b. Raises as ``check_lengths`` does.

    >>> valid_steps([2, 0], T=3, B=2).tolist()
    [[True, False], [True, False], [False, False]]
    """
    lengths = check_lengths(lengths, T, B, name, batch_first=batch_first)
    return xp.asarray(np.arange(T)[:, None] < lengths[None, :])


def lift_step(layer, given, shape, place, name):
    """``reset`` or ``mask`` of one timestep, (B,) or a bool, with an axis for it; None for None. Raises ShapeError.

    shape: () or (B,). place: the index that adds the axis.
    """
    if given is None:
        return None
    one = layer.ops.asarray(given, name)
    if one.shape != shape:
        wanted = f"for each sequence, (B,) = {shape}" if shape else "for the sequence"
        raise ShapeError(f"{name}: expected one boolean {wanted}, got shape {one.shape}")
    return one[place]


def check_steps(layer, given, T, B, single, name):
    """``reset`` or ``mask`` as booleans (T, B) of the layer's backend; None for None. Raises ShapeError, DtypeError."""
    if given is None:
        return None
    steps = layer.ops.asarray(given, name)
    if steps.dtype.kind != "b":
        hint = f": {name} = {name}.astype(bool)" if hasattr(given, "astype") else ""
        raise DtypeError(f"{name}: expected booleans, got {getattr(given, 'dtype', None) or described(given)}{hint}")
    axes, shape = ("(T,)", (T,)) if single else ("(B, T)", (B, T)) if layer.batch_first else ("(T, B)", (T, B))
    if steps.shape != shape:
        raise ShapeError(f"{name}: expected one boolean for each timestep, {axes} = {shape}, got {steps.shape}")
    if single:
        return steps[:, None]
    return steps.T if layer.batch_first else steps


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
        steps = valid_steps(lengths, T, B, ops.xp, batch_first=batch_first)
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
