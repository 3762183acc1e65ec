"""Which part of a batch this process computes, where several processes train one model together.

A batch of B sequences is cut by position; a process computes the sequences from ``first`` on. What it draws for them is
what one process would have drawn for the whole batch, and statistics over the batch are sums over all processes. Layers
ask here; without a ``Shard`` a batch is whole, and nothing here costs anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import rng
from ._typing import Array

_WHOLE = 16  # up to so many times what it needs, a backend's own code draws faster than array code (about 25 to 1.5 ns)
_current: ContextVar[Any] = ContextVar("gpurnn_shard", default=None)


@dataclass(frozen=True)
class Shard:
    """A part of a batch.

    first, count, total: the first of its sequences, their number, and the number of all in the batch. axis: of the
    sequences in arrays with a time axis. items: the same three numbers for arrays without one, where rows of packed
    sequences make more vectors than rows. add: sums an array over all processes, in place.
    """

    first: int
    count: int
    total: int
    axis: int
    items: tuple[int, int, int]
    add: Callable[[Array], Any]


@contextlib.contextmanager
def computing(shard: Shard | None) -> Iterator[None]:
    """Inside the block layers compute this part of a batch; None: a whole one."""
    token = _current.set(shard)
    try:
        yield
    finally:
        _current.reset(token)


def sequences(B: int) -> int:
    """The sequences of the whole batch, where a layer was given B of them."""
    shard = _current.get()
    return B if shard is None else shard.total


def added(xp: Any, array: Array) -> Array:
    """A sum over this process's part of the batch as the sum over the whole batch; the array itself may be changed."""
    shard = _current.get()
    if shard is None:
        return array
    array = xp.ascontiguousarray(array)
    shard.add(array.reshape(-1))
    return array


def counted(xp: Any, count: int) -> int:
    """A count in this process's part of the batch as the count in the whole batch."""
    return count if not active() else round(float(added(xp, xp.full(1, count, np.float64))[0]))


def active() -> bool:
    """Whether this process computes a part of a batch."""
    return _current.get() is not None


def dropout_mask(
    ops: Any, shape: tuple[int, ...], rate: float, seed: int, layer: int, call: int, axis: int | None = None
) -> Array:
    """``ops.dropout_mask`` of this process's part of the batch: what the mask of the whole batch has there.

    axis: of the sequences; None finds it. Raises ValueError where the shape has none.
    """
    shard = _current.get()
    if shard is None:
        return ops.dropout_mask(shape, rate, seed, layer, call)
    if axis is None:
        axis = shard.axis if len(shape) > 2 else 0
    first, count, total = shard.items if axis == 0 and len(shape) < 3 else (shard.first, shard.count, shard.total)
    if axis >= len(shape) or shape[axis] != count:
        raise ValueError(
            f"dropout over several processes expects the sequences of the batch on axis {axis}, {count} of them here, "
            f"got shape {shape}"
        )
    whole = (*shape[:axis], total, *shape[axis + 1 :])
    if total <= _WHOLE * count:
        part = (slice(None),) * axis + (slice(first, first + count),)
        return ops.xp.ascontiguousarray(ops.dropout_mask(whole, rate, seed, layer, call)[part])
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    rows = int(np.prod(shape[:axis], dtype=np.int64))
    drawn = rng.words_of_rows(rows, (first * inner, count * inner, total * inner), seed, layer, call, ops.xp)
    return (drawn.astype(np.uint64) >= np.uint64(rng.dropout_threshold(rate))).reshape(shape)
