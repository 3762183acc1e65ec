"""A graph as a list of nodes that run one after another over arrays of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...dtypes import is_float
from ...errors import BackendError, FileError, ShapeError, one_line
from ...files import check_room
from . import pointwise, recurrent_nodes, shapes
from .library import onnx_library
from .reading import OPERATORS as DOMAINS
from .reading import array_of, graphs_of

_OPERATORS: dict[str, Callable[..., Any] | None] = {
    **pointwise.OPERATORS,
    **shapes.OPERATORS,
    **recurrent_nodes.OPERATORS,
    "Scan": None,  # Node.run hands it the values around it, too
}


@dataclass
class Context:
    """What all nodes of a model share. place: what messages call the model. version: of ONNX's operators. constants:
    bytes of the values that the file alone decides, which stay from one call to the next."""

    ops: Any
    place: str
    version: int
    constants: int = 0

    def hold(self, arrays: Iterable[Any]) -> None:
        """Count more such values. Raises FileError where they take too much memory."""
        self.constants += sum(array.nbytes for array in arrays)
        check_room(self.place, self.constants, "its constants")


class Node:
    """A node that runs: ``op`` its operator, ``attributes`` by name, ``inputs`` and ``outputs`` the names of values.

    constant: whether the file alone decides its outputs.
    """

    def __init__(self, proto: Any, context: Context, constants: set[str]) -> None:
        self.op, self.context = proto.op_type, context
        self.ops, self.version, self.onnx = context.ops, context.version, onnx_library()
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.shown = f"{context.place}: node {proto.name[:80]!r} ({self.op})"
        self.attributes = {one.name: self._attribute(one, constants) for one in proto.attribute}
        self._function = _OPERATORS[self.op]
        if self.op == "Scan" and self.version < 9:
            raise FileError(f"{self.shown}: expected a Scan of opset 9 or later, got one of {self.version}")
        self.constant = set(self.inputs) <= constants | {""} and self.op != "Scan"
        self._fixed = set(self.inputs[1:4] + self.inputs[7:8]) <= constants | {""}
        self._made: Any = None
        if self.op in recurrent_nodes.OPERATORS:
            try:
                recurrent_nodes.settings(self)
            except (ValueError, TypeError) as error:
                raise FileError(f"{self.shown}: {one_line(error)}") from error

    def _attribute(self, proto, constants):
        if proto.type == self.onnx.AttributeProto.GRAPH:
            return Program(proto.g, self.context, constants)
        if proto.type == self.onnx.AttributeProto.TENSOR:
            return array_of(proto.t, self.shown)
        value = self.onnx.helper.get_attribute_value(proto)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if isinstance(value, (int, float)):
            return value
        return [one.decode(errors="replace") if isinstance(one, bytes) else one for one in value]

    def _named(self, function, *arguments):
        try:
            return function(*arguments)
        except (FileError, BackendError):
            raise
        except MemoryError as error:
            raise MemoryError(f"{self.shown}: {one_line(error)}") from error
        except Exception as error:
            kind = ShapeError if isinstance(error, (ShapeError, IndexError)) else ValueError
            raise kind(f"{self.shown}: {one_line(error)}") from error

    def run(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The outputs. values: arrays by name, None for what is absent. Raises ValueError that names the node."""
        found = [values[name] if name else None for name in self.inputs]
        if self.op == "Scan":
            return _scan(self, values, *found)
        outputs = self._named(self._function, self, *found)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    # ---- what operators ask for

    def cached(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; made once if the weights of the node never change."""
        if self._made is not None:
            return self._made
        made = make()
        if self._fixed:
            self._made = made
        return made

    def on_device(self, array: Any) -> bool:
        """Whether an array is one of the backend's, and not a shape or an index on the host."""
        return not isinstance(array, (np.ndarray, np.generic))

    def xp(self, array: Any) -> Any:
        """NumPy or CuPy, as the array is."""
        return self.ops.xp if self.on_device(array) else np

    def like(self, array: Any, other: Any) -> Any:
        """``other`` where ``array`` is."""
        return self.ops.xp.asarray(other) if self.on_device(array) else self.ops_to_numpy(other)

    def together(self, *arrays: Any) -> tuple[Any, ...]:
        """(xp, the arrays in one place): on the host where all are there."""
        if not any(map(self.on_device, arrays)):
            return np, *arrays
        return self.ops.xp, *(self.ops.xp.asarray(array) for array in arrays)

    def ops_to_numpy(self, array: Any) -> Any:
        """A NumPy array; None stays None."""
        return self.ops.to_numpy(array) if array is not None and self.on_device(array) else array

    def check_room(self, shape: Iterable[int], itemsize: int) -> None:
        """Raise FileError where an output of this shape would take more memory than one file may."""
        check_room(self.shown, math.prod(shape) * itemsize, "what it makes")

    def check_broadcast(self, *arrays: Any) -> None:
        """As ``check_room``, of arrays that are broadcast together to more than each of them is."""
        sizes = {array.shape for array in arrays}
        if len(sizes) > 1:
            size = np.broadcast_shapes(*sizes)
            if math.prod(size) > max(array.size for array in arrays):
                self.check_room(size, max(array.dtype.itemsize for array in arrays))

    def check_product(self, shape: Iterable[int], itemsize: int) -> None:
        """As ``check_room``, of what the size of the caller's arrays decides as well, unless there are none."""
        if self.constant:
            self.check_room(shape, itemsize)


class Program:
    """The nodes of a graph, in their order. constants: the names outside of it whose values never change."""

    def __init__(self, graph: Any, context: Context, constants: set[str] = frozenset()) -> None:
        self.context = context
        arrays = {one.name: array_of(one, context.place) for one in graph.initializer}
        xp = context.ops.xp  # integers stay on the host: they are shapes and axes, or move where they meet others
        self.initial = {name: xp.asarray(a) if is_float(a.dtype) else a for name, a in arrays.items()}
        self.inputs = [one.name for one in graph.input]
        self.outputs = [one.name for one in graph.output]
        constants = (set(constants) - set(self.inputs)) | (set(self.initial) - set(self.inputs))
        self.nodes, self._constants = [], {}
        for proto in graph.node:
            node = Node(proto, context, constants)
            self.nodes.append(node)
            if node.constant:
                constants |= set(node.outputs)
        self._last = {}
        for place, proto in enumerate(graph.node):
            for name in names_read(proto):
                self._last[name] = place

    def run(self, given: Mapping[str, Any], wanted: Iterable[str] | None = None) -> dict[str, Any]:
        """The outputs by name. given: the inputs and, for a graph inside another one, the values outside of it."""
        wanted = list(self.outputs if wanted is None else wanted)
        values = dict(self.initial) | self._constants | dict(given)
        for place, node in enumerate(self.nodes):
            if node.outputs and all(name in self._constants for name in node.outputs if name):
                continue
            outputs = node.run(values)
            made = {name: array for name, array in zip(node.outputs, outputs, strict=False) if name}
            missing = [name for name in node.outputs if name and name not in made]
            if missing:
                raise FileError(f"{node.shown}: it has no output {missing[0]!r}")
            values |= made
            if node.constant:
                self.context.hold(made.values())
                self._constants |= made
            for name in node.inputs:
                if self._last.get(name) == place and name not in wanted and name not in self.initial:
                    values.pop(name, None)
        own = self.initial.keys() | self._constants.keys()  # what the caller may not write to
        return {name: values[name].copy() if name in own else values[name] for name in wanted}


def names_read(proto: Any) -> set[str]:
    """The names that a node reads, in the graphs of its attributes, too."""
    names = set(proto.input)
    for attribute in proto.attribute:
        if attribute.HasField("g"):
            for graph in graphs_of(attribute.g):
                names |= {name for node in graph.node for name in node.input} | {one.name for one in graph.output}
    return names


def unknown_operators(graph: Any) -> list[str]:
    """The operators of a graph that are not run here, with their domains."""
    found = set()
    for inner in graphs_of(graph):
        for node in inner.node:
            known = node.domain in DOMAINS and node.op_type in _OPERATORS
            if not known:
                found.add(node.op_type if node.domain in DOMAINS else f"{node.domain}.{node.op_type}")
    return sorted(found)


def _scan(node, values, *arrays):
    """The operator Scan: a graph for each timestep."""
    given, body = node.attributes, node.attributes["body"]
    count = given["num_scan_inputs"]
    states, scanned = list(arrays[: len(arrays) - count]), arrays[len(arrays) - count :]
    for name in ("scan_input_axes", "scan_output_axes", "scan_output_directions"):
        if any(given.get(name, ())):
            raise ValueError(f"{node.shown}: {name}: expected 0, got {given[name]}")
    reverse = given.get("scan_input_directions") or [0] * count
    T = {len(array) for array in scanned}
    if not count or len(T) != 1 or len(body.inputs) != len(arrays):
        raise ShapeError(f"{node.shown}: expected inputs of one number of timesteps, got {sorted(T)}")
    (T,), stacked = T, []
    outer = {name: value for name, value in values.items() if name not in body.inputs}
    for t in range(T):
        steps = [array[T - 1 - t if back else t] for array, back in zip(scanned, reverse, strict=True)]
        found = body.run(outer | dict(zip(body.inputs, [*states, *steps], strict=True)))
        results = [found[name] for name in body.outputs]
        states = results[: len(states)]
        stacked.append(results[len(states) :])
    xp = node.ops.xp
    if not T and len(body.outputs) > len(states):
        raise ShapeError(f"{node.shown}: expected at least one timestep")
    return *states, *(xp.stack(parts) for parts in zip(*stacked, strict=True))
