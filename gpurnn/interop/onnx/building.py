"""A graph in the making: nodes, constants, and the weights of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...module import Module
from .library import onnx_library

Sizes = Sequence[int | str]


class Builder:
    """The nodes of a graph. A graph inside another one, the body of a Scan, has a Builder with its ``outer``.

    read: (module, name) -> the NumPy array of a parameter or buffer. dtype: of inputs, outputs and arithmetic.
    stored: of the weights in the file, which are cast to ``dtype`` where it is another one.

    Attributes
    ----------
    weights : dict of str to array
        What the file holds of the model, as ``read`` gave it, moved and joined. Not rounded.
    """

    def __init__(self, read: Callable[[Module, str], np.ndarray], dtype: Any, stored: Any, outer: Any = None) -> None:
        self.read, self.dtype, self.stored = read, np.dtype(dtype), np.dtype(stored)
        self.onnx = onnx_library()
        self.nodes: list[Any] = []
        self.outer = outer or self
        if outer is None:
            self.weights: dict[str, np.ndarray] = {}
            self.arrays: dict[str, np.ndarray] = {}
            self._names: set[str] = set()
            self._constants: dict[Any, str] = {}
            self._cast: dict[str, Any] = {}
            self.tables: dict[int, str] = {}  # of embeddings, which a TiedLinear reads, too

    def inside(self) -> Builder:
        """A Builder of a graph inside this one, which may read all of its values."""
        return Builder(self.read, self.dtype, self.stored, self.outer)

    def name(self, wanted: str) -> str:
        """A name that nothing in the file has yet."""
        wanted = re.sub(r"[^\w.]", "_", wanted)
        name, number, names = wanted, 1, self.outer._names
        while name in names:
            number += 1
            name = f"{wanted}_{number}"
        names.add(name)
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, called: str = "", **attributes: Any) -> Any:
        """The name of the output of a new node, or a list of several. called: what the output is called."""
        names = [self.name(called or op.lower()) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, name=f"{op}:{names[0]}", **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant: a number or an array in ``dtype``, that of the arithmetic by default."""
        array = np.array(value, self.dtype if dtype is None else dtype)
        key, known = (array.dtype.str, array.shape, array.tobytes()), self.outer._constants
        if key not in known:
            known[key] = self.name("constant")
            self.outer.arrays[known[key]] = array
        return known[key]

    def integers(self, *values: int) -> str:
        """The name of a constant row of int64: a shape, or axes."""
        return self.constant(values, np.int64)

    def weight(self, name: str, array: np.ndarray) -> str:
        """The name of weights in ``dtype``."""
        outer, name = self.outer, self.name(name)
        outer.weights[name] = array
        outer.arrays[name] = array.astype(self.stored)
        if self.stored == self.dtype:
            return name
        cast = outer.name(f"{name}.cast")
        to = self.onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
        outer._cast[cast] = self.onnx.helper.make_node("Cast", [name], [cast], name=f"Cast:{cast}", to=to)
        return cast

    def casts(self) -> list[Any]:
        """The nodes that cast weights; they come first."""
        return list(self._cast.values())

    # ---- what several layers need

    def reshape(self, x: str, *sizes: int) -> str:
        """x in another shape; 0 for a size that stays, -1 for one that follows."""
        return self.node("Reshape", x, self.integers(*sizes))

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Parts of x along an axis."""
        if len(sizes) == 1:
            return [x]
        return self.node("Split", x, self.integers(*sizes), axis=axis, outputs=len(sizes))

    def joined(self, parts: Sequence[str], axis: int) -> str:
        """Parts along an axis as one array."""
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=axis)

    def turned(self, x: str, axis: int = 0) -> str:
        """x from its end to its start."""
        one, end = self.integers(-1), self.integers(np.iinfo(np.int64).min)
        return self.node("Slice", x, one, end, self.integers(axis), one)

    def size(self, x: str, axis: int) -> str:
        """The size of an axis of x, as a row of one number."""
        return self.node("Gather", self.node("Shape", x), self.integers(axis), axis=0)

    def linear(self, x: str, weight: str, bias: str | None) -> str:
        """x W + b over the last axis; the weight is (inputs, outputs)."""
        y = self.node("MatMul", x, weight)
        return y if bias is None else self.node("Add", y, bias)

    def scan(
        self,
        body: Builder,
        names: Sequence[str],
        results: Sequence[str],
        states: Sequence[str],
        scanned: Sequence[str],
        called: str = "scan",
    ) -> list[str]:
        """The outputs of a Scan: the final states, then what is stacked over time.

        names: the inputs of ``body``: its states, then a timestep of each of ``scanned``; booleans are called "valid".
        """
        make = self.onnx.helper.make_tensor_value_info
        floats, booleans = (self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(one)) for one in (self.dtype, np.bool_))
        given = [make(name, booleans if name.startswith("valid") else floats, None) for name in names]
        results = [body.node("Identity", one) for one in results]  # a graph's outputs are its own, and differ
        graph = self.onnx.helper.make_graph(body.nodes, called, given, [make(name, floats, None) for name in results])
        inputs = [*states, *scanned]
        return self.node("Scan", *inputs, outputs=len(results), called=called, body=graph, num_scan_inputs=len(scanned))

    def described(self, name: str, sizes: Sizes, dtype: Any = None) -> Any:
        """The ValueInfoProto of an input or output."""
        to = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype if dtype is None else dtype))
        return self.onnx.helper.make_tensor_value_info(name, to, sizes)
