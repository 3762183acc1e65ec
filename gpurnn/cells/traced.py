"""Traced cells: a cell of one's own, from the equations of one timestep."""

from __future__ import annotations

import functools
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import check_choice, check_flag
from . import array_code, struct_code
from .derivatives import LEAVES, below, gradients, needed_values, saved_values
from .names import cell_name, is_name, words
from .names import parameters as declared_parameters
from .record import Cell, Draw, Parameter, Product
from .symbols import Graph, Symbol, symbol
from .trace import HiddenSymbol, Inner, Names, count_arguments, run

_INNER = "inner:"  # the saved block that a second product reads; no gate can have this name


class TracedCell(Cell):
    """A cell made from the equations of one timestep by the decorator ``cell``.

    Attributes
    ----------
    training : bool
        Whether draws are made. ``evaluating`` is the same cell without.
    """

    maker: tuple[Any, ...] | None = None  # what makes it again, in place of its name

    def __init__(
        self, function: Callable[..., Any], gates: Sequence[str], states: Sequence[str],
        parameters: Sequence[Parameter] = (), name: str = "", training: bool = True, **facts: Any,
    ) -> None:  # fmt: skip
        self.function, self.name = function, name or function.__name__
        self.gates, self.states, self.parameters = tuple(gates), tuple(states), tuple(parameters)
        self.training, self._facts = training, facts
        self.__module__, self.__doc__ = function.__module__, function.__doc__
        for fact, value in facts.items():
            setattr(self, fact, value)
        self._trace()
        self._differentiate()
        self.struct, self.stages, self.locals = struct_code.write(self)

    @functools.cached_property
    def evaluating(self) -> TracedCell:
        """The cell of evaluation mode: without random masks."""
        if not (self.draws or self.over_batch):
            return self
        other = TracedCell(self.function, self.gates, self.states, self.parameters, self.name, False, **self._facts)
        other.maker = getattr, (self, "evaluating")
        return other

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for cells of the same equations."""
        return self.name, self.struct or self.source("numpy"), self.saved, self.draws

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedCell:
        return self  # it never changes

    def __reduce__(self) -> tuple[Any, ...] | str:
        if self.maker:
            return self.maker
        name = getattr(self.function, "__qualname__", self.name)  # found by its name, as functions are
        found = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not self:
            raise pickle.PicklingError(
                f"cell {self.name}: pickle finds a cell by name, as it does functions, and {self.__module__}.{name} is "
                "not this one: put the decorator before a function at the top of a module"
            )
        return name

    # ---- tracing

    def _trace(self):
        graph = self.graph = Graph(self.training)
        states = {name: graph.make("state", value=k) for k, name in enumerate(self.states)}
        graph.inner = Inner(states[self.states[0]])
        ah = {}
        for k, name in enumerate(self.gates):
            ah[name] = HiddenSymbol(graph, "ah", (), k, len(graph.nodes))
            graph.nodes.append(ah[name])
        ax = {name: graph.make("ax", value=k) for k, name in enumerate(self.gates)}
        self._own, vector = {}, 0
        for parameter in self.parameters:
            own = [graph.make("own", value=vector + k) for k in range(parameter.vectors)]
            vector += len(own)
            gates = dict(zip(parameter.gates, own, strict=False))
            graph.called |= {("own", node.value): f"p.{parameter.name}.{gate}" for gate, node in gates.items()}
            self._own[parameter.name] = Names(self.name, f"p.{parameter.name}", gates) if gates else own[0]
        given = {"ax": ax, "ah": ah, "s": states, "p": self._own}
        graph.called |= {
            (node.op, node.value): f"{what}.{name}"
            for what, symbols in given.items()
            for name, node in symbols.items()
            if isinstance(node, Symbol)
        }
        arguments = tuple(Names(self.name, what, symbols) for what, symbols in given.items())
        count, graph.running = count_arguments(self.function, self.name), True
        returned, names = run(self.function, arguments[:count])
        graph.running = False
        self.new_states = self._new_states(returned)
        self.inner_node = graph.inner.vector
        for name, node in names.items():
            self._name(name, node)
        self.draws = tuple(Draw(f"draw{k}", rate, each) for k, (rate, each) in enumerate(graph.draws))
        used = below([*self.new_states, *([] if self.inner_node is None else [self.inner_node])], lambda node: False)
        self._used = {(node.op, node.value) for node in used}
        for place, node in enumerate(ah.values()):
            if place in graph.inner.products and node in used:
                name = self.gates[place]
                raise ValueError(
                    f"cell {self.name}: ah.{name} multiplies h at one place, and ah.{name}(v) v at another"
                )
        self._set_products(graph.inner.products)
        self.means = any(node.op == "mean" for node in used)
        self.over_batch, self.timesteps = bool(graph.normalizations), graph.timesteps
        self.normalizations = len(graph.normalizations)
        if self.over_batch:
            self.array_only = "it normalizes over the batch"
        elif self.means and self.inner_node is not None:
            self.array_only = "it has a mean over the units and a second product in one timestep"

    def _new_states(self, returned):
        values = returned if isinstance(returned, (tuple, list)) else (returned,)
        missing = [name for name, value in zip(self.states, values, strict=False) if value is None]
        if len(values) != len(self.states) or missing:
            got = "1 value" if len(values) == 1 else f"{len(values)} values"
            raise ValueError(
                f"cell {self.name}: expected it to return the new states {', '.join(self.states)}, in this order; got "
                + (f"None for {missing[0]}" if missing else got)
                + (": did you forget return?" if returned is None else "")
            )
        return [symbol(self.graph, value) for value in values]

    def _name(self, name, node):
        """Let generated code call a symbol as the function does."""
        if isinstance(node, Symbol) and node.graph is self.graph and node.name is None and is_name(name):
            node.name = name

    def _set_products(self, second):
        places = [k for k in range(len(self.gates)) if ("ah", k) in self._used]
        first = [k for k in places if k not in second]
        order = first + [k for k in places if k in second]
        if order != list(range(len(order))):
            right = [self.gates[k] for k in order] + [name for k, name in enumerate(self.gates) if k not in order]
            raise ValueError(
                f"cell {self.name}: the gates that multiply h come first, then those that multiply another vector, "
                f"then those without ah: write gates={' '.join(right)!r}"
            )
        unused = [name for k, name in enumerate(self.gates) if not {("ax", k), ("ah", k)} & self._used]
        if unused:
            raise ValueError(
                f"cell {self.name}: its equations do not use the gate {unused[0]!r}: leave it out of `gates`"
            )
        for parameter in self.parameters:
            own = self._own[parameter.name]
            symbols = [own] if isinstance(own, Symbol) else [getattr(own, gate) for gate in parameter.gates]
            if not any(("own", node.value) in self._used for node in symbols):
                raise ValueError(
                    f"cell {self.name}: its equations do not use the parameter {parameter.name!r}: leave it out of "
                    "`parameters`"
                )
        self._rows = len(first), len(order)  # row blocks of W_hh that multiply h, and all

    # ---- derivatives

    def _differentiate(self):
        graph = self.graph
        self.count = count = len(graph.nodes)  # symbols of the forward pass
        seeds = [(node, graph.make("dstate", value=k)) for k, node in enumerate(self.new_states)]
        found = gradients(graph, seeds)
        zero = graph.constant(0)
        own = [graph.make("own", value=k) for k in range(sum(parameter.vectors for parameter in self.parameters))]

        def outputs(found):
            """The gradients: of each gate's ah, of its ax, of the old states, of the own parameters."""
            ah, ax = ([found.get(node, zero) for node in self._leaves(op)] for op in ("ah", "ax"))
            states = [found.get(graph.make("state", value=k), zero) for k in range(len(self.states))]
            return ah, ax, states, [found.get(node, zero) for node in own]

        self.complete = [found[node] for node in self.new_states]
        ah, ax, self.dstates, dp = outputs(found)
        through = None
        if self.inner_node is not None:
            through = outputs(gradients(graph, [(self.inner_node, graph.make("d_inner"))]))
        self._lay_out(ah, ax, dp, through)
        for name, node in [
            *zip(self.states, self.complete, strict=True),
            *zip(self.preactivations, self.d, strict=True),
        ]:
            if node.op not in LEAVES:
                self._name("d_" + re.sub(r"\W+", "_", name.removeprefix("p:")), node)
        forward = [self.inner_node] if self.inner_node is not None else []
        self.free_states = {}  # symbol -> its place among the new states, which the backward pass has
        for k, node in enumerate(self.new_states):
            while node.op in ("clip_gradient", "stop_gradient"):
                node = node.args[0]
            if node.op not in LEAVES:
                self.free_states[node] = k
        new = set(self.free_states)
        self.needed = needed_values([*self.d, *self.dstates, *self.complete], count)
        inner_needed = needed_values([*self.d_inner, *self.dstates_inner], count)
        saved = saved_values(sorted({*self.needed, *inner_needed}, key=lambda node: node.index), new)
        self._place_saved(saved, inner_needed, forward, new)
        self.inner_first = self._is_inner_first()

    def _is_inner_first(self):
        """As ``Cell.inner_first``: the old state and masks of a sequence make it, and its gradient goes only there."""
        if self.inner_node is None or self._rows[0]:
            return False
        leaves = [
            node for node in below([self.inner_node], lambda node: False) if node.op in ("ax", "ah", "own", "mask")
        ]
        drawn = [node.op == "mask" and self.draws[node.value].each == "sequence" for node in leaves]
        return all(drawn) and not self.means

    def _leaves(self, op):
        by_place = {node.value: node for node in self.graph.nodes[: self.count] if node.op == op}
        return [by_place[k] for k in range(len(self.gates))]

    def _is_summed(self, gate):
        """Whether the equations read nothing but the sum of a gate's ax and ah, to which other terms may be added."""
        results = [*self.new_states, *([] if self.inner_node is None else [self.inner_node])]
        readers = {}
        for node in below(results, lambda node: False):
            for arg in node.args:
                readers.setdefault(arg, []).append(node)

        def sums(node):
            """The sums that a symbol goes into, as long as one alone reads it."""
            found = []
            while node not in results and len(readers.get(node, ())) == 1 and readers[node][0].op == "add":
                node = readers[node][0]
                found.append(node)
            return found

        ax, ah = (self._leaves(op)[gate] for op in ("ax", "ah"))
        return not set(sums(ax)).isdisjoint(sums(ah))

    def _lay_out(self, ah, ax, dp, through):
        """Set ``preactivations`` and the gradients ``d`` in their order; ``d_inner`` is what the second one adds."""
        rows, G, zero = self._rows[1], len(self.gates), self.graph.constant(0)
        ah_in, ax_in, self.dstates_inner, dp_in = through or ([zero] * G, [zero] * G, [], [zero] * len(dp))
        apart = [g for g in range(rows) if not self._is_summed(g) or (ah[g], ah_in[g]) != (ax[g], ax_in[g])]
        if apart:
            apart = list(range(apart[0], rows))  # the last ones
        self.d = [ah[g] if g < rows else ax[g] for g in range(G)] + [ax[g] for g in apart] + dp
        self.d_inner = [ah_in[g] if g < rows else ax_in[g] for g in range(G)] + [ax_in[g] for g in apart] + dp_in
        if through is None:
            self.d_inner = []
        self.inputs = tuple(f"{name}.x" if g in apart else name for g, name in enumerate(self.gates))
        blocks = tuple(name for parameter in self.parameters for name in parameter.blocks)
        self.preactivations = (*self.gates, *(self.inputs[g] for g in apart), *blocks)
        first = self._rows[0]
        products = [Product(self.gates[:first])] if first else []
        if rows > first:
            products.append(Product(self.gates[first:rows], _INNER))
        self.products = tuple(products)
        self.separate = len(apart)

    def _place_saved(self, saved, inner_needed, inner, new):
        """Order the saved blocks: what the gradients of the second product read lies behind the pre-activations."""
        known = set(below(inner_needed, lambda node: node in saved or node in new)) if inner else set()
        late = [node for node in saved if node in known]
        early = [node for node in saved if node not in late and node not in inner]
        behind = [node for node in saved if node in late and node not in inner]
        pads = max(0, len(self.preactivations) - len(early)) if behind or inner else 0
        self.saved_nodes = [*early, *[None] * pads, *behind, *inner]
        names = [self._saved_name(node, k) for k, node in enumerate(self.saved_nodes)]
        if inner:
            names[-1] = _INNER
        self.saved = tuple(names)
        self.shown = tuple(
            name for name, node in zip(names, self.saved_nodes, strict=True) if node is not None and node.name == name
        )

    def _saved_name(self, node, place):
        if node is None:
            return f"unused{place}"
        return node.name or f"{node.op}{place}"

    # ---- as the layers run it

    @functools.cached_property
    def _functions(self):
        return array_code.compiled(self)

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; record.py says what the arguments are."""
        self._functions[0](xp, w, ax, old, new, scratch)

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; record.py says what the arguments are."""
        self._functions[1](xp, w, old, new, dstate, scratch, hook)

    def source(self, language: str = "cuda") -> str:
        """The code generated from the equations.

        Parameters
        ----------
        language : {"cuda", "cpp", "numpy"}
            "cuda" and "cpp" are one struct, which the GPU runs on numbers and the CPU on vectors.

        Returns
        -------
        str
        """
        check_choice("language", language, ("cuda", "cpp", "numpy"))
        return array_code.write(self) if language == "numpy" else self.struct

    def __repr__(self) -> str:
        own = [f"parameters {' '.join(one.name for one in self.parameters)}"] if self.parameters else []
        parts = [f"gates {' '.join(self.gates)}", f"states {' '.join(self.states)}", *own]
        return f"<cell {self.name}: {', '.join(parts)}>"


