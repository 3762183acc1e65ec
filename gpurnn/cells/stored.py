"""Cells as documents, for files: the operations of a cell's equations, never code.

A document is JSON-ready. A cell is made of it by doing each operation again with the functions that equations are
written with (symbols.py), so that a cell from a file is the cell that a user could have written. Whatever else a
document says is refused.

    cell        {"version", "name", "gates", "states", "parameters", "remembers", "writes", "biases",
                 "training": graph, "evaluating": graph, or null where it is the same}
    function    {"version", "name", "training": graph, "evaluating": graph or null}: of one symbol, x
    graph       {"nodes": [node, ...], "results": [place of a node, ...], "normalizations": [[mean, variance], ...],
                 "timesteps"}
    node        {"op", "args": [place of an earlier node, ...], "value", "name"}; what is empty is left out
"""

from __future__ import annotations

import operator
from typing import Any

from ..errors import check_choice, check_flag, check_number, check_size, described
from . import symbols as s
from .names import cell_name, is_name, words
from .names import parameters as declared_parameters
from .record import Cell, Parameter
from .symbols import Graph, Symbol, symbol
from .trace import HiddenSymbol
from .traced import TracedCell

VERSION = 1
MOST_NODES, DEEPEST = 4000, 250  # of one graph: the largest of gpurnn's own have 200 nodes, 40 of them in a chain

_UNARY = {
    "neg": operator.neg, "sigmoid": s.sigmoid, "tanh": s.tanh, "relu": s.relu, "exp": s.exp, "expm1": s.expm1,
    "log": s.log, "log1p": s.log1p, "sqrt": s.sqrt, "softplus": s.softplus, "fabs": s.fabs, "mean": s.mean,
    "stop_gradient": s.stop_gradient,
}  # fmt: skip
_BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "larger": s.maximum,
    "smaller": s.minimum,
}  # fmt: skip
_LEAVES = ("ax", "ah", "state", "own", "x")  # what equations are given
_ARITY = (
    dict.fromkeys((*_LEAVES, "constant", "mask", "running"), 0)
    | dict.fromkeys((*_UNARY, "clip_gradient", "batch_mean", "product"), 1)
    | dict.fromkeys(_BINARY, 2)
    | {"where_greater": 4}
)

_OF_WEIGHTS = ("hidden", "normalizations", "timesteps")  # what shapes follow from: alike in both modes


# ---- documents of cells


def cell_document(cell: Cell) -> dict[str, Any]:
    """The document of a traced cell. Raises TypeError for another one, ValueError for one that is too large."""
    if type(cell) is not TracedCell:
        raise TypeError(f"cell: {described(cell)} is code in Python, which no file holds: make it with gpurnn.cell")
    evaluating = cell.evaluating
    document = {
        "version": VERSION,
        "name": cell.name,
        "gates": list(cell.gates),
        "states": list(cell.states),
        "parameters": [{"name": one.name, "gates": list(one.gates), "initial": one.initial} for one in cell.parameters],
        **{name: getattr(cell, name) for name in ("remembers", "writes", "biases")},
        "training": _graph_document(cell.graph, cell.graph.nodes[: cell.count], cell.new_states),
        "evaluating": None
        if evaluating is cell
        else _graph_document(evaluating.graph, evaluating.graph.nodes[: evaluating.count], evaluating.new_states),
    }
    again = cell_from(document)
    if (again, again.evaluating) != (cell, cell.evaluating):
        raise ValueError(f"cell {cell.name}: its equations, made again, are not the same: please report it")
    return document


def function_document(function: Any) -> dict[str, Any]:
    """The document of an activation: a function of one symbol. Raises TypeError or ValueError."""
    name = getattr(function, "__name__", None)
    graphs = []
    for training in (True, False):
        graph = Graph(training)
        x, graph.running = graph.make("x", value=0), True
        y = symbol(graph, function(x))
        graph.running = False
        if graph.normalizations:
            raise ValueError(f"activation {name}: a file holds no activation that normalizes over the batch")
        graphs.append(_graph_document(graph, graph.nodes, [y]))
    document = {"version": VERSION, "name": name, "training": graphs[0], "evaluating": graphs[1]}
    if graphs[0] == graphs[1]:
        document["evaluating"] = None
    function_from(document)
    return document


def _graph_document(graph, nodes, results):
    places = {id(node): place for place, node in enumerate(nodes)}
    return {
        "nodes": [_node_document(node, places) for node in nodes],
        "results": [places[id(node)] for node in results],
        "normalizations": [[places[id(one)] for one in both] for both in graph.normalizations],
        "timesteps": graph.timesteps,
    }


def _node_document(node, places):
    document = {"op": node.op, "args": [places[id(arg)] for arg in node.args], "value": node.value, "name": node.name}
    if node.op == "ah" and not isinstance(node, HiddenSymbol):
        document |= {"op": "product", "args": [places[id(node.graph.inner.vector)]]}
    if node.op == "mask":
        document["value"] = list(node.graph.draws[node.value])
    return {name: value for name, value in document.items() if value not in (None, [])}


