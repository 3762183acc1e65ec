"""Gradient clipping: by the norm of all gradients together, or entry by entry."""

from __future__ import annotations

import math

from .._typing import Array
from ..errors import check_number
from ..module import Module
from .blocks import check_model


def clip_grad_norm(model: Module, max_norm: float) -> Array:
    """Scale all gradients in place by ``min(1, max_norm / (norm + 1e-6))``; return their norm before that.

    Gradients of frozen parameters become zero and do not count. Where the norm is not finite the gradients stay as
    they are, so that the caller can see which of them broke.

    Parameters
    ----------
    model : Module
        The model whose ``flat_grads`` are scaled.
    max_norm : float
        Upper limit of the norm, above 0; ``math.inf`` only measures.

    Returns
    -------
    Array
        Euclidean norm over all gradients together, a float64 scalar of the backend. The squares are summed in float64
        in a fixed order. Reading it waits for the GPU; the call itself does not.

    Raises
    ------
    TypeError, ValueError
        For a ``model`` that is no Module, or a ``max_norm`` that is not above 0.

    Notes
    -----
    Source: Pascanu, Mikolov, Bengio, ICML 2013, in the form of ``torch.nn.utils.clip_grad_norm_``.

    Examples
    --------
    >>> model = gpurnn.Linear(2, 1)
    >>> norm = gpurnn.clip_grad_norm(model, 1.0)
    >>> if not math.isfinite(norm):
    ...     raise FloatingPointError(f"gradient norm is {norm}")
    """
    check_model(model)
    if max_norm != math.inf:
        check_number("max_norm", max_norm, 0.0, low_open=True)
    _zero_frozen(model)
    return model.ops.clip_norm(model.flat_grads, max_norm)


def clip_grad_value(model: Module, value: float) -> None:
    """Limit every gradient to [-value, value], in place. NaN stays NaN; gradients of frozen parameters become zero.

    Parameters
    ----------
    model : Module
        The model whose ``flat_grads`` are limited.
    value : float
        Largest magnitude of an entry, above 0.

    Raises
    ------
    TypeError, ValueError
        For a ``model`` that is no Module, or a ``value`` that is not a finite number above 0.

    Examples
    --------
    >>> model = gpurnn.Linear(2, 1)
    >>> model.grads["bias"] = 3.0
    >>> gpurnn.clip_grad_value(model, 0.5)
    >>> model.grads["bias"].tolist()
    [0.5]
    """
    check_model(model)
    value = check_number("value", value, 0.0, low_open=True)
    _zero_frozen(model)
    model.xp.clip(model.flat_grads, -value, value, out=model.flat_grads)


def _zero_frozen(model: Module) -> None:
    """Set the gradients of frozen parameters to zero."""
    for name in model.frozen:
        model.grads[name][...] = 0
