"""Losses over all timesteps at once, each returned with its own backward.

>>> logits, targets = np.zeros((3, 2, 4)), np.zeros((3, 2), int)               # (T, B, V), (T, B)
>>> loss, backward = cross_entropy(logits, targets, lengths=[3, 1])
>>> backward().shape                                                           # the gradient with respect to logits
(3, 2, 4)

What every loss here has in common:

- It returns ``(loss, backward)``. ``loss`` is a scalar of the first argument's dtype, or an array with
  ``reduction="none"``. ``backward(dloss=1.0)`` returns the gradient with respect to the first argument, a fresh array
  of its shape and dtype. ``dloss`` is a number, or with ``"none"`` a number or an array of the loss's shape.
  ``backward`` may be called again.
- ``backward`` recomputes results of the forward pass instead of saving them, so the gradient is the only large array
  that a loss ever makes (a saved softmax would be a second one). The arguments are saved by reference: do not change
  them in place before ``backward``.
- ``mask``: booleans, True where a place counts. Its shape is the leading axes of the array, usually (T, B).
  ``lengths``: integers (B,); step t of sequence b counts where t < lengths[b]. The array is then (T, B, ...), or
  (B, T, ...) with ``batch_first=True``. With both, a place counts where both say so.
- Places that do not count are left out of every sum. NaN, infinities and targets out of range there change nothing,
  and the gradient there is exactly zero.
- ``reduction``: ``"mean"`` over the elements that count, ``"sum"``, or ``"none"``: one loss for each element, zero
  where it does not count. Sums are accumulated in float64. If nothing counts, or the batch is empty, the mean is 0
  with zero gradients (PyTorch: nan).
- dtypes are float32, float64, float16 and bfloat16. The 16-bit ones are computed in float32, and so is their loss.
  Arrays live where the first argument lives; others are copied to it from the host.
- Each raises ShapeError, DtypeError, BackendError or ValueError, naming the argument, before anything is computed. A
  loss that overflows is inf or nan, without a warning, as on a GPU.
"""

from __future__ import annotations

import math

import numpy as np

from ._typing import Array, Backward, Lengths
from .backends import array_ops
from .backends.ops import blocks
from .dtypes import DTYPES, is_float, upcast
from .errors import DtypeError, ShapeError, check_choice, check_number, check_shape, check_size
from .masks import lift, valid_places

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> tuple[Array, Backward]:
    """Softmax cross-entropy in nats: -log softmax(logits)[target].

    Parameters
    ----------
    logits : Array
        (..., V), usually (T, B, V); also (N, V) or (V,).
    targets : Array
        Integers (...): classes from 0 to V - 1.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over the targets that count.
    label_smoothing : float
        From 0 to 1: this part of the target's probability is spread evenly over all V classes (Szegedy et al.,
        "Rethinking the Inception architecture", CVPR 2016, section 7).
    ignore_index : int, optional
        Targets of this value do not count, as if masked.

    Returns
    -------
    loss : Array
        A scalar, or (...) with ``reduction="none"``.
    backward : callable
        ``backward(dloss=1.0, out=None)`` returns the gradient with respect to logits, in ``out`` where given, an array
        like the logits. It may be the logits themselves: this saves the largest array of a language model, and the
        backward cannot be called again.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        Targets have another shape, are not integers or are out of range; see the module's text.

    Examples
    --------
    >>> loss, backward = cross_entropy(np.zeros((1, 1, 4)), np.array([[2]]))
    >>> float(loss)                                                             # log 4
    1.3862943611198906
    """
    check_choice("reduction", reduction, REDUCTIONS)
    smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
    given = array_ops(logits).asarray(logits, "logits").dtype
    classes = class_rows(logits, targets, mask, lengths, batch_first, ignore_index)
    return _softmax_loss(*classes, given, smoothing, reduction)


