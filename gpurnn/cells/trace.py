"""The run of a cell's function over symbols: what it gets, and what it leaves."""

from __future__ import annotations

import functools
import inspect
import sys

from .derivatives import below
from .symbols import Symbol, symbol


class Names:
    """The symbols of one kind by name, as attributes. cell: the name of the cell, for messages."""

    def __init__(self, cell, what, symbols):
        self.__dict__.update(symbols)
        self.__dict__["_what"], self.__dict__["_names"] = f"cell {cell}: {what}", tuple(symbols)

    def __getattr__(self, name):
        if name.startswith("__"):  # what Python itself asks for
            raise AttributeError(name)
        raise AttributeError(f"{self._what} has no {name!r}; it has {', '.join(self._names) or 'none'}")

    def __getitem__(self, name):
        return getattr(self, name if isinstance(name, str) else repr(name))

    def __setattr__(self, name, value):
        raise AttributeError(f"{self._what}.{name} cannot be set: return the new states, in the order of `states`")


class HiddenSymbol(Symbol):
    """``ah.n``: W_n h + b_n; called with another vector, W_n v + b_n, which is another symbol."""

    __slots__ = ()

    def __call__(self, vector):
        graph = self.graph
        inner = symbol(graph, vector)
        if inner is graph.inner.h:
            return self
        if inner.op == "constant":
            raise ValueError("ah of a number: expected a vector of the timestep, such as ah.n(r * s.h)")
        if graph.inner.vector is not None and graph.inner.vector is not inner:
            raise ValueError("a timestep may have one second product: all gates of it have to multiply the same vector")
        if not set(graph.inner.products.values()).isdisjoint(below([inner], lambda node: False)):
            raise ValueError("what a second product multiplies may not depend on a second product")
        graph.inner.vector = inner
        return graph.inner.products.setdefault(self.value, graph.make("ah", value=self.value))


class Inner:
    """The second product of a timestep: ``vector`` is what it multiplies, products: place of a gate -> its symbol."""

    def __init__(self, h):
        self.h, self.vector, self.products = h, None, {}


def count_arguments(function, name):
    """How many of ax, ah, s, p a function takes."""
    expected = f"cell {name}: expected a function of (ax, ah, s, p), or of (ax, ah, s)"
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function) or inspect.isclass(function):
        raise TypeError(f"{expected}, which returns the new states; got a class, a generator or a coroutine")
    if next(iter(inspect.signature(function).parameters), None) == "self":
        raise TypeError(f"{expected}; got one that begins with self: a cell is no method, write it outside the class")
    try:
        inspect.signature(function).bind(*range(4))
        return 4
    except TypeError:
        pass
    try:
        inspect.signature(function).bind(*range(3))
        return 3
    except TypeError:
        raise TypeError(f"{expected}, got one of {inspect.signature(function)}") from None


def run(function, arguments):
    """What the function returns over symbols, and its local variables when it ended."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not hasattr(inner, "__code__"):  # an object with __call__
        inner = type(inner).__call__
    names, code = {}, getattr(inspect.unwrap(inner), "__code__", None)

    def watch(frame, event, value):
        if event == "return" and frame.f_code is code:
            names.update(frame.f_locals)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        returned = function(*arguments)
    finally:
        if callable(before) or before is None:
            sys.setprofile(before)
        else:  # cProfile's, before Python 3.12, is no function
            sys.setprofile(None)
            before.enable()
    return returned, names
