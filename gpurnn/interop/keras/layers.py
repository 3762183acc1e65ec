"""Layers that models of Keras have and gpurnn's own do without: activations, merged directions, masks from the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._typing import Array, Backward, Lengths, State
from ...dtypes import upcast
from ...errors import ShapeError, check_choice, check_flag, check_number, check_shape, check_size
from ...layers import Pooling, Sequential
from ...layers.common import check_features, check_gradient, sizes_text
from ...layers.sequential import _follow_features
from ...module import Module, backward_of


def _sigmoid(xp, x):
    with np.errstate(over="ignore"):  # exp of a large number: the result is 0
        return 1 / (1 + xp.exp(-x))


def _hard_sigmoid(xp, x):
    return xp.minimum(xp.maximum(x / 6 + 0.5, 0), 1)


# Activation by name: (xp, x) -> y, and (xp, x, y) -> dy/dx.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "identity": (lambda xp, x: x.copy(), lambda xp, x, y: 1.0),
    "relu": (lambda xp, x: xp.maximum(x, 0), lambda xp, x, y: x > 0),
    "tanh": (lambda xp, x: xp.tanh(x), lambda xp, x, y: (1 - y) * (1 + y)),
    "sigmoid": (_sigmoid, lambda xp, x, y: y * (1 - y)),
    "hard_sigmoid": (_hard_sigmoid, lambda xp, x, y: xp.where(abs(x) < 3, 1 / 6, 0.0)),
    "softsign": (lambda xp, x: x / (1 + abs(x)), lambda xp, x, y: 1 / (1 + abs(x)) ** 2),
    "softplus": (
        lambda xp, x: xp.maximum(x, 0) + xp.log1p(xp.exp(-abs(x))),
        lambda xp, x, y: _sigmoid(xp, x),
    ),
    "elu": (
        lambda xp, x: xp.where(x > 0, x, xp.expm1(xp.minimum(x, 0))),
        lambda xp, x, y: xp.where(x > 0, 1.0, y + 1),
    ),
    "silu": (
        lambda xp, x: x * _sigmoid(xp, x),
        lambda xp, x, y: _sigmoid(xp, x) * (1 + x * (1 - _sigmoid(xp, x))),
    ),
}
ACTIVATIONS = (*_FUNCTIONS, "softmax")


class Activation(Module):
    """A function of each number, or "softmax" over the last axis.

    Parameters
    ----------
    function : str
        "identity", "relu", "tanh", "sigmoid", "hard_sigmoid" (x / 6 + 1/2 between 0 and 1), "softsign", "softplus",
        "elu", "silu" or "softmax".
    backend, dtype
        As in ``Module``.

    Raises
    ------
    ValueError
        There is no such function.

    Examples
    --------
    >>> from gpurnn.interop.keras import Activation
    >>> Activation("relu")(np.array([-1, 2], "float32")).tolist()
    [0.0, 2.0]
    """

    function: str

    def __init__(self, function: str, *, backend: str = "auto", dtype: str = "float32") -> None:
        super().__init__(backend, dtype)
        self.function = check_choice("function", function, ACTIVATIONS)

    def __call__(self, x: Array) -> Array:
        """The output alone, for inference: y, of the shape and dtype of x. Raises as ``forward``."""
        return self.forward(x)[0]

    def forward(self, x: Array, *, retain: bool = False) -> tuple[Array, Backward]:
        """The output and its backward, for training.

        Parameters
        ----------
        x : Array
            Any shape, of the layer's dtype; with "softmax" at least one axis.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            A fresh array of x's shape.
        backward : callable
            ``backward(doutput)`` returns dx, of x's shape.

        Raises
        ------
        ShapeError, DtypeError
            x is a single number where a softmax needs several, or is not of the layer's dtype.
        """
        check_flag("retain", retain)
        x, xp = upcast(self.ops.asfloat(x, self.dtype, "x")), self.xp
        if self.function == "softmax":
            y, chain = self._softmax(x)
        else:
            function, derivative = _FUNCTIONS[self.function]
            y = function(xp, x)

            def chain(dy):
                return dy * derivative(xp, x, y)

        @backward_of(self)
        def backward(doutput):
            dy = upcast(check_gradient(self, doutput, y.shape))
            return chain(dy).astype(self.dtype, copy=False)

        return y.astype(self.dtype, copy=False), backward

    def _softmax(self, x):
        if x.ndim == 0:
            raise ShapeError("x: expected shape (..., classes), got ()")
        xp = self.xp
        e = xp.exp(x - x.max(axis=-1, keepdims=True)) if x.size else x.copy()
        y = e / e.sum(axis=-1, keepdims=True)
        return y, lambda dy: y * (dy - (dy * y).sum(axis=-1, keepdims=True))

    def _sizes_text(self):
        return repr(self.function)


class Merge(Module):
    """The two halves of the features made one: the ``merge_mode`` of Keras's Bidirectional.

    Parameters
    ----------
    features : int
        Size of the last axis of x, a multiple of 2: those of the first direction, then those of the second.
    mode : {"sum", "mul", "ave"}
        Sum, product or mean of the two.
    backend, dtype
        As in ``Module``.

    Raises
    ------
    ValueError
        features is odd, or there is no such mode.

    Examples
    --------
    >>> from gpurnn.interop.keras import Merge
    >>> Merge(4, "ave")(np.array([[1, 2, 3, 4]], "float32")).tolist()
    [[2.0, 3.0]]
    """

    in_features: int
    out_features: int
    mode: str

    def __init__(self, features: int, mode: str, *, backend: str = "auto", dtype: str = "float32") -> None:
        super().__init__(backend, dtype)
        self.features = self.in_features = check_size("features", features, 2)
        if features % 2:
            raise ValueError(f"features should be a multiple of 2, got {features}")
        self.out_features = features // 2
        self.mode = check_choice("mode", mode, ("sum", "mul", "ave"))

    def __call__(self, x: Array) -> Array:
        """The output alone, for inference: y (..., features / 2), of x's dtype. Raises as ``forward``."""
        return self.forward(x)[0]

    def forward(self, x: Array, *, retain: bool = False) -> tuple[Array, Backward]:
        """The output and its backward, for training.

        Parameters
        ----------
        x : Array
            (..., features), of the layer's dtype.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            (..., features / 2).
        backward : callable
            ``backward(doutput)`` returns dx, of x's shape.

        Raises
        ------
        ShapeError, DtypeError
            x has another last axis, or is not of the layer's dtype.
        """
        check_flag("retain", retain)
        x, xp, mode = upcast(check_features(self, x, self.in_features)), self.xp, self.mode
        first, second = x[..., : self.out_features], x[..., self.out_features :]
        y = first * second if mode == "mul" else first + second
        y = y * 0.5 if mode == "ave" else y

        @backward_of(self)
        def backward(doutput):
            dy = upcast(check_gradient(self, doutput, y.shape))
            same = dy * 0.5 if mode == "ave" else dy
            parts = (dy * second, dy * first) if mode == "mul" else (same, same)
            return xp.concatenate(parts, axis=-1).astype(self.dtype, copy=False)

        return y.astype(self.dtype, copy=False), backward

    def _sizes_text(self):
        return sizes_text(self, "in_features", "mode")


