"""Losses of each element on its own: squared, absolute, Huber's, and the cross-entropy of yes/no answers."""

from __future__ import annotations

from functools import partial

from .._typing import Array, Backward, Lengths
from ..errors import check_number
from .common import elementwise


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
    return elementwise(_squared, _squared_gradient, arguments, mask, lengths, batch_first, reduction)


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
    return elementwise(_absolute, _absolute_gradient, arguments, mask, lengths, batch_first, reduction)


def huber(
    prediction: Array,
    target: Array,
    mask: Array | None = None,
    *,
    delta: float = 1.0,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Huber's loss of d = prediction - target: d^2 / 2 up to |d| = delta, and delta (|d| - delta / 2) beyond it.

    Parameters
    ----------
    prediction, target : Array
        Of equal shape, usually (T, B, F), and equal dtype.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over all elements that count, features included.
    delta : float
        Where the square goes over into a line, above 0.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to prediction.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        The two differ in shape or dtype; delta is not above 0; see the module's text.

    Notes
    -----
    Source: Huber, "Robust estimation of a location parameter", 1964.

    Examples
    --------
    >>> loss, backward = huber(np.array([1.5, 5.0]), np.array([1.0, 3.0]), reduction="sum")
    >>> float(loss), backward().tolist()                                        # 0.125 + 1.5
    (1.625, [0.5, 1.0])
    """
    delta = check_number("delta", delta, 0, low_open=True)
    arguments = {"prediction": prediction, "target": target}
    parts = partial(_huber, delta), partial(_huber_gradient, delta)
    return elementwise(*parts, arguments, mask, lengths, batch_first, reduction)


def smooth_l1(
    prediction: Array,
    target: Array,
    mask: Array | None = None,
    *,
    beta: float = 1.0,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Absolute error |d| with a rounded corner: d^2 / (2 beta) where |d| < beta, |d| - beta / 2 beyond it.

    It is Huber's loss divided by its delta: the slope of the lines is 1 whatever beta is.

    Parameters
    ----------
    prediction, target : Array
        Of equal shape, usually (T, B, F), and equal dtype.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over all elements that count, features included.
    beta : float
        Half the width of the corner, at least 0; 0 makes this ``mae``.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to prediction.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        The two differ in shape or dtype; beta is negative; see the module's text.

    Notes
    -----
    Source: Girshick, "Fast R-CNN", ICCV 2015.

    Examples
    --------
    >>> loss, backward = smooth_l1(np.array([1.5, 5.0]), np.array([1.0, 3.0]), beta=0.5, reduction="sum")
    >>> float(loss), backward().tolist()                                        # 0.25 + 1.75
    (2.0, [1.0, 1.0])
    """
    beta = check_number("beta", beta, 0)
    if beta == 0:
        return mae(prediction, target, mask, lengths=lengths, batch_first=batch_first, reduction=reduction)
    arguments = {"prediction": prediction, "target": target}
    parts = partial(_smooth, beta), partial(_smooth_gradient, beta)
    return elementwise(*parts, arguments, mask, lengths, batch_first, reduction)


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
    return elementwise(_binary, _binary_gradient, arguments, mask, lengths, batch_first, reduction)


# ---- elementwise losses: the loss of each element, and its gradient with respect to the first argument


def _squared(x, y, xp):
    return xp.square(x - y)


def _squared_gradient(x, y, xp):
    return 2 * (x - y)


def _absolute(x, y, xp):
    return xp.abs(x - y)


def _absolute_gradient(x, y, xp):
    return xp.sign(x - y)


def _huber(delta, x, y, xp):
    d = xp.abs(x - y)
    return xp.where(d <= delta, 0.5 * xp.square(d), delta * (d - 0.5 * delta))


def _huber_gradient(delta, x, y, xp):
    return xp.clip(x - y, -delta, delta)


def _smooth(beta, x, y, xp):
    d = xp.abs(x - y)
    return xp.where(d < beta, 0.5 * xp.square(d) / beta, d - 0.5 * beta)


def _smooth_gradient(beta, x, y, xp):
    return xp.clip((x - y) / beta, -1, 1)


def _binary(x, y, xp):
    other = xp.where(x > 0, 1 - y, -y)  # the target's probability of the answer that x speaks against, with x's sign
    return xp.where(other == 0, 0, x * other) + xp.log1p(xp.exp(xp.minimum(-x, x)))  # of 0 the branch of x <= 0


def _binary_gradient(x, y, xp):
    # For positive x this is (1 - y) - sigmoid(-x): 1 - sigmoid(x) would cancel to zero where x is large.
    e = xp.exp(xp.minimum(x, -x))  # -|x|; at 0 with the derivative of the branch that is taken below
    small = e / (1 + e)  # sigmoid(-|x|)
    return xp.where(x < 0, small - y, (1 - y) - small)
