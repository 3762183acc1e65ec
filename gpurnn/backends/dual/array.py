"""Arrays that carry a derivative along: dual numbers, for forward mode through any array code.

A ``Dual`` holds an array and its derivative along one direction, its tangent. NumPy's functions hand their arguments to
it (NEP 13 and 18), and it applies the chain rule. What it has no rule for raises TypeError, and so does a conversion to
a plain array or number, because the tangent would be lost.

At kinks the derivative is that of the cells' equations: of ``maximum(a, b)`` and ``minimum(a, b)`` with a = b it is
that of b, of ``abs(x)`` at 0 it is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ...dtypes import is_float

REAL = np.dtype(np.float64)


class Dual(NDArrayOperatorsMixin):
    """An array and its tangent, both float64 and of one shape. A slice of it is a view of both."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: np.ndarray, tangent: np.ndarray) -> None:
        self.value, self.tangent = value, tangent

    dtype = REAL
    itemsize = REAL.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def size(self) -> int:
        return self.value.size

    @property
    def strides(self) -> tuple[int, ...]:
        return self.value.strides

    @property
    def T(self) -> Dual:  # noqa: N802
        return self._both("transpose")

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self):
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        return f"Dual({self.value!r}, {self.tangent!r})"

    def __getitem__(self, index: Any) -> Dual:
        return Dual(np.asarray(self.value[index]), np.asarray(self.tangent[index]))

    def __setitem__(self, index: Any, other: Any) -> None:
        self.value[index], self.tangent[index] = parts(other)

    def __array__(self, *arguments: Any, **options: Any):
        raise TypeError("a Dual cannot become a plain array: its tangent would be lost. Take .value")

    def _number(self, *_: Any):
        raise TypeError("a Dual cannot become a plain number: its tangent would be lost. Take .value")

    __float__ = __int__ = __index__ = __complex__ = __bool__ = item = tolist = _number

    # ---- linear in the array: the same of the tangent

    def _both(self, method, *arguments, **options):
        value, tangent = (getattr(part, method)(*arguments, **options) for part in (self.value, self.tangent))
        return Dual(np.asarray(value), np.asarray(tangent))

    def reshape(self, *shape: Any) -> Dual:
        return self._both("reshape", *shape)

    def transpose(self, *axes: Any) -> Dual:
        return self._both("transpose", *axes)

    def swapaxes(self, first: int, second: int) -> Dual:
        return self._both("swapaxes", first, second)

    def copy(self, order: Any = "C") -> Dual:
        return self._both("copy", order)

    def fill(self, number: float) -> None:
        self[...] = number

    def sum(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Dual:
        return self._both("sum", axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Dual:
        return self._both("mean", axis=axis, keepdims=keepdims)

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        """Itself or a copy for every floating-point dtype: all are computed in float64. Otherwise the value alone."""
        if not is_float(np.dtype(dtype)):
            return self.value.astype(dtype)
        return self.copy() if copy else self

    # ---- choices that the value makes

    def argmax(self, axis: Any = None) -> Any:
        return self.value.argmax(axis=axis)

    def max(self, axis: int, keepdims: bool = False) -> Dual:
        if not self.value.shape[axis]:
            raise ValueError("max of no numbers")
        best = np.expand_dims(self.value.argmax(axis=axis), axis)
        found = Dual(*(np.take_along_axis(part, best, axis) for part in (self.value, self.tangent)))
        return found if keepdims else found.reshape(found.value.squeeze(axis).shape)

    # ---- NumPy's functions

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if method != "__call__" or options.keys() - {"dtype"}:
            return NotImplemented
        return apply_ufunc(ufunc, inputs, None if out is None else out[0])

    def __array_function__(self, function, types, arguments, options):
        rule = FUNCTIONS.get(function)
        return NotImplemented if rule is None else rule(*arguments, **options)


def parts(array: Any) -> tuple[Any, Any]:
    """(value, tangent) of a ``Dual``; of anything else itself and 0."""
    return (array.value, array.tangent) if isinstance(array, Dual) else (array, 0.0)


# ---- elementwise functions: the partial derivatives, from the arguments and the result y


def _quotient(a, b, y):
    inverse = 1 / b
    return inverse, -y * inverse


def _power(a, b, y):
    return b * a ** (b - 1), y * np.log(a)


_PARTIALS = {
    "add": lambda a, b, y: (1.0, 1.0),
    "subtract": lambda a, b, y: (1.0, -1.0),
    "multiply": lambda a, b, y: (b, a),
    "divide": _quotient,
    "negative": lambda x, y: (-1.0,),
    "positive": lambda x, y: (1.0,),
    "square": lambda x, y: (2 * x,),
    "sqrt": lambda x, y: (0.5 / y,),
    "exp": lambda x, y: (y,),
    "expm1": lambda x, y: (y + 1,),
    "log": lambda x, y: (1 / x,),
    "log1p": lambda x, y: (1 / (1 + x),),
    "tanh": lambda x, y: ((1 - y) * (1 + y),),
    "power": _power,
    "absolute": lambda x, y: (np.sign(x),),
    "maximum": lambda a, b, y: (np.greater(a, b), ~np.greater(a, b)),
    "minimum": lambda a, b, y: (np.less(a, b), ~np.less(a, b)),
}
# Infinite somewhere, which counts only for what moves; and 1 / (1 + exp(-x)), where exp overflows, does not move.
_SINGULAR = {"divide", "sqrt", "log", "log1p", "power"}
_FLAT = {
    "greater", "less", "greater_equal", "less_equal", "equal", "not_equal", "isfinite", "isnan", "isinf", "sign",
}  # fmt: skip


def apply_ufunc(ufunc, inputs, out=None):
    """A function of NumPy by the chain rule. out: a ``Dual`` to write to and return, or None."""
    values, tangents = zip(*map(parts, inputs), strict=True)
    if ufunc.__name__ in _FLAT and out is None:
        return ufunc(*values)
    if ufunc.__name__ == "matmul":
        value, tangent = ufunc(*values), 0.0
        for k, one in enumerate(tangents):
            if isinstance(inputs[k], Dual):
                tangent = tangent + (ufunc(one, values[1]) if k == 0 else ufunc(values[0], one))
    elif ufunc.__name__ in _PARTIALS:
        value = ufunc(*values)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # the value has warned
            tangent = _tangent(ufunc.__name__, (*values, value), tangents)
    else:
        return NotImplemented
    if out is None:
        value = np.asarray(value)
        same = np.shape(tangent) == value.shape
        return Dual(value, np.asarray(tangent) if same else np.broadcast_to(tangent, value.shape).copy())
    out[...] = Dual(value, tangent)  # a plain array refuses it
    return out


def _tangent(name, known, tangents):
    """The sum of partial derivatives times tangents. known: the arguments and the result."""
    tangent = 0.0
    for partial, one in zip(_PARTIALS[name](*known), tangents, strict=True):
        if not isinstance(one, float):  # the 0 of ``parts``
            part = partial * one
            if name in _SINGULAR:
                part = np.where((one == 0) | (partial == 0), 0.0, part)
            tangent = tangent + part
    return tangent


# ---- other functions


def _of_parts(function):
    """The rule of a function that is linear in its first argument, an array or a list of arrays."""

    def rule(arrays, *arguments, **options):
        if isinstance(arrays, Dual):
            return Dual(*(function(part, *arguments, **options) for part in parts(arrays)))
        values = [parts(array)[0] for array in arrays]
        tangents = [array.tangent if isinstance(array, Dual) else np.zeros(np.shape(array)) for array in arrays]
        return Dual(function(values, *arguments, **options), function(tangents, *arguments, **options))

    return rule


def _where(condition, a, b):
    values, tangents = zip(parts(a), parts(b), strict=True)
    return Dual(np.where(condition, *values), np.where(condition, *tangents))


def _copyto(out, array, where=True):
    if not isinstance(out, Dual):
        array.__array__()  # it refuses
    for one, part in zip((out.value, out.tangent), parts(array), strict=True):
        np.copyto(one, part, where=where)


def _clip(x, low, high):
    inside = (x.value > low) & (x.value < high)
    return Dual(np.clip(x.value, low, high), np.where(inside, x.tangent, 0.0))


FUNCTIONS = {
    **{one: _of_parts(one) for one in (np.concatenate, np.stack, np.broadcast_to, np.moveaxis, np.take_along_axis,
                                       np.mean, np.sum, np.cumsum)},
    **{one: lambda array, make=one, **options: Dual(*(make(part, **options) for part in parts(array)))
       for one in (np.zeros_like, np.empty_like)},
    np.where: _where,
    np.copyto: _copyto,
    np.clip: _clip,
    np.shape: lambda array: array.shape,
    np.ndim: lambda array: array.ndim,
    np.size: lambda array: array.size,
}  # fmt: skip
