"""Symbols: what the equations of a cell are written over, and the functions that they may use.

Equations are traced: a cell's function runs once, over symbols in place of numbers, and leaves a graph of ``Symbol``.
Each function here exists as array code, in CUDA and in C++ on vectors; functions.py has those that are made of them.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from ..errors import check_number

_IF = (
    "a cell's equations are traced once, before there are numbers, so that `if`, `while`, `and`, `or` and `not` cannot "
    "look at {}: write gpurnn.cells.where(condition, a, b)"
)
_MAX = ", and gpurnn.cells.maximum and minimum for Python's max and min"

_FOREIGN = "{} cannot take a symbol: a cell's equations may use + - * / and the functions of gpurnn.cells"
_SIGNS = {"add": " + ", "sub": " - ", "mul": " * ", "div": " / "}


class Graph:
    """The symbols of one trace, in the order in which they were made; equal ones are one."""

    def __init__(self, training):
        self.training, self.running = training, False  # running: the user's function is at work
        self.nodes, self._known, self.draws, self.inner = [], {}, [], None
        self.normalizations, self.timesteps = [], 0  # (mean, variance) over the batch; timesteps of their statistics
        self.called = {}  # (operation, value) of a leaf -> what the function calls it

    def make(self, op, *args, value=None):
        """The symbol of an operation; an equal one that exists already is it."""
        key = op, tuple(id(arg) for arg in args), value
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = Symbol(self, op, args, value, len(self.nodes))
            self.nodes.append(node)
        return node

    def constant(self, value):
        """The symbol of a number. Raises ValueError where float has none for it."""
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number in a cell's equation, got {value}")
        return self.make("constant", value=value)

    def draw(self, rate, each):
        """The symbol of a new mask."""
        self.draws.append((rate, each))
        return self.make("mask", value=len(self.draws) - 1)


class Symbol:
    """One value of a timestep, a number for each unit and sequence; an operation on others, or a leaf of the graph.

    Leaves are "ax", "ah" (value: the place of the gate), "state" (its place), "own" (the vector of a parameter),
    "mask", "constant"; in derivatives also "dstate" and "d_inner".
    """

    __slots__ = ("args", "graph", "index", "name", "op", "value")

    def __init__(self, graph, op, args, value, index):
        self.graph, self.op, self.args, self.value, self.index, self.name = graph, op, args, value, index, None

    def __add__(self, other):
        a, b = self, symbol(self.graph, other)
        if is_constant(a, 0) or is_constant(b, 0):
            return b if is_constant(a, 0) else a
        if b.op == "neg":
            return a - b.args[0]
        if a.op == "neg":
            return b - a.args[0]
        return _folded("add", a, b, lambda x, y: x + y)

    def __sub__(self, other):
        a, b = self, symbol(self.graph, other)
        if is_constant(b, 0):
            return a
        if is_constant(a, 0):
            return -b
        return a + b.args[0] if b.op == "neg" else _folded("sub", a, b, lambda x, y: x - y)

    def __mul__(self, other):
        a, b = self, symbol(self.graph, other)
        for one, two in ((a, b), (b, a)):
            if is_constant(one, 0) or is_constant(two, 1):
                return one
            if is_constant(one, -1):
                return -two
            if one.op == "neg":
                return -(one.args[0] * two)
        return _folded("mul", a, b, lambda x, y: x * y)

    def __truediv__(self, other):
        a, b = self, symbol(self.graph, other)
        if is_constant(b, 0):
            raise ZeroDivisionError("a cell's equation divides by 0")
        if is_constant(b, 1) or is_constant(a, 0):
            return a
        return -(a.args[0] / b) if a.op == "neg" else _folded("div", a, b, lambda x, y: x / y)

    def __neg__(self):
        if self.op == "constant":
            return self.graph.constant(-self.value)
        return self.args[0] if self.op == "neg" else self.graph.make("neg", self)

    def __radd__(self, other):
        return symbol(self.graph, other) + self

    def __rsub__(self, other):
        return symbol(self.graph, other) - self

    def __rmul__(self, other):
        return symbol(self.graph, other) * self

    def __rtruediv__(self, other):
        return symbol(self.graph, other) / self

    def __pos__(self):
        return self

    def __abs__(self):
        return fabs(self)

    def __pow__(self, power):
        if isinstance(power, float) and power == 0.5:
            return sqrt(self)
        if not isinstance(power, int) or not 1 <= power <= 8:
            other = (
                "1 / x" if isinstance(power, Real) and power == -1 else "gpurnn.cells.exp(power * gpurnn.cells.log(x))"
            )
            raise TypeError(
                f"a symbol can be raised to a whole power from 1 to 8, or to 0.5, got {power!r}: write {other}"
            )
        half = self ** (power // 2) if power > 1 else None
        return self if power == 1 else half * half * self if power % 2 else half * half

    def __rpow__(self, base):
        raise TypeError(
            f"a number cannot be raised to the power of a symbol, got {base!r}: write gpurnn.cells.exp(x * "
            "math.log(base))"
        )

    def __gt__(self, other):
        return Condition(self, symbol(self.graph, other))

    def __lt__(self, other):
        return Condition(symbol(self.graph, other), self)

    def __ge__(self, other):
        return Condition(symbol(self.graph, other), self, swapped=True)

    def __le__(self, other):
        return Condition(self, symbol(self.graph, other), swapped=True)

    def __eq__(self, other):
        if self.graph.running:
            raise TypeError(_IF.format("whether a symbol equals something") + " with > or <")
        return self is other

    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError(_IF.format("the value of a symbol"))

    def __iter__(self):
        raise TypeError("a symbol stands for one number of each unit: it has no parts to index or to loop over")

    def __getitem__(self, index):
        self.__iter__()

    __len__ = __iter__

    def __float__(self):
        raise TypeError("a symbol has no value yet: write the equation with gpurnn.cells' functions, not with math's")

    __int__ = __index__ = __complex__ = __float__

    def __call__(self, *arguments):
        raise TypeError("only ah.gate can be called: ah.n(v) multiplies the vector v by W_hh's rows of gate n")

    def __matmul__(self, other):
        raise TypeError("a cell's products with matrices are ax, ah and ah.gate(vector): @ is none of its operations")

    __rmatmul__ = __matmul__

    def __getattr__(self, name):
        if name.startswith("__"):  # what Python and NumPy ask for
            raise AttributeError(name)
        raise AttributeError(
            f"a symbol has no {name!r}: it is a number, not an array; see the functions of gpurnn.cells"
        )

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        raise TypeError(_FOREIGN.format(f"torch.{getattr(function, '__name__', function)}"))

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        function = _UFUNCS.get(ufunc.__name__)
        if function is None or method != "__call__" or options:
            raise TypeError(_FOREIGN.format(f"np.{ufunc.__name__}"))
        return function(*inputs)

    def __repr__(self):
        return self._shown(4)

    def _shown(self, depth):
        """Its name, or its equation down to ``depth``."""
        if self.op == "constant":
            return f"{self.value:g}"
        name = self.name or self.graph.called.get((self.op, self.value))
        if name or not self.args or not depth:
            return name or (f"{self.op}(...)" if self.args else f"<{self.op}>")
        parts = [arg._shown(depth - 1) for arg in self.args]
        if self.op in _SIGNS:
            return _SIGNS[self.op].join(f"({part})" if " " in part else part for part in parts)
        return f"{self.op}({', '.join(parts)})"


class Condition:
    """``a > b``, or with ``swapped`` its negation, for ``where``."""

    def __init__(self, a, b, swapped=False):
        self.a, self.b, self.swapped = a, b, swapped

    def __bool__(self):
        raise TypeError(_IF.format("a condition") + _MAX)

    def __and__(self, other):
        raise TypeError("conditions cannot be combined: write one gpurnn.cells.where inside another")

    __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __and__


def symbol(graph, value):
    """``value`` as a symbol of ``graph``."""
    if isinstance(value, Symbol):
        if value.graph is not graph:
            raise TypeError("a symbol of another trace: a symbol is of use only inside the call of the cell's function")
        return value
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value.item()
    if isinstance(value, Condition):
        raise TypeError("a condition is no number: write gpurnn.cells.where(condition, 1, 0)")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, np.number)):
        arrays = isinstance(value, (list, tuple)) or hasattr(value, "shape")
        more = (
            ": declare an array as a parameter, so that it is trained, saved and moved with the layer" if arrays else ""
        )
        raise TypeError(f"expected a symbol or a number in a cell's equation, got {type(value).__name__}{more}")
    return graph.constant(value)


def is_constant(node, value=None):
    return node.op == "constant" and (value is None or node.value == value)


def _folded(op, a, b, function):
    """An operation on two symbols; of two constants their value."""
    if is_constant(a) and is_constant(b):
        return a.graph.constant(function(a.value, b.value))
    return a.graph.make(op, a, b)


def graph_of(values, name):
    for value in values:
        if isinstance(value, (Symbol, Condition)):
            return (value.a if isinstance(value, Condition) else value).graph
    raise TypeError(
        f"{name}: expected a symbol of a cell's equations, got {', '.join(map(repr, values))}; of numbers take math's"
    )


def _make(op, *values):
    graph = graph_of(values, op)
    symbols = [symbol(graph, value) for value in values]
    if all(is_constant(one) for one in symbols):
        with np.errstate(all="ignore"):
            return graph.constant(_OF_NUMBERS[op](*(one.value for one in symbols)))
    return graph.make(op, *symbols)


# ---- the functions that have a derivative of their own


def sigmoid(x: Any) -> Symbol:
    """1 / (1 + exp(-x)), exact to 4 units in the last place however small the result is."""
    return _make("sigmoid", x)


def tanh(x: Any) -> Symbol:
    """Hyperbolic tangent."""
    return _make("tanh", x)


def relu(x: Any) -> Symbol:
    """The larger of x and 0; its derivative at 0 is 0."""
    return _make("relu", x)


def exp(x: Any) -> Symbol:
    """e^x."""
    return _make("exp", x)


def expm1(x: Any) -> Symbol:
    """e^x - 1, exact near 0, too."""
    return _make("expm1", x)


def log(x: Any) -> Symbol:
    """The natural logarithm."""
    return _make("log", x)


def log1p(x: Any) -> Symbol:
    """log(1 + x), exact near 0, too."""
    return _make("log1p", x)


def sqrt(x: Any) -> Symbol:
    """The square root."""
    return _make("sqrt", x)


def softplus(x: Any) -> Symbol:
    """log(1 + e^x), without overflow."""
    return _make("softplus", x)


def fabs(x: Any) -> Symbol:
    """The absolute value, also ``abs(x)``; its derivative at 0 is 0."""
    return _make("fabs", x)


def minimum(a: Any, b: Any) -> Symbol:
    """The smaller of two; NaN stays NaN. Where they are equal, the derivative goes to the second."""
    return _make("smaller", a, b)


def maximum(a: Any, b: Any) -> Symbol:
    """The larger of two; NaN stays NaN. Where they are equal, the derivative goes to the second."""
    return _make("larger", a, b)


def where(condition: Any, a: Any, b: Any) -> Symbol:
    """a where the condition (``x > y`` and its like) holds, else b."""
    if not isinstance(condition, Condition):
        raise TypeError(f"where: expected a comparison of symbols, such as x > 0, got {type(condition).__name__}")
    graph = condition.a.graph
    a, b = (symbol(graph, value) for value in ((b, a) if condition.swapped else (a, b)))
    if is_constant(condition.a) and is_constant(condition.b):
        return (b, a)[condition.a.value > condition.b.value]
    return graph.make("where_greater", condition.a, condition.b, a, b)


def mean(x: Any) -> Symbol:
    """The mean over all units of a sequence, the same for each of them."""
    graph = graph_of((x,), "mean")
    x = symbol(graph, x)
    return x if x.op in ("constant", "mean") else graph.make("mean", x)


def clip_gradient(x: Any, limit: float) -> Symbol:
    """x, whose gradient is clipped to [-limit, limit] on its way back."""
    limit = check_number("clip_gradient: limit", limit, 0, low_open=True)
    graph = graph_of((x,), "clip_gradient")
    return graph.make("clip_gradient", symbol(graph, x), value=limit)


def stop_gradient(x: Any) -> Symbol:
    """x, whose gradient goes no further back."""
    return _make("stop_gradient", x)


_OF_NUMBERS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "relu": lambda x: max(x, 0.0), "softplus": lambda x: np.logaddexp(0, x),
    "tanh": np.tanh, "exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt, "fabs": abs,
    "smaller": min, "larger": max, "mean": float, "stop_gradient": float,
}  # fmt: skip

_UFUNCS = {
    "add": lambda a, b: _operator(a, b, "__add__"), "subtract": lambda a, b: _operator(a, b, "__sub__"),
    "multiply": lambda a, b: _operator(a, b, "__mul__"), "divide": lambda a, b: _operator(a, b, "__truediv__"),
    "negative": lambda a: -a, "absolute": fabs, "fabs": fabs, "maximum": maximum, "minimum": minimum,
    "tanh": tanh, "exp": exp, "expm1": expm1, "log": log, "log1p": log1p, "sqrt": sqrt,
}  # fmt: skip


def _operator(a, b, name):
    graph = graph_of((a, b), "an operation")
    return getattr(symbol(graph, a), name)(symbol(graph, b))
