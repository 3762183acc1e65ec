"""Losses of targets that are classes, or probabilities of all classes: softmax cross-entropy and its log form."""

from __future__ import annotations

import math

import numpy as np

from .._typing import Array, Backward, Lengths
from ..dtypes import EPSILON, dtype_name, is_float, upcast
from ..errors import DtypeError, check_choice, check_number, check_shape
from . import common
from .common import (
    REDUCTIONS,
    Rows,
    check_same_dtype,
    class_rows,
    class_weights,
    counting_rows,
    floats,
    quiet,
    upstream,
    weight_divisor,
)


def cross_entropy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weight: Array | None = None,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> tuple[Array, Backward]:
    """Softmax cross-entropy in nats: -log softmax(logits)[target], or -sum(targets * log softmax(logits)).

    Parameters
    ----------
    logits : Array
        (..., V), usually (T, B, V); also (N, V) or (V,).
    targets : Array
        Integers (...): classes from 0 to V - 1. Or probabilities (..., V) of the logits' dtype, which add up to 1 but
        for rounding. On the host that is checked; on a GPU it is not, as the check would have to wait for it.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over the targets that count.
    weight : Array, optional
        (V,) numbers of at least 0, one for each class. Each term of the sum over classes is multiplied by its own. The
        mean over targets that are classes is divided by the weights of these; that over probabilities is not.
    label_smoothing : float
        From 0 to 1: this part of the target's probability is spread evenly over all V classes (Szegedy et al.,
        "Rethinking the Inception architecture", CVPR 2016, section 7).
    ignore_index : int, optional
        Targets of this value do not count, as if masked. Probabilities have none.

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
        Targets have another shape or dtype, are out of range or no probabilities; weights are negative; see the
        module's text.

    Examples
    --------
    >>> loss, backward = cross_entropy(np.zeros((1, 1, 4)), np.array([[2]]))
    >>> float(loss)                                                             # log 4
    1.3862943611198906
    >>> loss, backward = cross_entropy(np.zeros((3, 2)), np.array([0, 0, 1]), weight=[1, 2], reduction="none")
    >>> (loss / np.log(2)).tolist()
    [1.0, 1.0, 2.0]
    """
    check_choice("reduction", reduction, REDUCTIONS)
    smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
    ops = common.loss_ops("logits", logits)
    given, target = ops.asarray(logits, "logits"), ops.asarray(targets, "targets")
    places = (mask, lengths, batch_first)
    if is_float(target.dtype) and target.ndim == given.ndim > 0:
        found = _probability_rows(given, target, targets, places, ignore_index, ops)
        weights = class_weights(weight, found.values.shape[1], found.values.dtype, ops)
        soft = _smoothed(upcast(target).reshape(found.values.shape), weights, smoothing)
        divisor = max(found.count, 1)
        return _soft_loss(found, soft, given.dtype, divisor if reduction == "mean" else 1, reduction)
    found = class_rows(given, target, *places, ignore_index)
    weights = class_weights(weight, found.values.shape[1], found.values.dtype, ops)
    divisor = max(found.count, 1) if weights is None else weight_divisor(weights[found.labels], ops.xp)
    divisor = divisor if reduction == "mean" else 1
    if weights is not None and smoothing:
        soft = _smoothed_labels(found, weights, smoothing)
        return _soft_loss(found, soft, given.dtype, divisor, reduction)
    return _hard_loss(found, weights, given.dtype, divisor, reduction, smoothing)


