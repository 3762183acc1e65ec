"""Where the gradients of parameters go while ``per_sample_gradients`` records them: here instead of ``grads``.

The gradient of a parameter is a sum over all sequences and timesteps. Each layer hands over what is summed, as
``Term``, and per_sample/terms.py makes of them what is asked for.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .._typing import Array
from ..dtypes import compute_dtype, is_float
from ..errors import ShapeError

_recordings: contextvars.ContextVar[tuple[Recording, ...]] = contextvars.ContextVar("gpurnn_per_sample", default=())


class Term(NamedTuple):
    """A part of the gradient of a parameter: of sequence b the sum over t of d[b, t] x[b, t]^T, or of d[b, t] alone.

    d: (B, T, M); or integers (B, T, 1), each of which stands for the row that is 1 there and 0 elsewhere. x: (B, T, N),
    or None. start: the first row of the parameter that it belongs to. mask: None, or (M, N), by which the sum over t
    is multiplied.
    """

    d: Array
    x: Array | None = None
    start: int = 0
    mask: Array | None = None


class Recording:
    """The terms of a model's parameters by name.

    xp: NumPy or CuPy. names: id of a layer's ``grads`` -> the layer's name in the model, with a dot. batch_first:
    whether arrays of three or more axes are (B, T, F).
    """

    def __init__(self, xp: Any, names: dict[int, str], batch_first: bool) -> None:
        self.xp, self.names, self.batch_first = xp, names, batch_first
        self.terms: dict[str, list[Term]] = {}
        self.count: int | None = None  # B
        self.with_heads: set[str] = set()  # parameters (N, rows, ...), whose terms count the rows of all heads

    def add(self, layer: Any, name: str, d: Array, x: Array | None = None, start: int = 0, mask: Any = None) -> None:
        """Record a term of a parameter of ``layer``, for arrays (T, B, F). It copies them."""
        arrays = [None if array is None else _by_sequence(self.xp, array, 1) for array in (d, x)]
        self._add(layer, name, Term(*arrays, start, mask))

    def one_of_heads(self, layer: Any, name: str, head: int) -> int:
        """The first row of a head in a parameter (N, rows, ...) of ``layer``."""
        self.with_heads.add(self.names[id(layer.grads)] + name)
        return head * layer.params[name].shape[1]

    def add_any(self, layer: Any, name: str, d: Array, x: Array | None = None) -> None:
        """As ``add`` for arrays of any axes: the sequences are on the first of two axes, or where the model has them
        on the first or second of more."""
        axis = 0 if d.ndim < 3 or self.batch_first else 1
        arrays = [None if array is None else _by_sequence(self.xp, array, axis) for array in (d, x)]
        self._add(layer, name, Term(*arrays))

    def _add(self, layer: Any, name: str, term: Term) -> None:
        name, count = self.names[id(layer.grads)] + name, len(term.d)
        if self.count not in (None, count):
            raise ShapeError(
                f"per-sample gradients: {name} was used for {count} sequences, other parameters for {self.count}. Give "
                "every layer arrays with an axis for the sequences, also for a single one, and record one backward "
                "pass at a time"
            )
        self.count = count
        if term.x is None:  # the sum over time is all that is ever needed
            term = term._replace(d=term.d.sum(axis=1, dtype="float64", keepdims=True).astype(term.d.dtype))
        self.terms.setdefault(name, []).append(term)


def _by_sequence(xp, array, axis):
    """A copy (B, T, F), C-contiguous and in the compute dtype. axis: that of the sequences, where there is one."""
    array = array[None] if array.ndim == 1 else array
    rows = array.swapaxes(0, axis) if axis else array
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:-1]), rows.shape[-1])
    copied = xp.empty(rows.shape, compute_dtype(rows.dtype) if is_float(rows.dtype) else rows.dtype)
    copied[...] = rows
    return copied


def recording_of(layer: Any) -> Recording | None:
    """The recording that takes the gradients of ``layer`` now, or None."""
    return next((one for one in reversed(_recordings.get()) if id(layer.grads) in one.names), None)


def recorded(layer: Any, name: str, d: Array, x: Array | None = None) -> bool:
    """Whether a recording takes a parameter's gradient, so that it must not be added to ``grads``.

    d, x: as in ``Term``, with the axes of the layer's output.
    """
    recording = recording_of(layer)
    if recording is not None:
        recording.add_any(layer, name, d, x)
    return recording is not None


def refuse_mixing(layer: Any) -> None:
    """Raise ValueError where a recording includes a layer that normalizes over the batch."""
    if recording_of(layer) is not None:
        raise ValueError(
            f"per-sample gradients: {layer.name or type(layer).__name__} normalized over the batch, so that each "
            "sequence's output depends on all others and no sequence has a gradient of its own. Call eval() before "
            "forward, or use layer normalization"
        )


@contextlib.contextmanager
def active(recording: Recording) -> Iterator[None]:
    """Let ``recording`` take the gradients of its layers inside the ``with`` block."""
    token = _recordings.set((*_recordings.get(), recording))
    try:
        yield
    finally:
        _recordings.reset(token)
