"""Parameters and gradients of a module in one flat buffer each."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

from .. import rng
from .._typing import Array
from .views import Views, padded_size, writable

Layout = list[tuple[str, tuple[int, ...]]]  # (name, shape) of each parameter, in the order of the flat buffer


class FlatParameters:
    """The part of ``Module`` that declares parameters, joins them into flat buffers, and copies them."""

    xp: Any
    params: Views
    grads: Views
    flat_params: Array
    flat_grads: Array
    parameter_count: int
    buffers: dict[str, Array]
    children: dict[str, Any]
    name: str
    key: int

    # ---- declaring

    def _declare(self, arrays: Mapping[str, Array]) -> None:
        """Make the mapping name -> initial value this module's own parameters, in one flat buffer."""
        layout = [(name, array.shape) for name, array in arrays.items()]
        size = sum(padded_size(shape) for _, shape in layout)
        counts = self._counts[0]
        for name in arrays:
            counts[name] = counts.get(name, 0) + 1
        self.params._owners = {name: (counts, self._frozen[0], name) for name in arrays}
        self._bind(self.xp.zeros(size, self.compute_dtype), self.xp.zeros(size, self.compute_dtype), layout)
        for name, array in arrays.items():
            self.params[name][...] = self.xp.asarray(array, dtype=self.compute_dtype)

    def _adopt(self, children: Mapping[str, FlatParameters]) -> None:
        """Make the mapping name -> Module this module's children and move their parameters into one buffer.

        A child that appears under two names shares its parameters: it is stored once, under the first name. Raises
        ValueError where names, backends or dtypes do not fit, and for a child that belongs to another living module,
        because its parameters can lie in one buffer only.
        """
        for name, child in children.items():
            self._check_child(name, child)
        self.children = dict(children)
        for name, child in self.children.items():
            if child in self._homes.values():
                continue
            self._homes[name] = child
            child._set_name(name)
        self._gather()

    def _check_child(self, name: str, child: FlatParameters) -> None:
        if not isinstance(name, str):
            raise TypeError(f"names of layers should be strings, got {type(name).__name__}")
        if not name or "." in name:
            raise ValueError(f"names of layers should be non-empty and without a dot, got {name!r}")
        if not isinstance(child, FlatParameters):
            raise TypeError(f"{name}: expected a gpurnn layer, got {type(child).__name__}")
        if (child.ops.name, child.dtype) != (self.ops.name, self.dtype) or child.xp is not self.xp:
            raise ValueError(
                f"{name} is {child.ops.name}/{child.dtype}, the module around it {self.ops.name}/{self.dtype}: "
                "build all layers with one backend and one dtype"
            )
        if child._parent is not None and child._parent() is not None:
            raise ValueError(
                f"{name}: this {type(child).__name__} already belongs to another {type(child._parent()).__name__}, "
                "which holds its parameters; use that one whole, or build a layer and copy the values"
            )

    def _gather(self) -> None:
        """Move the parameters of all children into one buffer."""
        homes, layout = self._homes.values(), []
        self.params._owners = {}
        for name, child in self._homes.items():
            child._parent = weakref.ref(self)
            layout += [(f"{name}.{inner}", shape) for inner, shape in child._layout]
            self.params._owners |= {f"{name}.{inner}": owner for inner, owner in child.params._owners.items()}
        self._counts = [counts for child in homes for counts in child._counts]
        self._frozen = [frozen for child in homes for frozen in child._frozen]
        params = self.xp.concatenate([child.flat_params for child in homes])
        grads = self.xp.concatenate([child.flat_grads for child in homes])
        self._bind(params, grads, layout)

    def _bind(self, flat_params: Array, flat_grads: Array, layout: Layout) -> None:
        """Make ``params`` and ``grads`` views of the flat buffers, and give each child its slice of them."""
        self.flat_params, self.flat_grads = flat_params, flat_grads
        self._layout = layout
        self.parameter_count = sum(math.prod(shape) for _, shape in layout)
        self.params._arrays = self._views(flat_params)
        self.grads._arrays = self._views(flat_grads)
        start = 0
        for child in self._homes.values():
            stop = start + child.flat_params.size
            child._bind(flat_params[start:stop], flat_grads[start:stop], child._layout)
            start = stop

    def _views(self, buffer: Array) -> dict[str, Array]:
        """Name -> view in the parameter's shape, of a buffer that is laid out as ``flat_params``."""
        views, start = {}, 0
        for name, shape in self._layout:
            views[name] = buffer[start : start + math.prod(shape)].reshape(shape)
            start += padded_size(shape)
        return views

    def _set_name(self, path: str) -> None:
        """Name this module and its children by their place in the model; the name keys the random draws."""
        self.name, self.key = path, rng.name_key(path)
        for name, child in self._homes.items():
            child._set_name(f"{path}.{name}")

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place."""
        self.flat_grads.fill(0)

    # ---- copying

    def __copy__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"copy.copy: a shallow copy of this {name} would share its parameters, its layers and their modes with it: "
            "use copy.deepcopy, which makes an independent one"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The module's state for copies and pickles.

        Arrays are on the host, each layer has its own parameters, and the backend is stored by name.
        """
        state = self.__dict__.copy()
        for name in ("xp", "params", "grads", "flat_params", "flat_grads", "_parent", "_evaluations"):
            del state[name]
        if not self.children:
            state["flat"] = [self.ops.to_numpy(flat) for flat in (self.flat_params, self.flat_grads)]
        state["buffers"] = {name: self.ops.to_numpy(array) for name, array in self.buffers.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        flat = state.pop("flat", None)
        self.__dict__.update(state)
        self.xp = self.ops.xp
        self.params, self.grads, self._parent, self._evaluations = Views(), Views(), None, []
        self.buffers = {name: self.xp.asarray(writable(array)) for name, array in self.buffers.items()}
        if flat is not None:
            self.params._owners = {name: (self._counts[0], self._frozen[0], name) for name, _ in self._layout}
            self._bind(*(self.xp.asarray(writable(array)) for array in flat), self._layout)
        self._settle()

    def _settle(self) -> None:
        """Finish ``__setstate__`` once every child has its state.

        A layer that refers to the model around it may get its state after that model, which then waits for it.
        """
        late = next((child for child in self._homes.values() if not hasattr(child, "flat_params")), None)
        if late is not None:
            late.__dict__.setdefault("_waiting", []).append(self)
            return
        if self.children:
            self._gather()
        for module in self.__dict__.pop("_waiting", ()):
            module._settle()
