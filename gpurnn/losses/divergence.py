"""The Kullback-Leibler divergence of predicted from given probabilities."""

from __future__ import annotations

from .._typing import Array, Backward, Lengths
from ..errors import check_flag
from .common import elementwise


def kl_div(
    log_probs: Array,
    target: Array,
    mask: Array | None = None,
    *,
    log_target: bool = False,
    lengths: Lengths = None,
    batch_first: bool = False,
    reduction: str = "mean",
) -> tuple[Array, Backward]:
    """Terms of the Kullback-Leibler divergence in nats: target * (log(target) - log_probs).

    The divergence of one distribution is the sum of its V terms. ``"mean"`` is over all terms that count, as PyTorch's:
    V times that is the mean divergence of a timestep. Terms whose target is 0 are 0, also where log_probs is -inf
    (PyTorch: nan).

    Parameters
    ----------
    log_probs : Array
        (..., V), usually (T, B, V): logarithms of the predicted probabilities. They are not checked.
    target : Array
        Of the same shape and dtype: probabilities, or their logarithms with ``log_target``. They are not checked.
    mask, lengths, batch_first, reduction
        See the module's text; the mean is over all elements that count, classes included.
    log_target : bool
        Whether the target holds logarithms.

    Returns
    -------
    loss, backward
        See the module's text. ``backward(dloss=1.0)`` returns the gradient with respect to log_probs.

    Raises
    ------
    ShapeError, DtypeError, TypeError
        The two differ in shape or dtype; log_target is no flag; see the module's text.

    Examples
    --------
    >>> loss, backward = kl_div(np.log([[0.25, 0.75]]), np.array([[0.5, 0.5]]), reduction="sum")
    >>> round(float(loss), 4), backward().tolist()
    (0.1438, [[-0.5, -0.5]])
    """
    arguments = {"log_probs": log_probs, "target": target}
    parts = (_log_terms, _log_gradient) if check_flag("log_target", log_target) else (_terms, _gradient)
    return elementwise(*parts, arguments, mask, lengths, batch_first, reduction)


def _terms(x, y, xp):
    return xp.where(y == 0, 0, y * (xp.log(y) - x))


def _gradient(x, y, xp):
    return -y


def _log_terms(x, y, xp):
    p = xp.exp(y)
    return xp.where(p == 0, 0, p * (y - x))


def _log_gradient(x, y, xp):
    return -xp.exp(y)
