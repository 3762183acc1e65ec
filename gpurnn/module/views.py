"""Views of a flat buffer, by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._typing import Array
from ..arrays import refuse_graph, refuse_masked
from ..errors import MissingError, ShapeError

# Numbers: every parameter starts at a multiple of it in a flat buffer, so that kernels may load four at once.
ALIGNMENT = 16


class Views(Mapping[str, Any]):
    """Name -> view of a flat buffer.

    Assigning copies into the view, so that the buffer always holds the values: ``layer.params["bias"] = 0`` and
    ``layer.grads["bias"] += d`` both write through. Assigning to ``params`` also counts as a change, see
    ``Module.changed``.

    Examples
    --------
    >>> layer = gpurnn.Linear(2, 3)
    >>> layer.params["bias"] = [1, 2, 3]
    >>> layer.params
    {'weight': (3, 2), 'bias': (3,)}
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}
        # of parameters: name -> (version counts of its layer, frozen names of its layer, its name in that layer)
        self._owners: dict[str, tuple[dict[str, int], set[str], str]] = {}

    def __getitem__(self, name: str) -> Array:
        try:
            return self._arrays[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._arrays, 4)
            known = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(self._arrays) or 'none'}"
            raise MissingError(f"no parameter is called {name!r}; {known}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def get(self, name: str, default: Any = None) -> Any:
        """The view called ``name``, or ``default``."""
        return self._arrays.get(name, default)

    def __setitem__(self, name: str, value: Array) -> None:
        """Copy ``value``, a number or an array of the view's shape, into the view."""
        view = self[name]
        if value is not view:  # it is the view itself at the end of an in-place operation
            refuse_masked(name, value)
            refuse_graph(name, value)
            shape = np.shape(value)
            if shape and shape != view.shape:
                raise ShapeError(f"{name}: expected shape {view.shape}, got {shape}")
            view[...] = value
        if name in self._owners:
            counts, _, inner = self._owners[name]
            counts[inner] += 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return repr({name: array.shape for name, array in self._arrays.items()})


def padded_size(shape: tuple[int, ...]) -> int:
    """Numbers from the start of a parameter in a flat buffer to the start of the next one."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def writable(array: Array) -> Array:
    """``array``, or a copy if its memory is not writable: joblib and pickle may give read-only arrays."""
    return array if type(array) is np.ndarray and array.flags.writeable else np.array(array)
