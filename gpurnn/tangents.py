"""Forward mode: derivatives along a direction, of gradients too, which makes Hessian-vector products.

A copy of the model runs as array code over dual numbers (backends/dual), which carry the derivative along the direction
through forward pass, loss and backward pass alike. So every rule of differentiation is applied once more to the very
equations that the backward pass computes: the result is exact, and there is no second set of equations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ._typing import Array
from .arrays import host_array
from .backends.dual.array import REAL, Dual
from .backends.dual.ops import DUAL_OPS
from .dtypes import is_float
from .errors import check_shape, described
from .module import Module

__all__ = ["hvp", "jvp"]


def hvp(model: Module, function: Callable[[Module], Any], vector: Mapping[str, Array]) -> dict[str, Array]:
    """A Hessian-vector product: how the gradients change where the parameters move along ``vector``.

    With H the matrix of second derivatives of the loss with respect to all parameters this is H v, without H. It is
    exact, not a finite difference, and takes a few times as long as both passes of array code, on any backend.

    Parameters
    ----------
    model : Module
        A layer or a model.
    function : callable
        ``function(model)`` runs a forward pass, a loss and the backward pass. The model that it gets is a copy on NumPy
        in float64, whose ``grads`` are zero; take parameters, layers and ``ops`` from it. Draws are those of the next
        call of ``model``, which itself stays as it is. Arrays from outside may be of any dtype and on any device.
    vector : dict
        Name of a parameter -> array of its shape. Parameters that are not named do not move.

    Returns
    -------
    dict
        Name of each parameter that is not frozen -> array of its shape, of the model's ``compute_dtype``.

    Raises
    ------
    RuntimeError
        Where the function leaves no gradients in the model that it gets.
    KeyError, ShapeError
        For a vector of an unknown name, or of another shape than the parameter.
    TypeError
        Where ``function`` uses what has no derivative here, such as a function of NumPy without a rule, or makes a
        plain array or number of one that carries a derivative.

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.GRU(3, 4), gpurnn.Linear(4, 1))
    >>> x, y = np.ones((5, 2, 3), "float32"), np.zeros((5, 2, 1), "float32")
    >>> def gradient(model):
    ...     output, state, backward = model.forward(x)
    ...     loss, dloss = gpurnn.mse(output, y)
    ...     backward(dloss())
    >>> product = gpurnn.hvp(model, gradient, {"1.bias": [1.0]})
    >>> product["1.bias"].tolist()                # the second derivative of the mean of (h + b)^2
    [2.0]
    """

    def gradients(copied):
        function(copied)
        if not np.any(copied.flat_grads.value) and not np.any(copied.flat_grads.tangent):
            raise RuntimeError(
                "function: the model that it got has no gradients. It should run forward and backward on that model, "
                "its argument, and not on another one"
            )
        frozen = set(copied.frozen)
        return {name: array for name, array in copied.grads.items() if name not in frozen}

    return jvp(model, gradients, vector)[1]


def jvp(
    model: Module,
    function: Callable[..., Any],
    vector: Mapping[str, Array],
    inputs: Sequence[Array] = (),
    input_vectors: Sequence[Array | None] = (),
) -> tuple[Any, Any]:
    """The derivative of anything that a function of a model returns, along a direction.

    Parameters
    ----------
    model : Module
        A layer or a model.
    function : callable
        ``function(model, *inputs)``, as for ``hvp``. It may return an array, or tuples, lists and dicts of arrays: an
        output, a state, a loss, or gradients that a backward function has returned.
    vector : dict
        As for ``hvp``; {} if only the inputs move.
    inputs : sequence of Array
        Arrays of floating-point numbers that the function takes.
    input_vectors : sequence of Array or None
        The direction of each input, of its shape. None, or nothing at all: they do not move.

    Returns
    -------
    result, tangent
        What the function returns, and its derivative in the same structure; arrays are of the model's
        ``compute_dtype``. The derivative of what is no array of floating-point numbers is None.

    Raises
    ------
    KeyError, ShapeError, TypeError
        As ``hvp``.

    Examples
    --------
    >>> layer = gpurnn.Linear(2, 1, bias=False)
    >>> layer.params["weight"] = [[3.0, 4.0]]
    >>> y, dy = gpurnn.jvp(layer, lambda layer, x: layer(x), {"weight": [[1.0, 0.0]]}, [[5.0, 6.0]], [[0.0, 1.0]])
    >>> y.tolist(), dy.tolist()                   # 3 * 5 + 4 * 6, and 1 * 5 + 4 * 1
    ([39.0], [9.0])
    """
    copied = _dual_copy(model, vector)
    for name, given in (("inputs", inputs), ("input_vectors", input_vectors)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple of arrays, got {described(given)}: give [{name[:-1]}]")
    if input_vectors and len(input_vectors) != len(inputs):
        raise TypeError(f"input_vectors: expected one for each of {len(inputs)} inputs, got {len(input_vectors)}")
    given = []
    for number, (value, direction) in enumerate(zip(inputs, input_vectors or [None] * len(inputs), strict=True)):
        value = host_array(value, f"inputs[{number}]").astype(REAL)
        given.append(Dual(value, _direction(direction, value.shape, f"input_vectors[{number}]")))
    returned = function(copied, *given)
    return tuple(_outward(model, returned, kind) for kind in ("value", "tangent"))


def _dual_copy(model, vector):
    """A copy of ``model`` over ``Dual`` arrays, whose parameters move along ``vector``."""
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a gpurnn layer, got {described(model)}")
    if not isinstance(vector, Mapping):
        raise TypeError(f"vector: expected a dict, name of a parameter -> array, got {described(vector)}")
    copied = copy.deepcopy(model)
    values = host_array(copied.flat_params, "params").astype(REAL)
    tangents = np.zeros_like(values)
    views = copied._views(tangents)
    for name, direction in vector.items():
        views[name][...] = _direction(direction, model.params[name].shape, f"vector[{name!r}]")
    for _, module in copied.modules():
        module.__dict__.update(ops=DUAL_OPS, xp=DUAL_OPS.xp, dtype=REAL, compute_dtype=REAL)
        module.buffers = {name: _still(host_array(array, name)) for name, array in module.buffers.items()}
    copied._bind(Dual(values, tangents), DUAL_OPS.xp.zeros(values.shape), copied._layout)
    return copied


def _still(array):
    """An array of floating-point numbers as a ``Dual`` that does not move; another one as it is."""
    return Dual(array.astype(REAL), np.zeros(array.shape)) if is_float(array.dtype) else array


def _direction(direction, shape, name):
    if direction is None:
        return np.zeros(shape)
    direction = host_array(direction, name)
    check_shape(name, direction, shape)
    return direction.astype(REAL)


def _outward(model, returned, kind):
    """The values, or the tangents, of everything that a function has returned, on the model's backend."""
    if isinstance(returned, Mapping):
        return {name: _outward(model, part, kind) for name, part in returned.items()}
    if isinstance(returned, (tuple, list)):
        return type(returned)([_outward(model, part, kind) for part in returned])
    if not isinstance(returned, Dual):
        if kind == "value":
            return returned
        moves_not = isinstance(returned, np.ndarray) and is_float(returned.dtype)
        return model.xp.zeros(returned.shape, model.compute_dtype) if moves_not else None
    return model.xp.asarray(getattr(returned, kind).astype(model.compute_dtype))
