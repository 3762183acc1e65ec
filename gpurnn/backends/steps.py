"""One timestep of a whole model: what a backend needs to know of its layers to run them in one call."""

from __future__ import annotations

from typing import NamedTuple

from .._typing import Array
from ..cells import Cell, Weights
from .int8 import Int8Matrix


class TableStep(NamedTuple):
    """A lookup of numbers in the rows of ``weight`` (N, F)."""

    weight: Array


class LinearStep(NamedTuple):
    """x W^T + b with ``weight`` (F, I) and ``bias`` (F,) or None."""

    weight: Array | Int8Matrix
    bias: Array | None


class LoopStep(NamedTuple):
    """A recurrent layer that runs forward in time. weights: for each strand (each head)."""

    cell: Cell
    weights: list[Weights]