def _softmax_loss(ops, logits, labels, rows, lead, given, smoothing, reduction):
    """``cross_entropy`` of what ``class_rows`` returns; given: the dtype of the caller's logits."""
    xp, dtype, (N, V) = ops.xp, logits.dtype, logits.shape
    divisor = max(labels.size, 1) if reduction == "mean" else 1
    with quiet():
        losses, highest, total = ops.softmax_forward(logits, rows, labels, smoothing)
        if reduction == "none":
            loss = xp.zeros(N, dtype)
            loss[slice(None) if rows is None else rows] = losses
            loss = loss.reshape(lead)
        else:
            loss = (losses.sum() / divisor).astype(dtype)

    def backward(dloss=1.0, out=None):
        dlosses = upstream(dloss, loss.shape, (N, 1), divisor, dtype, ops)
        shape, place = (*lead, V), None
        if out is not None:
            _check_out(out, given, shape, xp)
            if out.flags.c_contiguous and getattr(out.flags, "aligned", True) and given == dtype:
                place = out.reshape(N, V)
        with quiet():
            dlogits = ops.softmax_backward(logits, rows, labels, smoothing, highest, total, dlosses, place)
            if place is not None:
                return out
            dlogits = dlogits.reshape(shape).astype(given, copy=False)
            if out is None:
                return dlogits
            out[...] = dlogits
        return out

    return loss, backward


def _check_out(out, dtype, shape, xp):
    """Raise unless ``out`` is an array of this dtype and shape that may be written to."""
    if not isinstance(out, xp.ndarray) or out.dtype != dtype:
        raise DtypeError(f"out: expected an array of {dtype}, got {getattr(out, 'dtype', type(out).__name__)}")
    check_shape("out", out, shape)
    if not getattr(out.flags, "writeable", True):  # compiled code would write to it all the same
        raise ValueError("out: expected an array that may be written to, got a read-only one")