def cell(
    gates: str | Sequence[str],
    states: str | Sequence[str] = "h",
    parameters: Any = (),
    name: str = "",
    *,
    remembers: str | None = None,
    writes: str | None = None,
    biases: bool = True,
) -> Callable[[Callable[..., Any]], TracedCell]:
    """Make a cell of a function: the equations of one timestep.

    The function is called once, with symbols: ``ax.i`` is W_ih x + b_ih of gate i, ``ah.i`` is W_hh h + b_hh of it
    (``ah.n(v)`` multiplies another vector v by W_hh's rows of n), ``s.h`` an old state, ``p.p_i`` a parameter of H
    numbers. It returns the new states; the first is the output. It may use + - * / and the functions of
    ``gpurnn.cells``. Derivatives, CUDA, C++ and array code are made from it.

    Parameters
    ----------
    gates : str or sequence of str
        The blocks of W_ih, W_hh and of the biases, in this order; a string is split at blanks. Those that multiply h
        come first, then those that multiply another vector, then those without ``ah``.
    states : str or sequence of str
        The first is the output.
    parameters : str, sequence of str or Parameter, or dict
        Vectors of H that are trained, too; of a dict the values are their initial values: "zeros", "ones", "biases"
        (drawn as biases are, the default), or a number. A ``Parameter`` may have a vector for each gate.
    name : str
        By default that of the function.
    remembers : str, optional
        The gate that preserves the old state: that of the layer's ``forget_bias`` and ``chrono``.
    writes : str, optional
        The gate that lets the new state in; ``chrono`` sets it, too.
    biases : bool
        Whether there are b_ih and b_hh.

    Returns
    -------
    function
        Of the equations; returns the ``TracedCell`` for ``gpurnn.Recurrent``.

    Raises
    ------
    ValueError, TypeError, AttributeError
        Where equations use what is not there, look at the value of a symbol, or leave a state unset.

    Examples
    --------
    >>> from gpurnn.cells import sigmoid, tanh
    >>> @gpurnn.cell(gates="f n", states="h")
    ... def minimal(ax, ah, s):
    ...     f = sigmoid(ax.f + ah.f)
    ...     return s.h + f * (tanh(ax.n + ah.n) - s.h)
    >>> minimal
    <cell minimal: gates f n, states h>
    >>> layer = gpurnn.Recurrent(minimal, 4, 8, backend="numpy")
    >>> output, h = layer(np.zeros((5, 3, 4), "float32"))
    >>> output.shape
    (5, 3, 8)
    """
    gates, states = words("gates", gates), words("states", states)
    for what, given in (("gates", gates), ("states", states)):
        if not given:
            raise ValueError(f"{what}: expected at least one name")
    declared = declared_parameters(parameters, states, check_flag("biases", biases))
    for what, gate in (("remembers", remembers), ("writes", writes)):
        if gate is not None:
            check_choice(what, gate, gates)

    def made(function):
        if not callable(function):
            raise TypeError(f"cell: expected a function of the equations, got {type(function).__name__}")
        facts = {"remembers": remembers, "writes": writes, "biases": bool(biases)}
        return TracedCell(function, gates, states, declared, cell_name(name, function), **facts)

    return made