def nll_loss(
    log_probs: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weight: Array | None = None,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> tuple[Array, Backward]:
    """Negative log-likelihood, -log_probs[target]: the cross-entropy of a model that returns log-probabilities.

    Parameters
    ----------
    log_probs : Array
        (..., V), usually (T, B, V): logarithms of probabilities. They are not checked.
    targets : Array
        Integers (...): classes from 0 to V - 1.
    mask, lengths, batch_first, reduction, weight
        See the module's text; the mean is over the targets that count.
    ignore_index : int, optional
        Targets of this value do not count, as if masked.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to log_probs.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        As for ``cross_entropy``.

    Examples
    --------
    >>> loss, backward = nll_loss(np.log([[0.25, 0.75]]), np.array([1]))
    >>> round(float(loss), 4), backward().tolist()
    (0.2877, [[0.0, -1.0]])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    ops = common.loss_ops("log_probs", log_probs)
    given = ops.asarray(log_probs, "log_probs").dtype
    found = class_rows(log_probs, targets, mask, lengths, batch_first, ignore_index, "log_probs")
    xp, (N, V), dtype = ops.xp, found.values.shape, found.values.dtype
    weights = class_weights(weight, V, dtype, ops)
    of_rows = 1 if weights is None else weights[found.labels]
    divisor = max(found.count, 1) if weights is None else weight_divisor(of_rows, xp)
    divisor = divisor if reduction == "mean" else 1
    rows = xp.arange(N) if found.rows is None else found.rows
    with quiet():
        loss = found.reduced(-found.values[rows, found.labels].astype(np.float64) * of_rows, divisor, reduction)

    def backward(dloss=1.0):
        dlosses = upstream(dloss, loss.shape, (N, 1), divisor, dtype, ops)
        d = xp.zeros((N, V), dtype)
        with quiet():
            d[rows, found.labels] = -dlosses[rows, 0] * of_rows
            return d.reshape(*found.lead, V).astype(given, copy=False)

    return loss, backward


# ---- one class for each target: the softmax of the backends


def _hard_loss(found, weights, given, divisor, reduction, smoothing):
    """``cross_entropy`` of ``Rows`` with labels; weights are None where there is a smoothing. given: the dtype."""
    ops, logits, labels, rows, _ = found
    xp, dtype, N = ops.xp, logits.dtype, len(logits)
    of_rows = None
    if weights is not None:
        of_rows = xp.zeros((N, 1), dtype)
        of_rows[found.index, 0] = weights[labels]
    with quiet():
        losses, highest, total = ops.softmax_forward(logits, rows, labels, smoothing)
        if of_rows is not None:
            losses = losses * of_rows[found.index, 0]
        loss = found.reduced(losses, divisor, reduction)

    def backward(dloss=1.0, out=None):
        dlosses = upstream(dloss, loss.shape, (N, 1), divisor, dtype, ops)
        with quiet():
            if of_rows is not None:
                dlosses = dlosses * of_rows

            def gradient(place):
                return ops.softmax_backward(logits, rows, labels, smoothing, highest, total, dlosses, place)

            return _delivered(gradient, found, given, out)

    return loss, backward


def _delivered(gradient, found, given, out):
    """``gradient(place)``, an array like ``found.values``, in the caller's shape, dtype and array ``out``.

    place: the array that ``gradient`` writes to, or None for a fresh one.
    """
    shape, dtype, place = (*found.lead, found.values.shape[1]), found.values.dtype, None
    if out is not None:
        _check_out(out, given, shape, found.ops.xp)
        if out.flags.c_contiguous and getattr(out.flags, "aligned", True) and given == dtype:
            place = out.reshape(found.values.shape)
    d = gradient(place)
    if place is not None:
        return out
    d = d.reshape(shape).astype(given, copy=False)
    if out is None:
        return d
    out[...] = d
    return out


def _check_out(out, dtype, shape, xp):
    """Raise unless ``out`` is an array of this dtype and shape that may be written to."""
    if not isinstance(out, xp.ndarray) or out.dtype != dtype:
        raise DtypeError(f"out: expected an array of {dtype}, got {getattr(out, 'dtype', type(out).__name__)}")
    check_shape("out", out, shape)
    if not getattr(out.flags, "writeable", True):  # compiled code would write to it all the same
        raise ValueError("out: expected an array that may be written to, got a read-only one")


# ---- a number for each class: array code


def _probability_rows(logits, targets, value, places, ignore_index, ops):
    """``Rows`` of logits (..., V) whose targets are probabilities of the same shape, made of ``value``, checked."""
    values, lead = floats(logits, "logits", ops), logits.shape[:-1]
    check_same_dtype("targets", targets, "logits", logits.dtype, value)
    check_shape("targets", targets, logits.shape)
    if ignore_index is not None:
        raise ValueError(
            f"ignore_index: targets that are probabilities have no class to ignore, got {ignore_index}. Use mask="
        )
    rows = counting_rows(lead, *places, ops)
    found = Rows(ops, values.reshape(math.prod(lead), logits.shape[-1]), None, rows, lead)
    if ops.xp is np:  # a GPU would have to be waited for
        _check_probabilities(found, targets)
    return found


def _check_probabilities(found, targets):
    """Raise ValueError for a row of ``targets``, among those that count, that is no distribution. NaN passes.

    A softmax in this dtype rounds V - 1 sums and each quotient, by at most half of EPSILON each: its probabilities add
    up to 1 within V / 2 of it. (V + 8) of it leave room for what a caller does after that, such as smoothing, and
    bfloat16's once for targets that were stored in 16 bits.
    """
    V = found.values.shape[1]
    rows, allowed = (
        targets.reshape(found.values.shape),
        (V + 8) * EPSILON[dtype_name(targets.dtype)] + EPSILON["bfloat16"],
    )
    for _, index in found.blocks():
        part = rows[index]
        totals = part.sum(axis=1, dtype=np.float64)
        negative, wrong = part < 0, abs(totals - 1) > allowed
        if negative.any() or wrong.any():
            got = part[negative][0] if negative.any() else f"a sum of {float(totals[wrong][0])}"
            raise ValueError(
                f"targets: expected probabilities of all {V} classes (one-hot, or at least 0 with a sum of 1), got "
                f"{got}. For class numbers give integers; for other numbers take another loss, such as mse"
            )


def _smoothed(targets, weights, smoothing):
    """A function of a block, as ``Rows.blocks`` yields it: q (n, V), the factors of -log softmax, of probabilities."""

    def soft(part, index):
        q = targets[index]
        if smoothing:
            q = q * (1 - smoothing) + smoothing / targets.shape[1]
        return q if weights is None else q * weights

    return soft


def _smoothed_labels(found, weights, smoothing):
    """The same for labels with weights: (1 - s) w_y at the label y, and s w_c / V at every class c."""
    xp, spread = found.ops.xp, weights * (smoothing / len(weights))

    def soft(part, index):
        labels = found.labels[part]
        q = xp.zeros((len(labels), len(weights)), weights.dtype)
        q += spread
        q[xp.arange(len(labels)), labels] += (1 - smoothing) * weights[labels]
        return q

    return soft


def _soft_loss(found, soft, given, divisor, reduction):
    """The loss -sum(q * log softmax(logits)) of each row, reduced; ``soft`` makes the factors q of a block.

    They need not add up to 1: with Q = sum(q), the loss of a row is Q log(sum(exp z)) - sum(q z), and its gradient
    Q softmax(z) - q. Where q is 0 a logit of -inf counts as 0.
    """
    ops, xp, logits, dtype = found.ops, found.ops.xp, found.values, found.values.dtype
    highest, total = xp.empty((found.count, 1), dtype), xp.empty((found.count, 1), np.float64)
    losses = xp.empty(found.count, np.float64)
    with quiet():
        for part, index in found.blocks():
            z, q = logits[index], soft(part, index)
            highest[part] = z.max(axis=1, keepdims=True)
            z = z - highest[part]
            scored = xp.where(q == 0, 0, q * z).sum(axis=1, dtype=np.float64)
            total[part] = xp.exp(z, out=z).sum(axis=1, dtype=np.float64, keepdims=True)
            losses[part] = q.sum(axis=1, dtype=np.float64) * xp.log(total[part, 0]) - scored
        loss = found.reduced(losses, divisor, reduction)

    def backward(dloss=1.0, out=None):
        dlosses = upstream(dloss, loss.shape, (len(logits), 1), divisor, dtype, ops)

        def gradient(place):
            dlogits = ops.derivative_array(logits, found.rows, place)
            for part, index in found.blocks():
                q, scale = soft(part, index), dlosses[index]
                d = logits[index] - highest[part]
                xp.exp(d, out=d)
                d *= (q.sum(axis=1, dtype=np.float64, keepdims=True) / total[part]).astype(dtype)
                d -= q
                dlogits[index] = d * scale
            return dlogits

        with quiet():
            return _delivered(gradient, found, given, out)

    return loss, backward