# ---- cells of documents


def cell_from(document: dict[str, Any]) -> TracedCell:
    """The traced cell of a document. Raises ValueError, TypeError, LookupError or ArithmeticError for a wrong one."""
    _check_version(document, "a cell")
    name = cell_name(document["name"], None)
    gates, states = words("gates", document["gates"]), words("states", document["states"])
    biases = check_flag("biases", document["biases"])
    facts = {"biases": biases}
    for what in ("remembers", "writes"):
        facts[what] = None if document[what] is None else check_choice(what, document[what], gates)
    own = [Parameter(one["name"], one["gates"], one["initial"]) for one in document["parameters"]]
    own = declared_parameters(own, states, biases)
    equations = _Equations(document, states, _count_leaves(gates, states, own))
    made = TracedCell(equations, gates, states, own, name, **facts)
    made.maker = (cell_from, (document,))
    if (made.evaluating is made) != (equations.evaluating is equations.training):
        raise ValueError(f"cell {name}: its equations for evaluation are missing, or are none")
    first, second = made, made.evaluating
    if any(getattr(first, what) != getattr(second, what) for what in _OF_WEIGHTS):
        raise ValueError(f"cell {name}: its equations for evaluation have other weights than those for training")
    return made


def function_from(document: dict[str, Any]) -> StoredFunction:
    """The activation of a document. Raises as ``cell_from``."""
    return StoredFunction(document)


def _check_version(document, what):
    version = check_size("version", document["version"], 1)
    if version > VERSION:
        raise ValueError(f"{what} of version {version}, this gpurnn reads version {VERSION}: install a newer gpurnn")


def _count_leaves(gates, states, own):
    counts = dict.fromkeys(("ax", "ah"), len(gates))
    return counts | {"state": len(states), "own": sum(parameter.vectors for parameter in own)}


class _Equations:
    """The function of a cell, over symbols, from its document; ``trace.run`` finds no symbols among its variables."""

    def __init__(self, document, states, counts):
        self.states = states
        self.training = _Nodes(document["training"], counts, training=True)
        evaluating = document["evaluating"]
        self.evaluating = self.training if evaluating is None else _Nodes(evaluating, counts, training=False)

    def __call__(self, ax, ah, s, p):
        return self._again(ax, ah, s, p)

    def _again(self, ax, ah, s, p):
        graph = getattr(s, self.states[0]).graph
        own = []
        for name in p._names:
            vectors = getattr(p, name)
            own += [vectors] if isinstance(vectors, Symbol) else [getattr(vectors, gate) for gate in vectors._names]
        leaves = {what: [getattr(given, name) for name in given._names] for what, given in (("ax", ax), ("ah", ah))}
        leaves |= {"state": [getattr(s, name) for name in s._names], "own": own}
        nodes = self.training if graph.training else self.evaluating
        return nodes.again(graph, leaves, exactly=True)


class StoredFunction:
    """An activation from a file, as ``function_from`` makes it."""

    def __init__(self, document: dict[str, Any]) -> None:
        _check_version(document, "an activation")
        name = document["name"]
        if name is not None:
            if name != "<lambda>" and not is_name(name):
                raise ValueError(f"activation: expected a name of letters, digits and underscores, got {name!r}")
            self.__name__ = name
        self._document = document
        self._training = _Nodes(document["training"], {"x": 1}, training=True)
        evaluating = document["evaluating"]
        self._evaluating = self._training if evaluating is None else _Nodes(evaluating, {"x": 1}, training=False)
        for nodes in (self._training, self._evaluating):
            graph = Graph(nodes.training)
            nodes.again(graph, {"x": [graph.make("x", value=0)]}, exactly=True)

    def __call__(self, x: Any) -> Symbol:
        graph = s.graph_of((x,), getattr(self, "__name__", "activation"))
        nodes = self._training if graph.training else self._evaluating
        return nodes.again(graph, {"x": [x]}, exactly=False)[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredFunction) and self._document == other._document

    def __hash__(self) -> int:
        return hash((self.__dict__.get("__name__"), len(self._document["training"]["nodes"])))


