"""Parameters and gradients of a module in one flat buffer each."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

from .. import rng
from .._typing import Array
from .building import Later, need_values
from .views import Views, padded_size, writable

Layout = list[tuple[str, tuple[int, ...]]]  # (name, shape) of each parameter, in the order of the flat buffer


class FlatParameters:
    """The part of ``Module`` that keeps its own parameters and those of its layers in flat buffers, and copies them.

    In a flat buffer a module's own parameters come first, then those of its children, each once and in order.
    """

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
    seed: int
    _drawn_seed: int | None = None

    def _declare(self, arrays: Mapping[str, Array | Later], again: bool = False) -> None:
        """Make the mapping name -> initial value this module's own parameters, in place of those that it had.

        again: whether all of them were parameters of it before.
        """
        needed = again or need_values(*(array.shape for array in arrays.values()))
        counts = self._counts[0]
        for name in arrays:
            counts[name] = counts.get(name, 0) + 1
        self._own = [(name, array.shape) for name, array in arrays.items()]
        size = _size(self._own)
        self.flat_params = self.xp.zeros(size, self.compute_dtype)
        self.flat_grads = self.xp.zeros(size, self.compute_dtype)
        self._join()
        for name, array in arrays.items() if needed else ():
            value = array.draw(array.shape) if isinstance(array, Later) else array
            self.params[name][...] = self.xp.asarray(value, dtype=self.compute_dtype)

    def _extend(self, name: str, array: Array) -> None:
        """Add one more parameter of this module's own; the others keep values and gradients."""
        used, added = _size(self._own), padded_size(array.shape)
        self._own.append((name, array.shape))
        self._counts[0][name] = 1
        room = self.xp.zeros(added, self.compute_dtype)
        self.flat_params = self.xp.concatenate([self.flat_params[:used], room])
        self.flat_grads = self.xp.concatenate([self.flat_grads[:used], room])
        self._join()
        self.params[name][...] = array

    def _join(self) -> None:
        """Move the module's own parameters and those of all children into one buffer.

        The modules around it do the same after it.
        """
        homes, own = self._homes.values(), _size(self._own)
        layout = list(self._own)
        owners = {name: (self._counts[0], self._frozen[0], name) for name, _ in self._own}
        for name, child in self._homes.items():
            child._parent = weakref.ref(self)
            layout += [(f"{name}.{inner}", shape) for inner, shape in child._layout]
            owners |= {f"{name}.{inner}": owner for inner, owner in child.params._owners.items()}
        self.params._owners = owners
        if self.seed == self._drawn_seed:
            self.seed = next((child.seed for child in homes if child.seed != child._drawn_seed), self.seed)
        self._counts = [self._counts[0], *(counts for child in homes for counts in child._counts)]
        self._frozen = [self._frozen[0], *(frozen for child in homes for frozen in child._frozen)]
        params = self.xp.concatenate([self.flat_params[:own], *(child.flat_params for child in homes)])
        grads = self.xp.concatenate([self.flat_grads[:own], *(child.flat_grads for child in homes)])
        self._bind(params, grads, layout)
        around = self._parent and self._parent()
        if around is not None:
            around._join()

    def _bind(self, flat_params: Array, flat_grads: Array, layout: Layout) -> None:
        """Make ``params`` and ``grads`` views of the flat buffers, and give each child its slice of them."""
        self.flat_params, self.flat_grads = flat_params, flat_grads
        self._layout = layout
        self.parameter_count = sum(math.prod(shape) for _, shape in layout)
        self.params._arrays = self._views(flat_params)
        self.grads._arrays = self._views(flat_grads)
        start = _size(self._own)
        for child in self._homes.values():
            stop = start + child.flat_params.size
            child._bind(flat_params[start:stop], flat_grads[start:stop], child._layout)
            start = stop

    def _structure(self) -> list[int]:
        """How often layers or parameters were added to each module; it changes where one takes another's place."""
        return [counts.get("", 0) for counts in self._counts]

    def _part(self) -> None:
        """Take this module out of the one around it: it gets buffers and a name of its own."""
        self._parent = None
        self._set_name("")
        self._bind(self.flat_params.copy(), self.flat_grads.copy(), self._layout)

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
            child._set_name(f"{path}.{name}" if path else name)

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

        Arrays are on the host, each module has its own parameters, and the backend is stored by name.
        """
        state = self.__dict__.copy()
        for name in ("xp", "params", "grads", "flat_params", "flat_grads", "_parent", "_evaluations"):
            del state[name]
        state.pop("_matrices", None)
        own = _size(self._own)
        state["flat"] = [self.ops.to_numpy(flat[:own]) for flat in (self.flat_params, self.flat_grads)]
        state["buffers"] = {name: self.ops.to_numpy(array) for name, array in self.buffers.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        flat = state.pop("flat")
        self.__dict__.update(state)
        self.xp = self.ops.xp
        self.params, self.grads, self._parent, self._evaluations = Views(), Views(), None, []
        self.buffers = {name: self.xp.asarray(writable(array)) for name, array in self.buffers.items()}
        self._settle([self.xp.asarray(writable(array)) for array in flat])

    def _settle(self, flat: list[Array]) -> None:
        """Finish ``__setstate__`` once every child has its state. flat: values and gradients of its own parameters.

        A layer that refers to the model around it may get its state after that model, which then waits for it.
        """
        late = next((child for child in self._homes.values() if not hasattr(child, "flat_params")), None)
        if late is not None:
            late.__dict__.setdefault("_waiting", []).append((self, flat))
            return
        self.flat_params, self.flat_grads = flat
        self._join()
        for module, waiting in self.__dict__.pop("_waiting", ()):
            module._settle(waiting)


def _size(layout: Layout) -> int:
    """Numbers in a flat buffer of this layout."""
    return sum(padded_size(shape) for _, shape in layout)
