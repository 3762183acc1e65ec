"""One timestep of a stepper as one CUDA graph: backends/cuda/recording.py says what a graph is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._typing import Array


def is_ours(thing: Any) -> bool:
    """Whether the class of a layer is one of this package. Python of others may do something else in each call, which a
    graph would freeze."""
    return type(thing).__module__.split(".")[0] == "gpurnn"


class StepGraph:
    """A recorded timestep.

    Parameters
    ----------
    graphs : UpdateGraphs
        Of the backend.
    step : callable
        ``step(x, states)`` returns y and the new states.
    x, y : Array
        An input, and its output: graphs are for their shapes.
    states : list of Array
        The states now.

    Attributes
    ----------
    states : list of Array
        The states, in arrays of its own.

    Raises
    ------
    BackendError
        If the step cannot be recorded; the message says why.
    """

    def __init__(self, graphs: Any, step: Callable[..., Any], x: Array, y: Array, states: list[Array]) -> None:
        xp = graphs.xp
        self._graphs, self._x, self._y = graphs, x.copy(), xp.empty(y.shape, y.dtype)
        self.states, self._norm = [part.copy() for part in states], xp.zeros(1)  # which is finite
        self._asks = x.dtype.kind in "iu"  # numbers of rows in a table may be out of range

        def run(graph):
            graph.begin(())
            made, new = step(self._x, self.states)
            graph.judge(self._norm)
            graph.carry(self.states, new)
            xp.copyto(self._y, made)

        self._graph = graphs.record(run, [])

    def fits(self, x: Array) -> bool:
        """Whether it is a graph for such an input."""
        return x.shape == self._x.shape and x.dtype == self._x.dtype

    def run(self, x: Array) -> Array | None:
        """The output, a new array; None, with the states as they were, where a number had no row in a table."""
        self._x[...] = x
        self._graph.graph.launch()
        if self._asks and not self._graphs.fetch(1)[0, 0]:
            self._graphs.go_on()
            return None
        return self._y.copy()
