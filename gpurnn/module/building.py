"""Initial values that are drawn late, and layers that are built without them, where a file has their values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

from .._typing import Array

_room: ContextVar[list[int] | None] = ContextVar("_room", default=None)  # [numbers that may still be allocated]


class Later(NamedTuple):
    """An initial value that is drawn where it is needed: ``draw(shape)`` is an array of the shape."""

    shape: tuple[int, ...]
    draw: Callable[[tuple[int, ...]], Array]


@contextlib.contextmanager
def without_values(numbers: int) -> Iterator[None]:
    """Layers that are built in this context hold zeros and draw nothing, for someone who has their values.

    numbers: how many numbers all their parameters and buffers may have. A layer with more of them raises ValueError
    before any memory is taken.
    """
    token = _room.set([numbers])
    try:
        yield
    finally:
        _room.reset(token)


def need_values(*shapes: tuple[int, ...]) -> bool:
    """Whether arrays of these shapes, which are about to be made, need values. Raises as ``without_values`` says."""
    room = _room.get()
    if room is None:
        return True
    room[0] -= sum(map(math.prod, shapes))
    if room[0] < 0:
        raise ValueError("its layers have more parameters than its arrays have numbers")
    return False