def mse(
    prediction: Array,
    target: Array,
    mask: Array | None = None,
    *,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Squared error, (prediction - target)^2.

    Parameters
    ----------
    prediction, target : Array
        Of equal shape, usually (T, B, F), and equal dtype.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over all elements that count, features included.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to prediction.

    Raises
    ------
    ShapeError, DtypeError
        The two differ in shape or dtype; see the module's text.

    Examples
    --------
    >>> loss, backward = mse(np.array([1.0, 5.0]), np.array([1.0, 3.0]))
    >>> float(loss), backward().tolist()
    (2.0, [0.0, 2.0])
    """
    arguments = {"prediction": prediction, "target": target}
    return _elementwise(_squared, _squared_gradient, arguments, mask, lengths, batch_first, reduction)


def mae(
    prediction: Array,
    target: Array,
    mask: Array | None = None,
    *,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Absolute error, |prediction - target|; its gradient is 0 where the two are equal.

    Parameters
    ----------
    prediction, target : Array
        Of equal shape, usually (T, B, F), and equal dtype.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over all elements that count, features included.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to prediction.

    Raises
    ------
    ShapeError, DtypeError
        The two differ in shape or dtype; see the module's text.

    Examples
    --------
    >>> loss, backward = mae(np.array([1.0, 5.0]), np.array([1.0, 3.0]))
    >>> float(loss), backward().tolist()
    (1.0, [0.0, 0.5])
    """
    arguments = {"prediction": prediction, "target": target}
    return _elementwise(_absolute, _absolute_gradient, arguments, mask, lengths, batch_first, reduction)


def binary_cross_entropy_with_logits(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Cross-entropy in nats of independent yes/no answers with probability sigmoid(logits).

    It is computed as max(x, 0) - x y + log(1 + exp(-|x|)), which no logit overflows. An infinite logit has the loss 0
    where it is right and inf where it is wrong.

    Parameters
    ----------
    logits, targets : Array
        Of equal shape, usually (T, B, F), and equal dtype. Targets are probabilities, usually 0 or 1; they are not
        checked.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over all elements that count, features included.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to logits.

    Raises
    ------
    ShapeError, DtypeError
        The two differ in shape or dtype; see the module's text.

    Examples
    --------
    >>> loss, backward = binary_cross_entropy_with_logits(np.zeros(2), np.array([0.0, 1.0]))
    >>> float(loss), backward().tolist()
    (0.6931471805599453, [0.25, -0.25])
    """
    arguments = {"logits": logits, "targets": targets}
    return _elementwise(_binary, _binary_gradient, arguments, mask, lengths, batch_first, reduction)


# ---- elementwise losses: the loss of each element, and its gradient with respect to the first argument


def _squared(x, y, xp):
    return xp.square(x - y)


def _squared_gradient(x, y, xp):
    return 2 * (x - y)


def _absolute(x, y, xp):
    return xp.abs(x - y)


def _absolute_gradient(x, y, xp):
    return xp.sign(x - y)


def _binary(x, y, xp):
    other = xp.where(x > 0, 1 - y, -y)  # the target's probability of the answer that x speaks against, with x's sign
    return xp.where(other == 0, 0, x * other) + xp.log1p(xp.exp(-xp.abs(x)))


def _binary_gradient(x, y, xp):
    # For positive x this is (1 - y) - sigmoid(-x): 1 - sigmoid(x) would cancel to zero where x is large.
    e = xp.exp(-xp.abs(x))
    small = e / (1 + e)  # sigmoid(-|x|)
    return xp.where(x < 0, small - y, (1 - y) - small)


def _elementwise(value, gradient, arguments, mask, lengths, batch_first, reduction):
    """The loss ``value`` of each element, reduced, and its backward from the ``gradient`` of each element.

    arguments: the two argument names with their values, the differentiable one first.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    (name, x), (other, y) = arguments.items()
    ops = array_ops(x)
    xp = ops.xp
    given, y = ops.asarray(x, name).dtype, ops.asarray(y, other)
    x = floats(x, name, ops)
    if y.dtype != given:
        raise DtypeError(
            f"{other}: dtype ({y.dtype}) does not match that of {name} ({given}). "
            f"Convert it: {other} = {other}.astype({str(given)!r})"
        )
    check_shape(other, y, x.shape)
    y = upcast(y)
    shape, dtype = x.shape, x.dtype
    valid = valid_places(shape, mask, lengths, batch_first, ops)
    rows = None if valid is None else xp.flatnonzero(valid)
    N = x.size if valid is None else valid.size
    width = 1 if valid is None else math.prod(shape[valid.ndim :])
    x, y, count = x.reshape(N, width), y.reshape(N, width), N if rows is None else rows.size
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


# ---- what counts: shared by all losses and by the metrics


def class_rows(logits, targets, mask, lengths, batch_first, ignore_index):
    """Check logits (..., V) against integer targets (...); returns ``(ops, logits, labels, rows, lead)``.

    logits: (N, V) in the compute dtype, a view where possible. labels: int64, the targets of the rows that count, each
    in [0, V). rows: the indices of these rows among the N, or None if all count. lead: the shape of the targets.
    """
    ops = array_ops(logits)
    xp = ops.xp
    logits, targets = floats(logits, "logits", ops), ops.asarray(targets, "targets")
    if targets.dtype.kind not in "iu":
        raise DtypeError(f"targets: expected integers (class numbers), got {targets.dtype}")
    if logits.ndim == 0:
        raise ShapeError("logits: expected shape (..., V), got ()")
    check_shape("targets", targets, logits.shape[:-1])
    targets = targets.astype(np.int64, copy=False)
    valid = valid_places(targets.shape, mask, lengths, batch_first, ops)
    if valid is not None:
        valid = xp.broadcast_to(lift(valid, targets.ndim), targets.shape)
    if ignore_index is not None:
        counted = targets != check_size("ignore_index", ignore_index, minimum=-(2**63))
        valid = counted if valid is None else valid & counted
    rows = None if valid is None else xp.flatnonzero(valid)
    labels = targets.reshape(-1) if rows is None else targets.reshape(-1)[rows]
    V = logits.shape[-1]
    wrong = (labels < 0) | (labels >= V)
    if wrong.any():
        value = int(labels[wrong][0])
        raise ValueError(
            f"targets: expected classes from 0 to {V - 1} (logits have V = {V}), got {value}; "
            f"mask such targets, or leave them out with ignore_index={value}"
        )
    return ops, logits.reshape(targets.size, V), labels, rows, targets.shape


def floats(value, name, ops):
    """``value`` as an array of ``ops`` in its compute dtype; raises DtypeError unless its dtype is in ``DTYPES``."""
    array = ops.asarray(value, name)
    if array.dtype.name not in DTYPES:
        raise DtypeError(f"{name}: expected {', '.join(DTYPES)}, got {array.dtype}")
    return upcast(array)


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