class _Nodes:
    """A graph from a document, checked as far as that is possible without doing its operations.

    counts: how many leaves of each kind there are.
    """

    def __init__(self, document, counts, training):
        self.training, self.nodes = training, []
        if not isinstance(document["nodes"], list) or not 0 < len(document["nodes"]) <= MOST_NODES:
            raise ValueError(f"nodes: expected a list of 1 to {MOST_NODES}")
        depths = []
        for place, node in enumerate(document["nodes"]):
            self.nodes.append(_checked_node(node, place, counts, training))
            depths.append(1 + max((depths[arg] for arg in self.nodes[-1][1]), default=0))
        if max(depths) > DEEPEST:
            raise ValueError(f"nodes: {max(depths)} operations follow from one another, at most {DEEPEST} may")
        self.results = [self._place(place, "results") for place in document["results"]]
        pairs = document["normalizations"]
        self.normalizations = [tuple(self._place(one, "normalizations") for one in both) for both in pairs]
        self.timesteps = check_size("timesteps", document["timesteps"], 1 if pairs else 0)
        wanted = "batch_mean" if training else "running"
        for both in self.normalizations:
            if len(both) != 2 or any(self.nodes[one][0] != wanted for one in both):
                raise ValueError(f"normalizations: expected pairs of {wanted}")
        for op, _, value, _ in self.nodes:
            if op == wanted and (not pairs or (op == "running" and value >= 2 * len(pairs))):
                raise ValueError(f"normalizations: the equations have more of {wanted} than there are")

    def _place(self, place, what):
        if check_size(what, place, 0) >= len(self.nodes):
            raise ValueError(f"{what}: there is no node {place}")
        return place

    def again(self, graph, leaves, exactly):
        """The symbols of the results, made in ``graph``.

        exactly: whether each operation has to give a symbol of its own kind, none that is simplified; so it is in every
        graph that was traced.
        """
        made = []
        for place, (op, args, value, name) in enumerate(self.nodes):
            given = [made[arg] for arg in args]
            node = leaves[op][value] if op in _LEAVES else _made(graph, op, given, value, leaves)
            if exactly and not _is_made(node, op, given):
                raise ValueError(f"node {place}: {op} of these arguments is none that equations leave")
            if exactly and name is not None and node.name is None:
                node.name = name
            made.append(node)
        graph.normalizations += [tuple(made[one] for one in both) for both in self.normalizations]
        graph.timesteps = max(graph.timesteps, self.timesteps)
        return [made[place] for place in self.results]


def _checked_node(node, place, counts, training):
    """(op, args, value, name) of a node's document. Raises ValueError and its like."""
    if not isinstance(node, dict):
        raise TypeError(f"node {place}: expected an operation, got {described(node)}")
    op, args, value, name = node["op"], node.get("args", []), node.get("value"), node.get("name")
    if op not in _ARITY or (op in _LEAVES and op not in counts):
        raise ValueError(f"node {place}: unknown operation {op!r}")
    if op in (("running",) if training else ("mask", "batch_mean")):
        raise ValueError(f"node {place}: {op} does not go with {'training' if training else 'evaluation'}")
    if not isinstance(args, list) or len(args) != _ARITY[op]:
        raise ValueError(f"node {place}: {op} has {_ARITY[op]} arguments")
    for arg in args:
        if check_size(f"node {place}: args", arg, 0) >= place:
            raise ValueError(f"node {place}: its argument {arg} does not come before it")
    if op in _LEAVES:
        if check_size(f"node {place}: value", value, 0) >= counts[op]:
            raise ValueError(f"node {place}: there is no {op} {value}")
    elif op == "product":
        if check_size(f"node {place}: value", value, 0) >= counts.get("ah", 0):
            raise ValueError(f"node {place}: there is no gate {value}")
    elif op == "running":
        check_size(f"node {place}: value", value, 0)
    elif op == "constant":
        check_number(f"node {place}: value", value)
    elif op == "clip_gradient":
        check_number(f"node {place}: value", value, 0, low_open=True)
    elif op == "mask":
        rate, each = value
        check_number(f"node {place}: rate", rate, 0, 1)
        check_choice(f"node {place}: each", each, ("timestep", "sequence"))
    elif value is not None:
        raise ValueError(f"node {place}: {op} has no value")
    if name is not None and not is_name(name):
        raise ValueError(f"node {place}: expected a name of letters, digits and underscores, got {name!r}")
    return op, tuple(args), value, name


def _made(graph, op, given, value, leaves):
    """The symbol of an operation that is no leaf."""
    if op == "constant":
        return graph.constant(value)
    if op == "mask":
        return graph.draw(*value)
    if op in _UNARY:
        return _UNARY[op](*given)
    if op in _BINARY:
        return _BINARY[op](*given)
    if op == "where_greater":
        return s.where(given[0] > given[1], given[2], given[3])
    if op == "clip_gradient":
        return s.clip_gradient(given[0], value)
    if op == "product":
        return leaves["ah"][value](given[0])
    if op == "batch_mean":
        return graph.make("batch_mean", *given)
    return graph.make("running", value=value)


def _is_made(node, op, given):
    """Whether a symbol is that of an operation, and not of another one that is simpler."""
    if op == "product":
        return node.op == "ah" and not isinstance(node, HiddenSymbol)
    return node.op == op and len(node.args) == len(given) and all(map(operator.is_, node.args, given))
