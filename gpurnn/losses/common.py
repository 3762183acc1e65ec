"""What losses share: which places count, reductions, and the gradient that comes from behind."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .._typing import Array
from ..arrays import conversion, host_array
from ..backends import array_ops
from ..backends.ops import blocks
from ..dtypes import DTYPES, is_float, upcast
from ..errors import DtypeError, ShapeError, check_choice, check_shape, check_size
from ..masks import lift, valid_places

REDUCTIONS = ("mean", "sum", "none")


# ---- losses of single elements


def elementwise(value, gradient, arguments, mask, lengths, batch_first, reduction, outputs=None):
    """The loss ``value`` of each element, reduced, and its backward from the ``gradient`` of each element.

    arguments: the two argument names with their values, the differentiable one first. outputs: None where the two are
    of one shape; otherwise how many numbers of the first, along its last axis, belong to each of the second.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    (name, x), (other, y) = arguments.items()
    ops = loss_ops(name, x)
    xp, value_of_y = ops.xp, y
    given, y = ops.asarray(x, name).dtype, ops.asarray(y, other)
    x = floats(x, name, ops)
    check_same_dtype(other, y, name, given, value_of_y)
    check_shape(other, y, x.shape if outputs is None else x.shape[:-1])
    shape, dtype, y = x.shape, x.dtype, upcast(y)
    valid = valid_places(y.shape, mask, lengths, batch_first, ops)
    rows = None if valid is None else xp.flatnonzero(valid)
    N = y.size if valid is None else valid.size
    inner = 1 if valid is None else math.prod(y.shape[valid.ndim :])
    width = inner * (outputs or 1)
    x, y, count = x.reshape(N, width), y.reshape(N, inner), N if rows is None else rows.size
    divisor = max(count * width, 1) if reduction == "mean" else 1

    with quiet():
        if reduction == "none":
            loss = xp.zeros((N, width), dtype)
            for _, index in blocks(rows, count, width, xp):
                loss[index] = value(x[index], y[index], xp)
            loss = loss.reshape(shape)
        else:
            total = xp.zeros((), np.float64)
            for _, index in blocks(rows, count, width, xp):
                total = total + value(x[index], y[index], xp).sum(dtype=np.float64)
            loss = (total / divisor).astype(dtype)

    def backward(dloss=1.0):
        dlosses = upstream(dloss, loss.shape, (N, width), divisor, dtype, ops)
        dx = (xp.empty if rows is None else xp.zeros)((N, width), dtype)
        with quiet():
            for _, index in blocks(rows, count, width, xp):
                dx[index] = gradient(x[index], y[index], xp) * dlosses[index]
            return dx.reshape(shape).astype(given, copy=False)

    return loss, backward


# ---- losses of rows of V classes


