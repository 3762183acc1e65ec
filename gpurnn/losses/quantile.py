"""The quantile loss, whose minimum is a quantile of the target: for forecasts with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .._typing import Array, Backward, Lengths
from ..errors import ShapeError, check_number
from . import common


def quantile_loss(
    prediction: Array,
    target: Array,
    quantiles: Sequence[float],
    mask: Array | None = None,
    *,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Pinball loss of e = target - prediction: q e where e is positive, (q - 1) e where it is negative.

    For q = 0.5 it is half the absolute error. The gradient is 0 where the two are equal.

    Parameters
    ----------
    prediction : Array
        (..., Q), usually (T, B, F, Q) or (T, B, Q): one forecast for each quantile.
    target : Array
        (...), the shape of prediction without its last axis, and of its dtype.
    quantiles : sequence of float
        The Q quantiles, each above 0 and below 1, such as ``[0.1, 0.5, 0.9]``.
    mask, lengths, batch_first, reduction
        See the module's text; they say which elements of the target count. The mean is over all of these and over the
        quantiles.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to prediction.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        Shapes or dtypes do not fit; a quantile is out of its range; see the module's text.

    Notes
    -----
    Source: Koenker and Bassett, "Regression quantiles", Econometrica 1978.

    Examples
    --------
    >>> loss, backward = quantile_loss(np.array([[1.0, 4.0]]), np.array([3.0]), [0.1, 0.9], reduction="none")
    >>> loss.round(6).tolist(), backward().round(6).tolist()
    ([[0.2, 0.1]], [[-0.1, 0.1]])
    """
    if isinstance(quantiles, (int, float)) or np.ndim(quantiles) != 1 or not len(quantiles):
        raise ShapeError(f"quantiles: expected a list of numbers such as [0.1, 0.5, 0.9], got {quantiles!r}")
    levels = [
        check_number(f"quantiles[{n}]", float(q), 0, 1, low_open=True, high_open=True) for n, q in enumerate(quantiles)
    ]
    shape = common.loss_ops("prediction", prediction).asarray(prediction, "prediction").shape
    if shape[-1:] != (len(levels),):
        raise ShapeError(
            f"prediction: expected shape (..., {len(levels)}), one number for each of the quantiles, got {shape}"
        )
    arguments = {"prediction": prediction, "target": target}
    parts = partial(_pinball, levels), partial(_pinball_gradient, levels)
    return common.elementwise(*parts, arguments, mask, lengths, batch_first, reduction, len(levels))


def _pinball(levels, x, y, xp):
    q = xp.asarray(levels, x.dtype)
    e = y[:, :, None] - x.reshape(*y.shape, len(levels))
    return xp.maximum(q * e, (q - 1) * e).reshape(x.shape)


def _pinball_gradient(levels, x, y, xp):
    q = xp.asarray(levels, x.dtype)
    e = y[:, :, None] - x.reshape(*y.shape, len(levels))
    return xp.where(e < 0, 1 - q, xp.where(e > 0, -q, e)).reshape(x.shape)  # e is 0 or NaN where it is neither
