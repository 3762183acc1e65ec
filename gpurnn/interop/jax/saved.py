"""What a forward pass saves for its backward pass, as arrays of JAX's graph: nothing else has to live in between.

Every layer of the stack has, for each of its strands, gates, h and the other states; and its output, which the next
layer reads. Axis 1 of each is B. With them a backward pass repeats the forward pass without its time loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._typing import Array
from ...backends.records import SavedLayer, SavedPass
from ...dtypes import compute_dtype
from ...recurrent import Recurrent


def saved_shapes(layer: Recurrent, T: int, B: int, dtype: Any) -> list[tuple[tuple[int, ...], Any]]:
    """The shape and dtype of each array that a call with x (T, B, I) saves.

    There are none where ``memory`` or ``wavefront`` cut time into segments: the backward pass begins with a forward
    pass then.
    """
    if layer.memory is not None or layer.wavefront:
        return []
    found, cell, real = [], layer.cell, compute_dtype(dtype)
    for k in range(layer.num_layers):
        _, H, P = (size // layer.heads for size in layer._sizes(k))
        one = [((T, B, cell.saved_blocks * H), dtype), ((T + 1, B, P), dtype)]
        if len(cell.states) > 1:
            one.append((((len(cell.states) - 1) * (T + 1), B, H), real))
        found += one * len(layer._strands)
        if k < layer.num_layers - 1:
            found.append(((T, B, P * len(layer._strands)), dtype))
    return found


class _Wrapped:
    """``Ops`` with another ``layer_forward``."""

    def __init__(self, ops: Any, arrays: Sequence[Array]) -> None:
        self._ops, self._arrays = ops, iter(arrays)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def with_precision(self, precision: str) -> _Wrapped:
        """Itself: a CPU has one."""
        return self


class Recording(_Wrapped):
    """Copies what is saved to ``arrays``."""

    def layer_forward(self, *given: Any) -> tuple[SavedLayer, list[Any], Array]:
        """That of the backend."""
        saved, finals, output = self._ops.layer_forward(*given)
        for one in saved.passes:
            next(self._arrays)[...] = one.gates
            next(self._arrays)[...] = one.h
            if one.others:
                array = next(self._arrays)
                for state, into in zip(one.others, np.split(array, len(one.others)), strict=True):
                    into[...] = state
        array = next(self._arrays, None)  # the last layer has none
        if array is not None:
            array[...] = output
        return saved, finals, output


class Replaying(_Wrapped):
    """Takes from ``arrays`` what a forward pass has saved. The output of the last layer is zero instead.

    wants_dx: whether the gradient with respect to x is wanted.
    """

    def __init__(self, ops: Any, arrays: Sequence[Array], wants_dx: bool) -> None:
        super().__init__(ops, arrays)
        self._wants_dx = wants_dx

    def layer_forward(
        self, cell: Any, x: Array, weights: Any, states: Any, lengths: Any, options: Any
    ) -> tuple[SavedLayer, list[Any], Array]:
        """What that of the backend has saved."""
        passes, finals, D = [], [], len(options.directions)
        masks, marks = options.masks or (None,) * D, options.marks or (None,) * D
        for d, reverse in enumerate(options.directions):
            gates, h, count = next(self._arrays), next(self._arrays), len(cell.states) - 1
            others = tuple(np.split(next(self._arrays), count)) if count else ()
            passes.append(SavedPass(gates, h, others, reverse, masks[d], marks=marks[d]))
            end = 0 if reverse else -1
            finals.append((h[end], *(state[end] for state in others)))
        T, B, P = passes[0].h_new.shape
        output = next(self._arrays, None)
        output = np.zeros((T, B, D * P), x.dtype) if output is None else output
        return SavedLayer(cell, weights, np.ascontiguousarray(x), lengths, passes), finals, output

    def layer_backward(
        self, saved: SavedLayer, grads: Any, doutput: Any, dstates: Any, hooks: Any, is_first: bool
    ) -> tuple[Any, Any, Any]:
        """That of the backend, but for a dx that nobody wants."""
        dx = None if self._wants_dx or not is_first else False
        return self._ops.layer_backward(saved, grads, doutput, dstates, hooks, is_first, dx)