class First(Pooling):
    """The first valid timestep of each sequence, where a layer with ``reverse=True`` ends.

    Arguments of the constructor and of a call, and the result, are those of ``Pooling``, without modes.

    Parameters
    ----------
    features, batch_first, backend, dtype
        As ``Pooling``.

    Examples
    --------
    >>> from gpurnn.interop.keras import First
    >>> mask = np.array([[False], [True], [True]])
    >>> First(1)(np.array([[[1.0]], [[3.0]], [[5.0]]], "float32"), mask=mask).tolist()
    [[3.0]]
    """

    def __init__(
        self, features: int, *, batch_first: bool = False, backend: str = "auto", dtype: str = "float32"
    ) -> None:
        super().__init__(features, batch_first=batch_first, backend=backend, dtype=dtype)

    def __call__(
        self, x: Array, lengths: Lengths = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> Array:
        """The output alone, for inference: y (B, features). Arguments and errors are those of ``forward``."""
        return self.forward(x, lengths, reset=reset, mask=mask)[0]  # its own, or ONNX would have it for a Pooling

    def _last(self, x, steps):
        return super()._last(x, steps._replace(first=steps.last, last=steps.first))


class Masked(Sequential):
    """A ``Sequential`` that finds its mask in its input, as Keras does.

    A timestep does not happen where all features are ``mask_value`` (Keras's layer ``Masking``), or where the id is 0
    (``Embedding(mask_zero=True)``). A mask or lengths that a call is given hold, too.

    Parameters
    ----------
    layers : dict of Module
        As for ``Sequential``.
    mask_value : float, optional
        None: x holds ids, and 0 is no timestep.

    Examples
    --------
    >>> from gpurnn.interop.keras import Masked
    >>> model = Masked({"rnn": gpurnn.RNN(2, 3), "last": gpurnn.Pooling(3)}, mask_value=0.0)
    >>> x = np.array([[[1, 2]], [[0, 3]], [[0, 0]]], "float32")
    >>> y, state = model(x)
    >>> bool((y == model(x[:2])[0]).all())
    True
    """

    mask_value: float | None

    def __init__(self, layers: dict[str, Module], *, mask_value: float | None = None) -> None:
        super().__init__(layers)
        self.mask_value = None if mask_value is None else check_number("mask_value", mask_value)

    def _check_layers(self, children):
        super()._check_layers(children)
        _follow_features(children)

    def __call__(
        self,
        x: Array,
        state: State = None,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
    ) -> Array | tuple[Array, State]:
        """The output, for inference. Arguments, results and errors are those of ``Sequential``."""
        return super().__call__(x, state, lengths, reset=reset, mask=self._mask(x, mask))

    def forward(
        self,
        x: Array,
        state: State = None,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
        retain: bool = False,
    ) -> tuple[Any, ...]:
        """The output and its backward. Arguments, results and errors are those of ``Sequential``."""
        return super().forward(x, state, lengths, reset=reset, mask=self._mask(x, mask), retain=retain)

    def step(
        self, x: Array, state: State = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, State]:
        """One timestep, for streaming. Arguments, results and errors are those of ``Sequential``."""
        return super().step(x, state, reset=reset, mask=self._mask(x, mask))

    def _mask(self, x, given):
        """True where a timestep happens: booleans of x's shape, without the features."""
        x = self.ops.asarray(x, "x")
        if self.mask_value is None:
            mask = x != 0
        elif x.ndim == 0:
            raise ShapeError("x: expected shape (..., features), got ()")
        else:
            mask = (x != self.mask_value).any(axis=-1)
        if given is None:
            return mask
        given = self.ops.asarray(given, "mask")
        check_shape("mask", given, mask.shape)
        return mask & given
