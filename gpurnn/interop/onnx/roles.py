"""Which inputs and outputs of a graph are states, and which one is the lengths of the sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import ShapeError
from ...files import check_room

_RECURRENT = ("RNN", "GRU", "LSTM")
_MOVING = ("Cast", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


class Roles(NamedTuple):
    """x: the inputs that are neither states nor lengths. lengths: an input or None. state, final: the names of states,
    a name or tuples of them as a call's state is; None for none. initial: state -> the initializer of its learned
    initial value. time: which axis of x is time. optional: the inputs that may be absent, as recurrent nodes alone read
    them."""

    x: tuple[str, ...]
    lengths: str | None
    state: Any
    final: Any
    initial: Mapping[str, str]
    time: int = 0
    optional: frozenset[str] = frozenset()

    @property
    def final_names(self) -> set[str]:
        """The outputs that are states."""
        return set(names_in(self.final))

    def final_state(self, found: Mapping[str, Any]) -> Any:
        """The state that a call returns, of the outputs by name."""
        return _mapped(self.final, found.__getitem__)

    def lengths_given(self, lengths: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The input for the lengths. Raises ValueError where the graph has none."""
        if self.lengths is None:
            if lengths is not None:
                raise ValueError("lengths: this graph takes none; give a batch of sequences of one length")
            return {}
        if lengths is None:
            if self.lengths in self.optional:
                return {self.lengths: None}
            B, T = (_known(self.lengths, size, sizes) for size in ("B", "T"))
            return {self.lengths: np.full(B, T, np.int32)}
        return {self.lengths: np.asarray(lengths, np.int32)}

    def states_given(self, state: Any, sizes: Any, inputs: Any, initializers: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs for a state, as a call takes it. Raises ShapeError where it has another form."""
        if self.state is None:
            if state is not None:
                raise ValueError("state: this graph takes none")
            return {}
        if state is not None:
            return dict(_paired(self.state, state, "state"))
        given: dict[str, Any] = {}
        for name in names_in(self.state):
            if name in self.optional:
                given[name] = None
                continue
            dtype, shape = inputs[name]
            shape = [_known(name, size, sizes) for size in shape or [None]]
            check_room(name, math.prod(shape) * np.dtype(dtype).itemsize, "an initial state")
            learned = initializers.get(self.initial.get(name))
            given[name] = np.zeros(shape, dtype) if learned is None else np.broadcast_to(learned, shape)
        return given


def _known(name, size, sizes):
    """The number that a size is. Raises ValueError where x does not say it."""
    size = sizes.get(size) if isinstance(size, str) else size
    if size is None:
        raise ValueError(f"{name}: its shape does not follow from x: give it")
    return size


def names_in(structure: Any) -> list[str]:
    """The names in a name or in tuples of names."""
    if structure is None:
        return []
    return [structure] if isinstance(structure, str) else [name for part in structure for name in names_in(part)]


def _mapped(structure, function):
    if structure is None:
        return None
    return function(structure) if isinstance(structure, str) else tuple(_mapped(part, function) for part in structure)


def _paired(structure, state, place):
    """(name, array) pairs of a state of the form of ``structure``; None stays None."""
    if isinstance(structure, str):
        return [(structure, state)]
    if not isinstance(state, (tuple, list)) or len(state) != len(structure):
        got = f"{len(state)} parts" if isinstance(state, (tuple, list)) else type(state).__name__
        raise ShapeError(f"{place}: expected {len(structure)} parts, got {got}")
    parts = zip(structure, state, strict=True)
    return [pair for k, (inner, part) in enumerate(parts) for pair in _paired(inner, part, f"{place}[{k}]")]


def roles_of_document(document: Any, inputs: Any, outputs: Any, initializers: Any) -> Roles:
    """The roles that gpurnn wrote into a file. Raises ValueError, TypeError or LookupError for others."""
    given = document["roles"]
    state, final = (_structure(given[name], known) for name, known in (("state", inputs), ("final", outputs)))
    lengths, time = given["lengths"], given["time"]
    if lengths is not None and lengths not in inputs:
        raise LookupError("lengths")
    if time not in (0, 1):
        raise ValueError("time")
    initial = {str(name): str(one) for name, one in given["initial"].items()}
    if not set(initial) <= set(names_in(state)) or not set(initial.values()) <= set(initializers):
        raise LookupError("initial")
    roles = {lengths, *names_in(state)}
    return Roles(tuple(name for name in inputs if name not in roles), lengths, state, final, initial, time)


def _structure(value, known):
    """Lists of names from JSON as tuples. Raises LookupError for an unknown name."""
    if value is None or isinstance(value, str):
        if value is not None and value not in known:
            raise LookupError(value)
        return value
    return tuple(_structure(part, known) for part in list(value))


def roles_by_use(graph: Any, inputs: Any, outputs: Any) -> Roles:
    """The roles in a file of others: what recurrent nodes read and write as states and lengths, perhaps in parts."""
    made = {name: node for node in graph.node for name in node.output}
    read: dict[str, set[str]] = {"x": set(), "lengths": set(), "state": set()}
    needed = set()  # what others than recurrent nodes read, which alone may have None
    for node in graph.node:
        for place, name in enumerate(node.input):
            role = _role(node, place)
            if role is not None:
                read[role].add(_origin(name, made))
            if role in (None, "x"):
                needed.add(name)
    states = tuple(name for name in inputs if name in read["state"] - read["x"])
    lengths = next((name for name in inputs if name in read["lengths"] - read["x"] - set(states)), None)
    finals = tuple(name for name in outputs if _is_final(name, made))
    if len(finals) == len(outputs):  # a graph that gives nothing but final states: they are its output
        finals = ()
    x = tuple(name for name in inputs if name not in {*states, lengths})
    return Roles(x, lengths, _few(states), _few(finals), {}, optional=frozenset(set(inputs) - needed))


def _role(node, place):
    """What a node reads at a place; None where that is passed on, in part or in another shape."""
    if node.op_type in _RECURRENT:
        return {4: "lengths", 5: "state", 6: "state"}.get(place, "x")
    passes = node.op_type == "Shape" or (node.op_type in _MOVING and place == 0)
    return None if passes else "x"


def _origin(name, made):
    """The value that another one is a part of, or is in another shape."""
    while name in made and made[name].op_type in _MOVING:
        name = made[name].input[0]
    return name


def _is_final(name, made):
    """Whether a value is made of final states of recurrent nodes alone."""
    todo, seen = [name], set()
    while todo:
        name = _origin(todo.pop(), made)
        node = made.get(name)
        if node is None or (node.op_type not in _RECURRENT and node.op_type != "Concat"):
            return False
        if node.op_type == "Concat" and name not in seen:
            todo += node.input
        elif node.op_type in _RECURRENT and name == node.output[0]:
            return False
        seen.add(name)
    return True


def _few(names):
    return None if not names else names[0] if len(names) == 1 else tuple(names)