class Rows(NamedTuple):
    """Rows of V numbers, one for each class, of which some count.

    values: (N, V) in the compute dtype, a view where possible. labels: for each row that counts its class, int64
    (count,); None where targets are no classes. rows: the indices of the rows that count among the N, or None if all
    do. lead: the shape of the targets, whose product is N.
    """

    ops: Any
    values: Array
    labels: Array | None
    rows: Array | None
    lead: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many rows count."""
        return len(self.values) if self.rows is None else self.rows.size

    @property
    def index(self) -> Array | slice:
        """The rows that count, as an index of all."""
        return slice(None) if self.rows is None else self.rows

    def blocks(self):
        """The rows that count in blocks, as ``backends.ops.blocks`` yields them."""
        return blocks(self.rows, self.count, self.values.shape[1], self.ops.xp)

    def reduced(self, losses: Array, divisor: Any, reduction: str) -> Array:
        """The loss of ``losses``, float64 (count,): their sum over ``divisor``, or with "none" one for each row."""
        xp, dtype = self.ops.xp, self.values.dtype
        if reduction == "none":
            loss = xp.zeros(len(self.values), dtype)
            loss[self.index] = losses
            return loss.reshape(self.lead)
        return (losses.sum() / divisor).astype(dtype)


def class_rows(logits, targets, mask, lengths, batch_first, ignore_index, name="logits"):
    """``Rows`` of logits (..., V) and integer targets (...), checked; every label is in [0, V).

    name: what errors call the logits.
    """
    ops = loss_ops(name, logits)
    logits, targets = floats(logits, name, ops), ops.asarray(targets, "targets")
    if targets.dtype.kind in "US":
        raise DtypeError(
            "targets: expected class numbers, got text. Number it: np.unique(targets, return_inverse=True)"
        )
    if targets.dtype.kind not in "iu":
        raise DtypeError(
            f"targets: expected integers (class numbers), got {targets.dtype}{_one_hot_hint(targets, logits)}"
        )
    if logits.ndim == 0:
        raise ShapeError(f"{name}: expected shape (..., V), got ()")
    if targets.shape != logits.shape[:-1]:
        hint = _one_hot_hint(targets, logits)
        if logits.ndim > 2 and targets.shape == logits.shape[:1] + logits.shape[2:]:
            hint = f". The classes are the last axis of {name}, not axis 1: give np.moveaxis({name}, 1, -1)"
        raise ShapeError(f"targets: expected shape {logits.shape[:-1]}, got {targets.shape}{hint}")
    targets = targets.astype(np.int64, copy=False)
    counted = None if ignore_index is None else targets != check_size("ignore_index", ignore_index, minimum=-(2**63))
    rows = counting_rows(targets.shape, mask, lengths, batch_first, ops, counted)
    labels = targets.reshape(-1) if rows is None else targets.reshape(-1)[rows]
    V = logits.shape[-1]
    labels, wrong = ops.bounded(labels, V)
    if wrong is not None:
        value = int(wrong[0])
        raise ValueError(
            f"targets: expected classes from 0 to {V - 1} ({name} have V = {V}), got {value}; "
            f"mask such targets, or leave them out with ignore_index={value}"
        )
    return Rows(ops, logits.reshape(targets.size, V), labels, rows, targets.shape)


def _one_hot_hint(targets, logits):
    """What to do with targets that have one axis more than classes have; "" for others."""
    if targets.shape == logits.shape:
        return ". Of one-hot targets give the classes: targets = targets.argmax(-1)"
    return ". Drop the last axis: targets = targets[..., 0]" if targets.shape == (*logits.shape[:-1], 1) else ""


def counting_rows(lead, mask, lengths, batch_first, ops, counted=None):
    """The indices of the places that count in an array of shape ``lead``; None if all do.

    counted: booleans of that shape, or None; a place must be True there, too.
    """
    valid = valid_places(lead, mask, lengths, batch_first, ops)
    if valid is not None:
        valid = ops.xp.broadcast_to(lift(valid, len(lead)), lead)
    if counted is not None:
        valid = counted if valid is None else valid & counted
    return None if valid is None else ops.xp.flatnonzero(valid)


def class_weights(weight, V, dtype, ops):
    """``weight`` as an array (V,) of ``dtype`` on the backend, checked; None for None."""
    if weight is None:
        return None
    weight = host_array(weight, "weight")
    if not (weight.dtype.kind in "iu" or is_float(weight.dtype)):
        raise DtypeError(f"weight: expected numbers, got {weight.dtype}")
    check_shape("weight", weight, (V,))
    with np.errstate(over="ignore"):
        weight = weight.astype(dtype)
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError(f"weight: expected finite numbers of at least 0, got {weight.tolist()}")
    return ops.xp.asarray(weight)


def weight_divisor(weights, xp):
    """What the weighted losses of rows are divided by for their mean: the sum of ``weights``, or 1 where it is 0."""
    total = weights.sum(dtype=np.float64)
    return xp.where(total == 0, 1.0, total)


# ---- arguments


def floats(value, name, ops):
    """``value`` as an array of ``ops`` in its compute dtype; raises DtypeError unless its dtype is in ``DTYPES``."""
    array = ops.asarray(value, name)
    if array.dtype.name not in DTYPES:
        raise DtypeError(f"{name}: expected {', '.join(DTYPES)}, got {array.dtype}")
    return upcast(array)


def loss_ops(name, value):
    """The ``Ops`` for the argument ``name`` of a loss; raises TypeError for a recurrent model's (output, state)."""
    if isinstance(value, tuple) and value and hasattr(value[0], "dtype"):
        raise TypeError(f"{name}: got a tuple. A recurrent model returns (output, state): give the first, output")
    return array_ops(value)


def check_same_dtype(other, y, name, dtype, value):
    """Raise DtypeError unless the argument ``other``, the array y made of ``value``, has the dtype of ``name``."""
    if y.dtype != dtype:
        raise DtypeError(
            f"{other}: dtype ({y.dtype}) does not match that of {name} ({dtype}). "
            f"Convert it: {other} = {conversion(other, value, str(dtype))}"
        )


def upstream(dloss, shape, flat, divisor, dtype, ops):
    """``dloss / divisor`` for every row, shape ``flat``; ``dloss`` is a number or has the loss's ``shape``."""
    dloss = ops.asarray(dloss, "dloss")
    if not (dloss.dtype.kind in "iu" or is_float(dloss.dtype)):
        raise DtypeError(f"dloss: expected numbers, got {dloss.dtype}")
    if dloss.ndim:
        check_shape("dloss", dloss, shape)
        return dloss.astype(dtype, copy=False).reshape(flat)
    with quiet():
        return ops.xp.broadcast_to((dloss.astype(np.float64) / divisor).astype(dtype), flat)


def quiet():
    """NumPy without floating-point warnings: a loss that is not finite says so by its value."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")
